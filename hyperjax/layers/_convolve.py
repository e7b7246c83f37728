"""One convolution, by the formulation that is fast where it runs."""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ._windows import Windows, patches

Formulation: TypeAlias = Literal["xla", "patches"]


class Products(NamedTuple):
    """How products are taken, in the words of `lax.dot_general`."""

    precision: lax.PrecisionLike = None
    preferred_element_type: DTypeLike | None = None


AS_THEY_COME = Products()


def convolver(
    x: jax.Array,
    windows: Windows,
    groups: int,
    formulation: Formulation,
    products: Products = AS_THEY_COME,
) -> Callable[[jax.Array], jax.Array]:
    """Of x [n, *space, in], as a function of kernels [*window, in / groups, out].

    By patches of x, which are taken once for all kernels, or by XLA's own convolution. On CPU that
    one is up to a half quicker in a program of its own, and many times slower inside
    `lax.scan`, where training happens.
    """
    if formulation == "xla":
        return lambda kernel: _xla(x, kernel, windows, groups, products)
    product = functools.partial(_product, products)
    if groups == 1:
        seen = patches(x, windows)
        return lambda kernel: product(seen, kernel)
    seen = jax.vmap(lambda x: patches(x, windows), in_axes=-2)(_apart(x, groups))

    def grouped(kernel: jax.Array) -> jax.Array:
        y = jax.vmap(product, in_axes=(0, -2), out_axes=-2)(seen, _apart(kernel, groups))
        return jnp.reshape(y, (*y.shape[:-2], -1))

    return grouped


def _apart(x: jax.Array, groups: int) -> jax.Array:
    """The last axis as [groups, each]."""
    return jnp.reshape(x, (*x.shape[:-1], groups, x.shape[-1] // groups))


def _product(products: Products, seen: jax.Array, kernel: jax.Array) -> jax.Array:
    """[n, *places, window * in], [*window, in, out]. Matrices, as they need no transposition."""
    rows = jnp.reshape(seen, (math.prod(seen.shape[:-1]), seen.shape[-1]))
    y = jnp.dot(rows, jnp.reshape(kernel, (-1, kernel.shape[-1])), **products._asdict())
    return jnp.reshape(y, (*seen.shape[:-1], kernel.shape[-1]))


def _xla(x, kernel, windows: Windows, groups: int, products: Products) -> jax.Array:
    letters = "DHW"[3 - len(windows.window) :]
    return lax.conv_general_dilated(
        x,
        kernel,
        windows.strides,
        windows.pads,
        lhs_dilation=windows.holes,
        rhs_dilation=windows.dilation,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
        **products._asdict(),
    )
