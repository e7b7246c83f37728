"""The shape of an op: copy this file, keep the sections and their order, change the body.

`scale_rows(x, scale)` multiplies row i of `x` by `scale[i]`. XLA fuses that by itself, so the
op is no part of the public interface; it is the smallest one that shows every section working,
and `tests/test_kernels.py` holds it to what any op has to keep.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ._op import Implementation, choose

# Named (rows, cols), read by the tests and by the benchmarks: what is measured is what is tested.
SHAPES = {"one": (1, 1), "odd": (7, 3), "ragged": (129, 257), "layer": (256, 512)}

# A block is (rows, cols); the last two dimensions of a TPU tile are multiples of (16, 128) in
# bfloat16. Arrays that do not fill their last block are padded on reading, cut on writing.
BLOCK = (128, 128)

# Where the compiled body may run. On a GPU `pallas_call` needs Triton's `CompilerParams` (without
# them it goes to Mosaic GPU, which is deprecated) and masks where blocks are not full: an op that
# wants one brings a second body, and a public op imports its bodies when they are used, as
# `_vector_update.py` does.
PLATFORMS = ("tpu",)
FASTER_ON: tuple[str, ...] = ()  # where the benchmark has shown it to be faster than XLA


def reference(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The definition of the op: [rows, cols], [rows] -> [rows, cols]."""
    return x * scale[:, None]


def _body(x_ref, scale_ref, out_ref):
    out_ref[...] = x_ref[...] * scale_ref[...]


def _launch(x: jax.Array, scale: jax.Array, interpret: bool) -> jax.Array:
    rows, cols = x.shape
    tile = pl.BlockSpec(BLOCK, lambda i, j: (i, j))
    column = pl.BlockSpec((BLOCK[0], 1), lambda i, j: (i, 0))
    return pl.pallas_call(
        _body,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(pl.cdiv(rows, BLOCK[0]), pl.cdiv(cols, BLOCK[1])),
        in_specs=[tile, column],
        out_specs=tile,
        interpret=interpret,
    )(x, scale[:, None])


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _pallas(x: jax.Array, scale: jax.Array, interpret: bool) -> jax.Array:
    return _launch(x, scale, interpret)


# The derivative is that of the reference. As a JVP rule it serves every mode: JAX transposes the
# tangent for the VJP, and differentiates the rule again for either order of Hessian. A `custom_vjp`
# would refuse forward mode and forward-over-reverse products; take one only for a backward kernel
# that was measured to be worth it.
@_pallas.defjvp
def _pallas_jvp(interpret, primals, tangents):
    return _pallas(*primals, interpret), jax.jvp(reference, primals, tangents)[1]


def scale_rows(
    x: jax.Array, scale: jax.Array, *, implementation: Implementation = "auto"
) -> jax.Array:
    """Multiply row i of `x` by `scale[i]`: [rows, cols], [rows] -> [rows, cols].

    `auto` takes what was measured faster on this backend, which is XLA everywhere. A named
    implementation runs or raises: "xla" is the reference, "pallas" the compiled kernel,
    "interpret" the kernel's body run by XLA, on any backend, for tests.
    """
    how = choose("scale_rows", implementation, platforms=PLATFORMS, faster_on=FASTER_ON)
    _check(x, scale)
    return reference(x, scale) if how == "xla" else _pallas(x, scale, how == "interpret")


def _check(x: jax.Array, scale: jax.Array) -> None:
    if jnp.ndim(x) != 2 or jnp.shape(scale) != jnp.shape(x)[:1]:
        raise ValueError(
            "scale_rows: `x` and `scale` have shapes "
            f"{jnp.shape(x)} and {jnp.shape(scale)}, expected (rows, cols) and (rows,)."
        )
    if x.dtype != scale.dtype:
        raise ValueError(
            f"scale_rows: `scale` is {scale.dtype}, expected the dtype of `x`, {x.dtype}."
        )
