"""What conjugate gradients and the Neumann series do to their vectors, in one pass.

After the product q = A p an iteration moves the solution along p and the residual along q, and
wants the square of what is left and the curvature along p. By itself each of the four is a pass
over the parameters.

    x' = x + a p,   r' = r - a q,   r'r',   p'q

In conjugate gradients r'r' is the next iteration's; p'q came before the step and is for free. In
the Neumann series p is r and a its `scale`.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plt

from ._op import Case, Implementation, Traffic, alike, choose, result

# Named (entries,), read by the tests and by the benchmarks.
SHAPES = {"one": (1,), "odd": (7,), "ragged": (3001,), "layer": (784 * 128,)}
LARGE = {"2^22": (2**22,), "2^26": (2**26,), "2^28": (2**28,)}

PLATFORMS = ("gpu", "tpu")
DTYPES = ("float32", "bfloat16", "float16")
FASTER_ON: tuple[str, ...] = ()  # no accelerator has run `benchmarks/kernels.py` so far

BLOCK = 2048  # entries per program of a GPU
LANES, ROWS, ALIGN = 128, 512, 16  # of a TPU: a block is [ROWS, LANES], rows a multiple of ALIGN


class VectorUpdate(NamedTuple):
    """What `vector_update` returns: the new vectors, r'r and p'q."""

    x: jax.Array
    r: jax.Array
    rr: jax.Array  # r'r' of the new r, in float32 at least
    pq: jax.Array


def reference(
    x: jax.Array, r: jax.Array, p: jax.Array, q: jax.Array, step: jax.Array
) -> VectorUpdate:
    """The definition of the op: sums and products in float32 at least, rounded once."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    new_x = x.astype(wide) + step * p.astype(wide)
    new_r = (r.astype(wide) - step * q.astype(wide)).astype(x.dtype)
    rr = jnp.sum(jnp.square(new_r.astype(wide)))
    pq = jnp.sum(p.astype(wide) * q.astype(wide))
    return VectorUpdate(new_x.astype(x.dtype), new_r, rr, pq)


def vector_update(
    x: jax.Array,
    r: jax.Array,
    p: jax.Array,
    q: jax.Array,
    step: jax.Array | float,
    *,
    implementation: Implementation = "auto",
) -> VectorUpdate:
    """x + step p and r - step q, with the squares of the latter and the product of p and q.

    The four are of one shape, any, and one dtype; `step` is a scalar. The two sums are in float32,
    or float64 for that, of the results as they are returned.

    `auto` takes what was measured faster on this backend, which is "xla" everywhere, the reference:
    no accelerator has run the benchmark so far. "pallas" is the compiled kernel, for GPUs (Triton)
    and TPUs (Mosaic), in 32 or 16 bits; on a TPU sizes that 2048 does not divide are padded, which
    copies them. "interpret" is its body for GPUs run by XLA, on any backend, for tests. The
    derivative is that of the reference.

    Raises ValueError for other names, shapes or dtypes, and for "pallas" where it cannot run.
    """
    how = choose("vector_update", implementation, platforms=PLATFORMS, faster_on=FASTER_ON)
    step = jnp.asarray(step, jnp.promote_types(x.dtype, jnp.float32))
    _check(x, r, p, q, step)
    if how == "xla" or not x.size:
        return reference(x, r, p, q, step)
    if how in PLATFORMS and str(x.dtype) not in DTYPES:
        raise ValueError(
            f"vector_update: `x` is {x.dtype}, expected one of {DTYPES} for the compiled kernel; "
            "'auto' and 'xla' take any."
        )
    return _by_kernel(how, x, r, p, q, step)


# Elementwise, so that XLA's derivative is one pass as well, and has every mode.
@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_kernel(how: str, x, r, p, q, step) -> VectorUpdate:
    launch = _tpu if how.endswith("tpu") else _gpu
    return launch(how.startswith("interpret"), *alike(x, r, p, q, step))


@_by_kernel.defjvp
def _(how, primals, tangents):
    return _by_kernel(how, *primals), jax.jvp(reference, primals, tangents)[1]


def _part(x, r, p, q, step, inside) -> tuple[jax.Array, ...]:
    """A block of x' and r', and the terms of the sums, zero where not `inside`."""
    wide = step.dtype
    new_x = (x.astype(wide) + step * p.astype(wide)).astype(x.dtype)
    new_r = (r.astype(wide) - step * q.astype(wide)).astype(x.dtype)
    terms = jnp.square(new_r.astype(wide)), p.astype(wide) * q.astype(wide)
    zero = jnp.zeros(terms[0].shape, wide)
    return new_x, new_r, *(t if inside is None else jnp.where(inside, t, zero) for t in terms)


# ------------------------------------------------------------------------------------------ GPU


def _gpu(interpret: bool, *arrays) -> VectorUpdate:
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
    return VectorUpdate(jnp.reshape(x, shape), jnp.reshape(r, shape), jnp.sum(rr), jnp.sum(pq))


def _gpu_body(size: int, x_ref, r_ref, p_ref, q_ref, step_ref, *out_refs) -> None:
    program = pl.program_id(0)
    block = pl.ds(program * BLOCK, BLOCK)
    inside = None if size % BLOCK == 0 else program * BLOCK + jnp.arange(BLOCK) < size

    def read(ref):
        at = ref.at[block]
        return plt.load(at) if inside is None else plt.load(at, mask=inside, other=0)

    x, r, *terms = _part(*map(read, (x_ref, r_ref, p_ref, q_ref)), step_ref[0], inside)
    plt.store(out_refs[0].at[block], x, mask=inside)
    plt.store(out_refs[1].at[block], r, mask=inside)
    for ref, term in zip(out_refs[2:], terms, strict=True):
        ref[program] = jnp.sum(term)


# ------------------------------------------------------------------------------------------ TPU


def _tpu(interpret: bool, *arrays) -> VectorUpdate:
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
    return VectorUpdate(unfold(x), unfold(r), jnp.sum(rr), jnp.sum(pq))


def _tpu_body(rows: int, block: int, x_ref, r_ref, p_ref, q_ref, step_ref, *out_refs) -> None:
    row = lax.broadcasted_iota(jnp.int32, (block, LANES), 0) + pl.program_id(0) * block
    inside = None if rows % block == 0 else row < rows
    refs = x_ref, r_ref, p_ref, q_ref
    x, r, *terms = _part(*(ref[...] for ref in refs), step_ref[0, 0], inside)
    out_refs[0][...] = x
    out_refs[1][...] = r
    for ref, term in zip(out_refs[2:], terms, strict=True):
        ref[...] = jnp.sum(jnp.reshape(term, (block // 8, 8, LANES)), 0)


# ---------------------------------------------------------------------------------- the rest


def _check(x, r, p, q, step) -> None:
    for name, other in {"r": r, "p": p, "q": q}.items():
        if (other.shape, other.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"vector_update: `{name}` is {other.dtype}{list(other.shape)}, expected the shape "
                f"and dtype of `x`, {x.dtype}{list(x.shape)}."
            )
    if step.shape:
        raise ValueError(f"vector_update: `step` has shape {step.shape}, expected a scalar.")


def _make(count: int, key, shape, dtype) -> tuple:
    """So many vectors, and a step."""
    *keys, last = jax.random.split(key, count + 1)
    vectors = (jax.random.normal(k, shape).astype(dtype) for k in keys)
    return *vectors, jax.random.uniform(last, (), jnp.promote_types(dtype, jnp.float32))


def _run(implementation: Implementation, *arrays) -> VectorUpdate:
    return vector_update(*arrays, implementation=implementation)


def _series(implementation: Implementation, x, r, q, step) -> VectorUpdate:
    return vector_update(x, r, r, q, step, implementation=implementation)


def _traffic(passes: int, shape, dtype) -> Traffic:
    size = math.prod(shape)
    return Traffic(passes * size * jnp.dtype(dtype).itemsize, 8 * size)


CASES = {
    "conjugate gradients": Case(partial(_make, 4), _run, partial(_traffic, 6)),
    "neumann": Case(partial(_make, 3), _series, partial(_traffic, 5)),
}
