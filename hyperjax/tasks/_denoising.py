"""Denoising whose inner problem is strongly convex and smooth, with the constants that say so.

An inner solution x of [n, H, W] denoises the batch, noisy images of the same shape:

    minimize |x - noisy|^2 / 2 + (a penalty that hparams weigh) over x.

The score compares x with a batch of clean images. Hparams are logarithms, so that there is no bound
to keep; what exp makes of them, and the square of gamma = exp(smoothing), must not overflow, so in
float32 let them stay below 44. A gamma below tiny^(1/3), 2e-13 in float32, counts as that number,
with a derivative of zero. Losses compute in the types of params and hparams.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._types import Batch, HParams, Loss, Params, Scalar

Constant = Callable[[HParams, Batch], Scalar]


class Convex(NamedTuple):
    """A bilevel problem with a strongly convex, smooth inner loss.

    `convexity(hparams, batch)` is at most the smallest eigenvalue of d^2 loss / d params^2,
    `smoothness(hparams, batch)` at least the largest, for all params.
    """

    loss: Loss
    score: Loss
    convexity: Constant
    smoothness: Constant


def half_squared_error(params: Params, hparams: HParams, clean: Batch) -> Scalar:
    """Half the squared error, mean over all pixels of all images."""
    return jnp.mean((params - clean) ** 2) / 2


# ---------------------------------------------------------------------------- total variation


def total_variation() -> Convex:
    """Smoothed isotropic total variation (Rudin, Osher, Fatemi 1992), as MAID was tried on.

        |x - noisy|^2 / 2 + sum over pixels p of w_p sqrt(|grad x|_p^2 + gamma^2)

    with forward differences, zero across the right and lower edge, so that the eigenvalues of
    grad' grad are below 8. Hparams: {"weight": log w, a scalar or a map [H, W] that all images
    share, "smoothing": log gamma, a scalar}. The Hessian lies between 1 and 1 + 8 max(w) / gamma.

    A map of weights belongs to the image that it was learned on; two scalars serve any image.

    Source: Salehi, Mukherjee, Roberts, Ehrhardt, arXiv 2308.10098, with weight and smoothing as
    there. Raises ValueError at trace time if the map or the batch has another shape than x.
    """

    def loss(params: Params, hparams: HParams, batch: Batch) -> Scalar:
        _check_images("total_variation", params, batch)
        weight, smoothing = jnp.exp(hparams["weight"]), jnp.exp(_floored(hparams["smoothing"]))
        if jnp.ndim(weight):
            _check_map(weight, params)
            weight = jnp.expand_dims(weight, range(params.ndim - 2))
        down, right = differences(params)
        return jnp.sum((params - batch) ** 2) / 2 + jnp.sum(
            weight * jnp.sqrt(down**2 + right**2 + smoothing**2)
        )

    def smoothness(hparams: HParams, batch: Batch) -> Scalar:
        # In logarithms, lest a small gamma underflow before it divides.
        return 1 + 8 * jnp.exp(jnp.max(hparams["weight"]) - _floored(hparams["smoothing"]))

    return Convex(loss, half_squared_error, _one, smoothness)


def differences(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Forward differences of images [..., H, W] down and to the right, zero across the edge."""
    flat = [(0, 0)] * (x.ndim - 2)
    down = jnp.pad(jnp.diff(x, axis=-2), [*flat, (0, 1), (0, 0)])
    right = jnp.pad(jnp.diff(x, axis=-1), [*flat, (0, 0), (0, 1)])
    return down, right


# -------------------------------------------------------------------------- fields of experts


def fields_of_experts() -> Convex:
    """Learned filters under a smoothed absolute value: the convex field of experts.

        |x - noisy|^2 / 2 + sum over filters i, pixels p of w_i sqrt((k_i * x)_p^2 + gamma_i^2)

    Hparams: {"filters": [m, s, s], of which the means are taken off to give k_i, "weight": log w
    [m], "smoothing": log gamma [m]}; `dct_filters` is a start. Images are periodic: the matrices
    K_i of the filters are then circulant and share their eigenvectors, and the bound

        1 + max over frequencies of sum_i (w_i / gamma_i) |transform of k_i|^2

    on the Hessian is its largest eigenvalue at a constant image, not just above it.

    Source: Roth and Black 2005 for the model; potential and parameters of Salehi et al., arXiv
    2308.10098, whose 48 filters of 7 x 7 have no mean either. Theirs reflect at the edges, where
    no such bound is exact. Raises ValueError at trace time for shapes that do not fit.
    """

    def loss(params: Params, hparams: HParams, batch: Batch) -> Scalar:
        _check_images("fields_of_experts", params, batch)
        _check_experts(hparams, params)
        filters = zero_mean(hparams["filters"])
        weight, smoothing = jnp.exp(hparams["weight"]), jnp.exp(_floored(hparams["smoothing"]))
        responses = correlate(params, filters)  # [m, n H W]
        potential = jnp.sqrt(responses**2 + smoothing[:, None] ** 2)
        return jnp.sum((params - batch) ** 2) / 2 + jnp.sum(weight * jnp.sum(potential, axis=1))

    def smoothness(hparams: HParams, batch: Batch) -> Scalar:
        spectra = jnp.abs(jnp.fft.fft2(zero_mean(hparams["filters"]), jnp.shape(batch)[-2:])) ** 2
        curvature = jnp.exp(hparams["weight"] - _floored(hparams["smoothing"]))
        return 1 + jnp.max(jnp.sum(curvature[:, None, None] * spectra, axis=0))

    return Convex(loss, half_squared_error, _one, smoothness)


def dct_filters(size: int) -> np.ndarray:
    """All but the constant of the two-dimensional cosine transform: [size^2 - 1, size, size].

    Each has unit norm and no mean, and they are orthogonal to one another: 48 of 7 x 7.

    Raises ValueError unless `size` is an integer >= 2.
    """
    _checks.positive_int("dct_filters", "size", size, least=2)
    places = (np.arange(size) + 0.5) * np.pi / size
    rows = np.cos(np.arange(size)[:, None] * places)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.einsum("ap,bq->abpq", rows, rows).reshape(-1, size, size)[1:]


def zero_mean(filters: jax.Array) -> jax.Array:
    return filters - jnp.mean(filters, axis=(1, 2), keepdims=True)


def correlate(images: jax.Array, filters: jax.Array) -> jax.Array:
    """Responses [m, n H W] of periodic images [n, H, W] to filters [m, s, s]."""
    size = filters.shape[-1]
    shifted = [
        jnp.roll(images, (-i, -j), axis=(-2, -1)).ravel() for i in range(size) for j in range(size)
    ]
    # One product of matrices: as fast as convolutions are in float32 and much faster in float64.
    return filters.reshape(filters.shape[0], -1) @ jnp.stack(shifted)


def _floored(smoothing: jax.Array) -> jax.Array:
    """log gamma, not so low that gamma^3 underflows: second derivatives divide by it."""
    return jnp.maximum(smoothing, math.log(jnp.finfo(jnp.result_type(smoothing)).tiny) / 3)


# -------------------------------------------------------------------------------------- checks


def _one(hparams: HParams, batch: Batch) -> Scalar:
    return jnp.ones((), jnp.result_type(batch))


def _check_images(where: str, params: Params, batch: Batch) -> None:
    if jnp.ndim(params) < 2 or jnp.shape(params) != jnp.shape(batch):
        raise ValueError(
            f"{where}: params and the batch must be images of one shape [n, H, W]; got "
            f"{_checks.describe(params)} and {_checks.describe(batch)}. Start from the noisy ones."
        )


def _check_map(weight: jax.Array, params: Params) -> None:
    if jnp.shape(weight) != jnp.shape(params)[-2:]:
        raise ValueError(
            "total_variation: `weight` must be a scalar or a map of the images' size "
            f"{jnp.shape(params)[-2:]}; got {_checks.describe(weight)}."
        )


def _check_experts(hparams: HParams, params: Params) -> None:
    shape = jnp.shape(hparams["filters"])
    count = shape[:1]
    sizes = [jnp.shape(hparams[name]) for name in ("weight", "smoothing")]
    square = len(shape) == 3 and shape[1] == shape[2] <= min(jnp.shape(params)[-2:])
    if not square or sizes != [count, count]:
        raise ValueError(
            "fields_of_experts: hparams must be {'filters': [m, s, s], 'weight': [m], 'smoothing': "
            f"[m]}} with filters no larger than the images; got {shape}, {sizes[0]}, {sizes[1]} "
            f"for images {jnp.shape(params)[-2:]}."
        )
