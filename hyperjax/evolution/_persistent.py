"""Evolution strategies on pieces of training, without the bias of truncation: PES and NRES."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._types import Carry, Estimate, Estimator, HParams, Key, Loss, Params, PyTree, Response, Split
from . import _common


class ParticleState(NamedTuple):
    """Run 0 is that of the hyperparameters themselves, then N runs at +, then N at -."""

    params: Params  # where every episode starts
    carries: Carry  # [1 + 2N, ...]
    noise: HParams  # [N, ...]: what differences are weighed with, in units of sigma
    left: jax.Array  # int32 [1 + N]: estimates left in the episode; <= 0 begins one
    key: Key


def persistent(
    response: Response,
    score: Loss,
    init: Callable[[Params, HParams], Carry],
    *,
    key: Key,
    pairs: int,
    sigma: PyTree,
    horizon: int | None,
    stagger: bool = False,
    chunk: int | None = None,
) -> Estimator:
    """Persistent evolution strategies (Vicol, Metz, Sohl-Dickstein 2021, arXiv 2112.13835).

    An estimate trains each particle of every antithetic pair a piece further, from its own carry
    and with a new perturbation, and weighs the difference of scores with the sum of all
    perturbations of the episode so far: grad = mean over pairs of (S+ - S-) xi / (2 sigma^2),
    xi = sum of sigma z. With S_t the score after t pieces as a function of the hyperparameters
    h_1 ... h_t of each piece, E S_t xi / sigma^2 is the sum over pieces of the derivatives of
    E S_t(h_1 + sigma z_1, ..., h_t + sigma z_t) at equal h: the whole derivative, unbiased, and so
    is the sum over an episode for the sum of the S_t. The variance of an estimate grows with the
    age of the episode; that of `noise_reuse` need not, but the sum over an episode may be known
    better or worse. When an optimizer moves hparams within an episode, what came before counts as
    if it had been at the present ones.

    An episode begins with `init(params, perturbed hparams)`, so that what `init` makes of hparams
    counts too. `value` is the score of an own run with the hyperparameters themselves, of the same
    horizon. A particle whose score is not finite is left out together with its partner and
    counted, and both begin a new episode at the next estimate; so does the own run. The standard
    error is that of one estimate; the estimates of an episode are not independent of one another.

    Args:
      key, pairs, sigma: as of `antithetic`.
      horizon: estimates in an episode; None never ends one.
      stagger: spread the pairs' episodes over the horizon, so that each estimate sees all parts of
        training; the first episodes are cut short for that.
      chunk: runs trained at once; None is all 2 pairs + 1. All carries are kept in any case.

    `Estimate.info` is an `EvolutionInfo`. Raises ValueError or TypeError for arguments out of
    range, hparams that are not floating point, or a score that is not a scalar.
    """
    if horizon is None and stagger:
        raise ValueError("persistent: `stagger` needs a `horizon` to spread over; got None.")

    def advance(begins, noise, drawn):
        gathered = jax.tree.map(jnp.add, _tree.where(begins, _tree.zeros_like(noise), noise), drawn)
        return drawn, gathered

    return _estimator(
        "persistent", response, score, init, key, pairs, sigma, horizon, stagger, chunk, advance
    )


def noise_reuse(
    response: Response,
    score: Loss,
    init: Callable[[Params, HParams], Carry],
    *,
    key: Key,
    pairs: int,
    sigma: PyTree,
    horizon: int,
    stagger: bool = False,
    chunk: int | None = None,
) -> Estimator:
    """Noise-reuse evolution strategies (Li et al. 2023, arXiv 2304.12180).

    `persistent` with one perturbation per pair and episode: grad = mean over pairs of
    (S_t(h + sigma z) - S_t(h - sigma z)) z / (2 sigma), unbiased at every t for the derivative of
    the score smoothed as in `antithetic`, E S_t(h + sigma z). Its sum over an episode is full ES
    of the summed score, at one piece of training per estimate. Within an episode the estimates
    see the same few directions, while those of `persistent` average over new ones; for one
    hyperparameter and a score linear in it, the variance of an estimate is twice its square at any
    age.

    horizon: estimates in an episode, and so in the life of a perturbation. Staggered pairs are
    what the paper recommends; here lockstep is the default, as in `persistent`.

    For the rest see `persistent`.
    """
    _checks.positive_int("noise_reuse", "horizon", horizon)

    def advance(begins, noise, drawn):
        kept = _tree.where(begins, drawn, noise)
        return kept, kept

    return _estimator(
        "noise_reuse", response, score, init, key, pairs, sigma, horizon, stagger, chunk, advance
    )


def _estimator(
    where, response, score, init, key, pairs, sigma, horizon, stagger, chunk, advance
) -> Estimator:
    """`advance(begins, noise, drawn)` gives the perturbations and weights of this estimate."""
    _common.check_factory(where, response, init, key, chunk)
    _check_options(where, pairs, sigma, horizon)
    score = _checks.scalar_loss(where, "score", score)

    def start(params: Params, hparams: HParams) -> ParticleState:
        params, hparams = _tree.strong((params, hparams))
        carries = _stack(_tree.strong(init(params, hparams)), 1 + 2 * pairs)
        noise = _tree.zeros_like(_stack(hparams, pairs))
        left = _first_episodes(pairs, horizon, stagger)
        own = _common.own_key(key, params, hparams)
        # Inside shard_map, what depends on a member varies over members from the start.
        carries, noise, left = _tree.vary_like((carries, noise, left), (params, hparams))
        return ParticleState(params, carries, noise, left, own)

    def estimate(hparams: HParams, state: ParticleState, split: Split):
        _checks.differentiable(where, "hparams", hparams)
        hparams = _tree.strong(hparams)
        scales = _common.spread(where, "sigma", sigma, hparams)
        now, later = jax.random.split(state.key)
        begins = state.left <= 0
        drawn = _common.draw(jax.random.normal, now, pairs, hparams)
        z, weights = advance(begins[1:], state.noise, drawn)

        def run(particle):
            h, begin, carry = particle
            carry = _tree.where(begin, _tree.strong(init(state.params, h)), carry)
            params, carry = response(h, carry, split.train)
            return score(params, h, split.valid), carry

        mirrored = jax.tree.map(lambda x: jnp.concatenate([0 * x[:1], x, -x]), z)
        shifted = _common.shift(hparams, scales, mirrored)
        scores, carries = _common.each(run, (shifted, _of_runs(begins), state.carries), chunk)
        rises = (scores[1 : 1 + pairs] - scores[1 + pairs :]) / 2
        grad, info = _common.slopes(rises, weights, scales, scores[1:])
        sound = jnp.isfinite(jnp.concatenate([scores[:1], rises]))
        left = jnp.where(sound, _count_down(state.left, horizon), 0)
        after = ParticleState(state.params, carries, weights, left, later)
        return Estimate(scores[0], grad, info), after

    return Estimator(start, estimate)


def _check_options(where: str, pairs: int, sigma: PyTree, horizon: int | None) -> None:
    _common.check_scale(where, "sigma", sigma)
    _checks.positive_int(where, "pairs", pairs)
    if horizon is not None:
        _checks.positive_int(where, "horizon", horizon)


def _stack(tree: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), tree)


def _of_runs(flags: jax.Array) -> jax.Array:
    """[1 + N] of the own run and the pairs to [1 + 2N] of all runs."""
    return jnp.concatenate([flags, flags[1:]])


def _first_episodes(pairs: int, horizon: int | None, stagger: bool) -> jax.Array:
    """Minus what is missing of the first episode of the own run and of each pair."""
    offsets = jnp.arange(pairs, dtype=jnp.int32) * (horizon or 0) // pairs if stagger else 0
    return -jnp.zeros(1 + pairs, jnp.int32).at[1:].set(offsets)


def _count_down(left: jax.Array, horizon: int | None) -> jax.Array:
    if horizon is None:
        return jnp.ones_like(left)
    return jnp.where(left > 0, left, horizon + left) - 1
