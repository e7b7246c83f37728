"""Convolutions that stay fast when every member of a population has a kernel of its own.

Under vmap over kernels XLA's convolution becomes one in groups, which on CPU is some ten times
slower than products with what the window sees (benchmarks/population_layers.py), and so does its
derivative in a kernel that is shared by a vmapped input. Products become batched products, in
every derivative.

The choice is made where the layer is called and not by a batching rule, since
`jax.custom_batching.custom_vmap` has no reverse mode of its own (jax 0.10.2): `vmap(grad(f))`
raises, and inside `custom_vjp` forward mode, and with it forward over reverse, is lost.
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from .. import _checks
from ._convolve import Products, convolver
from ._windows import Padding, Windows, extent, pads_of, per_axis

Implementation: TypeAlias = Literal["auto", "xla", "patches"]


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    implementation: Implementation = "auto",
) -> jax.Array:
    """A convolution in one to three dimensions, channels last: [..., *space, in] -> [..., out].

    `kernel` is [*window, in / groups, out] and decides the number of dimensions. Axes of `x`
    before those of space are examples; there may be none. `strides` and `dilation` (of the window)
    are one integer, or one per dimension; `padding` is "SAME", "SAME_LOWER", "VALID" or a pair for
    each dimension, where a negative number cuts off. Differentiable in both modes and to any order.

    `implementation`, which changes speed, memory and rounding only:

    - "patches": one product with the patches of x, which hold it as many times as the window has
      entries (of a window of 3 x 3: 9 times) and are kept for the derivative.
    - "xla": XLA's convolution. On CPU many times slower inside `lax.scan`, and under vmap over
      kernels.
    - "auto": patches, for any number of groups. On accelerators nothing was measured; try "xla"
      there for one large model.

    Raises ValueError for shapes, dtypes or arguments that do not fit, and for a window that is
    larger than x with its padding.
    """
    space = jnp.ndim(kernel) - 2
    _check("conv", x, kernel, groups, implementation)
    lead = x.shape[: x.ndim - space - 1]
    images = jnp.reshape(x, (math.prod(lead), *x.shape[len(lead) :]))
    window = kernel.shape[:space]
    strides = per_axis("conv", "strides", strides, space)
    dilation = per_axis("conv", "dilation", dilation, space)
    reach = extent(window, dilation)
    pads = pads_of("conv", padding, images.shape[1:-1], reach, strides)
    windows = Windows(window, strides, pads, dilation, (1,) * space)
    formulation = "patches" if implementation == "auto" else implementation
    y = convolver(images, windows, groups, formulation)(kernel)
    return jnp.reshape(y, (*lead, *y.shape[1:]))


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: None = None,
) -> jax.Array:
    """`conv` with the arguments of `jax.lax.conv_general_dilated`, to stand in its place.

    A Flax model becomes one for populations by one argument, `nn.Conv` and `nnx.Conv` alike::

        fast = hyperjax.layers.conv_general_dilated
        nnx.Conv(3, 16, (3, 3), conv_general_dilated=fast, rngs=rngs)

    Its parameters and its outputs stay what they are, to rounding. One to three dimensions of
    space, in any order of axes that `dimension_numbers` can name.

    Raises ValueError for what `conv` refuses, and for `batch_group_count` and `out_sharding`, which
    have no counterpart here.
    """
    where = "conv_general_dilated"
    for name, value, only in (
        ("batch_group_count", batch_group_count, 1),
        ("out_sharding", out_sharding, None),
    ):
        if value != only:
            raise ValueError(
                f"{where}: `{name}` must be {only}; got {value!r}. Take "
                "`jax.lax.conv_general_dilated`, which has it."
            )
    if jnp.ndim(lhs) != jnp.ndim(rhs):
        raise ValueError(
            f"{where}: `lhs` and `rhs` need as many axes as each other; got "
            f"{_checks.describe(lhs)} and {_checks.describe(rhs)}."
        )
    spec = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    batch, channel, *places = spec.lhs_spec
    out, into, *sides = spec.rhs_spec
    x, kernel = (
        jnp.transpose(lhs, (batch, *places, channel)),
        jnp.transpose(rhs, (*sides, into, out)),
    )
    _check(where, x, kernel, feature_group_count, "auto")
    windows = _windows(where, x, kernel, window_strides, padding, lhs_dilation, rhs_dilation)
    products = Products(precision, preferred_element_type)
    y = convolver(x, windows, feature_group_count, "patches", products)(kernel)
    batch, channel, *places = spec.out_spec
    order = (batch, *places, channel)
    return jnp.transpose(y, sorted(range(y.ndim), key=lambda axis: order[axis]))


def _windows(where: str, x, kernel, strides, padding, lhs_dilation, rhs_dilation) -> Windows:
    space = kernel.ndim - 2
    strides = per_axis(where, "window_strides", strides, space)
    dilation = per_axis(where, "rhs_dilation", rhs_dilation or 1, space)
    holes = per_axis(where, "lhs_dilation", lhs_dilation or 1, space)
    if isinstance(padding, str) and padding != "VALID" and max(holes) > 1:
        raise ValueError(
            f"{where}: `padding` must be pairs of integers where `lhs_dilation` is more than 1; "
            f"got {padding!r}."
        )
    sizes = extent(x.shape[1:-1], holes)
    pads = pads_of(where, padding, sizes, extent(kernel.shape[:space], dilation), strides)
    return Windows(kernel.shape[:space], strides, pads, dilation, holes)


def _check(where: str, x, kernel, groups: int, implementation: str) -> None:
    _checks.positive_int(where, "groups", groups)
    _checks.one_of(where, "implementation", implementation, get_args(Implementation))
    space = jnp.ndim(kernel) - 2
    # With the axes in our order, as `conv_general_dilated` has brought them into it.
    found = f"the kernel [*window, in / groups, out] is {_checks.describe(kernel)}"
    if not 1 <= space <= 3:
        raise ValueError(f"{where}: {found}, expected 3 to 5 axes.")
    if 0 in jnp.shape(kernel):
        raise ValueError(f"{where}: {found}, expected no axis of length 0.")
    channels = jnp.shape(kernel)[-2] * groups
    if jnp.ndim(x) <= space or jnp.shape(x)[-1] != channels:
        raise ValueError(
            f"{where}: the input [..., *space, in] is {_checks.describe(x)}, expected {space} axes "
            f"of space and {channels} channels, since {found} and the number of groups {groups}."
        )
    if jnp.shape(kernel)[-1] % groups:
        raise ValueError(
            f"{where}: {found}, expected a last axis that the number of groups divides, {groups}."
        )
    if jnp.result_type(x) != jnp.result_type(kernel):
        raise ValueError(
            f"{where}: the kernel is {jnp.result_type(kernel)}, expected the dtype of the input, "
            f"{jnp.result_type(x)}. Convert one of them with `.astype`."
        )
