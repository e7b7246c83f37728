"""Kinks and constraints that have a closed form.

prox(v, hparams, rate) = argmin over w of |w - v|^2 / 2 + rate penalty(w, hparams). Weights are
functions of hparams and return one array, or a tree like params, that broadcasts to each leaf.
Parikh and Boyd 2014, Proximal Algorithms, sections 6.2 and 6.5.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from .. import _checks
from .._types import HParams, Params, PyTree, Scalar

# (params, hparams, rate) -> params: the proximal operator of rate times a penalty.
Prox: TypeAlias = Callable[[Params, HParams, Scalar | float], Params]
Weight: TypeAlias = Callable[[HParams], PyTree]


def lasso(weight: Weight) -> Prox:
    """Of weight(hparams) |w|_1: soft thresholding.

    The weight has to stay positive, for example as `lambda h: jnp.exp(h["l1"])`: a negative one
    would expand.

    Raises TypeError unless `weight` is a function.
    """
    _checks.is_callable("lasso", "weight", weight)

    def prox(params: Params, hparams: HParams, rate: Scalar | float) -> Params:
        shrink = lambda v, c: jnp.sign(v) * jnp.maximum(jnp.abs(v) - rate * c, 0)
        return jax.tree.map(shrink, params, _like(params, weight(hparams)))

    return prox


def elastic_net(l1: Weight, l2: Weight) -> Prox:
    """Of l1 |w|_1 + l2 |w|^2 / 2: soft thresholding, then shrinkage (Zou and Hastie 2005).

    Raises TypeError unless both weights are functions.
    """
    _checks.is_callable("elastic_net", "l2", l2)
    soft = lasso(l1)

    def prox(params: Params, hparams: HParams, rate: Scalar | float) -> Params:
        shrink = lambda v, c: v / (1 + rate * c)
        return jax.tree.map(shrink, soft(params, hparams, rate), _like(params, l2(hparams)))

    return prox


def non_negative() -> Prox:
    """Of the constraint w >= 0: projection."""
    return lambda params, hparams, rate: jax.tree.map(lambda v: jnp.maximum(v, 0), params)


def box(lower: Weight, upper: Weight) -> Prox:
    """Of the constraint lower(hparams) <= w <= upper(hparams): projection.

    Where lower exceeds upper, w = upper.

    Raises TypeError unless both are functions.
    """
    _checks.is_callable("box", "lower", lower)
    _checks.is_callable("box", "upper", upper)

    def prox(params: Params, hparams: HParams, rate: Scalar | float) -> Params:
        low, high = _like(params, lower(hparams)), _like(params, upper(hparams))
        return jax.tree.map(lambda v, a, b: jnp.minimum(jnp.maximum(v, a), b), params, low, high)

    return prox


def _like(params: Params, weight: PyTree) -> PyTree:
    """A weight for each leaf; a lone one serves all. In the type of the leaf, shape permitting."""
    leaves, tree = jax.tree.flatten(params)
    weights = jax.tree.leaves(weight)
    if len(weights) == 1:
        weights = weights * len(leaves)
    elif jax.tree.structure(weight) != tree:
        raise ValueError(
            "prox: a weight must be one array or have the structure of params; got "
            f"{jax.tree.structure(weight)}, expected {tree}."
        )
    cast = [
        jnp.broadcast_to(c, x.shape).astype(x.dtype) for x, c in zip(leaves, weights, strict=True)
    ]
    return tree.unflatten(cast)
