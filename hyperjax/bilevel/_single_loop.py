"""Bilevel algorithms with second derivatives as settings of one loop.

What they have in common: params, hparams and the adjoint vector v with H v = f_p are all values
that one scan carries. A step is

    1. every so often, T steps of the params optimizer on g; or none, if params move in 3;
    2. the terms g_p, H v, J'v, f_p, f_h at one point, on one train and one valid batch, after the
       adjoint rule had its batches; a reduction makes estimates of them;
    3. hparams move along f_h - J'v, and with them, from the same terms, params along g_p and v
       along H v - f_p, unless 1 or 2 has moved them already.

|         | T       | adjoint rule   | reduction | hparams optimizer     |
|---------|---------|----------------|-----------|-----------------------|
| soba    | 0       | together       | plain     | descent               |
| saba    | 0       | together       | saga      | descent               |
| ma_soba | 0       | together       | plain     | descent on an average |
| mrbo    | 0       | neumann_series | storm     | descent               |
| ttsa    | 1       | neumann_series | plain     | descent               |
| stocbio | T       | neumann_series | plain     | descent               |
| amigo   | T       | descent        | plain     | descent               |
| bo_rep  | N per I | together       | plain     | normalized momentum   |

Where the loop breaks: VRBO (Yang, Ji and Liang 2021, Algorithm 2). Its estimator is the reduction
`spider`, but after a step of hparams it takes several of params, in each of which the estimate of
the *outer* direction is refreshed although hparams stand still; here hparams and what is known of
their direction have one clock. And it begins anew from a batch far larger than the others, where
a scan gives every step the same shapes. First-order methods have no adjoint and no use for this
loop.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .. import _checks, _tree
from .._tuner import Metrics
from .._types import Batches, HParams, Loss, Params, PyTree, Scalar, Split, Tuner
from ._adjoint_rules import AdjointRule, deal
from ._common import Calls, calls, second_order, settle, slopes
from ._variance_reduction import Point, Reduction, Terms, plain

WHERE = "single_loop"


class SingleLoopState(NamedTuple):
    """State of `single_loop` and of all its settings."""

    params: Params
    hparams: HParams
    adjoint: Params  # v
    params_state: PyTree  # of the optimizers
    hparams_state: PyTree
    memory: PyTree  # of the reduction
    steps: jax.Array  # int32: taken so far


class SingleLoopInfo(NamedTuple):
    """What a step cost, and what it knows of its own error."""

    calls: Calls
    # |g_p|, 2-norm, where the directions were looked at, as estimated. It grows from step to step
    # if the steps of params are too large.
    stationarity: Scalar
    # |H v - f_p| / |f_p| of the v that the hypergradient was made of, as estimated; 0 if f_p is.
    # Above 1, v is worse than zero: the rate of the adjoint is too large, or its start far away.
    residual: Scalar


class _Found(NamedTuple):
    value: Scalar
    adjoint: Params  # as solved for


class _Setting(NamedTuple):
    """The arguments of `single_loop`."""

    loss: Loss
    score: Loss
    params_optimizer: optax.GradientTransformation
    hparams_optimizer: optax.GradientTransformation
    adjoint: AdjointRule
    inner_steps: int
    every: int
    radius: float | Scalar | None
    reduction: Reduction
    project: Callable[[HParams], HParams]


def _init(setting: _Setting, params: Params, hparams: HParams) -> SingleLoopState:
    _checks.differentiable(WHERE, "params", params)
    _checks.differentiable(WHERE, "hparams", hparams)
    params, hparams = _tree.strong((params, hparams))
    v = _tree.vary_like(_tree.zeros_like(params), (params, hparams))
    state = SingleLoopState(
        params,
        hparams,
        v,
        setting.params_optimizer.init(params),
        setting.hparams_optimizer.init(hparams),
        setting.reduction.init(Point(params, hparams, v)),
        jnp.zeros((), jnp.int32),
    )
    return _tree.strong(state)


def _step(
    setting: _Setting, state: SingleLoopState, split: Split
) -> tuple[SingleLoopState, Metrics]:
    rule, inner = setting.adjoint, setting.inner_steps
    _check_batches(split.train, inner + rule.batches + 1)
    params, params_state = state.params, state.params_state
    if inner:
        params, params_state = _train(setting, state, _part(split.train, 0, inner))
    rest = split._replace(train=_part(split.train, inner, inner + rule.batches + 1))
    terms, found, memory = setting.reduction.estimate(
        state.memory,
        lambda point: _look(setting, point, rest, state.steps),
        Point(params, state.hparams, state.adjoint),
        (_tree.last(rest.train), rest.valid),
        state.steps,
    )
    wrong = _tree.sub(terms.curvature, terms.params)
    direction = _tree.sub(terms.hparams, terms.mixed)
    if not inner:
        params, params_state = _descend(
            setting.params_optimizer, terms.gradient, params_state, params
        )
    hparams, hparams_state = _descend(
        setting.hparams_optimizer, direction, state.hparams_state, state.hparams
    )
    hparams = setting.project(hparams)
    _checks.same_tree(WHERE, "project(hparams)", hparams, "hparams", state.hparams)
    moved = SingleLoopState(
        params,
        hparams,
        rule.move(found.adjoint, wrong, state.steps),
        params_state,
        hparams_state,
        memory,
        state.steps + 1,
    )
    size = _tree.norm(terms.params)
    info = SingleLoopInfo(
        _asked(setting, state.steps),
        _tree.norm(terms.gradient),
        _tree.norm(wrong) / jnp.where(size > 0, size, 1),
    )
    return settle(found.value, direction, moved, state, info)


def _train(setting: _Setting, state: SingleLoopState, batches: Batches) -> tuple[Params, PyTree]:
    """Step 1 of the three."""

    def one(carry, batch):
        params, opt_state = carry
        grad = jax.grad(setting.loss)(params, state.hparams, setting.reduction.unwrap(batch))
        params, opt_state = _descend(setting.params_optimizer, grad, opt_state, params)
        if setting.radius is not None:
            params = within(setting.radius, state.params, params)
        return params, opt_state

    begin = _tree.vary_like((state.params, state.params_state), state)
    steps = lambda: deal(one, begin, batches, setting.inner_steps)
    if setting.every == 1:
        return steps()
    return lax.cond(state.steps % setting.every == 0, steps, lambda: begin)


def _look(setting: _Setting, point: Point, split: Split, count: jax.Array) -> tuple[Terms, _Found]:
    """Step 2: `split.train` is [adjoint.batches + 1 or 1, ...], its last for the terms."""
    params, hparams, start = point
    train, valid = (setting.reduction.unwrap(x) for x in split)
    value, (f_p, f_h) = slopes(setting.score, params, hparams, valid)
    look = lambda batch: second_order(setting.loss, params, hparams, batch)
    before = _part(train, 0, setting.adjoint.batches)
    v = setting.adjoint.solve(start, lambda b, u: look(b)[1](u)[0], f_p, before, count)
    gradient, products = look(_tree.last(train))
    curvature, mixed = products(v)
    return Terms(gradient, curvature, mixed, f_p, f_h), _Found(value, v)


def _descend(optimizer: optax.GradientTransformation, grad, state, point):
    updates, after = optimizer.update(grad, state, point)
    return _tree.cast_like((optax.apply_updates(point, updates), after), (point, state))


def within(radius: float | Scalar, center: Params, params: Params) -> Params:
    """The nearest point to `params` in a ball."""
    away = _tree.sub(params, center)
    distance = _tree.norm(away)
    share = jnp.where(distance > radius, radius / jnp.where(distance > 0, distance, 1), 1)
    return _tree.axpy(share, away, center)


def _part(batches: Batches, start: int, stop: int) -> Batches:
    """Batches from `start` to `stop`; where there is only one, that."""
    if jax.tree.leaves(batches)[0].shape[0] == 1:
        return batches
    return jax.tree.map(lambda x: x[start:stop], batches)


def _asked(setting: _Setting, count: jax.Array) -> Calls:
    inner = jnp.where(count % setting.every == 0, setting.inner_steps, 0)
    looks = setting.reduction.looks
    return calls(gradients=inner + 2 * looks, products=(setting.adjoint.batches + 1) * looks)


def _check_batches(batches: Any, needed: int) -> None:
    got = _checks.count_steps(WHERE, batches)
    if got not in (1, needed):
        raise ValueError(
            f"{WHERE}: leaves of `split.train` need the leading axis {needed}, one batch per "
            "inner step and per product of the adjoint rule and one for the directions, or 1, "
            f"one batch for all of them; got {got}."
        )


def single_loop(
    loss: Loss,
    score: Loss,
    *,
    params_optimizer: optax.GradientTransformation,
    hparams_optimizer: optax.GradientTransformation,
    adjoint: AdjointRule,
    inner_steps: int = 0,
    every: int = 1,
    radius: float | Scalar | None = None,
    reduction: Reduction | None = None,
    project: Callable[[HParams], HParams] = lambda hparams: hparams,
) -> Tuner:
    """The loop that `soba`, `stocbio`, `bo_rep` and others are settings of: see the module.

    `init(params, hparams) -> SingleLoopState`; `step(state, split) -> (state, Metrics)` with a
    `SingleLoopInfo`. Leaves of `split.train` are [inner_steps + adjoint.batches + 1, ...], in the
    order of their use: the steps of params, the products of the adjoint rule, the terms. Leaves
    [1, ...] serve for all of them, which makes a deterministic algorithm of full batches.
    `split.valid` is one batch. `Metrics.value` is the score of `hparams` with the params that the
    directions were looked at, after the inner steps where there are any.

    Args:
      loss, score: functions of params, hparams and a batch.
      params_optimizer, hparams_optimizer: step sizes in them may be traced, or optax schedules.
      adjoint: `together`, `descent` or `neumann_series`.
      inner_steps: T; 0 lets params move at the same time as hparams.
      every: inner steps are taken at step numbers that this divides.
      radius: inner steps stay within this distance, 2-norm, of where they began; None: anywhere.
      reduction: `plain()`, the default; `saga`, `storm`, `spider`.
      project: applied to hparams after each step.

    Raises ValueError at trace time for numbers out of range, for a number of train batches other
    than the above, for `every` or `radius` without inner steps, and for a `project` that changes
    shapes or types; TypeError for an `adjoint`, a `reduction` or an optimizer that is none.

    Dagreou et al. 2022 (arXiv 2201.13409) have the framework for T = 0. Their v has the other
    sign.
    """
    _checks.positive_int(WHERE, "inner_steps", inner_steps, least=0)
    _checks.positive_int(WHERE, "every", every)
    _checks.is_callable(WHERE, "project", project)
    for name, optimizer in (("params", params_optimizer), ("hparams", hparams_optimizer)):
        _checks.has_functions(WHERE, f"{name}_optimizer", optimizer, ("init", "update"))
    _checks.has_functions(WHERE, "adjoint", adjoint, ("solve", "move"))
    if reduction is not None:
        _checks.has_functions(WHERE, "reduction", reduction, ("init", "estimate"))
    if radius is not None:
        _checks.number(WHERE, "radius", radius, positive=True)
    if inner_steps == 0 and (every != 1 or radius is not None):
        raise ValueError(
            f"{WHERE}: `every` and `radius` are about inner steps, of which there are none; leave "
            f"them out or give `inner_steps`; got {every!r} and {radius!r}."
        )
    setting = _Setting(
        _checks.scalar_loss(WHERE, "loss", loss),
        _checks.scalar_loss(WHERE, "score", score),
        params_optimizer,
        hparams_optimizer,
        adjoint,
        inner_steps,
        every,
        radius,
        plain() if reduction is None else reduction,
        project,
    )
    return Tuner(functools.partial(_init, setting), functools.partial(_step, setting))
