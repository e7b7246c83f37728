"""The outer loop: hyperparameters that follow their hypergradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from . import _checks, _tree
from ._inner import Inner
from ._types import (
    Batches,
    Carry,
    Estimator,
    HParams,
    Params,
    PyTree,
    Scalar,
    Split,
    State,
    Tuner,
)


class TunerState(NamedTuple):
    """State of `tune`."""

    hparams: HParams
    opt_state: PyTree
    carry: Carry


class Metrics(NamedTuple):
    """One outer step, for the eye."""

    value: Scalar  # the score reached with `hparams`
    hparams: HParams  # in force during the step
    grad_norm: Scalar
    finite: jax.Array  # False: the score or the hypergradient was not, and hparams stayed put
    info: PyTree  # Estimate.info


def tune(estimator: Estimator, optimizer: optax.GradientTransformation) -> Tuner:
    """A tuner that takes one step of `optimizer` per estimate.

    `init(params, hparams) -> TunerState`; `step(state, split) -> (TunerState, Metrics)`. Where the
    hypergradient or the score is not finite, hparams and the optimizer's state stay, and
    `Metrics.finite` is False. The carry goes on, so that params that are NaN remain so: `restart`
    begins anew, and exchange rules replace such a member.

    Raises TypeError if a leaf of hparams is not floating point.
    """

    _checks.has_functions("tune", "estimator", estimator, ("init", "estimate"))
    _checks.has_functions("tune", "optimizer", optimizer, ("init", "update"))

    def init(params: Params, hparams: HParams) -> TunerState:
        _checks.differentiable("tune", "hparams", hparams)
        hparams = _tree.strong(hparams)
        return TunerState(
            hparams,
            _tree.strong(optimizer.init(hparams)),
            estimator.init(params, hparams),
        )

    def step(state: TunerState, split: Split) -> tuple[TunerState, Metrics]:
        estimate, carry = estimator.estimate(state.hparams, state.carry, split)
        _checks.same_tree("tune", "Estimate.grad", estimate.grad, "hparams", state.hparams)
        finite = jnp.isfinite(estimate.value) & _tree.all_finite(estimate.grad)
        updates, opt_state = optimizer.update(estimate.grad, state.opt_state, state.hparams)
        moved = optax.apply_updates(state.hparams, updates), opt_state
        hparams, opt_state = _tree.where(finite, moved, (state.hparams, state.opt_state))
        metrics = Metrics(
            value=estimate.value,
            hparams=state.hparams,
            grad_norm=_tree.norm(estimate.grad),
            finite=finite,
            info=estimate.info,
        )
        return TunerState(hparams, opt_state, carry), metrics

    return Tuner(init, step)


def run(tuner: Tuner, state: State, splits: Split) -> tuple[State, PyTree]:
    """`tuner.step` over the leading axis of `splits`, in one `lax.scan`.

    Leaves of splits.train are [outer steps, inner steps, ...], of splits.valid [outer steps, ...].
    Returns the final state and the metrics, [outer steps, ...]. Raises ValueError at trace time if
    the leading axes differ.
    """
    _checks.count_steps("run", splits)
    return lax.scan(tuner.step, state, splits)


def repeat(tuner: Tuner, state: State, split: Split, steps: int) -> tuple[State, PyTree]:
    """`steps` outer steps on the same `split`, in one `lax.scan`: for full-batch problems.

    Unlike `run` on a split repeated `steps` times, it keeps one copy of the data. Returns the final
    state and the metrics, [steps, ...]. Raises ValueError unless `steps` is a positive integer.
    """
    _checks.positive_int("repeat", "steps", steps)
    return lax.scan(lambda s, _: tuner.step(s, split), state, length=steps)


def replay(training: Inner, params: Params, schedule: HParams, batches: Batches) -> Params:
    """Ordinary training along a recorded schedule of hyperparameters.

    `schedule` are hyperparameters with a leading axis of outer steps, for example
    `metrics.hparams` of `run`; leaves of `batches` are [outer steps, inner steps, ...], as in
    `Split.train` there. Optimizer state is kept throughout. Returns the trained params.

    Raises ValueError at trace time unless both have the same number of outer steps, and all
    batches the same number of inner ones.
    """
    _checks.has_functions("replay", "training", training, ("init", "step"))
    steps = _checks.count_steps("replay", batches)
    rows = jax.tree_util.tree_leaves_with_path(batches)
    inner_axes = {jnp.shape(x)[1:2] for _, x in rows}
    if len(inner_axes) > 1 or inner_axes & {(), (0,)}:
        listing = ", ".join(f"{_checks.path(k)}: {_checks.describe(x)}" for k, x in rows)
        raise ValueError(
            "replay: every leaf of `batches` needs the same two axes first, [outer steps, inner "
            f"steps, ...], of size 1 or more; got {listing}. For one inner step: `x[:, None]`."
        )
    if {jnp.shape(x)[:1] for x in jax.tree.leaves(schedule)} != {(steps,)}:
        named = jax.tree_util.tree_leaves_with_path(schedule)
        listing = ", ".join(f"{_checks.path(k)}: {_checks.describe(x)}" for k, x in named)
        raise ValueError(
            f"replay: leaves of `schedule` need the leading axis of `batches`, {steps} outer "
            f"steps; got {listing or 'no leaves'}. Repeat rows with `jnp.repeat(x, k, axis=0)`."
        )

    def outer(state, row):
        hparams, inner_batches = row
        one = lambda s, batch: (training.step(s, hparams, batch), None)
        return lax.scan(one, state, inner_batches)[0], None

    first = training.init(params, _tree.take(schedule, jnp.asarray(0)))
    return lax.scan(outer, first, (schedule, batches))[0].params
