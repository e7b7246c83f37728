"""Gradient descent, the ultimate optimizer: an optimizer whose hyperparameters are optimized."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _tree
from .._types import HParams, Params, State


class Last(NamedTuple):
    """What the last update was made from."""

    grads: Params
    opt_state: State
    params: Params
    exists: jax.Array  # bool: False before the first update


class UltimateState(NamedTuple):
    """State of `ultimate`."""

    hparams: HParams  # in force in the last update
    opt_state: State
    over: State
    last: Last


def ultimate(
    optimizer: Callable[[HParams], optax.GradientTransformation],
    hparams: HParams,
    over: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """An optimizer whose hyperparameters are moved by another one, along with training.

    Chandra et al. 2022 (arXiv 1909.13371). With g the gradient of the present loss in params, one
    update does, in this order:

    1. The gradient of the present loss in hparams, through the last update alone, since
       params = params_last + update(hparams): g times the derivative of that update in hparams at
       the gradient, state and params it was made from, which count as constants.
    2. `over` moves hparams along it. Before the first update this gradient is zero.
    3. `optimizer(hparams)` at the new hparams makes the update.

    `over` may itself be `ultimate(...)`. Its step 1 then differentiates its own last update in the
    same way, so that towers of any height update from the top down, as in the paper:

        sgd = lambda h: optax.sgd(h)
        ultimate(sgd, 0.01, ultimate(sgd, 1e-3, optax.sgd(1e-4)))

    Any optax factory will do, and hparams may be any pytree of floats: rates, momenta, decays, also
    per-parameter ones. Nothing keeps them in a range: either optimize what the factory maps into
    it, `lambda h: hj.guarded.adam(h["lr"], b1=jax.nn.sigmoid(h["b1"]))`, or chain
    `optax.keep_params_nonnegative()` after `over`. Adam needs its `eps_root` (`guarded.adam`), or
    a gradient entry of exactly zero makes the derivative NaN.

    The result must be the last piece of a chain that touches updates: step 1 takes what it returns
    for what is added to params. The cost is a second evaluation of the update and its derivative,
    and the memory of one gradient, one state and one copy of params.

    The hparams in force are in the state, `UltimateState.hparams`; those of the level above in
    `UltimateState.over.hparams`.

    Raises TypeError for hparams that are not floating point, ValueError at trace time if `update`
    is called without params.
    """
    _checks.is_callable("ultimate", "optimizer", optimizer)
    _checks.has_functions("ultimate", "over", over, ("init", "update"))
    _checks.differentiable("ultimate", "hparams", hparams)

    def init(params: Params) -> UltimateState:
        values = _tree.strong(hparams)
        opt_state = optimizer(values).init(params)
        last = Last(_tree.zeros_like(params), opt_state, params, jnp.asarray(False))
        return _tree.strong(UltimateState(values, opt_state, over.init(values), last))

    def update(
        updates: optax.Updates, state: State, params: optax.Params | None = None
    ) -> tuple[optax.Updates, State]:
        if params is None:
            raise ValueError(
                "ultimate: `params` is None, but the derivative of an update may depend on them; "
                "call `update(grads, state, params)`."
            )
        slope = _slope(optimizer, state, updates)
        moves, above = over.update(slope, state.over, state.hparams)
        values = _cast_like(optax.apply_updates(state.hparams, moves), state.hparams)
        last = Last(updates, state.opt_state, params, jnp.ones_like(state.last.exists))
        result, opt_state = optimizer(values).update(updates, state.opt_state, params)
        state = UltimateState(
            values, _cast_like(opt_state, state.opt_state), above, _cast_like(last, state.last)
        )
        return _cast_like(result, updates), state

    return optax.GradientTransformation(init, update)


def _slope(optimizer, state: UltimateState, grads: Params) -> HParams:
    """The derivative in hparams of the present loss, whose gradient in params is `grads`."""
    last = state.last

    def again(hparams):
        result, _ = optimizer(hparams).update(last.grads, last.opt_state, last.params)
        return _cast_like(result, grads)

    _, pull = jax.vjp(again, state.hparams)
    (slope,) = pull(grads)
    return _tree.where(last.exists, slope, _tree.zeros_like(slope))


def _cast_like(tree, like):
    """A hyperparameter in higher precision must not promote what it trains."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype) if x.dtype != y.dtype else x, tree, like)
