"""Gaussian noise, the usual way for a copy to explore (Jaderberg et al. 2017, arXiv 1711.09846,
multiply by 0.8 or 1.2: steps of a fixed size in the logarithm)."""

import jax
import jax.numpy as jnp

from .._types import HParams, Key
from ._replace import Explore


def perturb(scale: float) -> Explore:
    """`explore(key, hparams)` that adds normal noise of deviation `scale` to every raw value.

    Raises ValueError for a negative scale.
    """
    if not scale >= 0:
        raise ValueError(f"perturb: `scale` must be >= 0; got {scale!r}.")

    def explore(key: Key, hparams: HParams) -> HParams:
        leaves, tree = jax.tree.flatten(hparams)
        keys = jax.random.split(key, len(leaves))
        noise = lambda k, x: jax.random.normal(k, jnp.shape(x), jnp.result_type(x))
        return tree.unflatten([x + scale * noise(k, x) for k, x in zip(keys, leaves, strict=True)])

    return explore
