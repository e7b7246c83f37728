"""MARTHE: real-time hypergradients that decide how much history to keep."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _checks, _tree
from .._types import Estimate, Estimator, HParams, Loss, Params, Split, State
from . import _tangents


class MartheCarry(NamedTuple):
    """The carry of `marthe`, for N scalar hyperparameters."""

    state: State
    tangent: State  # as in RthoCarry, N rows
    newest: jax.Array  # [N]: what the last step alone contributed to the gradient
    decay: jax.Array  # [N]: mu of the last estimate
    total: jax.Array  # [N]: the sum of mu since it was last 0


class MartheInfo(NamedTuple):
    """How much of the past is in an estimate."""

    decay: HParams  # mu in force, one per scalar hyperparameter, in [0, 1]


def marthe(
    step: _tangents.Step, score: Loss, init: Callable[[Params, HParams], State]
) -> Estimator:
    """`rtho` with a decay mu that adapts itself, one for every scalar hyperparameter.

    Donini et al. 2020 (arXiv 1910.08525). At each estimate, with eta the hyperparameter as it now
    is and b = <d score / d params, B> what the step before contributed on its own,

        z = min(|eta| / max(-b, 0), 1), or 0 where b > 0;
        c <- c [mu > 0] + mu;    mu = z^(1 / (c + 1)).

    For a learning rate of SGD, -b is the inner product of validation and training gradient. So
    history counts while the newest step asks for a larger rate, and is dropped as soon as it asks
    for a smaller one, that is where the two gradients disagree. For other hyperparameters the same
    rule is applied to the same quantities, a generalization of ours. It compares a value with a
    derivative in that value: meant for hyperparameters in their own unit, not for logarithms.

    One inner step per estimate is the algorithm of the paper; with several, mu is held during the
    estimate and b belongs to its last step. Two pieces of the algorithm are left to the optimizer
    that `tune` gets: that a rate stays non-negative
    (`optax.chain(optax.sgd(beta), optax.keep_params_nonnegative())`), and an adaptive beta
    (`hypergradient_descent`).

    The rule for mu is taken from the released code, from which we differ in three points. Its
    tangents use the initial rate throughout; here the current one, as the paper has it. It starts
    with mu = -1, which makes the first exponent infinite; here mu = 0, since there is no history.
    With momentum it compares with the training gradient, here with the derivative of the step.

    Costs and requirements are those of `rtho`, with two products instead of one in the last step
    of an estimate. `Estimate.info` is a `MartheInfo`.

    Raises ValueError at trace time for hparams without entries, TypeError for hparams that are not
    floating point.
    """
    _checks.is_callable("marthe", "step", step)
    _checks.is_callable("marthe", "init", init)
    score = _checks.scalar_loss("marthe", "score", score)

    def begin(params: Params, hparams: HParams) -> MartheCarry:
        state, tangent = _tangents.start("marthe", init, params, hparams)
        zero = jnp.zeros_like(_tangents.flatten(_tangents.check("marthe", hparams)))
        # An infinite `newest` says that there is no history to keep: mu is 0 at first.
        return MartheCarry(state, tangent, zero + jnp.inf, zero, zero)

    def estimate(
        hparams: HParams, carry: MartheCarry, split: Split
    ) -> tuple[Estimate, MartheCarry]:
        hparams = _tangents.check("marthe", hparams)
        steps = _checks.count_steps("marthe", split.train)
        carry = _tree.vary_like(carry, hparams)  # what is trained depends on them
        decay, total = _adapt(carry, _tangents.flatten(hparams))
        body = lambda c, batch: (
            _tangents.push(step, c[0], _tangents.decayed(decay, c[1]), hparams, batch),
            None,
        )
        state, tangent = carry.state, carry.tangent
        if steps > 1:  # the last one is taken apart
            before = jax.tree.map(lambda x: x[:-1], split.train)
            (state, tangent), _ = lax.scan(body, (state, tangent), before)
        state, carried, own = _tangents.push_apart(
            step, state, _tangents.decayed(decay, tangent), hparams, _tree.last(split.train)
        )
        tangent = jax.tree.map(jnp.add, carried, own)
        value, slope, direct = _tangents.score_slopes(score, state.params, hparams, split.valid)
        indirect = _tangents.unflatten(_tangents.along(slope, tangent), hparams)
        newest = _tangents.along(slope, own).astype(decay.dtype)
        info = MartheInfo(_tangents.unflatten(decay, hparams))
        result = Estimate(value, jax.tree.map(jnp.add, direct, indirect), info)
        return result, MartheCarry(state, tangent, newest, decay, total)

    return Estimator(begin, estimate)


def _adapt(carry: MartheCarry, hparams: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next mu and total."""
    gain = -carry.newest
    ratio = jnp.minimum(jnp.abs(hparams) / jnp.where(gain > 0, gain, 1), 1)
    # Without any gain the ratio grows beyond 1; a newest term that is not finite keeps nothing.
    z = jnp.where(gain > 0, ratio, jnp.where(gain == 0, jnp.ones_like(gain), 0))
    total = jnp.where(carry.decay > 0, carry.total, 0) + carry.decay
    return z ** (1 / (total + 1)), total
