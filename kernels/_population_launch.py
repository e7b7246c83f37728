"""Pallas bodies of the fused optimizers: every stream is read once and written once.

Two layouts of the same formulas. On GPU (Triton) a program has a stretch of one member, whose
numbers are scalars, and masks what is past the end. On TPU a program has a tile of several members,
whose numbers are columns, and the ends are cut by the compiler.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from . import _op
from . import _population_rules as rules
from ._population_rules import Plan, Streams

# Entries of a program: eight per thread of four warps, two loads of 16 bytes per float32 stream.
STRETCH = 1024
# Where a program has all members, there are few programs: shorter stretches until each of the 132
# processors of an H200 has two. Not measured: no GPU was at hand.
SHORT, PROGRAMS = 128, 264
# Members and entries of a tile; those of bfloat16 are multiples of (16, 128). Of all members a
# tile is narrower.
TILE = (16, 1024)
NARROW = 128


def step(plan: Plan, how: str, table, seeds, streams: Streams) -> Streams:
    """`rules.reference` of [R, columns], [R, 2] and [R, P].

    `how` is "gpu" or "tpu", or "interpret" or "interpret tpu", the same bodies run by XLA.
    """
    size, length = streams["grads"].shape
    if not how.endswith("tpu"):
        height, width = None, min(STRETCH, pl.next_power_of_2(length))
        # The first axis of a grid is the one without a limit worth the name.
        grid = (pl.cdiv(length, width), size)
        place = lambda j, i: (i, j)
        body = partial(_stretch_body, plan, length, width)
    else:
        height, width = min(TILE[0], size), min(TILE[1], length)
        grid = (pl.cdiv(size, height), pl.cdiv(length, width))
        place = lambda i, j: (i, j)
        body = partial(_tile_body, plan, width)
    numbers = [table] if seeds is None else [table, seeds]
    columns = [pl.BlockSpec((height, x.shape[1]), lambda *ij: (place(*ij)[0], 0)) for x in numbers]
    stretch = pl.BlockSpec((height, width), place)
    operands = _op.alike(*numbers, *(streams[name] for name in plan.reads))
    out = rules.dtypes(plan, streams)
    results = pl.pallas_call(
        body,
        out_shape=[_op.result((size, length), dtype, *operands) for dtype in out.values()],
        grid=grid,
        in_specs=columns + [stretch] * len(streams),
        out_specs=[stretch] * len(out),
        # In place: a scan would otherwise copy what it carries.
        input_output_aliases=_aliases(plan, len(numbers), out, streams),
        interpret=how.startswith("interpret"),
        compiler_params=_params(how),
        name="population_step",
    )(*operands)
    return dict(zip(out, results, strict=True))


def _stretch_body(plan: Plan, length: int, width: int, *refs):
    numbers, ins, outs = _split(plan, refs)
    index = pl.program_id(0) * width + lax.iota(jnp.int32, width)
    mask = index < length
    row = {name: numbers[0][k] for k, name in enumerate(plan.columns)}
    seed = (numbers[1][0], numbers[1][1]) if len(numbers) > 1 else None
    streams = {name: triton.load(ref.at[:], mask=mask, other=0) for name, ref in ins.items()}
    for name, value in rules.tile(plan, row, streams, index, seed).items():
        triton.store(outs[name].at[:], value.astype(outs[name].dtype), mask=mask)


def _tile_body(plan: Plan, width: int, *refs):
    numbers, ins, outs = _split(plan, refs)
    streams = {name: ref[...] for name, ref in ins.items()}
    row, seed = _columns(plan, *numbers)
    index = _places(streams["grads"].shape, pl.program_id(1) * width)
    for name, value in rules.tile(plan, row, streams, index, seed).items():
        outs[name][...] = value.astype(outs[name].dtype)


def converge(
    plan: Plan, how: str, table, seeds, kept: jax.Array, streams: Streams
) -> tuple[Streams, jax.Array]:
    """`rules.reference_converge` of [R, columns], [R, 2], bool [R] and [R, P].

    A program has all members: their sum is complete before the first mean is written.
    """
    size, length = streams["grads"].shape
    if not how.endswith("tpu"):
        width = min(STRETCH, pl.next_power_of_2(length))
        while width > SHORT and pl.cdiv(length, width) < PROGRAMS:
            width //= 2
        body = partial(_loop_body, plan, size, length, width)
    else:
        width = min(NARROW, length)
        body = partial(_all_body, plan, length, width)
    blocks = pl.cdiv(length, width)
    chosen = jnp.stack([jnp.argmax(kept), jnp.maximum(kept.sum(), 1)]).astype(jnp.int32)[None]
    numbers = [chosen, kept.astype(jnp.int32)[:, None], table] + ([] if seeds is None else [seeds])
    stretch = pl.BlockSpec((size, width), lambda j: (0, j))
    operands = _op.alike(*numbers, *(streams[name] for name in plan.reads))
    out = rules.dtypes(plan, streams)
    *results, sound = pl.pallas_call(
        body,
        out_shape=[_op.result((size, length), dtype, *operands) for dtype in out.values()]
        + [_op.result((blocks, size, 1), jnp.int32, *operands)],
        grid=(blocks,),
        in_specs=[pl.BlockSpec(x.shape, lambda j: (0, 0)) for x in numbers]
        + [stretch] * len(streams),
        out_specs=[stretch] * len(out) + [pl.BlockSpec((None, size, 1), lambda j: (j, 0, 0))],
        interpret=how.startswith("interpret"),
        compiler_params=_params(how),
        name="population_converge",
    )(*operands)
    return dict(zip(out, results, strict=True)), (sound != 0).all((0, 2))


def _loop_body(plan: Plan, size: int, length: int, width: int, *refs):
    *refs, sound = refs
    (chosen, kept, *numbers), ins, outs = _split(plan, refs)
    index = pl.program_id(0) * width + lax.iota(jnp.int32, width)
    mask = index < length

    def member(r):
        row = {name: numbers[0][r, k] for k, name in enumerate(plan.columns)}
        read = lambda ref: triton.load(ref.at[r, :], mask=mask, other=0)
        source, update, moments = rules.advance(plan, row, {n: read(x) for n, x in ins.items()})
        return source + update, moments

    def put(r, out):
        for name, value in out.items():
            triton.store(outs[name].at[r, :], value.astype(outs[name].dtype), mask=mask)

    def add(r, total):
        new, moments = member(r)
        put(r, moments)
        fault = jnp.where(mask & ~(jnp.abs(new) < jnp.inf), 1, 0).astype(jnp.int32)
        sound[r, 0] = 1 - jnp.max(fault)
        return total + jnp.where(kept[r, 0] != 0, new - near, 0)

    first = chosen[0, 0].astype(int)
    near = member(first)[0]
    total = lax.fori_loop(0, size, add, jnp.zeros_like(near))
    mean = near + total / chosen[0, 1].astype(near.dtype)
    seed = (numbers[1][first, 0], numbers[1][first, 1]) if len(numbers) > 1 else None
    out = rules.finish(plan, mean, None, index, seed)
    lax.fori_loop(0, size, lambda r, _: put(r, out), None)


def _all_body(plan: Plan, length: int, width: int, *refs):
    *refs, sound = refs
    (chosen, kept, *numbers), ins, outs = _split(plan, refs)
    streams = {name: ref[...] for name, ref in ins.items()}
    row, seeds = _columns(plan, *numbers)
    shape = streams["grads"].shape
    index = _places(shape, pl.program_id(0) * width)
    source, update, moments = rules.advance(plan, row, streams)
    new = source + update
    # What is past the end is no number of anybody.
    fault = jnp.where((index < length) & ~(jnp.abs(new) < jnp.inf), 1, 0).astype(jnp.int32)
    sound[...] = 1 - jnp.max(fault, 1, keepdims=True)
    first = lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0) == chosen[0, 0]
    pick = lambda x: jnp.sum(jnp.where(first, x, 0), 0, keepdims=True, dtype=x.dtype)
    near = pick(new)
    far = jnp.where(kept[...] != 0, new - near, 0)
    mean = near + jnp.sum(far, 0, keepdims=True) / chosen[0, 1].astype(near.dtype)
    seed = None if seeds is None else tuple(pick(x) for x in seeds)
    for name, value in (moments | rules.finish(plan, mean, None, index[:1], seed)).items():
        outs[name][...] = jnp.broadcast_to(value, shape).astype(outs[name].dtype)


def _split(plan: Plan, refs):
    """Numbers of members, streams in, streams out."""
    last = len(refs) - len(plan.writes)
    first = last - len(plan.reads)
    ins = dict(zip(plan.reads, refs[first:last], strict=True))
    return refs[:first], ins, dict(zip(plan.writes, refs[last:], strict=True))


def _columns(plan: Plan, table, seeds=None):
    numbers = table[...]
    row = {name: numbers[:, k : k + 1] for k, name in enumerate(plan.columns)}
    return row, None if seeds is None else (seeds[:, :1], seeds[:, 1:])


def _places(shape: tuple[int, ...], start) -> jax.Array:
    return start + lax.broadcasted_iota(jnp.int32, shape, 1)


def _aliases(plan: Plan, numbers: int, out: dict, streams: Streams) -> dict[int, int]:
    pairs = {}
    for place, (name, dtype) in enumerate(out.items()):
        donor = name if name in plan.reads else "grads"
        if streams[donor].dtype == dtype:
            pairs[numbers + plan.reads.index(donor)] = place
    return pairs


def _params(how: str):
    # Without them JAX 0.10 takes its other backend for GPUs, for which these are no bodies.
    return None if how.endswith("tpu") else triton.CompilerParams(num_warps=4)
