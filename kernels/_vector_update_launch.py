"""Pallas bodies of the vector update: a program has a block of all four vectors."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plt

from ._op import result

BLOCK = 2048  # entries per program of a GPU
LANES, ROWS, ALIGN = 128, 512, 16  # of a TPU: a block is [ROWS, LANES], rows a multiple of ALIGN


def launch(how: str, *arrays: jax.Array) -> tuple:
    """x', r', r'r' and p'q. `how` is "gpu" or "tpu", or "interpret" or "interpret tpu"."""
    return (_tpu if how.endswith("tpu") else _gpu)(how.startswith("interpret"), *arrays)


def _part(x, r, p, q, step, inside) -> tuple[jax.Array, ...]:
    """A block of x' and r', and the terms of the sums, zero where not `inside`."""
    wide = step.dtype
    new_x = (x.astype(wide) + step * p.astype(wide)).astype(x.dtype)
    new_r = (r.astype(wide) - step * q.astype(wide)).astype(x.dtype)
    terms = jnp.square(new_r.astype(wide)), p.astype(wide) * q.astype(wide)
    zero = jnp.zeros(terms[0].shape, wide)
    return new_x, new_r, *(t if inside is None else jnp.where(inside, t, zero) for t in terms)


# ------------------------------------------------------------------------------------------ GPU


def _gpu(interpret: bool, *arrays) -> tuple:
    *vectors, step = arrays
    shape, dtype = vectors[0].shape, vectors[0].dtype
    size = math.prod(shape)
    programs = pl.cdiv(size, BLOCK)
    vector = result((size,), dtype, *arrays)
    part = result((programs,), step.dtype, *arrays)
    x, r, rr, pq = pl.pallas_call(
        partial(_gpu_body, size),
        out_shape=[vector, vector, part, part],
        grid=(programs,),
        interpret=interpret,
        compiler_params=None if interpret else plt.CompilerParams(num_warps=4, num_stages=1),
        name="vector_update",
    )(*(jnp.reshape(v, -1) for v in vectors), jnp.reshape(step, 1))
    # Each program has written its own part: the same sum in every run, which atomics would not be.
    return jnp.reshape(x, shape), jnp.reshape(r, shape), jnp.sum(rr), jnp.sum(pq)


def _gpu_body(size: int, x_ref, r_ref, p_ref, q_ref, step_ref, *out_refs) -> None:
    program = pl.program_id(0)
    block = pl.ds(program * BLOCK, BLOCK)
    inside = None if size % BLOCK == 0 else program * BLOCK + jnp.arange(BLOCK) < size

    def read(ref):
        at = ref.at[block]
        return plt.load(at) if inside is None else plt.load(at, mask=inside, other=0)

    vectors = read(x_ref), read(r_ref), read(p_ref), read(q_ref)
    x, r, *terms = _part(*vectors, step_ref[0], inside)
    plt.store(out_refs[0].at[block], x, mask=inside)
    plt.store(out_refs[1].at[block], r, mask=inside)
    for ref, term in zip(out_refs[2:], terms, strict=True):
        ref[program] = jnp.sum(term)


# ------------------------------------------------------------------------------------------ TPU


def _tpu(interpret: bool, *arrays) -> tuple:
    *vectors, step = arrays
    shape, dtype = vectors[0].shape, vectors[0].dtype
    size = math.prod(shape)
    rows = pl.cdiv(size, LANES * ALIGN) * ALIGN
    block = min(rows, ROWS)
    programs = pl.cdiv(rows, block)

    def fold(v):
        flat = jnp.reshape(v, -1)
        return jnp.reshape(jnp.pad(flat, (0, rows * LANES - size)), (rows, LANES))

    vector = result((rows, LANES), dtype, *arrays)
    part = result((8 * programs, LANES), step.dtype, *arrays)
    of_vector = pl.BlockSpec((block, LANES), lambda i: (i, 0))
    of_part = pl.BlockSpec((8, LANES), lambda i: (i, 0))
    of_step = pl.BlockSpec((1, 1), lambda i: (0, 0), memory_space=pltpu.SMEM)
    x, r, rr, pq = pl.pallas_call(
        partial(_tpu_body, rows, block),
        out_shape=[vector, vector, part, part],
        grid=(programs,),
        in_specs=[of_vector] * 4 + [of_step],
        out_specs=[of_vector, of_vector, of_part, of_part],
        interpret=interpret,
        compiler_params=None
        if interpret
        else pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="vector_update",
    )(*map(fold, vectors), jnp.reshape(step, (1, 1)))
    unfold = lambda v: jnp.reshape(jnp.reshape(v, -1)[:size], shape)
    return unfold(x), unfold(r), jnp.sum(rr), jnp.sum(pq)


def _tpu_body(rows: int, block: int, x_ref, r_ref, p_ref, q_ref, step_ref, *out_refs) -> None:
    row = lax.broadcasted_iota(jnp.int32, (block, LANES), 0) + pl.program_id(0) * block
    inside = None if rows % block == 0 else row < rows
    vectors = x_ref[...], r_ref[...], p_ref[...], q_ref[...]
    x, r, *terms = _part(*vectors, step_ref[0, 0], inside)
    out_refs[0][...] = x
    out_refs[1][...] = r
    for ref, term in zip(out_refs[2:], terms, strict=True):
        ref[...] = jnp.sum(jnp.reshape(term, (block // 8, 8, LANES)), 0)
