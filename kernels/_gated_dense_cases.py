"""What the benchmark runs of gated dense, and the least it has to cost."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from ._gated_dense import LARGE as LARGE
from ._gated_dense import SHAPES as SHAPES
from ._gated_dense import Backward, gated_dense
from ._op import Case, Implementation, Traffic


def _make(key, shape, dtype) -> tuple:
    """x, W, V, a gate for each row, b and c."""
    rows, wide, out = shape
    keys = jax.random.split(key, 6)
    shapes = (rows, wide), (wide, out), (wide, out), (rows, out), (out,), (out,)
    scales = 1, wide**-0.5, wide**-0.5, 1, 1, 1
    draw = lambda key, shape, scale: (scale * jax.random.normal(key, shape)).astype(dtype)
    return tuple(map(draw, keys, shapes, scales))


def _run(implementation: Implementation, *arrays, backward: Backward = "xla"):
    x, weight, response, gate, bias, response_bias = arrays
    return gated_dense(
        x,
        weight,
        response,
        gate,
        bias=bias,
        response_bias=response_bias,
        implementation=implementation,
        backward=backward,
    )


def _gradients(backward: Backward, implementation: Implementation, *arrays):
    y, pull = jax.vjp(partial(_run, implementation, backward=backward), *arrays)
    return pull(y)


def _bytes(shape, dtype, counts: dict[str, int]) -> int:
    rows, wide, out = shape
    each = {"x": rows * wide, "y": rows * out, "matrix": wide * out, "row": out}
    return jnp.dtype(dtype).itemsize * sum(n * each[name] for name, n in counts.items())


def _forward_traffic(shape, dtype) -> Traffic:
    return Traffic(
        _bytes(shape, dtype, {"x": 1, "y": 2, "matrix": 2, "row": 2}), 4 * math.prod(shape)
    )


def _gradients_traffic(shape, dtype) -> Traffic:
    # Once through the layer, which keeps its result and what the gate multiplies; then x, the gate
    # and the matrices again, and a derivative of each.
    counts = {"x": 3, "y": 7, "matrix": 6, "row": 4}
    return Traffic(_bytes(shape, dtype, counts), 12 * math.prod(shape))


def _one_product(key, shape, dtype):
    """One product with a matrix of twice the width."""
    x, weight, *_ = _make(key, (shape[0], shape[1], 2 * shape[2]), dtype)
    return jnp.matmul, (x, weight)


CASES = {
    "forward": Case(_make, _run, _forward_traffic, _one_product),
    "gradients by xla": Case(_make, partial(_gradients, "xla"), _gradients_traffic),
    "gradients by kernels": Case(_make, partial(_gradients, "kernel"), _gradients_traffic),
}
