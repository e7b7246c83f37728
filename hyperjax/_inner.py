"""One step of training, as a function of the hyperparameters."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from . import _checks, _tree
from ._fused import FusedTransformation
from ._types import Batch, HParams, Loss, Optimality, Params, PyTree


class InnerState(NamedTuple):
    """State of ordinary training."""

    params: Params
    opt_state: PyTree


class Inner(NamedTuple):
    """Training as `init(params, hparams) -> state`, `step(state, hparams, batch) -> state`."""

    init: Callable[[Params, HParams], InnerState]
    step: Callable[[InnerState, HParams, Batch], InnerState]


def inner(loss: Loss, optimizer: Callable[[HParams], optax.GradientTransformation]) -> Inner:
    """Training of `loss(params, hparams, batch)` by an optimizer that is a function of hparams.

    The optimizer is rebuilt from the hyperparameters inside every traced step, so that learning
    rates, momenta and decays have derivatives and vmap like everything else:
    `inner(loss, lambda h: guarded.adam(h["lr"]))`. The derivative of plain `optax.adam` is NaN
    wherever a gradient entry is exactly zero; `hyperjax.guarded` has what optax lacks there.

    Randomness belongs in the batch (a PRNG key is a leaf), so that a step is deterministic.

    Raises TypeError at trace time if the loss is not a real scalar or a leaf of params is not
    floating point.
    """
    _checks.is_callable("inner", "optimizer", optimizer)
    gradient = jax.grad(_checks.scalar_loss("inner", "loss", loss))

    def init(params: Params, hparams: HParams) -> InnerState:
        _checks.differentiable("inner", "params", params)
        params = _tree.strong(params)
        return InnerState(params, _tree.strong(optimizer(hparams).init(params)))

    def step(state: InnerState, hparams: HParams, batch: Batch) -> InnerState:
        grads = gradient(state.params, hparams, batch)
        params, opt_state = _apply(optimizer(hparams), grads, state)
        # A hyperparameter in higher precision must not promote what it trains.
        return _cast_like(InnerState(params, opt_state), state)

    return Inner(init, step)


def stationary(loss: Loss) -> Optimality:
    """The gradient of `loss` in params: zero where training has converged.

    For `implicit`. With a stochastic loss, choose one whose stationary point training really
    approaches: the loss over the whole training set rather than over a minibatch.

    Raises TypeError at trace time if the loss is not a scalar.
    """
    return jax.grad(_checks.scalar_loss("stationary", "loss", loss))


def _apply(
    transform: optax.GradientTransformation, grads: Params, state: InnerState
) -> tuple[Params, PyTree]:
    if isinstance(transform, FusedTransformation):
        return transform.apply(grads, state.opt_state, state.params)
    updates, opt_state = transform.update(grads, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state


def _cast_like(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x.astype(y.dtype) if x.dtype != y.dtype else x, tree, like)
