"""Self-tuning networks (MacKay, Vicol, Lorraine, Duvenaud and Grosse 2019, arXiv 1903.03088)."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .. import _checks, _tree
from .._tuner import Metrics
from .._types import Batch, HParams, Loss, Params, PyTree, Scalar, Split, Tuner
from ..hypernet import Hypernet
from ._common import Calls, calls, settle
from ._gaussian import (
    Draw,
    Gaussian,
    at_bound,
    bounded,
    check_keys,
    differential_entropy,
    group_keys,
    sample,
    scales,
)


class SelfTuningState(NamedTuple):
    """State of `self_tuning` and `delta_self_tuning`."""

    params: Params  # of the hypernetwork: `net.apply(params, hparams.mean)` are the model's
    hparams: Gaussian
    params_state: PyTree
    mean_state: PyTree
    scale_state: PyTree  # () where scales are not tuned
    steps: jax.Array  # int32: so far


class SelfTuningInfo(NamedTuple):
    """One outer step of self-tuning, for the eye."""

    # A perturbed batch is one call, whatever its number of groups. What an optimizer that searches
    # along its direction evaluates there is not counted.
    calls: Calls
    loss: Scalar  # the training loss with perturbed hyperparameters, mean over the training steps
    scale: HParams  # deviations of the perturbation during the step
    at_bound: HParams  # where a scale ends at the least or the most there is, bool


class Outer(NamedTuple):
    """How the distribution of the hyperparameters moves."""

    score: Callable[[HParams, HParams, Params, Batch], Scalar]  # of (z, mean, phi, one group)
    mean: optax.GradientTransformation
    scale: optax.GradientTransformation | None
    entropy: float | Scalar
    warm_up: int


Fit: TypeAlias = Callable[[SelfTuningState, Draw], tuple[Params, PyTree, Scalar]]


def self_tuning(
    loss: Loss,
    score: Loss,
    net: Hypernet,
    optimizer: optax.GradientTransformation,
    *,
    outer: optax.GradientTransformation,
    spread: optax.GradientTransformation | None = None,
    entropy: float | Scalar = 1e-3,
    warm_up: int = 0,
) -> Tuner:
    """Weights that know how they answer to hyperparameters, which follow the validation score.

    One step trains phi on every batch of `split.train`, by the gradient in phi of
    E loss(net.apply(phi, z), z, batch) with z ~ N(mean, scale^2); then moves mean and scale once,
    on E score(net.apply(phi, z), z, batch) - entropy * H(scale) with phi held. The loss has no
    derivative in hyperparameters, so these may be dropout rates, strengths of augmentation, and
    integers (`hyperjax.integers`, `hyperjax.choice`).

    Args:
      loss, score: of (params, raw hyperparameters, batch); `space.lift` makes them from losses of
        constrained values. The hypernetwork sees the raw ones.
      net: `hypernet.gated()` for the paper's layers, or any other. `hypernet.factored` with
        layers of `hyperjax.hypernet` where every example is a group.
      optimizer: for phi; also one that searches along its direction, such as `optax.lbfgs`.
      outer: for the means; the paper's is Adam at 3e-3 to 1e-2.
      spread: for the raw scales; None holds the scales, with the perturbation as it is. (In the
        authors' code, not to tune them also ends the perturbation of the validation step.)
      entropy: the weight of H = sum log(scale sqrt(2 pi e)). At 0 scales shrink, and with them
        what is learnt about the response; at 1 they stay broad. May be traced.
      warm_up: steps at first that train phi only.

    `init(phi, gaussian(raw, scale)) -> SelfTuningState`, with phi from `net.init`; `step(state,
    split)` with `Split(Draw, Draw)`: leaves of `train.data` [steps, groups, ...], keys [steps];
    leaves of `valid.data` [groups, ...] and one key. Every group draws a z of its own: one group
    is a draw per batch, as many groups as examples is the paper's draw per example.

    `Metrics.value` is the mean score under perturbation, without the entropy; `Metrics.hparams` is
    the distribution in force. `replay` trains an ordinary model on the means so recorded. A step
    that comes out non-finite, its training loss included, moves nothing and is reported; during
    `warm_up` a score that is not finite is reported too, but the weights go on.

    Raises TypeError or ValueError at trace time for hyperparameters that are not a `Gaussian` of
    floating-point leaves, for batches without a common axis of groups, and for other numbers of
    keys.
    """
    where = "self_tuning"
    check(where, net, optimizer, outer, spread, entropy, warm_up)
    loss = _checks.scalar_loss(where, "loss", loss)
    score = _checks.scalar_loss(where, "score", score)

    def perturbed(phi: Params, distribution: Gaussian, draw: Draw) -> Scalar:
        near = lambda z, batch: loss(net.apply(phi, z), z, batch)
        return over_groups(where, near, lax.stop_gradient(distribution), draw)

    def fit(state: SelfTuningState, draws: Draw) -> tuple[Params, PyTree, Scalar]:
        def one(carry, draw):
            phi, opt_state = carry
            at = lambda phi: perturbed(phi, state.hparams, draw)
            phi, opt_state, value = descend(optimizer, at, phi, opt_state)
            return (phi, opt_state), value

        start = state.params, state.params_state
        (phi, opt_state), values = lax.scan(one, start, draws)
        return phi, opt_state, jnp.mean(values)

    def init(params: Params, hparams: Gaussian) -> SelfTuningState:
        return first(where, params, hparams, optimizer.init(params), outer, spread)

    at = lambda z, mean, phi, batch: score(net.apply(phi, z), z, batch)
    moving = Outer(at, outer, spread, entropy, warm_up)
    return Tuner(init, lambda state, split: advance(where, moving, fit, 1, state, split))


def descend(
    optimizer: optax.GradientTransformation,
    function: Callable[[PyTree], Scalar],
    params: PyTree,
    state: PyTree,
) -> tuple[PyTree, PyTree, Scalar]:
    """A step of `optimizer`, also of one that searches along its direction (`optax.lbfgs`)."""
    value, grads = jax.value_and_grad(function)(params)
    given = {"value": value, "grad": grads, "value_fn": function}
    search = optax.with_extra_args_support(optimizer)
    updates, state = search.update(grads, state, params, **given)
    return optax.apply_updates(params, updates), state, value


def first(
    where: str,
    params: Params,
    hparams: Gaussian,
    params_state: PyTree,
    outer: optax.GradientTransformation,
    spread: optax.GradientTransformation | None,
) -> SelfTuningState:
    _checks.differentiable(where, "params", params)
    if not isinstance(hparams, Gaussian):
        raise TypeError(
            f"{where}: `hparams` must be a Gaussian, which says how far to perturb them; got "
            f"{type(hparams).__name__}. Pass `bilevel.gaussian(hparams, 0.5)`."
        )
    _checks.differentiable(where, "hparams", hparams)
    hparams = _tree.strong(hparams)
    _checks.same_tree(where, "hparams.raw_scale", hparams.raw_scale, "the means", hparams.mean)
    scale_state = () if spread is None else spread.init(hparams.raw_scale)
    # An optimizer may keep what it is given, and what is in a tree twice cannot be donated.
    own = lambda tree: jax.tree.map(jnp.copy, _tree.strong(tree))
    return SelfTuningState(
        _tree.strong(params),
        hparams,
        own(params_state),
        own(outer.init(hparams.mean)),
        own(scale_state),
        jnp.zeros((), jnp.int32),
    )


def advance(
    where: str, moving: Outer, fit: Fit, passes: int, state: SelfTuningState, split: Split
) -> tuple[SelfTuningState, Metrics]:
    """One step: `fit`, `passes` gradients a batch, and then the distribution."""
    if not isinstance(split.train, Draw) or not isinstance(split.valid, Draw):
        raise TypeError(
            f"{where}: `split.train` and `split.valid` must each be a `bilevel.Draw(data, key)`; "
            f"got {type(split.train).__name__} and {type(split.valid).__name__}."
        )
    check_keys(where, split.train, split.valid)
    steps = _checks.count_steps(where, split.train)
    phi, params_state, train_loss = fit(state, split.train)

    def objective(distribution: Gaussian) -> tuple[Scalar, Scalar]:
        at = lambda z, batch: moving.score(z, distribution.mean, phi, batch)
        value = over_groups(where, at, distribution, split.valid)
        return value - moving.entropy * differential_entropy(distribution), value

    (_, value), grads = jax.value_and_grad(objective, has_aux=True)(state.hparams)
    if moving.scale is None:
        grads = grads._replace(raw_scale=_tree.zeros_like(grads.raw_scale))
    moved = _move(moving, state, grads)
    warming = state.steps < moving.warm_up
    moved = _tree.where(warming, state, moved)
    moved = moved._replace(params=phi, params_state=params_state, steps=state.steps + 1)
    info = SelfTuningInfo(
        calls(gradients=passes * steps + 1),
        train_loss,
        scales(state.hparams),
        at_bound(moved.hparams.raw_scale),
    )
    after, metrics = settle(value, grads, moved, state, info, taken_back=warming)
    sound = jnp.isfinite(train_loss)
    return _tree.where(sound, after, state), metrics._replace(finite=metrics.finite & sound)


def over_groups(
    where: str,
    function: Callable[[HParams, Batch], Scalar],
    distribution: Gaussian,
    draw: Draw,
) -> Scalar:
    """The mean over groups of `function(z, batch)`, every group with a z of its own."""
    keys = group_keys(where, draw)
    return jnp.mean(jax.vmap(lambda k, b: function(sample(k, distribution), b))(keys, draw.data))


def _move(moving: Outer, state: SelfTuningState, grads: Gaussian) -> SelfTuningState:
    means = state.hparams.mean
    updates, mean_state = moving.mean.update(grads.mean, state.mean_state, means)
    means = optax.apply_updates(means, updates)
    raw, scale_state = state.hparams.raw_scale, state.scale_state
    if moving.scale is not None:
        updates, scale_state = moving.scale.update(grads.raw_scale, scale_state, raw)
        raw = bounded(optax.apply_updates(raw, updates))
    hparams = _tree.cast_like(Gaussian(means, raw), state.hparams)
    return state._replace(hparams=hparams, mean_state=mean_state, scale_state=scale_state)


def check(where: str, net, optimizer, outer, spread, weight, warm_up) -> None:
    _checks.has_functions(where, "net", net, ("init", "apply"))
    _checks.has_functions(where, "optimizer", optimizer, ("init", "update"))
    _checks.has_functions(where, "outer", outer, ("init", "update"))
    if spread is not None:
        _checks.has_functions(where, "spread", spread, ("init", "update"))
    _checks.number(where, "entropy", weight)
    _checks.positive_int(where, "warm_up", warm_up, least=0)
