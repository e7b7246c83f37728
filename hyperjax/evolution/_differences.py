"""Differences of scores along random directions: antithetic evolution strategies and SPSA."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._types import Carry, Estimate, Estimator, HParams, Key, Loss, Params, PyTree, Response, Split
from . import _common


class DifferenceState(NamedTuple):
    """The carry of `antithetic` and `spsa`."""

    carry: Carry  # of training with the hyperparameters themselves
    key: Key


def antithetic(
    response: Response,
    score: Loss,
    init: Callable[[Params, HParams], Carry],
    *,
    key: Key,
    pairs: int,
    sigma: PyTree,
    chunk: int | None = None,
) -> Estimator:
    """The gradient of the smoothed score E S(h + sigma z), z normal, from antithetic pairs.

    grad = mean over pairs of (S(h + sigma z) - S(h - sigma z)) z / (2 sigma), where S is the score
    after training (Salimans et al. 2017, arXiv 1703.03864). It is unbiased for the smoothed score
    at any sigma, and differs from the gradient of S itself by terms of order sigma^2, none if S is
    a quadratic. For a linear S in d dimensions the squared error is (d + 1) / pairs times the
    squared gradient: with few hyperparameters `hypergradient` in forward mode is better.

    All runs of an estimate train from the same carry on the same batches, and so does the run with
    the hyperparameters themselves: its score is `value`, and its carry is what the next estimate
    goes on from. That is truncated ES, blind to what hyperparameters did to the carry; `restart`
    trains from the beginning every time, `persistent` and `noise_reuse` go on without that bias.

    A pair with a score that is not finite is left out and counted in `Estimate.info`, an
    `EvolutionInfo`; without any pair the gradient is NaN. What is left out is not learnt from: a
    score that maps divergence to a large number is.

    Args:
      key: a typed PRNG key. The values of params and hparams at `init` are folded in, so that
        members of a population draw apart, and the same start draws the same noise. A member that
        an exchange copied goes on drawing what its parent draws.
      pairs: at least 1; 2 for a standard error.
      sigma: in the units of hparams: one number, or a tree like hparams of what broadcasts to its
        leaves.
      chunk: runs trained at once; None is all 2 pairs + 1, in one vmap.

    Raises ValueError or TypeError for arguments out of range, hparams that are not floating point,
    or a score that is not a scalar.
    """
    noise = jax.random.normal
    return _estimator("antithetic", response, score, init, key, pairs, "sigma", sigma, chunk, noise)


def spsa(
    response: Response,
    score: Loss,
    init: Callable[[Params, HParams], Carry],
    *,
    key: Key,
    radius: PyTree,
    pairs: int = 1,
    sides: Literal[1, 2] = 2,
    chunk: int | None = None,
) -> Estimator:
    """Simultaneous perturbation: differences along random signs (Spall 1992, IEEE TAC 37:332-341).

    `antithetic` with z = +-1 in place of normal noise: grad = mean over pairs of
    (S(h + radius z) - S(h - radius z)) z / (2 radius), which is division by z. For a linear S
    the squared error is (d - 1) / pairs times the squared gradient, so that one hyperparameter
    alone gets its central difference. Spall lets the radius shrink over the steps; here it stays.

    Args:
      radius: in the units of hparams, as `sigma` of `antithetic`.
      sides: 2, as above. 1 takes (S(h + radius z) - S(h)) z / radius: half the runs, and as little
        bias, but the curvature of S adds to the variance.

    For the rest see `antithetic`.
    """
    _checks.one_of("spsa", "sides", sides, (1, 2))
    signs = jax.random.rademacher
    return _estimator(
        "spsa", response, score, init, key, pairs, "radius", radius, chunk, signs, sides
    )


def _estimator(where, response, score, init, key, pairs, name, scale, chunk, noise, sides=2):
    _common.check_factory(where, response, init, key, chunk)
    _common.check_scale(where, name, scale)
    _checks.positive_int(where, "pairs", pairs)
    score = _checks.scalar_loss(where, "score", score)

    def start(params: Params, hparams: HParams) -> DifferenceState:
        params, hparams = _tree.strong((params, hparams))
        own = _common.own_key(key, params, hparams)
        return DifferenceState(_tree.strong(init(params, hparams)), own)

    def estimate(hparams: HParams, state: DifferenceState, split: Split):
        _checks.differentiable(where, "hparams", hparams)
        hparams = _tree.strong(hparams)
        scales = _common.spread(where, name, scale, hparams)
        now, later = jax.random.split(state.key)
        z = _common.draw(noise, now, pairs, hparams)
        both = z if sides == 1 else jax.tree.map(lambda x: jnp.concatenate([x, -x]), z)

        def run(h):
            params, carry = response(h, state.carry, split.train)
            return score(params, h, split.valid), carry

        shifted = _common.shift(hparams, scales, both)
        value, scores, carry = _run_all(run, hparams, shifted, chunk)
        rises = scores - value if sides == 1 else (scores[:pairs] - scores[pairs:]) / 2
        grad, info = _common.slopes(rises, z, scales, scores)
        return Estimate(value, grad, info), DifferenceState(carry, later)

    return Estimator(start, estimate)


def _run_all(run, hparams, shifted, chunk):
    """Score and carry of the run at hparams, and the scores of the shifted ones [N]."""
    if chunk is None:
        every = jax.tree.map(lambda h, x: jnp.concatenate([h[None], x]), hparams, shifted)
        scores, carries = jax.vmap(run)(every)
        return scores[0], scores[1:], jax.tree.map(lambda x: x[0], carries)
    # By itself, since the carries of the others need not be kept.
    value, carry = run(hparams)
    return value, _common.each(lambda h: run(h)[0], shifted, chunk), carry
