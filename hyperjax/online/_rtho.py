"""Real-time hyperparameter optimization: forward-mode derivatives that go on along training."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _checks, _tree
from .._types import Estimate, Estimator, HParams, Loss, Params, Scalar, Split, State
from . import _tangents


class RthoCarry(NamedTuple):
    """The carry of `rtho`: a state of training and its derivative."""

    state: State
    tangent: State  # d state / d hparams: leaves [N, ...] for N scalars, None for counters and keys


def rtho(
    step: _tangents.Step,
    score: Loss,
    init: Callable[[Params, HParams], State],
    *,
    decay: float | Scalar = 1.0,
) -> Estimator:
    """Hypergradients through the whole history of training, in one pass and without storing it.

    Franceschi et al. 2017 (arXiv 1703.01785), forward mode with real-time updates: beside the
    training state s the carry holds its tangent Z, and each inner step makes

        Z <- A (decay Z) + B,    A = d step / d s,    B = d step / d hparams,

    so that the gradient is d score / d hparams + <d score / d params, Z>. The tangent is never
    reset: the derivative is that of all steps so far, as if hparams had been constant. While
    hparams stay put and decay is 1 it is exact, and equals reverse mode through the history.

    `decay` in [0, 1] is the mu of MARTHE (see `marthe`): 1 is RTHO, 0 the greedy hypergradient,
    which sees the last step alone (hypergradient descent on the score). Values between 0 and 1
    forget: a term that is k steps old counts decay^k.

    Costs one Jacobian-vector product of `step` per scalar hyperparameter and step, and as many
    copies of the state; neither grows with the number of steps. Forward mode needs every operation
    in the loss to have it: those with only a `custom_vjp` are refused by JAX.

    `init(params, hparams)` makes the state, as `Inner.init`; the state has a field `params`.
    `Estimate.info` is (). A training that diverges takes its tangent along, which then is no
    longer finite; `tune` reports it and stands still.

    Raises ValueError for a decay outside [0, 1], and at trace time for hparams without entries;
    TypeError for hparams that are not floating point.
    """
    _checks.is_callable("rtho", "step", step)
    _checks.is_callable("rtho", "init", init)
    score = _checks.scalar_loss("rtho", "score", score)
    known = _checks.number("rtho", "decay", decay)
    if known is not None and known > 1:
        raise ValueError(f"rtho: `decay` must be in [0, 1]; got {decay!r}.")

    def begin(params: Params, hparams: HParams) -> RthoCarry:
        return RthoCarry(*_tangents.start("rtho", init, params, hparams))

    def estimate(hparams: HParams, carry: RthoCarry, split: Split) -> tuple[Estimate, RthoCarry]:
        hparams = _tangents.check("rtho", hparams)
        _checks.count_steps("rtho", split.train)
        carry = _tree.vary_like(carry, hparams)  # what is trained depends on them

        def body(c: RthoCarry, batch):
            old = _tangents.decayed(decay, c.tangent)
            return RthoCarry(*_tangents.push(step, c.state, old, hparams, batch)), None

        carry, _ = lax.scan(body, carry, split.train)
        value, slope, direct = _tangents.score_slopes(
            score, carry.state.params, hparams, split.valid
        )
        indirect = _tangents.unflatten(_tangents.along(slope, carry.tangent), hparams)
        return Estimate(value, jax.tree.map(jnp.add, direct, indirect), ()), carry

    return Estimator(begin, estimate)
