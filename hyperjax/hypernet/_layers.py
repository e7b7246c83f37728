"""Layers that take a weight as an array or as `Gated`, and apply the gate to what they give.

A layer of a `Gated` weight equals the layer of the materialized one to rounding. Under vmap over
hyperparameters, where every example has a gate of its own and all share base and response, it is
two products of the whole batch with one matrix each: no weight per example is ever held.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax import lax

from hyperjax.kernels import gated_dense

from .. import _checks
from ..layers._convolve import convolver
from ..layers._windows import Padding, Windows, extent, pads_of, per_axis
from ._rules import Gated, Weight, materialize

Implementation: TypeAlias = Literal["auto", "xla", "patches"]


def dense(x: jax.Array, weight: Weight, bias: Weight | None = None) -> jax.Array:
    """x W + b: [..., in], [in, out], [out] -> [..., out].

    The layer of self-tuning networks (MacKay et al. 2019, arXiv 1903.03088, eq. 10) where weight
    and bias are `Gated`; their gates are two. Raises ValueError for shapes or dtypes that do not
    fit.
    """
    _check("dense", x, weight, bias, rank=2)
    if jnp.ndim(x) < 1 or jnp.shape(x)[-1] != _shape(weight)[0]:
        raise ValueError(
            f"dense: `x` is {_checks.describe(x)}, expected a last axis of {_shape(weight)[0]}, "
            f"the first of `weight` {_describe(weight)}."
        )
    if isinstance(weight, Gated):
        # A bias per example is no larger than what comes out.
        offset = None if bias is None else materialize(bias)
        return gated_dense(x, weight.base, weight.response, _row(weight, 1), bias=offset)
    return _add(x @ weight, bias)


def conv(
    x: jax.Array,
    weight: Weight,
    bias: Weight | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    implementation: Implementation = "auto",
) -> jax.Array:
    """A convolution in one to three dimensions, channels last: [..., *space, in] -> [..., out].

    `weight` is [*window, in / groups, out] and decides the number of dimensions; `bias` [out]. Axes
    of `x` before those of space are examples; there may be none. `strides` and `dilation` (of the
    window) are one integer, or one per dimension; `padding` is "SAME", "SAME_LOWER", "VALID" or a
    pair for each dimension, where a negative number cuts off. A gate acts on output channels.

    `implementation`: "xla" is XLA's convolution, twice for a `Gated` weight. "patches" is a product
    with the patches of x, which hold it as many times as the window has entries (of a window of
    3 x 3: 9 times), once for a `Gated` weight too, and are kept for the derivative; for one group.
    "auto" takes patches on CPU for one group, since XLA's convolution is many times slower
    there inside `lax.scan`, and XLA's otherwise. Take "xla" where memory is what lacks.

    Raises ValueError for shapes, dtypes or arguments that do not fit, and for a window that is
    larger than x with its padding. The body `convolution` is for hypernetworks.
    """
    _checks.positive_int("conv", "groups", groups)
    _checks.one_of("conv", "implementation", implementation, get_args(Implementation))
    if implementation == "patches" and groups > 1:
        raise ValueError(f"conv: patches are for one group; got {groups}. Take 'auto' or 'xla'.")
    _check("conv", x, weight, bias, rank=None)
    space = len(_shape(weight)) - 2
    if not 1 <= space <= 3:
        raise ValueError(
            f"conv: `weight` is {_describe(weight)}, expected 3 to 5 axes: [*window, in, out]."
        )
    if jnp.ndim(x) <= space or jnp.shape(x)[-1] != _shape(weight)[-2] * groups:
        raise ValueError(
            f"conv: `x` is {_checks.describe(x)}, expected {space} axes of space and a last one of "
            f"{_shape(weight)[-2] * groups} channels, to fit `weight` {_describe(weight)} in "
            f"{groups} group(s)."
        )
    if _shape(weight)[-1] % groups:
        raise ValueError(
            f"conv: `weight` is {_describe(weight)}, expected a last axis that `groups` divides, "
            f"{groups}."
        )
    lead = x.shape[: x.ndim - space - 1]
    images = jnp.reshape(x, (math.prod(lead), *x.shape[len(lead) :]))
    window = _shape(weight)[:space]
    strides = per_axis("conv", "strides", strides, space)
    dilation = per_axis("conv", "dilation", dilation, space)
    pads = pads_of("conv", padding, images.shape[1:-1], extent(window, dilation), strides)
    patches = implementation == "patches" or (
        implementation == "auto" and groups == 1 and jax.default_backend() == "cpu"
    )
    windows = Windows(window, strides, pads, dilation, (1,) * space)
    product = convolver(images, windows, groups, "patches" if patches else "xla")
    y = _linear(product, weight, space + 2)
    return _add(jnp.reshape(y, (*lead, *y.shape[1:])), bias)


def embed(tokens: jax.Array, table: Weight) -> jax.Array:
    """Rows of a table: integers [...] and [count, width] -> [..., width].

    Indices out of range follow the rules of indexing in JAX. Raises TypeError for tokens that are
    not integers, ValueError for a table that is not a matrix.
    """
    if not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
        raise TypeError(
            f"embed: `tokens` is {_checks.describe(tokens)}, expected integers; convert them with "
            "`.astype(jnp.int32)`."
        )
    _check_weight("embed", "table", table, rank=2)
    return _linear(lambda rows: rows[tokens], table, jnp.ndim(tokens) + 1)


def square_norm(weight: Weight) -> jax.Array:
    """The sum of squares of a weight, for penalties: a scalar.

    Of W + V s by three sums per output, W^2 + 2 s W V + s^2 V^2, none of which depends on s: under
    vmap over hyperparameters they are taken once. The price is rounding of about eps (|W|^2 +
    |s V|^2), eps that of the dtype, which matters where W and s V cancel; what would come out
    negative for an output is 0. The derivative is that of the sums.

    Raises ValueError for a weight without axes, or a gated one whose parts do not fit.
    """
    _check_weight("square_norm", "weight", weight, rank=None)
    if not isinstance(weight, Gated):
        return jnp.sum(jnp.square(weight))
    base, response, _ = weight
    per_output = lambda x: jnp.sum(x, axis=tuple(range(x.ndim - 1)))
    gate = _row(weight, 1)
    cross = 2 * per_output(base * response) + gate * per_output(jnp.square(response))
    total = per_output(jnp.square(base)) + gate * cross
    return jnp.sum(total + lax.stop_gradient(jnp.maximum(-total, 0)))


def masked(weight: Weight, mask: jax.Array) -> Weight:
    """`weight * mask`, for DropConnect and pruning: the same mask for base and response.

    `mask` has the shape of the weight and any type. One mask per example would be a weight per
    example: draw it once for the batch.

    Raises ValueError unless `mask` has the shape of the weight.
    """
    _check_weight("masked", "weight", weight, rank=None)
    if jnp.shape(mask) != _shape(weight):
        raise ValueError(
            f"masked: `mask` has shape {jnp.shape(mask)}, expected that of `weight`, "
            f"{_shape(weight)}."
        )
    if isinstance(weight, Gated):
        keep = mask.astype(weight.base.dtype)
        return weight._replace(base=weight.base * keep, response=weight.response * keep)
    return weight * mask.astype(weight.dtype)


def _linear(product: Callable, weight: Weight, rank: int) -> jax.Array:
    """A product that is linear in its weight; `rank` is that of what comes out."""
    if isinstance(weight, Gated):
        return product(weight.base) + _row(weight, rank) * product(weight.response)
    return product(weight)


def _row(weight: Gated, rank: int) -> jax.Array:
    """The gate as [1, ..., out] of this rank."""
    return jnp.reshape(weight.gate, (1,) * (rank - 1) + weight.gate.shape[-1:])


def _add(y: jax.Array, bias: Weight | None) -> jax.Array:
    if bias is None:
        return y
    row = materialize(bias)
    return y + jnp.reshape(row, (1,) * (y.ndim - 1) + row.shape)


def _shape(weight: Weight) -> tuple[int, ...]:
    return jnp.shape(weight.base if isinstance(weight, Gated) else weight)


def _describe(weight: Weight) -> str:
    return _checks.describe(weight.base if isinstance(weight, Gated) else weight)


def _check(where: str, x, weight: Weight, bias: Weight | None, *, rank: int | None) -> None:
    """One dtype, and a bias that fits."""
    _check_weight(where, "weight", weight, rank=rank)
    if bias is not None:
        _check_weight(where, "bias", bias, rank=1)
        if _shape(bias) != _shape(weight)[-1:]:
            raise ValueError(
                f"{where}: `bias` is {_describe(bias)}, expected the shape {_shape(weight)[-1:]}, "
                f"the last axis of `weight` {_describe(weight)}."
            )
    for name, other in {"weight": weight, "bias": bias}.items():
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(other)}
        if dtypes - {jnp.result_type(x)}:
            found = ", ".join(sorted(str(d) for d in dtypes))
            raise ValueError(
                f"{where}: `{name}` is {found}, expected the dtype of `x`, {jnp.result_type(x)}. "
                "Convert one of them with `.astype`."
            )


def _check_weight(where: str, name: str, weight: Weight, *, rank: int | None) -> None:
    shape = _shape(weight)
    if len(shape) < 1 or (rank is not None and len(shape) != rank):
        wanted = "at least 1" if rank is None else str(rank)
        raise ValueError(f"{where}: `{name}` is {_describe(weight)}, expected {wanted} axes.")
    if not isinstance(weight, Gated):
        return
    row = (1,) * (len(shape) - 1) + shape[-1:]
    found = jnp.shape(weight.response), jnp.shape(weight.gate)
    if found != (shape, row):
        raise ValueError(
            f"{where}: `{name}` is Gated with a base of shape {shape}, a response of {found[0]} "
            f"and a gate of {found[1]}; expected {shape} and {row}. One gate per example comes by "
            "`jax.vmap` over hparams."
        )
