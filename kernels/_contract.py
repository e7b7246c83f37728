"""Several products of shared matrices in one pass: the loop that gated dense is made of.

A contraction fills results [m, n] by tiles. For a tile it goes along k, adds what `step` makes of
the blocks it has read to some accumulators, and writes what `finish` makes of those. Each operand
is read once per tile, however many products it enters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._op import result


class Operand(NamedTuple):
    """A matrix, and which axis of the contraction each of its axes is: of "m", "n", "k", "1".

    "1" is an axis of size 1, which `step` or `finish` broadcasts.
    """

    array: jax.Array
    axes: str


def contract(
    step: Callable,
    finish: Callable,
    operands: tuple[Operand, ...],
    extras: tuple[Operand, ...],
    *,
    sums: int,
    results: int,
    how: str,
) -> tuple[jax.Array, ...]:
    """The results, each [m, n] in the dtype of the operands.

    `how` is "gpu" (Triton), "tpu" (Mosaic), or "interpret" and "interpret tpu", the same bodies run
    by XLA. Accumulators are float32, or float64 where the operands are.
    """
    from . import _contract_launch as launch  # Pallas, which only who uses it waits for

    both = (*operands, *extras)
    sizes = {
        axis: size
        for x in both
        for axis, size in zip(x.axes, x.array.shape, strict=True)
        if axis != "1"
    }
    dtype = operands[0].array.dtype
    plan = launch.Plan(
        step=step,
        finish=finish,
        axes=tuple(x.axes for x in both),
        summed=len(operands),
        sums=sums,
        results=results,
        sizes=sizes,
        tile=launch.tile(how, sizes, dtype),
        dtype=jnp.promote_types(dtype, jnp.float32),
    )
    arrays = tuple(x.array for x in both)
    out = [result((sizes["m"], sizes["n"]), dtype, *arrays)] * results
    return tuple(launch.program(how, plan, out)(*arrays))


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], dtype: Any) -> jax.Array:
    """The product of two blocks over these axes, as every `step` takes it."""
    return lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=dtype)
