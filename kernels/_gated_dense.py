"""Gated dense: two products of one input, the second under a gate for every output.

The layer of best-response networks. With one gate per row, as one draw of hyperparameters per
example gives, no row needs a matrix of its own.

Three kernels, each with both products from one read of what they share: the layer, its derivative
in the input, its derivative in the two matrices.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ._contract import Operand, contract, dot
from ._op import Case, Implementation, Traffic, alike, choose

Activation: TypeAlias = Callable[[jax.Array], jax.Array]
Backward: TypeAlias = Literal["xla", "kernel"]

# Named (rows, inputs, outputs), read by the tests and by the benchmarks.
SHAPES = {
    "one": (1, 1, 1),
    "odd": (7, 5, 3),
    "ragged": (129, 257, 130),
    "layer": (128, 784, 256),
    "lstm": (40, 650, 2600),
}
# What a GPU is asked for beside them.
LARGE = {
    "batch": (4096, 1024, 1024),
    "wide": (8192, 4096, 4096),
}

PLATFORMS = ("gpu", "tpu")
DTYPES = ("float32", "bfloat16", "float16")
FASTER_ON: tuple[str, ...] = ()  # no accelerator has run `benchmarks/kernels.py` so far


def reference(
    x: jax.Array,
    weight: jax.Array,
    response: jax.Array,
    gate: jax.Array,
    bias: jax.Array | None = None,
    response_bias: jax.Array | None = None,
    activation: Activation | None = None,
) -> jax.Array:
    """The definition of the op: activation((x W + b) + s * (x V + c))."""
    y, _ = _pair_reference(x, weight, response, gate, bias, response_bias)
    return y if activation is None else activation(y)


def gated_dense(
    x: jax.Array,
    weight: jax.Array,
    response: jax.Array,
    gate: jax.Array,
    *,
    bias: jax.Array | None = None,
    response_bias: jax.Array | None = None,
    activation: Activation | None = None,
    implementation: Implementation = "auto",
    backward: Backward = "xla",
) -> jax.Array:
    """activation((x W + b) + s * (x V + c)): [..., in] -> [..., out].

    `weight` W and `response` V are [in, out]. `gate` s, `bias` b and `response_bias` c are [out],
    or have the rank of `x` with size 1 or that of `x` on all axes but the last: a row each. All are
    of one dtype. `activation` is a function of single numbers, such as `jax.nn.relu`.

    `response_bias` is for layers whose bias has the gate of the weight, and so one gate less.

    `auto` takes what was measured faster on this backend, which is "xla" everywhere, the reference:
    no accelerator has run the benchmark so far. "pallas" is the compiled kernel, for GPUs (Triton)
    and TPUs (Mosaic), in 32 or 16 bits; "interpret" its body for GPUs run by XLA, on any backend,
    for tests. Both add up in float32 and round once. Under vmap with shared matrices the rows of
    all become rows of one product.

    `backward` says who takes the derivatives of a kernel. "xla" has every mode, and under vmap does
    what it does for the reference. "kernel" is two kernels, for x and for the matrices, each with
    both of its products from one read. It has reverse mode, and either mode over it, but not
    forward mode alone; and of matrices that are shared under vmap it holds a derivative for each
    row of that, before their sum.

    Raises ValueError for other names, shapes or dtypes, and for "pallas" where it cannot run.
    """
    how = choose("gated_dense", implementation, platforms=PLATFORMS, faster_on=FASTER_ON)
    if backward not in get_args(Backward):
        raise ValueError(
            f"gated_dense: `backward` is {backward!r}, expected one of {get_args(Backward)}."
        )
    _check(x, weight, response, gate, bias, response_bias)
    if how == "xla" or 0 in (*x.shape, *weight.shape):
        return reference(x, weight, response, gate, bias, response_bias, activation)
    if how in PLATFORMS and str(x.dtype) not in DTYPES:
        raise ValueError(
            f"gated_dense: `x` is {x.dtype}, expected one of {DTYPES} for the compiled kernel; "
            "'auto' and 'xla' take any."
        )
    return _by_kernel(how, backward, activation, x, weight, response, gate, bias, response_bias)


def _by_kernel(
    how: str, backward: str, activation: Activation | None, x, weight, response, *rows
) -> jax.Array:
    layer = {"xla": _layer, "kernel": _layer_of_kernels}[backward]
    flat = [None if row is None else _flat(row, x.shape[:-1]) for row in rows]
    x2 = jnp.reshape(x, (-1, x.shape[-1]))
    y = layer(activation, how, *alike(x2, weight, response, *flat))
    return jnp.reshape(y, (*x.shape[:-1], y.shape[-1]))


def _flat(row: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """[1, out] where all rows of `x` share it, else [rows, out]."""
    aligned = _align(row, len(lead) + 1)
    if math.prod(aligned.shape[:-1]) > 1:
        aligned = jnp.broadcast_to(aligned, (*lead, aligned.shape[-1]))
    return jnp.reshape(aligned, (-1, aligned.shape[-1]))


def _align(x: jax.Array, rank: int) -> jax.Array:
    return jnp.reshape(x, (1,) * (rank - x.ndim) + x.shape)


# ------------------------------------------------------------------------------- the derivative
# From here on all arrays are matrices.


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _layer(activation, how, *arrays):
    return _forward(how, activation, True)(*arrays)[0]


@partial(_layer.defjvp, symbolic_zeros=True)
def _layer_jvp(activation, how, primals, tangents):
    x, weight, response, gate, *_ = primals
    z, answer = _pair(how, *primals)
    given = lambda i: tangents[i] is not None and not isinstance(tangents[i], SymbolicZero)
    slope = jnp.zeros_like(z)
    terms = {
        0: lambda dx: dx @ weight + gate * (dx @ response),
        1: lambda dw: x @ dw,
        2: lambda dv: gate * (x @ dv),
        3: lambda ds: ds * answer,
        4: lambda db: db,
        5: lambda dc: gate * dc,
    }
    for i, term in terms.items():
        slope = slope + term(tangents[i]) if given(i) else slope
    return (z, slope) if activation is None else jax.jvp(activation, (z,), (slope,))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _layer_of_kernels(activation, how, *arrays):
    return _forward(how, activation, True)(*arrays)[0]


# Made of kernels with the JVP of their reference, so that the derivative has one, by XLA.
def _layer_forward(activation, how, *arrays):
    z, answer = _pair(how, *arrays)
    return (
        (z, (arrays, answer, None)) if activation is None else (activation(z), (arrays, answer, z))
    )


def _layer_backward(activation, how, kept, slope):
    (x, weight, response, gate, bias, response_bias), answer, z = kept
    if activation is not None:
        (slope,) = jax.vjp(activation, z)[1](slope)
    dx = _back_input(how, slope, gate, weight, response)
    dw, dv = _back_matrices(how, x, slope, gate, weight)
    gated = gate * slope
    sums = _sum_to(gate, slope * answer), _sum_to(bias, slope), _sum_to(response_bias, gated)
    return dx, dw, dv, *sums


_layer_of_kernels.defvjp(_layer_forward, _layer_backward)


def _sum_to(row: jax.Array | None, slope: jax.Array) -> jax.Array | None:
    if row is None or row.shape == slope.shape:
        return None if row is None else slope
    return jnp.sum(slope, 0, keepdims=True)


def _pair_reference(x, weight, response, gate, bias, response_bias):
    """The layer before its activation, and what the gate multiplies."""
    # One product with [W V] is no faster on CPU and holds a copy of both: `stn_overhead.py`.
    plain, answer = x @ weight, x @ response
    if bias is not None:
        plain = plain + _align(bias, plain.ndim)
    if response_bias is not None:
        answer = answer + _align(response_bias, plain.ndim)
    return plain + _align(gate, plain.ndim) * answer, answer


def _input_reference(slope, gate, weight, response):
    return slope @ weight.T + (gate * slope) @ response.T


def _matrices_reference(x, slope, gate, weight):
    del weight
    return x.T @ slope, x.T @ (gate * slope)


def _with_derivative(run: Callable, reference: Callable) -> Callable:
    """`run(how)` of arrays, with the JVP of the reference."""

    @partial(jax.custom_jvp, nondiff_argnums=(0,))
    def op(how, *arrays):
        return run(how)(*arrays)

    @op.defjvp
    def _(how, primals, tangents):
        return op(how, *primals), jax.jvp(reference, primals, tangents)[1]

    return op


# ---------------------------------------------------------------------------------- the kernels


def _forward(how: str, activation: Activation | None, only: bool) -> Callable:
    """(x, W, V, s, b, c) -> the layer, and unless it `only` is wanted, what the gate multiplies."""

    def kernel(x, weight, response, gate, bias, response_bias):
        dtype = _wide(x)
        given = bias is not None, response_bias is not None

        def step(x, w, v):
            return dot(x, w, (1, 0), dtype), dot(x, v, (1, 0), dtype)

        def finish(sums, gate, *rest):
            plain, answer = sums
            rest = [row.astype(dtype) for row in rest]
            if given[0]:
                plain = plain + rest[0]
            if given[1]:
                answer = answer + rest[-1]
            y = plain + gate.astype(dtype) * answer
            y = y if activation is None else activation(y)
            return (y,) if only else (y, answer)

        operands = Operand(x, "mk"), Operand(weight, "kn"), Operand(response, "kn")
        rows = [row for row in (gate, bias, response_bias) if row is not None]
        extras = tuple(Operand(row, _row_axis(row, x) + "n") for row in rows)
        count = 1 if only else 2
        return contract(step, finish, operands, extras, sums=2, results=count, how=how)

    def slow(*arrays):
        y, answer = _pair_reference(*arrays)
        y = y if activation is None else activation(y)
        return (y,) if only else (y, answer)

    return _merging(kernel, slow, rows=(0, 3, 4, 5), shared=(1, 2), first=(0,))


def _input(how: str) -> Callable:
    def kernel(slope, gate, weight, response):
        dtype = _wide(slope)

        def step(slope, gate, w, v):
            gated = (gate.astype(dtype) * slope.astype(dtype)).astype(slope.dtype)
            return (dot(slope, w, (1, 1), dtype) + dot(gated, v, (1, 1), dtype),)

        operands = (
            Operand(slope, "mk"),
            Operand(gate, _row_axis(gate, slope) + "k"),
            Operand(weight, "nk"),
            Operand(response, "nk"),
        )
        return contract(step, lambda sums: sums, operands, (), sums=1, results=1, how=how)

    slow = lambda *arrays: (_input_reference(*arrays),)
    run = _merging(kernel, slow, rows=(0, 1), shared=(2, 3), first=(0, 1))
    return lambda *arrays: run(*arrays)[0]


def _matrices(how: str) -> Callable:
    def kernel(x, slope, gate, weight):
        del weight
        dtype = _wide(x)

        def step(x, slope, gate):
            gated = (gate.astype(dtype) * slope.astype(dtype)).astype(slope.dtype)
            return dot(x, slope, (0, 0), dtype), dot(x, gated, (0, 0), dtype)

        axes = "1n" if gate.shape[0] != x.shape[0] else "kn"
        operands = Operand(x, "km"), Operand(slope, "kn"), Operand(gate, axes)
        return contract(step, lambda sums: sums, operands, (), sums=2, results=2, how=how)

    # Nothing to merge: with shared matrices there is a result for each member too, before their sum.
    return _merging(kernel, _matrices_reference, rows=(), shared=(3,), first=())


def _row_axis(row: jax.Array, x: jax.Array) -> str:
    return "m" if row.shape[0] == x.shape[0] else "1"


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


_pair = _with_derivative(lambda how: _forward(how, None, False), _pair_reference)
_back_input = _with_derivative(_input, _input_reference)
_back_matrices = _with_derivative(_matrices, _matrices_reference)


def _merging(
    kernel: Callable, slow: Callable, *, rows: tuple, shared: tuple, first: tuple
) -> Callable:
    """`kernel`, which under vmap is one kernel of more rows where the `shared` matrices are.

    `rows` are the arguments that have rows, `first` those of which one has to be mapped for it to
    be worth while: otherwise, and where there are no such, it is `slow`.
    """

    @jax.custom_batching.custom_vmap
    def op(*arrays):
        return kernel(*arrays)

    @op.def_vmap
    def _(size, mapped, *arrays):
        axes = [
            None if x is None else 0 if m else None for x, m in zip(arrays, mapped, strict=True)
        ]
        if any(axes[i] == 0 for i in shared):
            out = jax.vmap(kernel, axes, axis_size=size)(*arrays)
        elif any(axes[i] == 0 for i in first):
            most = max(arrays[i].shape[-2] for i in rows if arrays[i] is not None)
            merged = list(arrays)
            for i in rows:
                merged[i] = _merge(arrays[i], axes[i] == 0, size, most)
            out = op(*merged)
            out = jax.tree.map(lambda y: jnp.reshape(y, (size, most, y.shape[-1])), out)
        else:
            out = jax.vmap(slow, axes, axis_size=size)(*arrays)
        return out, jax.tree.map(lambda _: True, out)

    return op


def _merge(x: jax.Array | None, mapped: bool, size: int, most: int) -> jax.Array | None:
    """[size, rows, wide] or [rows, wide] -> [size * most, wide], or [1, wide] where all share it."""
    if x is None or (not mapped and x.shape[0] == 1):
        return x
    x = x if mapped else x[None]
    return jnp.reshape(jnp.broadcast_to(x, (size, most, x.shape[-1])), (-1, x.shape[-1]))


# ---------------------------------------------------------------------------------- the rest


def _check(x, weight, response, gate, bias, response_bias) -> None:
    shape = jnp.shape(weight)
    if jnp.ndim(x) < 1 or len(shape) != 2 or jnp.shape(x)[-1] != shape[0]:
        raise ValueError(
            f"gated_dense: `x` and `weight` have shapes {jnp.shape(x)} and {shape}, expected "
            "(..., in) and (in, out)."
        )
    if jnp.shape(response) != shape:
        raise ValueError(
            f"gated_dense: `response` has shape {jnp.shape(response)}, expected that of `weight`, "
            f"{shape}."
        )
    rows = {"gate": gate, "bias": bias, "response_bias": response_bias}
    rows = {name: row for name, row in rows.items() if row is not None}
    for name, row in rows.items():
        out = (*jnp.shape(x)[:-1], shape[1])
        fits = len(out) == jnp.ndim(row) and jnp.shape(row)[-1] == shape[1]
        fits = fits and all(n in (1, m) for n, m in zip(jnp.shape(row), out, strict=True))
        if jnp.shape(row) != shape[1:] and not fits:
            raise ValueError(
                f"gated_dense: `{name}` has shape {jnp.shape(row)}, expected {shape[1:]} or {out}, "
                "where axes before the last may have size 1."
            )
    for name, other in {"weight": weight, "response": response, **rows}.items():
        if other.dtype != x.dtype:
            raise ValueError(
                f"gated_dense: `{name}` is {other.dtype}, expected the dtype of `x`, {x.dtype}."
            )


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
    counts = {"x": 3, "y": 6, "matrix": 6, "row": 4}
    return Traffic(_bytes(shape, dtype, counts), 12 * math.prod(shape))


def _one_product(x, weight, response, *rest):
    """The product with both matrices side by side, which the layer is to be as fast as."""
    del rest
    return x @ jnp.concatenate([weight, response], 1)


CASES = {
    "forward": Case(_make, _run, _forward_traffic),
    "gradients by xla": Case(_make, partial(_gradients, "xla"), _gradients_traffic),
    "gradients by kernels": Case(_make, partial(_gradients, "kernel"), _gradients_traffic),
}
