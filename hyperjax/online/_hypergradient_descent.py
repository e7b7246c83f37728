"""Hypergradient descent on the learning rate, as an optax transformation."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .. import _checks, _tree
from .._types import Params, Scalar, State


class HypergradientDescentState(NamedTuple):
    """State of `hypergradient_descent`."""

    learning_rate: Scalar  # in force in the last update
    last: Params  # the direction u of the last update; zero at first
    direction: State


def hypergradient_descent(
    direction: optax.GradientTransformation,
    learning_rate: float | Scalar,
    hyper_learning_rate: float | Scalar,
    *,
    rule: Literal["additive", "multiplicative"] = "additive",
) -> optax.GradientTransformation:
    """Descent along `direction` with one learning rate that moves by its own gradient.

    Baydin et al. 2018 (arXiv 1703.04782). With g the gradient, u the output of `direction`:

        additive:        alpha <- max(alpha + beta <g, u_last>, 0)
        multiplicative:  alpha <- max(alpha (1 + beta cos(g, u_last)), 0)

    and then the update -alpha u, at the new rate. The inner product is that of the whole tree,
    and -<g, u_last> is the derivative of the present loss in the rate of the last step.

    Args:
      direction: `optax.identity()` is SGD, `optax.trace(0.9, nesterov=True)` SGD with Nesterov
        momentum, `optax.scale_by_adam()` Adam: a transformation that does not change the sign.
      learning_rate: alpha at first, >= 0. May be traced, as may beta.
      hyper_learning_rate: beta >= 0. Additive: in units of alpha per squared gradient, so that a
        good value depends on the problem; 1e-3 for SGD and 1e-7 for Adam in the paper. The
        multiplicative one is a plain number, below 1.

    The floor at 0 is ours: the additive rule can otherwise go below and then ascends. A rate of 0
    can recover in the additive rule, not in the multiplicative one. Where g or u_last is zero, the
    cosine is 0. Where one is not finite, no rate is right, and the cosine is NaN. The rate has at
    least float32, also for parameters in bfloat16. Weight decay belongs in front, so that it is
    part of g: `optax.chain(optax.add_decayed_weights(1e-4), hypergradient_descent(...))`.

    The rate that was in force stands in the state, `HypergradientDescentState.learning_rate`.

    Raises ValueError for arguments out of range.
    """
    where = "hypergradient_descent"
    _checks.has_functions(where, "direction", direction, ("init", "update"))
    _checks.number(where, "learning_rate", learning_rate)
    _checks.number(where, "hyper_learning_rate", hyper_learning_rate)
    _checks.one_of(where, "rule", rule, ("additive", "multiplicative"))

    def init(params: Params) -> HypergradientDescentState:
        # A rate in higher precision is kept so; a Python number takes the precision of params, but
        # at least float32: a rate in bfloat16 would not move by less than 1/500 of itself.
        dtype = jnp.result_type(learning_rate, jnp.float32, *jax.tree.leaves(params))
        rate = jnp.asarray(learning_rate, dtype)
        state = HypergradientDescentState(rate, _tree.zeros_like(params), direction.init(params))
        return _tree.strong(state)

    def update(
        updates: optax.Updates, state: State, params: optax.Params | None = None
    ) -> tuple[optax.Updates, State]:
        rate = state.learning_rate
        g, last = jax.tree.map(lambda x: x.astype(rate.dtype), (updates, state.last))
        if rule == "additive":
            rate = rate + hyper_learning_rate * optax.tree.vdot(g, last)
        else:
            rate = rate * (1 + hyper_learning_rate * _cosine(g, last))
        rate = jnp.maximum(rate, 0).astype(state.learning_rate.dtype)
        u, inner = direction.update(updates, state.direction, params)
        # Gradients may be of another type than params; a state keeps its own.
        last = jax.tree.map(lambda x, old: x.astype(old.dtype), u, state.last)
        return _tree.scale(-rate, u), HypergradientDescentState(rate, last, inner)

    return optax.GradientTransformation(init, update)


def _cosine(a: Params, b: Params) -> Scalar:
    """0 if one is zero, NaN if one is not finite."""
    a, b = _in_units(a), _in_units(b)
    squares = optax.tree.vdot(a, a) * optax.tree.vdot(b, b)
    zero = squares == 0
    # Chosen before the root, whose derivative at 0 would be infinite.
    return jnp.where(zero, 0, optax.tree.vdot(a, b) / jnp.sqrt(jnp.where(zero, 1, squares)))


def _in_units(a: Params) -> Params:
    """In units of the largest entry, whose square neither overflows nor vanishes."""
    sizes = [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(a)]
    # The cosine is the same in any unit, so that the derivative in this one is left out.
    largest = lax.stop_gradient(functools.reduce(jnp.maximum, sizes, jnp.asarray(0.0)))
    unit = jnp.where(largest > 0, largest, 1)
    return jax.tree.map(lambda x: x / unit, a)
