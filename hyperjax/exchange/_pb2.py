"""PB2: new hyperparameters by a time-varying Gaussian-process bandit (Parker-Holder, Nguyen and
Roberts 2020, arXiv 2002.02518)."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _checks, _tree
from .. import _gaussian_process as gp
from .._space import Space
from .._types import Exchange, Key, PyTree
from ._replace import Clock, if_anybody, when_due
from ._truncation import select

# log variance, log length, epsilon, log noise of the process, and their bounds
START = (0.0, 0.0, 0.1, -1.0)
LOW = (-6.0, -11.5, 0.0, -9.0)
HIGH = (6.0, 0.0, 0.5, 2.0)
FIT_STEPS, FIT_RATE = 15, 0.3
CANDIDATES, REFINED, REFINE_STEPS, REFINE_RATE = 256, 4, 20, 0.02
C1, C2 = 0.2, 0.4


class PB2State(NamedTuple):
    """What was seen: a ring of rows, one per member and interval, and where members started."""

    time: jax.Array  # [W], the outer step at which the interval ended
    before: jax.Array  # [W], the score at the start of the interval
    point: jax.Array  # [W, D], the hyperparameters in the unit cube
    change: jax.Array  # [W], how much the score fell per outer step; NaN: no row
    rows: jax.Array  # int32 scalar: how many were ever written
    since: jax.Array  # [P], when the interval of each member began
    start: jax.Array  # [P], its score then; NaN before the first
    kernel: jax.Array  # [4], the last fit: log variance, log length, epsilon, log noise
    calls: jax.Array  # int32 scalar


class PB2Events(NamedTuple):
    """What an exchange did, [P], and what it knew."""

    parents: jax.Array  # int32: the slot whose state this one holds now; its own if untouched
    diverged: jax.Array  # bool: its score was not finite
    kernel: jax.Array  # [4], as in the state


def pb2(
    space: Space,
    fraction: float = 0.25,
    *,
    every: int = 1,
    window: int = 200,
    spread: Literal["variance", "deviation"] = "variance",
) -> Exchange:
    """The worst `fraction` copy one of the best and get hyperparameters from a bandit.

    Copying is that of `truncation`. A Gaussian process predicts by how much the score falls per
    outer step, from the time, the score at the start of the interval and the hyperparameters in
    the unit cube of `space`, with covariance (section 4 of the paper; distances without time)

        s^2 exp(-|x - x'|^2 / l) (1 - epsilon)^(|t - t'| / 2)

    and a copy takes the hyperparameters that maximize mean + sqrt(0.2 log(0.4 n)) spread, n the
    number of rows, for the time and the score it starts from. Copies of one round are chosen one
    after the other, each with the earlier ones as rows of which only the place is known, so that
    they spread. Without any row the choice is a draw from the space.

    Args:
      space: of the raw hyperparameters of the members. A `choice` is searched as so many
        continuous coordinates; the bandit for categories of PB2-Mix is not here.
      fraction: in (0, 0.5]; of P members, floor(fraction P) are replaced.
      every: outer steps between exchanges, an interval. Diverged members are reseeded at every
        step, from any member that has not diverged, and get a choice of the bandit as well.
      window: rows that are remembered; cost per choice grows with its square.
      spread: of the prediction: "variance" as in the authors' code, whose results are the
        published ones, or "deviation" as in the paper's text.

    Members are tuner states with a field `hparams`; a row says what they were when the interval
    ended. Intervals in which a member diverged are never rows. As in the authors' code, time and
    score are scaled to [0, 1] over the rows, and changes are standardized and clipped to +-2.
    Different from the code: s, l, epsilon and the noise are fitted by 15 steps of Adam on the
    true gradient of the likelihood, from the code's start and from the last fit, instead of
    L-BFGS-B (the code's gradients for s, l and epsilon are not those of its kernel); l stays in
    [1e-5, 1] during the fit, not after it; copies chosen earlier change the variance alone, and
    not the fit; the prediction is for the interval to come, where the code takes time and score of
    the one before; the acquisition is maximized from 256 draws, the best four refined by ascent;
    rows older than the window are forgotten, while the code chooses a length by likelihood; and
    a factor sqrt(0.2 log(0.4 n)) below zero under the root, for n < 3, is 0.

    Raises ValueError for a fraction outside its range or hyperparameters not of the space.
    """
    if not 0 < fraction <= 0.5:
        raise ValueError(f"pb2: `fraction` must be in (0, 0.5]; got {fraction!r}.")
    _checks.positive_int("pb2", "every", every)
    _checks.positive_int("pb2", "window", window)
    _checks.one_of("pb2", "spread", spread, ("variance", "deviation"))

    def unit(members: PyTree) -> jax.Array:
        # There is no Cholesky factorization in less than single precision.
        wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return space.to_unit(jax.tree.map(wide, members.hparams))

    def init(members: PyTree) -> PB2State:
        points = unit(members)
        size, dims = points.shape
        nan = lambda *shape: jnp.full(shape, jnp.nan, points.dtype)
        start = jnp.asarray(START, points.dtype)
        zero = jnp.zeros((), jnp.int32)
        empty = jnp.zeros((window, dims), points.dtype)
        since = jnp.zeros(size, points.dtype)
        state = PB2State(
            nan(window), nan(window), empty, nan(window), zero, since, nan(size), start, zero
        )
        return _tree.vary_like(state, points)

    def apply(key: Key, state: PB2State, members: PyTree, score: jax.Array):
        # Inside shard_map all varies as the whole does, in either branch.
        like = key, state, members, score
        _, state, members, score = _tree.vary_like(like, like)
        finite = jnp.isfinite(score)
        now, due = state.calls + 1, (state.calls + 1) % every == 0
        which, choose = jax.random.split(key)
        best, reseed = jax.random.split(which)
        parents = select(best, reseed, score, fraction)
        parents = when_due(Clock(state.calls), every, score, parents)
        moved = parents != jnp.arange(score.shape[0])
        points = unit(members)
        at, level = now.astype(points.dtype), score.astype(points.dtype)
        state = _tree.where(due, _record(state, points, level, at), state)
        begins = level[parents]
        points, kernel = lax.cond(
            moved.any(),
            lambda: _choose(choose, state, points[parents], moved, begins, at + every, spread),
            lambda: (points, state.kernel),
        )
        members = if_anybody(moved, lambda members: _tree.take(members, parents), members, every)
        chosen = _tree.cast_like(space.from_unit(points), members.hparams)
        members = members._replace(hparams=_tree.where(moved, chosen, members.hparams))
        fresh = due | moved  # a new interval begins
        state = state._replace(
            since=jnp.where(fresh, at, state.since),
            start=jnp.where(fresh, begins, state.start),
            kernel=kernel,
            calls=now,
        )
        return members, state, PB2Events(parents, ~finite, kernel)

    return Exchange(init, apply)


def _record(state: PB2State, points: jax.Array, score: jax.Array, now: jax.Array) -> PB2State:
    """One more row of every member whose interval has both ends; the ring forgets the oldest."""
    window = state.time.shape[0]
    change = (state.start - score) / (now - state.since)
    known = jnp.isfinite(change)
    place = (state.rows + jnp.cumsum(known) - 1) % window
    # Of more rows than the ring has places, the last stay.
    kept = known & (jnp.cumsum(known) > known.sum() - window)
    place = jnp.where(kept, place, window)
    put = lambda ring, rows: ring.at[place].set(rows, mode="drop")
    return state._replace(
        time=put(state.time, jnp.broadcast_to(now, change.shape)),
        before=put(state.before, state.start),
        point=put(state.point, points),
        change=put(state.change, change),
        rows=state.rows + known.sum(dtype=jnp.int32),
    )


class Rows(NamedTuple):
    """Places in the domain of the process, scaled to [0, 1]."""

    time: jax.Array  # [N]
    x: jax.Array  # [N, 1 + D]: score before, point


def _choose(key, state, points, moved, begins, ends, spread):
    """Points [P, D], in which those that moved are chosen anew, and the fitted kernel.

    For intervals from the scores `begins` [P] until the time `ends`.
    """
    seen = jnp.isfinite(state.change)
    when, level = _min_max(state.time, seen), _min_max(state.before, seen)
    place = lambda t, before, point: Rows(
        jnp.broadcast_to(when(t), before.shape), jnp.column_stack([level(before), point])
    )
    empty = lambda x: jnp.where(seen, x, 0.0)  # no NaN, for the sake of derivatives
    rows = place(empty(state.time), empty(state.before), state.point)
    targets = _standardize(state.change, seen)
    kernel = _fit_kernel(rows, targets, seen, state.kernel)
    noise = jnp.exp(kernel[3])
    fitted = gp.fit(_covariance(kernel, rows, rows), noise, targets, seen)
    factor = jnp.sqrt(jnp.maximum(C1 * jnp.log(C2 * jnp.maximum(seen.sum(), 1)), 0.0))
    blank = jnp.zeros(state.change.shape[0] + moved.shape[0], points.dtype)

    def choose(own, begin, key, points, taken):
        every = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b]), rows, place(ends, begins, points)
        )
        mask = jnp.concatenate([seen, taken])
        placed = gp.fit(_covariance(kernel, every, every), noise, blank, mask)

        def acquire(candidates):
            count = candidates.shape[0]
            new = place(ends, jnp.broadcast_to(begin, (count,)), candidates)
            prior = jnp.broadcast_to(jnp.exp(kernel[0]), (count,))
            mean, _ = gp.predict(fitted, _covariance(kernel, new, rows), prior, seen)
            _, variance = gp.predict(placed, _covariance(kernel, new, every), prior, mask)
            # the root has no derivative at 0
            doubt = jnp.sqrt(variance + 1e-12) if spread == "deviation" else variance
            return mean + factor * doubt

        shape = CANDIDATES, points.shape[1]
        draws = jax.random.uniform(key, shape, points.dtype)
        _, top = lax.top_k(acquire(draws), REFINED)
        best, _ = gp.maximize(
            lambda u: acquire(u[None])[0],
            draws[top],
            low=0.0,
            high=1.0,
            steps=REFINE_STEPS,
            rate=REFINE_RATE,
        )
        return jnp.where(own[:, None], best, points), taken | own

    def slot(carry, row):
        go, *row = row
        return lax.cond(go, choose, lambda own, begin, key, *kept: kept, *row, *carry), None

    size = moved.shape[0]
    slots = moved, jnp.eye(size, dtype=bool), begins, jax.random.split(key, size)
    # The mask, too, must vary inside shard_map: vmap of a `cond` would make it vary unannounced.
    carry, slots = _tree.vary_like(
        ((points, jnp.zeros_like(moved)), slots), (points, targets, begins)
    )
    (points, _), _ = lax.scan(slot, carry, slots)
    return points, kernel


def _fit_kernel(rows: Rows, targets: jax.Array, seen: jax.Array, last: jax.Array) -> jax.Array:
    """Log variance, log length, epsilon, log noise of the greatest likelihood that was met."""

    def likelihood(kernel):
        gram = _covariance(kernel, rows, rows)
        return gp.fit(gram, jnp.exp(kernel[3]), targets, seen).likelihood

    # of scalars: arrays of constants cannot be made to vary in a branch under vmap and shard_map
    vector = lambda values: jnp.stack([jnp.asarray(v, last.dtype) for v in values])
    starts, low, high = jnp.stack([vector(START), last]), vector(LOW), vector(HIGH)
    best, _ = gp.maximize(likelihood, starts, low=low, high=high, steps=FIT_STEPS, rate=FIT_RATE)
    return best


def _covariance(kernel: jax.Array, a: Rows, b: Rows) -> jax.Array:
    distance = jnp.abs(a.time[:, None] - b.time[None, :])
    near = gp.squared_distance(a.x, b.x) * jnp.exp(-kernel[1])
    return jnp.exp(kernel[0] - near + distance / 2 * jnp.log1p(-kernel[2]))


def _min_max(x: jax.Array, seen: jax.Array):
    """The affine map that takes the least of what was seen to 0 and the greatest to 1."""
    low = jnp.where(seen, x, jnp.inf).min()
    high = jnp.where(seen, x, -jnp.inf).max()
    span = high - low
    some = jnp.isfinite(span) & (span > 0)
    low, span = jnp.where(some, low, 0.0), jnp.where(some, span, 1.0)
    # without two different values all are alike
    return lambda new: jnp.where(some, (new - low) / span, 0.0)


def _standardize(x: jax.Array, seen: jax.Array) -> jax.Array:
    count = jnp.maximum(seen.sum(), 1)
    shifted = jnp.where(seen, x, 0.0)
    centred = jnp.where(seen, shifted - shifted.sum() / count, 0.0)
    deviation = jnp.sqrt((centred**2).sum() / count)
    return jnp.clip(centred / (deviation + 1e-8), -2.0, 2.0)
