"""Wrappers around any hypernetwork: what it sees, and to what its output is added."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._types import HParams, Key, Params
from ._encodings import Encoding, cos_sin
from ._structured import BestResponse
from ._types import Hypernet, Phi


class Additive(NamedTuple):
    """The weights of `magnitude_invariant`: params, and what is added to them."""

    base: Params
    response: Phi


def magnitude_invariant(
    net: Hypernet, *, low: HParams | float = 0.0, high: HParams | float = 1.0
) -> Hypernet:
    """`net` behind an encoding of constant norm, its output added to params of its own.

    Without biases a network with piecewise linear activations is positively homogeneous, and
    biases begin at zero: the weights that it makes at first, and the gradients, are proportional to
    the hyperparameters. Here they are not: params = base + net(E(hparams)) with
    E = `cos_sin(low, high)` and base as the ordinary model has it. Ortiz et al. 2024
    (arXiv 2304.07645); it is `additive(encoded(net, cos_sin(low, high)))`.

    Behind a `generated` net drawn weights begin with 1.5 times the variance of the model's, or
    somewhat more: base has all of it, as in the paper, and what the net adds about half of it, for
    that is the mean square of the code, where heads are drawn for inputs of mean square one.

    `low` and `high` bound the hyperparameters: numbers, or trees like them.
    """
    return additive(encoded(net, cos_sin(low, high)))


def encoded(net: Hypernet, encoding: Encoding) -> Hypernet:
    """`net` that sees `encoding(hparams)`, a vector, in place of hparams. phi is that of `net`.

    Encodings at hand: `cos_sin`, `complement`, `unit_direction`.
    """
    _checks.has_functions("encoded", "net", net, ("init", "apply"))
    _checks.is_callable("encoded", "encoding", encoding)
    return Hypernet(
        lambda key, params, hparams: net.init(key, params, encoding(hparams)),
        lambda phi, hparams: net.apply(phi, encoding(hparams)),
    )


def additive(net: Hypernet) -> Hypernet:
    """params = base + net(hparams), base beginning as the params that `init` is given.

    phi is (base, response), the second that of `net`, which begins for params of the same scale
    but around zero: where all entries of a leaf are equal, as in a bias, it adds nothing at first.
    Elsewhere variances add up. `init` raises ValueError for `structured` nets, which have a base
    already, and for params without leaves or with an empty one.
    """
    _checks.has_functions("additive", "net", net, ("init", "apply"))

    def init(key: Key, params: Params, hparams: HParams) -> Additive:
        _checks.differentiable("additive", "params", params)
        _checks.has_entries("additive", "params", params)
        params = _tree.strong(params)
        around = jax.tree.map(lambda x: jnp.where(jnp.all(x == jnp.ravel(x)[0]), 0, x), params)
        response = net.init(key, around, hparams)
        if isinstance(response, BestResponse):
            raise ValueError(
                "additive: `net` is structured, whose answers are already added to params of its "
                "own; use it as it is, or in `encoded` alone."
            )
        return Additive(params, _tree.strong(response))

    def apply(phi: Additive, hparams: HParams) -> Params:
        return jax.tree.map(jnp.add, phi.base, net.apply(phi.response, hparams))

    return Hypernet(init, apply)
