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

from ._op import Case, Implementation, Traffic, alike, choose

# Named (entries,), read by the tests and by the benchmarks.
SHAPES = {"one": (1,), "odd": (7,), "ragged": (3001,), "layer": (784 * 128,)}
LARGE = {"2^22": (2**22,), "2^26": (2**26,), "2^28": (2**28,)}

PLATFORMS = ("gpu", "tpu")
DTYPES = ("float32", "bfloat16", "float16")
FASTER_ON: tuple[str, ...] = ()  # no accelerator has run `benchmarks/kernels.py` so far


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
    step = jnp.asarray(step, jnp.promote_types(x.dtype, jnp.float32))
    _check(x, r, p, q, step)
    how = choose(
        "vector_update",
        implementation,
        platforms=PLATFORMS,
        faster_on=FASTER_ON,
        unfit=lambda backend: _unfit(x),
    )
    if how == "xla" or not x.size:
        return reference(x, r, p, q, step)
    return _by_kernel(how, *alike(x, r, p, q, step))


def _unfit(x: jax.Array) -> str | None:
    if str(x.dtype) not in DTYPES:
        return f"`x` is {x.dtype}, expected one of {DTYPES}"
    if x.size >= 2**31:  # places are int32
        return f"`x` has {x.size} entries, expected less than 2^31"
    return None


# Elementwise, so that XLA's derivative is one pass as well, and has every mode.
@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_kernel(how: str, x, r, p, q, step) -> VectorUpdate:
    from . import _vector_update_launch as launch  # Pallas, which only who uses it waits for

    return VectorUpdate(*launch.launch(how, *alike(x, r, p, q, step)))


@_by_kernel.defjvp
def _(how, primals, tangents):
    return _by_kernel(how, *primals), jax.jvp(reference, primals, tangents)[1]


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
