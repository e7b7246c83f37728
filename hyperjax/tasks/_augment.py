"""Random changes of inputs whose strengths may be hyperparameters, traced, one for every example.

Each is `(key, images, strength, ...) -> images` for images [..., H, W, channels] (noise and dropout
for arrays of any shape). Every image has a draw of its own and all have the strength in common; one
strength per example is a `vmap` over keys, images and strengths. Nothing is looked up or branched
on, so they compile once for all strengths, and a strength of zero is the identity, bit by bit.

Colours are linear in the pixels and nothing is clipped, so that what they preserve is preserved
exactly: pixels may leave [0, 1], which a network that sees them standardized does not mind.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _checks
from .._types import Key, Scalar

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, of red, green and blue; they sum to one


def jitter(key: Key, x: jax.Array, deviation: Scalar | float) -> jax.Array:
    """x plus normal noise of that standard deviation, in any shape."""
    return x + _as(x, deviation) * jax.random.normal(key, x.shape, x.dtype)


def dropout(key: Key, x: jax.Array, rate: Scalar | float) -> jax.Array:
    """Every entry zero with probability `rate`, else divided by 1 - rate, so that means are kept.

    Rate 0 is the identity and rate 1 gives zeros. The mask has no derivative in the rate, and the
    rate counts as a constant: for tuning by `bilevel.self_tuning`, not by gradients. Raises
    ValueError for a rate outside [0, 1]; what is traced cannot be looked at.
    """
    within_one("dropout", "rate", rate)
    rate = lax.stop_gradient(_as(x, rate))
    kept = jax.random.uniform(key, x.shape, x.dtype) >= rate
    # A factor rather than a quotient: at rate 1 the latter's derivative would be 0 times infinity.
    return x * jnp.where(kept, 1 / jnp.maximum(1 - rate, jnp.finfo(x.dtype).eps), 0)


def scaling(key: Key, images: jax.Array, strength: Scalar | float) -> jax.Array:
    """Each image times a factor that is uniform in (1 / (1 + strength), 1 + strength).

    Raises ValueError for images of another shape.
    """
    _check("scaling", images, colours=False)
    high = 1 + _as(images, strength)
    low = 1 / high
    return images * (low + (high - low) * _uniform(key, images))


def brightness(key: Key, images: jax.Array, strength: Scalar | float) -> jax.Array:
    """Each image times a factor that is uniform in (1 - strength, 1 + strength), 0 the black.

    Raises ValueError for images of another shape.
    """
    _check("brightness", images, colours=False)
    return images * (1 + _symmetric(key, images, strength))


def contrast(key: Key, images: jax.Array, strength: Scalar | float) -> jax.Array:
    """Distances from the mean luma of the image times a factor as in `brightness`.

    Raises ValueError for images of another shape.
    """
    _check("contrast", images)
    mean = jnp.mean(_luma(images), axis=(-3, -2), keepdims=True)
    return images + _symmetric(key, images, strength) * (images - mean)


def saturation(key: Key, images: jax.Array, strength: Scalar | float) -> jax.Array:
    """Distances from grey, that is of each pixel from its luma, times a factor as in `brightness`.

    Luma is preserved.

    Raises ValueError for images of another shape.
    """
    _check("saturation", images)
    return images + _symmetric(key, images, strength) * (images - _luma(images))


def hue(key: Key, images: jax.Array, strength: Scalar | float) -> jax.Array:
    """Colours turned by an angle uniform within +- strength full turns; at 0.5, all angles.

    The part of a pixel off its luma is rotated in the plane of constant luma, which preserves its
    luma and its length (in red, green and blue). The usual shift of H in HSV is neither linear nor
    smooth, and changes luma.

    Raises ValueError for images of another shape.
    """
    _check("hue", images)
    angle = 2 * jnp.pi * _symmetric(key, images, strength)
    chroma = images - _luma(images)
    normal = jnp.asarray(LUMA, images.dtype)
    axis = normal / jnp.linalg.norm(normal)
    across = jnp.cross(jnp.broadcast_to(axis, chroma.shape), chroma)
    return images + (jnp.cos(angle) - 1) * chroma + jnp.sin(angle) * across


def cutout(
    key: Key, images: jax.Array, holes: Scalar | float, length: Scalar | float, *, most: int
) -> jax.Array:
    """`holes` squares of `length` x `length` pixels set to zero, wherever they fall in each image.

    Centres are uniform over the pixels, so that a square may reach over the edge, and squares may
    overlap. `holes`, at most `most`, and `length` are traced and rounded down; they count as
    constants. Zero is the mean of standardized images. Source: DeVries and Taylor 2017, arXiv
    1708.04552.

    Raises ValueError for images of another shape, or a `most` that is not a positive integer.
    """
    _check("cutout", images, colours=False)
    _checks.positive_int("cutout", "most", most)
    height, width = images.shape[-3:-1]
    shape = (*images.shape[:-3], most)
    of_row, of_column = jax.random.split(key)
    rows = jax.random.randint(of_row, shape, 0, height)
    columns = jax.random.randint(of_column, shape, 0, width)
    covered = covers(rows, columns, holes, length, (height, width))
    return jnp.where(covered[..., None], 0, images)


def covers(
    rows: jax.Array,
    columns: jax.Array,
    holes: Scalar | float,
    length: Scalar | float,
    size: tuple[int, int],
) -> jax.Array:
    """Which pixels, bool [..., height, width], lie in one of the first `holes` squares.

    Centres are `rows` and `columns`, int [..., squares]; for an even length, the centre is the
    first pixel of the second half.
    """
    count = jnp.floor(lax.stop_gradient(holes)).astype(jnp.int32)
    side = jnp.floor(lax.stop_gradient(length)).astype(jnp.int32)

    def within(centre: jax.Array, extent: int) -> jax.Array:  # [..., squares, extent]
        shape = (*centre.shape, extent)
        place = lax.broadcasted_iota(jnp.int32, shape, centre.ndim)
        place = place - (centre - side // 2)[..., None]
        return (place >= 0) & (place < side)

    used = lax.broadcasted_iota(jnp.int32, rows.shape, rows.ndim - 1) < count
    down = within(rows, size[0]) & used[..., None]
    return jnp.any(down[..., :, None] & within(columns, size[1])[..., None, :], axis=-3)


def within_one(where: str, name: str, rate: Scalar | float) -> None:
    """Refuses a rate that is known and not in [0, 1]."""
    known = _checks.entries(rate)
    if known is not None and not np.all((known >= 0) & (known <= 1)):
        raise ValueError(f"{where}: `{name}` must be in [0, 1]; got {rate!r}.")


def _as(x: jax.Array, strength: Scalar | float) -> jax.Array:
    """The strength in the type of x, since a hyperparameter must not promote the inputs."""
    return jnp.asarray(strength, x.dtype)


def _uniform(key: Key, images: jax.Array) -> jax.Array:
    """One number in [0, 1) per image: [..., 1, 1, 1]."""
    return jax.random.uniform(key, (*images.shape[:-3], 1, 1, 1), images.dtype)


def _symmetric(key: Key, images: jax.Array, strength: Scalar | float) -> jax.Array:
    return _as(images, strength) * (2 * _uniform(key, images) - 1)


def _luma(images: jax.Array) -> jax.Array:
    # Not a matrix product, which some accelerators round.
    return sum(w * images[..., i : i + 1] for i, w in enumerate(LUMA))  # type: ignore[return-value]


def _check(where: str, images: jax.Array, *, colours: bool = True) -> None:
    if jnp.ndim(images) < 3 or (colours and images.shape[-1] != 3):
        raise ValueError(
            f"{where}: `images` must be [..., H, W, {'3' if colours else 'channels'}]; got "
            f"{_checks.describe(images)}. A grey image has one channel: `x[..., None]`."
        )
