"""Hypernetworks: parametrizations of params as a function of hparams."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from . import _checks
from ._types import HParams, Key, Params, PyTree


class Hypernet(NamedTuple):
    """`init(key, params, hparams) -> phi`, `apply(phi, hparams) -> params`."""

    init: Callable[[Key, Params, HParams], PyTree]
    apply: Callable[[PyTree, HParams], Params]


class GatedLeaf(NamedTuple):
    base: jax.Array  # [..., out]
    response: jax.Array  # [..., out]
    gate: jax.Array  # [hyperparameters, out]


def gated(*, scale: float = 0.01) -> Hypernet:
    """Every leaf as base + response * (z' gate), gated along its last axis.

    z is the vector of all hyperparameters. A leaf [..., out] costs twice its entries and one gate
    [hyperparameters, out]. For linear regression with an L2 penalty a gate on the output is exact
    (MacKay et al. 2019, arXiv 1903.03088). `response` begins as a copy of the leaf
    (ones for vectors, where biases begin at zero), `gate` as normal noise of deviation `scale`.

    The layers of the paper, made a transformation of parameters so that no model is rewritten.
    """

    def init(key: Key, params: Params, hparams: HParams) -> PyTree:
        _checks.differentiable("gated", "params", params)
        count = ravel_pytree(hparams)[0].size
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))

        def one(key, x):
            width = x.shape[-1:] if jnp.ndim(x) else ()
            response = x if jnp.ndim(x) > 1 else jnp.ones_like(x)
            return GatedLeaf(x, response, scale * jax.random.normal(key, (count, *width), x.dtype))

        return tree.unflatten([one(k, x) for k, x in zip(keys, leaves, strict=True)])

    def apply(phi: PyTree, hparams: HParams) -> Params:
        z = ravel_pytree(hparams)[0]

        def one(leaf: GatedLeaf):
            return leaf.base + leaf.response * (z.astype(leaf.gate.dtype) @ leaf.gate)

        return jax.tree.map(one, phi, is_leaf=lambda x: isinstance(x, GatedLeaf))

    return Hypernet(init, apply)
