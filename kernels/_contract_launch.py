"""Pallas bodies of a contraction: by Triton for GPUs, by Mosaic for TPUs."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plt

# Tiles (m, n) on a GPU from large to small: the first that keeps this many processors busy. Not
# measured: no GPU was at hand. A product of tensor cores has at least 16 along each axis.
GPU_TILES = ((128, 128), (64, 128), (64, 64), (32, 64), (32, 32))
PROCESSORS = 132  # of an H100 or H200

# On a TPU the last two dimensions of a block are multiples of (16, 128) or the whole axis.
TPU_TILES = {"m": 256, "n": 256, "k": 512}


class Plan(NamedTuple):
    step: Callable[..., tuple]  # blocks of the operands -> what to add to each accumulator
    finish: Callable[..., tuple]  # accumulators, then blocks of the extras -> results
    axes: tuple[str, ...]  # of operands and extras
    summed: int  # how many of those are operands
    sums: int
    results: int
    sizes: dict[str, int]
    tile: dict[str, int]
    dtype: Any  # of the accumulators


def tile(how: str, sizes: dict[str, int], dtype: Any) -> dict[str, int]:
    return _tpu_tile(sizes) if how.endswith("tpu") else _gpu_tile(sizes, dtype)


def program(how: str, plan: Plan, out: list) -> Callable:
    """The kernel, a function of the arrays of the plan. `how` is that of `contract`."""
    return (_tpu if how.endswith("tpu") else _gpu)(plan, out, how.startswith("interpret"))


# ------------------------------------------------------------------------------------------ GPU


def _gpu_tile(sizes: dict[str, int], dtype: Any) -> dict[str, int]:
    fit = lambda size, most: max(16, min(most, pl.next_power_of_2(size)))
    count = lambda m, n: pl.cdiv(sizes["m"], m) * pl.cdiv(sizes["n"], n)
    m, n = next((t for t in GPU_TILES if count(*t) >= PROCESSORS), GPU_TILES[-1])
    deep = fit(sizes["k"], 64 if jnp.dtype(dtype).itemsize < 4 else 32)
    return {"m": fit(sizes["m"], m), "n": fit(sizes["n"], n), "k": deep}


def _gpu(plan: Plan, out: list, interpret: bool) -> Callable:
    tile = plan.tile
    # One axis of programs, since Triton has three and every vmap adds one.
    programs = pl.cdiv(plan.sizes["m"], tile["m"]) * pl.cdiv(plan.sizes["n"], tile["n"])
    wide = tile["m"] * tile["n"] * plan.sums >= 128 * 128 * 2
    params = plt.CompilerParams(num_warps=8 if wide else 4, num_stages=3)
    return pl.pallas_call(
        partial(_gpu_body, plan),
        out_shape=out,
        grid=(programs,),
        interpret=interpret,
        compiler_params=None if interpret else params,
        name="contract",
    )


def _gpu_body(plan: Plan, *refs) -> None:
    inputs, outputs = refs[: len(plan.axes)], refs[len(plan.axes) :]
    across = pl.cdiv(plan.sizes["n"], plan.tile["n"])
    program = pl.program_id(0)
    start = {
        "m": program // across * plan.tile["m"],
        "n": program % across * plan.tile["n"],
    }

    def read(i: int, at: dict):
        index, mask = _window(plan, plan.axes[i], at)
        # What lies outside is zero, and so adds nothing to a sum.
        ref = inputs[i].at[index]
        return plt.load(ref) if mask is None else plt.load(ref, mask=mask, other=0)

    def along(k, sums):
        at = {**start, "k": k * plan.tile["k"]}
        terms = plan.step(*(read(i, at) for i in range(plan.summed)))
        return tuple(a + b for a, b in zip(sums, terms, strict=True))

    zero = jnp.zeros((plan.tile["m"], plan.tile["n"]), plan.dtype)
    steps = pl.cdiv(plan.sizes["k"], plan.tile["k"])
    sums = lax.fori_loop(0, steps, along, (zero,) * plan.sums)
    extras = (read(i, start) for i in range(plan.summed, len(plan.axes)))
    index, mask = _window(plan, "mn", start)
    for ref, value in zip(outputs, plan.finish(sums, *extras), strict=True):
        plt.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def _window(plan: Plan, axes: str, at: dict) -> tuple[tuple, jax.Array | None]:
    """Where a block lies, and which of it is inside; None if all of it always is."""
    index, mask = [], None
    for i, axis in enumerate(axes):
        if axis == "1":
            index.append(pl.ds(0, 1))
            continue
        size, tile = plan.sizes[axis], plan.tile[axis]
        index.append(pl.ds(at[axis], tile))
        if size % tile:
            inside = at[axis] + jnp.arange(tile) < size
            inside = inside[:, None] if i == 0 else inside[None, :]
            mask = inside if mask is None else mask & inside
    if mask is not None:
        shape = tuple(1 if axis == "1" else plan.tile[axis] for axis in axes)
        mask = jnp.broadcast_to(mask, shape)
    return tuple(index), mask


# ------------------------------------------------------------------------------------------ TPU


def _tpu_tile(sizes: dict[str, int]) -> dict[str, int]:
    return {axis: min(size, TPU_TILES[axis]) for axis, size in sizes.items()}


def _tpu(plan: Plan, out: list, interpret: bool) -> Callable:
    place = {"m": 0, "n": 1, "k": 2}
    tile = {**plan.tile, "1": 1}

    def spec(axes: str) -> pl.BlockSpec:
        index = lambda *grid: tuple(0 if a == "1" else grid[place[a]] for a in axes)
        return pl.BlockSpec(tuple(tile[a] for a in axes), index)

    params = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
    return pl.pallas_call(
        partial(_tpu_body, plan),
        out_shape=out,
        grid=tuple(pl.cdiv(plan.sizes[a], plan.tile[a]) for a in "mnk"),
        in_specs=[spec(axes) for axes in plan.axes],
        out_specs=[spec("mn")] * plan.results,
        scratch_shapes=[pltpu.VMEM((tile["m"], tile["n"]), plan.dtype)] * plan.sums,
        interpret=interpret,
        compiler_params=None if interpret else params,
        name="contract",
    )


def _tpu_body(plan: Plan, *refs) -> None:
    ends = len(plan.axes), len(plan.axes) + plan.results
    inputs, outputs, sums = refs[: ends[0]], refs[ends[0] : ends[1]], refs[ends[1] :]
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    def read(i: int):
        # Padding holds anything, and anything times zero may be NaN: both factors are zeroed.
        block, size, tile = inputs[i][...], plan.sizes["k"], plan.tile["k"]
        if "k" not in plan.axes[i] or not size % tile:
            return block
        row = lax.broadcasted_iota(jnp.int32, block.shape, plan.axes[i].index("k"))
        return jnp.where(k * tile + row < size, block, jnp.zeros_like(block))

    for ref, term in zip(sums, plan.step(*map(read, range(plan.summed))), strict=True):
        ref[...] += term

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        extras = (inputs[i][...] for i in range(plan.summed, len(plan.axes)))
        results = plan.finish(tuple(ref[...] for ref in sums), *extras)
        for ref, value in zip(outputs, results, strict=True):
            ref[...] = value.astype(ref.dtype)
