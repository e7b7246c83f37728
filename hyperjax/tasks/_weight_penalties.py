"""Multinomial logistic regression with one penalty for each weight, on MNIST made small."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from .._types import Batch, HParams, Params, Scalar, Split
from ._denoising import Convex
from ._mnist import images as mnist_images

_SIDE, _CLASSES = 28, 10


def weight_penalties() -> Convex:
    """Softmax regression without a bias, where each weight has a penalty of its own.

        mean over rows of cross-entropy(x w, y) + sum_ij exp(h_ij) w_ij^2 / 2

    Params w and hparams h are [features, classes], a batch is {"x": [n, features], "y": int [n]},
    and the score is the cross-entropy alone. With p the predicted probabilities, diag(p) - p p' has
    no eigenvalue above 1/2, so that the Hessian lies between min exp(h) and
    max exp(h) + lambda_max(x'x / n) / 2.

    Source: Pedregosa 2016, arXiv 1602.02355, and Salehi et al., arXiv 2308.10098, whose penalties
    are 1,440 on MNIST of 12 x 12.

    Raises ValueError unless hparams have the shapes of params.
    """

    def cross_entropy(params: Params, hparams: HParams, batch: Batch) -> Scalar:
        rows = optax.softmax_cross_entropy_with_integer_labels(batch["x"] @ params, batch["y"])
        return jnp.mean(rows)

    def loss(params: Params, hparams: HParams, batch: Batch) -> Scalar:
        if jnp.shape(params) != jnp.shape(hparams):
            raise ValueError(
                "weight_penalties: hparams must have the shape of params, one penalty a weight; "
                f"got {_checks.describe(hparams)} for {_checks.describe(params)}."
            )
        return cross_entropy(params, hparams, batch) + jnp.sum(jnp.exp(hparams) * params**2) / 2

    def smoothness(hparams: HParams, batch: Batch) -> Scalar:
        gram = batch["x"].T @ batch["x"] / batch["x"].shape[0]
        return jnp.exp(jnp.max(hparams)) + jnp.linalg.eigvalsh(gram)[-1] / 2

    return Convex(loss, cross_entropy, lambda h, batch: jnp.exp(jnp.min(h)), smoothness)


def small_mnist(
    data_dir: str | Path | None = None,
    seed: int = 0,
    *,
    train: int = 3_000,
    valid: int = 1_000,
    size: int = 12,
) -> Split:
    """`train` and `valid` other of the official 60,000 training images, averaged to size x size.

    Batches are {"x": [n, size^2] in [0, 1], of JAX's default float type, "y": int32 [n]}; that of
    training has the leading axis 1 of a single batch. A small pixel is the mean over the area that
    it covers of the 28 x 28 image. `seed` chooses the images. Read from `data_dir` or the folder
    that HYPERJAX_DATA names. Raises DataError if a file is missing or damaged, ValueError for
    numbers out of range.
    """
    for name, value in (("train", train), ("valid", valid), ("size", size)):
        _checks.positive_int("small_mnist", name, value)
    pixels, labels, official = mnist_images(data_dir)
    if train + valid > official or size > _SIDE:
        raise ValueError(
            f"small_mnist: `train` + `valid` must be at most {official} and `size` at most "
            f"{_SIDE}; got {train} + {valid} and {size}."
        )
    order = np.random.default_rng(seed).permutation(official)[: train + valid]
    images = pixels.reshape(-1, _SIDE, _SIDE)[order] / 255
    small = area_average(images, size).reshape(len(order), -1)
    digits = labels[order].astype(np.int32)
    return Split(
        {"x": jnp.asarray(small[None, :train]), "y": jnp.asarray(digits[None, :train])},
        {"x": jnp.asarray(small[train:]), "y": jnp.asarray(digits[train:])},
    )


def area_average(images: np.ndarray, size: int) -> np.ndarray:
    """Square images [n, side, side] as means over the areas of size x size pixels, size <= side."""
    side = images.shape[-1]
    ends = np.arange(size + 1) * side / size
    old = np.arange(side)
    # How much of old pixel j lies in new pixel i, in one dimension; rows sum to one.
    overlap = np.minimum(ends[1:, None], old + 1) - np.maximum(ends[:-1, None], old)
    shares = np.clip(overlap, 0, None) * size / side
    return np.einsum("ia,nab,jb->nij", shares, images, shares)
