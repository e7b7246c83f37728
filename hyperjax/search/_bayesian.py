"""Expected improvement under a Gaussian process, integrated over its hyperparameters (Snoek,
Larochelle and Adams 2012, arXiv 1206.2944)."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _checks, _tree
from .. import _gaussian_process as gp
from .._types import Key, Scalar
from ._types import Search

# Coordinates of the process: mean, log deviation, log noise variance, log length per dimension.
NOISE_SCALE = 0.1  # of the horseshoe
LOG_LENGTH = (math.log(0.005), math.log(2.0))
LOW, HIGH = (-5.0, -5.0, -16.0), (5.0, 5.0, 2.0)
START = (0.0, 0.0, math.log(1e-3), math.log(0.5))
SLICE_WIDTH = 1.0
ML_STEPS, ML_RATE = 60, 0.1
NEAR = (1e-2, 1e-3)  # deviations of candidates around the best point
REFINED, REFINE_STEPS, REFINE_RATE = 4, 20, 0.005


class BayesianState(NamedTuple):
    """State of `bayesian`, for M evaluations at most in D dimensions."""

    key: Key
    points: jax.Array  # [M, D]
    scores: jax.Array  # [M]; infinite for a failed evaluation
    known: jax.Array  # [M] bool: a row that holds an evaluation
    told: jax.Array  # int32 scalar: evaluations so far
    process: jax.Array  # [3 + D], the last hyperparameters, from which the next are found


def bayesian(
    dim: int,
    batch: int,
    memory: int,
    *,
    initial: int = 2,
    samples: int = 10,
    warmup: int = 10,
    fantasies: int = 8,
    candidates: int = 512,
    hyperparameters: Literal["slice", "maximum"] = "slice",
) -> Search:
    """Points of the `dim`-dimensional unit cube where the score is expected to improve the most.

    Scores, standardized, are modelled by a process with constant mean, Matern-5/2 covariance with
    one length per dimension (of the Euclidean distance) and noise. Expected improvement on the best
    score is averaged over hyperparameters of the process drawn by slice sampling. The points of a
    batch are chosen one after the other: where earlier ones are pending, the average is also over
    scores drawn for them from the process (section 3.2 of the paper).

    Priors: mean N(0, 1); log deviation N(0, 1); noise variance v with density log(1 + 3 (0.1/v)^2),
    a horseshoe; lengths uniform on (0, 2). Different from the authors' code (Spearmint): all
    coordinates are updated one by one, deviation, noise and lengths on a logarithmic scale with
    the density that this asks for; the chain goes on from the last call; lengths stay above 0.005
    and the noise variance above 1e-7; candidates are uniform and not Sobol points. Evaluation costs
    and warped inputs (later papers) are left out.

    A failed evaluation counts as the worst score seen, so that its neighbourhood is avoided.

    Args:
      memory: evaluations that are remembered, in a buffer of this fixed size: nothing is traced
        again while they come. Once it is full a new one takes the place of the worst.
      initial: uniform points before the first that is chosen.
      samples: states of the chain that are averaged over, after `warmup` sweeps; in one call.
      fantasies: draws of pending scores for each of the samples, if `batch` > 1.
      candidates: uniform points among which the best are refined by gradient; 32 more lie close to
        the best point.
      hyperparameters: "slice", or "maximum" for those of the greatest likelihood alone.

    Cost of a call: about 20 (samples + warmup) (3 + dim) factorizations of a matrix of `memory`
    rows. In single precision the noise has a floor near 1e-4 for `memory` = 100, from rounding.

    Raises ValueError for counts that are not positive integers, a `memory` that does not hold a
    batch, and unknown `hyperparameters`.
    """
    for name, value in {
        "dim": dim, "batch": batch, "memory": memory, "initial": initial, "samples": samples,
        "fantasies": fantasies, "candidates": candidates,
    }.items():  # fmt: skip
        _checks.positive_int("bayesian", name, value)
    _checks.positive_int("bayesian", "warmup", warmup, least=0)
    _checks.one_of("bayesian", "hyperparameters", hyperparameters, ("slice", "maximum"))
    if memory < batch:
        raise ValueError(
            f"bayesian: `memory` must hold a batch; got memory={memory!r}, batch={batch!r}."
        )
    draws = fantasies if batch > 1 else 1

    def init(key: Key) -> BayesianState:
        start = jnp.asarray([*START[:3], *([START[3]] * dim)], float)
        return BayesianState(
            key,
            jnp.zeros((memory, dim), float),
            jnp.full(memory, jnp.inf, float),
            jnp.zeros(memory, bool),
            jnp.zeros((), jnp.int32),
            start,
        )

    def ask(state: BayesianState) -> tuple[jax.Array, BayesianState]:
        key, chain, uniform, choose = jax.random.split(state.key, 4)
        targets = _standardized(state)
        density = _log_density(state.points, targets, state.known, prior=hyperparameters == "slice")
        if hyperparameters == "slice":
            sweeps = warmup + samples
            chain = gp.slice_sample(chain, density, state.process, width=SLICE_WIDTH, sweeps=sweeps)
            processes = chain[warmup:]
        else:
            processes = _likeliest(density, state.process)[None]
        points = _choose(choose, state, targets, processes, batch, draws, candidates)
        some = jax.random.uniform(uniform, (batch, dim), points.dtype)
        early = state.told + jnp.arange(batch) < initial
        return _tree.where(early, some, points), state._replace(key=key, process=processes[-1])

    def tell(state: BayesianState, points, scores) -> BayesianState:
        scores = jnp.asarray(scores, state.scores.dtype)
        scores = jnp.where(jnp.isfinite(scores), scores, jnp.inf)
        # Empty rows go first, then failed ones, then the worst.
        most = jnp.finfo(scores.dtype).max
        worth = jnp.where(state.known, jnp.minimum(state.scores, most), jnp.inf)
        _, place = lax.top_k(worth, batch)
        return state._replace(
            points=state.points.at[place].set(points.astype(state.points.dtype)),
            scores=state.scores.at[place].set(scores),
            known=state.known.at[place].set(True),
            told=state.told + batch,
        )

    return Search(init, ask, tell)


def _standardized(state: BayesianState) -> jax.Array:
    """Scores with mean 0 and variance 1; 0 where there is none; failed ones as the worst."""
    sound = state.known & jnp.isfinite(state.scores)
    worst = jnp.where(sound, state.scores, -jnp.inf).max()
    worst = jnp.where(jnp.isfinite(worst), worst, 0.0)
    scores = jnp.where(sound, state.scores, worst)
    count = jnp.maximum(state.known.sum(), 1)
    centred = scores - jnp.where(state.known, scores, 0.0).sum() / count
    centred = jnp.where(state.known, centred, 0.0)
    deviation = jnp.sqrt((centred**2).sum() / count)
    return centred / jnp.where(deviation > 0, deviation, 1.0)


def _covariance(process: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.exp(2 * process[1]) * gp.matern52(gp.squared_distance(a, b, jnp.exp(process[3:])))


def _log_density(points, targets, known, *, prior: bool) -> Callable[[jax.Array], Scalar]:
    """The log likelihood in the coordinates of a process, with or without the log prior."""
    low, high = _bounds(points)

    def density(process: jax.Array) -> Scalar:
        mean, deviation, noise, *_ = process
        gram = _covariance(process, points, points)
        value = gp.fit(gram, jnp.exp(noise), targets - mean, known).likelihood
        if not prior:
            return value
        # Densities of the logarithms: noise and lengths come with their Jacobians.
        horseshoe = jnp.log(jnp.log1p(3 * (NOISE_SCALE * jnp.exp(-noise)) ** 2)) + noise
        value += horseshoe + process[3:].sum() - (mean**2 + deviation**2) / 2
        return jnp.where(((process >= low) & (process <= high)).all(), value, -jnp.inf)

    return density


def _bounds(points: jax.Array) -> tuple[jax.Array, jax.Array]:
    box = zip(LOW, HIGH, strict=True)
    rows = [*box, *([LOG_LENGTH] * points.shape[1])]
    low, high = jnp.asarray(rows, points.dtype).T
    return low, high


def _likeliest(density: Callable[[jax.Array], Scalar], last: jax.Array) -> jax.Array:
    first = jnp.asarray([*START[:3], *([START[3]] * (last.shape[0] - 3))], last.dtype)
    low, high = _bounds(last[None, 3:])
    starts = jnp.stack([first, last])
    best, _ = gp.maximize(density, starts, low=low, high=high, steps=ML_STEPS, rate=ML_RATE)
    return best


class Pending(NamedTuple):
    """The rows of the state, then the points of the batch as they are chosen: N = M + batch."""

    points: jax.Array  # [N, D]
    targets: jax.Array  # [S, N, F]: for every process, with draws for what is pending
    known: jax.Array  # [N]


def _choose(key, state, targets, processes, batch, draws, candidates) -> jax.Array:
    """The points of a batch, [batch, D]."""
    memory = state.points.shape[0]
    pad = lambda x: jnp.concatenate([x, jnp.zeros((batch, *x.shape[1:]), x.dtype)])
    rows = pad(targets)[None, :, None]
    shape = (processes.shape[0], memory + batch, draws)
    start = Pending(pad(state.points), jnp.broadcast_to(rows, shape), pad(state.known))
    best = state.points[jnp.argmin(jnp.where(state.known, state.scores, jnp.inf))]

    def one(j, pending: Pending) -> Pending:
        now, fantasy = jax.random.split(jax.random.fold_in(key, j))
        predict = _predictor(pending, processes)
        least = jnp.where(pending.known[None, :, None], pending.targets, jnp.inf).min(1)

        def acquire(points):
            mean, variance = predict(points)  # [S, C, F], [S, C]
            deviation = jnp.sqrt(variance + 1e-14)[:, :, None]
            gain = gp.expected_improvement(least[:, None, :], mean, deviation).mean(2)
            # a process whose covariance could not be factorized has no say
            return jnp.where(jnp.isfinite(gain), gain, 0.0).mean(0)

        point = _maximize(now, acquire, best, candidates)
        mean, variance = predict(point[None])
        deviation = jnp.sqrt(variance + jnp.exp(processes[:, 2])[:, None])[:, :, None]
        drawn = mean + deviation * jax.random.normal(fantasy, mean.shape, mean.dtype)
        drawn = jnp.where(jnp.isfinite(drawn), drawn, 0.0)[:, 0]
        return Pending(
            pending.points.at[memory + j].set(point),
            pending.targets.at[:, memory + j].set(drawn),
            pending.known.at[memory + j].set(True),
        )

    start = _tree.vary_like(start, (state.points, processes))
    return lax.fori_loop(0, batch, one, start).points[memory:]


def _predictor(pending: Pending, processes: jax.Array):
    """points [C, D] -> mean [S, C, F] and variance [S, C] of the noiseless targets."""

    def condition(process, targets):
        gram = _covariance(process, pending.points, pending.points)
        return gp.fit(gram, jnp.exp(process[2]), targets - process[0], pending.known)

    fits = jax.vmap(condition)(processes, pending.targets)

    def predict(points):
        def one(process, fitted):
            cross = _covariance(process, points, pending.points)
            prior = jnp.broadcast_to(jnp.exp(2 * process[1]), points.shape[:1])
            mean, variance = gp.predict(fitted, cross, prior, pending.known)
            return mean + process[0], variance

        return jax.vmap(one)(processes, fits)

    return predict


def _maximize(key, acquire, best: jax.Array, candidates: int) -> jax.Array:
    """The point [D] of the cube where `acquire`, points [C, D] -> [C], is largest, nearly."""
    uniform, close = jax.random.split(key)
    everywhere = jax.random.uniform(uniform, (candidates, best.shape[0]), best.dtype)
    noise = jax.random.normal(close, (2, 16, best.shape[0]), best.dtype)
    scale = jnp.asarray(NEAR, best.dtype)[:, None, None]
    near = (best[None, None] + scale * noise).reshape(-1, best.shape[0])
    pool = jnp.concatenate([everywhere, jnp.clip(near, 0.0, 1.0)])
    _, top = lax.top_k(acquire(pool), min(REFINED, pool.shape[0]))
    point, _ = gp.maximize(
        lambda u: acquire(u[None])[0],
        pool[top],
        low=0.0,
        high=1.0,
        steps=REFINE_STEPS,
        rate=REFINE_RATE,
    )
    return point
