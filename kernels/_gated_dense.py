"""Gated dense: two products of one input, the second under a gate for every output.

The layer of best-response networks. With one gate per row, as one draw of hyperparameters per
example gives, no row needs a matrix of its own.

Three kernels, each with both products from one read of what they share: the layer, its derivative
in the input, its derivative in the two matrices.
"""

import math
from functools import partial
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ._gated_dense_kernels import (
    Activation,
    align,
    back_input,
    back_matrices,
    forward,
    pair,
    pair_reference,
)
from ._op import Implementation, alike, choose

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
    y, _ = pair_reference(x, weight, response, gate, bias, response_bias)
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
    for tests. Both add up in float32 and round once (with an activation under a derivative twice,
    before it and after). Under vmap with shared matrices the rows of all become rows of one
    product; if of these only gates are mapped, the products are those of one input, and XLA's.

    `backward` says who takes the derivatives of a kernel. "xla" has every mode, and under vmap does
    what it does for the reference. "kernel" is two kernels, for x and for the matrices, each with
    both of its products from one read. It has reverse mode, and either mode over it, but not
    forward mode alone; and of matrices that are shared under vmap it holds a derivative for each
    row of that, before their sum.

    Raises ValueError for other names, shapes or dtypes, and for "pallas" where it cannot run.
    """
    if backward not in get_args(Backward):
        raise ValueError(
            f"gated_dense: `backward` is {backward!r}, expected one of {get_args(Backward)}."
        )
    _check(x, weight, response, gate, bias, response_bias)
    how = choose(
        "gated_dense",
        implementation,
        platforms=PLATFORMS,
        faster_on=FASTER_ON,
        unfit=lambda backend: _unfit(x, activation),
    )
    if how == "xla" or 0 in (*x.shape, *weight.shape):
        return reference(x, weight, response, gate, bias, response_bias, activation)
    return _by_kernel(how, backward, activation, x, weight, response, gate, bias, response_bias)


def _unfit(x: jax.Array, activation: Activation | None) -> str | None:
    if str(x.dtype) not in DTYPES:
        return f"`x` is {x.dtype}, expected one of {DTYPES}"
    if activation is not None and jax.make_jaxpr(activation)(jnp.zeros((), x.dtype)).consts:
        return "`activation` closes over arrays, expected a function of its argument alone"
    return None


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
    aligned = align(row, len(lead) + 1)
    if math.prod(aligned.shape[:-1]) > 1:
        aligned = jnp.broadcast_to(aligned, (*lead, aligned.shape[-1]))
    return jnp.reshape(aligned, (-1, aligned.shape[-1]))


# ------------------------------------------------------------------------------- the derivative
# From here on all arrays are matrices.


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _layer(activation, how, *arrays):
    return forward(how, activation, True)(*arrays)[0]


@partial(_layer.defjvp, symbolic_zeros=True)
def _layer_jvp(activation, how, primals, tangents):
    x, weight, response, gate, *_ = primals
    z, answer = pair(how, *primals)
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
    return forward(how, activation, True)(*arrays)[0]


# Made of kernels with the JVP of their reference, so that the derivative has one, by XLA.
def _layer_forward(activation, how, *arrays):
    z, answer = pair(how, *arrays)
    return (
        (z, (arrays, answer, None)) if activation is None else (activation(z), (arrays, answer, z))
    )


def _layer_backward(activation, how, kept, slope):
    (x, weight, response, gate, bias, response_bias), answer, z = kept
    if activation is not None:
        (slope,) = jax.vjp(activation, z)[1](slope)
    dx = back_input(how, slope, gate, weight, response)
    dw, dv = back_matrices(how, x, slope, gate, weight)
    gated = gate * slope
    sums = _sum_to(gate, slope * answer), _sum_to(bias, slope), _sum_to(response_bias, gated)
    return dx, dw, dv, *sums


_layer_of_kernels.defvjp(_layer_forward, _layer_backward)


def _sum_to(row: jax.Array | None, slope: jax.Array) -> jax.Array | None:
    if row is None or row.shape == slope.shape:
        return None if row is None else slope
    return jnp.sum(slope, 0, keepdims=True)


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
