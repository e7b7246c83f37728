"""Interval arithmetic: bounds that hold for every point of a box, through layers of a network.

All bounds hold up to rounding, which is not directed outwards here. Products are asked for at full
precision: the default of an accelerator may round factors to ten bits.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _checks
from .._types import Key, PyTree, Scalar


class Interval(NamedTuple):
    """A box, entry by entry, and a point in it that is carried along: lower <= middle <= upper.

    The middle of the first box is its centre; behind an activation it is the image of what it
    was, not the centre of the image.
    """

    lower: jax.Array
    middle: jax.Array
    upper: jax.Array


Bounded: TypeAlias = jax.Array | Interval

_PROBES = 20.0, 4001  # an activation is looked at from minus to plus the first, at so many points
_FALL = 1e-5  # of the largest value seen: what rounding may do


def interval(middle: jax.Array, radius: jax.Array | float) -> Interval:
    """[middle - radius, middle + radius]; `radius` >= 0 broadcasts.

    Raises ValueError for a radius below zero or NaN. Where it is traced, the bounds of that entry
    are NaN, and so is all that depends on them.
    """
    known = _checks.entries(radius)
    if known is not None and not np.all(known >= 0):
        raise ValueError(
            f"interval: `radius` must be >= 0; got {np.min(known)}. Pass a size, `jnp.abs(radius)`."
        )
    lower, upper = middle - radius, middle + radius
    if known is None:
        lower, upper = (jnp.where(radius >= 0, end, jnp.nan) for end in (lower, upper))
    return Interval(lower, middle, upper)


def interval_dense(
    x: Bounded, weight: Bounded, bias: Bounded | None = None, *, nonnegative: bool = False
) -> Interval:
    """Bounds of x @ weight + bias over all x, weights and biases in their boxes.

    x [..., in], weight [in, out], bias [out], each an array or an `Interval`. Where x or the
    weights are an array the bounds are those of the box, without slack: with the centre c and the
    radius r of the other, c w -+ r |w|. Where both are boxes, x is split into max(x, 0) and
    min(x, 0), of which the products with w have bounds without slack: so has the sum, unless an
    entry of x and its weight both may have either sign, where it is at most twice too wide.

    nonnegative: x is known to be >= 0, as behind a relu, which saves half of the eight products.
      If any of x is not, or its bounds are not in order, all bounds come back as NaN: never as
      bounds that do not hold.
    """
    middle = _matmul(_middle(x), _middle(weight))
    lower = upper = middle
    if isinstance(x, Interval):
        if isinstance(weight, Interval):
            lower, upper = _product(x, weight, nonnegative)
        else:
            size = jnp.abs(weight)
            lower, upper = _around(x, lambda c: _matmul(c, weight), lambda r: _matmul(r, size))
    elif isinstance(weight, Interval):
        size = jnp.abs(x)
        lower, upper = _around(weight, lambda c: _matmul(x, c), lambda r: _matmul(size, r))
    # Rounding may carry the sums of parts past the middle, which lies in the box.
    out = _around_middle(lower, middle, upper)
    if nonnegative:
        fault = jnp.where(_is_nonnegative(x), 0, jnp.nan).astype(middle.dtype)
        out = Interval(out.lower + fault, middle, out.upper + fault)
    return out if bias is None else _add(out, bias)


def interval_map(function: Callable[[jax.Array], jax.Array], x: Interval) -> Interval:
    """The image under a function that is applied entry by entry and nowhere falls, such as relu.

    Raises ValueError for one that falls, such as silu or gelu, as far as that can be seen: it is
    evaluated at 4,001 points from -20 to 20, for an entry of any shape [1, ..., 1]. Falls that are
    narrower or lie further out are not found, nor is anything of a function of traced values; and
    it is not checked that entries do not meet in it.
    """
    refuse_falling("interval_map", "function", function, x.lower)
    return monotone_image(function, x)


def monotone_image(function: Callable[[jax.Array], jax.Array], x: Interval) -> Interval:
    """`interval_map` of a function that has been checked."""
    # What nowhere falls may do so by rounding.
    return _around_middle(*map(function, x))


def refuse_falling(where: str, name: str, function: Callable, like: jax.Array) -> None:
    """Raise ValueError if `function` is seen to fall, for arrays of the rank and type of `like`."""
    _checks.is_callable(where, name, function)
    with jax.ensure_compile_time_eval():
        grid = jnp.linspace(-_PROBES[0], *_PROBES, dtype=like.dtype)
        seen = jax.vmap(function)(grid.reshape(-1, *(1,) * like.ndim))
    values = _checks.entries(seen)
    if values is None:
        return
    values = values.astype(np.float64)
    fall = np.max(np.maximum.accumulate(values) - values)
    if not fall <= _FALL * max(1.0, np.max(np.abs(values))):
        raise ValueError(
            f"{where}: `{name}` must nowhere fall, or the ends of a box are not the bounds of its "
            f"image; it falls by {fall:.2g} between {-_PROBES[0]:g} and {_PROBES[0]:g}. Take one "
            "that rises, such as relu, tanh or softplus."
        )


def worst_logits(logits: Interval, labels: jax.Array) -> jax.Array:
    """The logits [..., classes] of the box that are worst for `labels` [...], integers.

    Lower at the label and upper elsewhere; upper everywhere if the label is no class. The
    cross-entropy falls in the first and rises in the others, so that at this corner it is the
    largest of the whole box.
    """
    hit = jax.nn.one_hot(labels, logits.lower.shape[-1], dtype=bool)
    return jnp.where(hit, logits.lower, logits.upper)


def certified(logits: Interval, labels: jax.Array) -> jax.Array:
    """Whether the label has the largest logit everywhere in the box: bool [...].

    False for a label that is none of the classes, and where bounds are NaN.
    """
    hit = jax.nn.one_hot(labels, logits.lower.shape[-1], dtype=bool)
    least = jnp.min(logits.lower, axis=-1, where=hit, initial=jnp.inf)
    rival = jnp.max(logits.upper, axis=-1, where=~hit, initial=-jnp.inf)
    return jnp.any(hit, axis=-1) & (least > rival)


class Overlap(NamedTuple):
    """What boxes have in common."""

    box: Interval  # lower > upper somewhere if it is empty
    empty: jax.Array  # bool


def intersection(boxes: Interval) -> Overlap:
    """What boxes [n, d] have in common, [d]. Every point of it is a point of each of them."""
    lower, upper = jnp.max(boxes.lower, axis=0), jnp.min(boxes.upper, axis=0)
    return Overlap(Interval(lower, (lower + upper) / 2, upper), jnp.any(lower > upper))


def middles(tree: PyTree) -> PyTree:
    """A tree with intervals for leaves, without their bounds."""
    return jax.tree.map(_middle, tree, is_leaf=_is_interval)


def draw_inside(key: Key, tree: PyTree) -> PyTree:
    """A point of the box, uniformly; `tree` has intervals for leaves."""

    def one(key: Key, x: Interval) -> jax.Array:
        share = jax.random.uniform(key, x.lower.shape, x.lower.dtype)
        return jnp.clip(x.lower + share * (x.upper - x.lower), x.lower, x.upper)

    return _draw(key, tree, one)


def draw_corner(key: Key, tree: PyTree) -> PyTree:
    """A corner of the box, all with the same chance; `tree` has intervals for leaves.

    In a box of many dimensions nearly all points drawn uniformly give nearly the same sums.
    Corners are further out, and `low_corner` further still.
    """
    side = lambda key, x: jnp.where(
        jax.random.bernoulli(key, shape=x.lower.shape), x.upper, x.lower
    )
    return _draw(key, tree, side)


def low_corner(function: Callable[[PyTree], Scalar], tree: PyTree) -> PyTree:
    """The corner where `function` is least, if it is linear; in general a good guess.

    Every entry goes to the side to which the gradient of `function(point)` at the middle falls.
    `tree` has intervals for leaves, as in `draw_inside`; what is no interval stays.
    """
    slopes = jax.grad(function)(middles(tree))

    def side(x: Bounded, slope: jax.Array) -> jax.Array:
        return jnp.where(slope > 0, x.lower, x.upper) if isinstance(x, Interval) else x

    return jax.tree.map(side, tree, slopes, is_leaf=_is_interval)


def _product(x: Interval, w: Interval, nonnegative: bool) -> tuple[jax.Array, jax.Array]:
    """Bounds of x @ w. By parts, x = max(x, 0) + min(x, 0), which lie in boxes of one sign each.

    For x in [a, b], 0 <= a, and w in [c, d] the least product is a c+ - b c-, the largest
    b d+ - a d-; and a product with min(x, 0) is minus the product with max(-x, 0).
    """
    least, most = _one_sign(jax.nn.relu(x.lower), jax.nn.relu(x.upper), w)
    if nonnegative:
        return least, most
    negative_least, negative_most = _one_sign(jax.nn.relu(-x.upper), jax.nn.relu(-x.lower), w)
    return least - negative_most, most - negative_least


def _one_sign(a: jax.Array, b: jax.Array, w: Interval) -> tuple[jax.Array, jax.Array]:
    relu = jax.nn.relu
    least = _matmul(a, relu(w.lower)) - _matmul(b, relu(-w.lower))
    most = _matmul(b, relu(w.upper)) - _matmul(a, relu(-w.upper))
    return least, most


def _around(x: Interval, centre: Callable, radius: Callable) -> tuple[jax.Array, jax.Array]:
    middle, spread = centre((x.lower + x.upper) / 2), radius((x.upper - x.lower) / 2)
    return middle - spread, middle + spread


def _around_middle(lower: jax.Array, middle: jax.Array, upper: jax.Array) -> Interval:
    return Interval(jnp.minimum(lower, middle), middle, jnp.maximum(upper, middle))


def _is_nonnegative(x: Bounded) -> jax.Array:
    if isinstance(x, Interval):
        return jnp.all((x.lower >= 0) & (x.upper >= x.lower))
    return jnp.all(x >= 0)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _draw(key: Key, tree: PyTree, one: Callable[[Key, Interval], jax.Array]) -> PyTree:
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_interval)
    keys = jax.random.split(key, len(leaves))
    points = [
        one(k, x) if isinstance(x, Interval) else x for k, x in zip(keys, leaves, strict=True)
    ]
    return structure.unflatten(points)


def _add(x: Interval, bias: Bounded) -> Interval:
    ends = bias if isinstance(bias, Interval) else Interval(bias, bias, bias)
    lift = lambda b, y: jnp.reshape(b, (1,) * (y.ndim - b.ndim) + b.shape)
    return Interval(*(y + lift(b, y) for y, b in zip(x, ends, strict=True)))


def _middle(x: Bounded) -> jax.Array:
    return x.middle if isinstance(x, Interval) else x


def _is_interval(x) -> bool:
    return isinstance(x, Interval)
