"""The kernels of gated dense, on matrices: two products from one read of what they share.

Each is a function of `how` (see `_contract.py`), with its reference beside it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from ._contract import Operand, contract, dot

Activation: TypeAlias = Callable[[jax.Array], jax.Array]


def align(x: jax.Array, rank: int) -> jax.Array:
    return jnp.reshape(x, (1,) * (rank - x.ndim) + x.shape)


def pair_reference(x, weight, response, gate, bias, response_bias):
    """The layer before its activation, and what the gate multiplies."""
    # One product with [W V] is no faster on CPU and holds a copy of both: `stn_overhead.py`.
    plain, answer = x @ weight, x @ response
    if bias is not None:
        plain = plain + align(bias, plain.ndim)
    if response_bias is not None:
        answer = answer + align(response_bias, plain.ndim)
    return plain + align(gate, plain.ndim) * answer, answer


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


def forward(how: str, activation: Activation | None, only: bool) -> Callable:
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
        y, answer = pair_reference(*arrays)
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

    # Nothing to merge: with shared matrices each member still has a result, before their sum.
    return _merging(kernel, _matrices_reference, rows=(), shared=(3,), first=())


def _row_axis(row: jax.Array, x: jax.Array) -> str:
    return "m" if row.shape[0] == x.shape[0] else "1"


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


pair = _with_derivative(lambda how: forward(how, None, False), pair_reference)
back_input = _with_derivative(_input, _input_reference)
back_matrices = _with_derivative(_matrices, _matrices_reference)


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
    """[size, rows, wide] or [rows, wide] -> [size * most, wide], or [1, wide] if all share it."""
    if x is None or (not mapped and x.shape[0] == 1):
        return x
    x = x if mapped else x[None]
    return jnp.reshape(jnp.broadcast_to(x, (size, most, x.shape[-1])), (-1, x.shape[-1]))
