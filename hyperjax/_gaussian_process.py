"""Gaussian-process regression by Cholesky, in buffers of a fixed size.

Rows that a mask leaves out behave as if they were not there, so that nothing is traced again while
data grows: they are uncorrelated with everything and have unit variance and a target of zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from . import _tree
from ._types import Key, Scalar


class Fit(NamedTuple):
    """A process conditioned on N rows."""

    factor: jax.Array  # [N, N], lower: the Cholesky factor of the covariance of the targets
    weights: jax.Array  # [N] or [N, F]: that covariance's inverse times the targets
    likelihood: jax.Array  # scalar or [F]: log density of the targets; NaN if there is no factor


def squared_distance(a: jax.Array, b: jax.Array, length: jax.Array | float = 1.0) -> jax.Array:
    """sum_d (a_d - b_d)^2 / length_d^2 between rows: [N, D] and [M, D] to [N, M].

    From differences, not from products, which cancel where rows are close.
    """
    scaled = lambda x: x / jnp.broadcast_to(length, x.shape)
    return jnp.sum((scaled(a)[:, None, :] - scaled(b)[None, :, :]) ** 2, -1)


def matern52(squared: jax.Array) -> jax.Array:
    """Matern covariance of smoothness 5/2 and unit variance, from the squared Euclidean distance:
    (1 + sqrt(5) r + 5 r^2 / 3) exp(-sqrt(5) r)."""
    zero = squared == 0
    # the root has no derivative at 0, where that of the covariance is 0
    r = jnp.sqrt(5.0) * jnp.sqrt(jnp.where(zero, 1.0, squared))
    return jnp.where(zero, 1.0, (1 + r + r**2 / 3) * jnp.exp(-r))


def fit(gram: jax.Array, noise: Scalar | float, targets: jax.Array, mask: jax.Array) -> Fit:
    """Condition a process of mean zero on noisy targets.

    Args:
      gram: [N, N], covariance of the noiseless values.
      noise: variance of the noise, to which 10 N eps times the mean of the diagonal of `gram` is
        added, so that rounding leaves the matrix positive definite where rows coincide.
      targets: [N], or [N, F] for F sets of targets at the same rows.
      mask: [N], bool: the rows that count.
    """
    size = gram.shape[0]
    both = mask[:, None] & mask[None, :]
    floor = 10 * size * jnp.finfo(gram.dtype).eps * jnp.mean(jnp.diagonal(gram))
    diagonal = jnp.where(mask, noise + floor, 1.0)
    factor = jnp.linalg.cholesky(jnp.where(both, gram, 0.0) + jnp.diag(diagonal))
    targets = _tree.where(mask, targets, jnp.zeros_like(targets))
    weights = jax.scipy.linalg.cho_solve((factor, True), targets)
    determinant = jnp.sum(jnp.log(jnp.diagonal(factor)))
    constant = mask.sum() * jnp.log(2 * jnp.pi) / 2
    likelihood = -jnp.sum(targets * weights, 0) / 2 - determinant - constant
    return Fit(factor, weights, likelihood)


def predict(
    fitted: Fit, cross: jax.Array, prior: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean, [M] or [M, F], and variance [M] of the noiseless values at M new points.

    `cross` [M, N] is their covariance with the rows, `prior` [M] their variance without data.
    """
    cross = jnp.where(mask[None, :], cross, 0.0)
    half = jax.scipy.linalg.solve_triangular(fitted.factor, cross.T, lower=True)
    return cross @ fitted.weights, jnp.maximum(prior - jnp.sum(half**2, 0), 0.0)


def expected_improvement(best: jax.Array, mean: jax.Array, deviation: jax.Array) -> jax.Array:
    """E max(best - y, 0) of a normal y: what a minimizer gains on `best`. Zero deviation is fine.

    Snoek, Larochelle and Adams 2012 (arXiv 1206.2944), equation 2, which goes back to Mockus 1978.
    """
    known = deviation <= 0
    safe = jnp.where(known, 1.0, deviation)
    u = (best - mean) / safe
    gain = safe * (u * jax.scipy.stats.norm.cdf(u) + jax.scipy.stats.norm.pdf(u))
    return jnp.where(known, jnp.maximum(best - mean, 0.0), jnp.maximum(gain, 0.0))


def maximize(
    objective: Callable[[jax.Array], Scalar],
    starts: jax.Array,
    *,
    low: jax.Array | float,
    high: jax.Array | float,
    steps: int,
    rate: float,
) -> tuple[jax.Array, Scalar]:
    """The best point met from any of `starts` [R, K] by Adam within a box, and its value.

    The starts themselves count. Steps whose gradient is not finite are not taken; without a start
    of finite value the first comes back, with the value -inf.
    """
    adam = optax.adam(rate, b2=0.99)
    value_and_grad = jax.value_and_grad(objective)

    def ascend(start):
        def step(carry, _):
            at, state, best, top = carry
            value, grad = value_and_grad(at)
            better = value > top  # False for NaN
            best, top = _tree.where(better, (at, value), (best, top))
            sound = jnp.isfinite(grad).all()
            updates, moved = adam.update(-jnp.where(sound, grad, 0.0), state)
            after = jnp.clip(at + updates, low, high).astype(at.dtype)
            at, state = _tree.where(sound, (after, moved), (at, state))
            return (at, state, best, top), None

        lowest = jnp.full((), -jnp.inf, starts.dtype)
        carry = start, _tree.strong(adam.init(start)), start, lowest
        carry = _tree.vary_like(carry, objective(start))
        (at, _, best, top), _ = lax.scan(step, carry, length=steps)
        value = objective(at)
        return _tree.where(value > top, (at, value), (best, top))

    points, values = jax.vmap(ascend)(starts)
    winner = jnp.argmax(values)
    return points[winner], values[winner]


def slice_sample(
    key: Key,
    density: Callable[[jax.Array], Scalar],
    start: jax.Array,
    *,
    width: float,
    sweeps: int,
) -> jax.Array:
    """States [sweeps, K] of a Markov chain whose stationary log density is `density`.

    Each sweep updates every coordinate by slice sampling (Neal 2003): an interval of `width` placed
    at random around the point steps out until both ends lie below the level, at most ten times
    in all, then shrinks towards the point until a uniform draw lies in the slice. A density of NaN
    counts as zero, also at the start, which stays until it sees some. Works under jit, vmap, scan.
    """
    dims = start.shape[0]
    start = _tree.vary_like(start, density(start))

    def sweep(point, key):
        point = lax.fori_loop(
            0,
            dims,
            lambda d, p: _slice_coordinate(jax.random.fold_in(key, d), density, p, d, width),
            point,
        )
        return point, point

    return lax.scan(sweep, start, jax.random.split(key, sweeps))[1]


STEPS_OUT = 10
SHRINKS = 100  # the interval is then narrower than rounding; the point stays where it was


def _slice_coordinate(key, density, point, d, width):
    level_key, place_key, share_key, draw_key = jax.random.split(key, 4)
    along = lambda t: density(point.at[d].add(t))
    here = density(point)
    here = jnp.where(jnp.isnan(here), -jnp.inf, here)  # or a chain would never leave again
    # the log of a uniform height under the density
    level = here - jax.random.exponential(level_key, (), point.dtype)
    left = -width * jax.random.uniform(place_key, (), point.dtype)
    # the ends share the steps at random, as detailed balance asks of a limit
    budget = jax.random.randint(share_key, (), 0, STEPS_OUT)

    def outwards(end, sign, most):
        inside = lambda c: (c[1] < c[2]) & (along(c[0]) > level)
        further = lambda c: (c[0] + sign * width, c[1] + 1, c[2])
        first = _tree.vary_like((end, jnp.zeros_like(most), most), level)
        return lax.while_loop(inside, further, first)[0]

    right = outwards(left + width, 1.0, STEPS_OUT - 1 - budget)
    left = outwards(left, -1.0, budget)

    def draw(carry):
        left, right, _, _, key, count = carry
        key, now = jax.random.split(key)
        t = left + (right - left) * jax.random.uniform(now, (), point.dtype)
        found = along(t) > level
        left, right = jnp.where(t < 0, t, left), jnp.where(t < 0, right, t)
        return left, right, t, found, key, count + 1

    start = left, right, jnp.zeros_like(left), jnp.zeros_like(level, bool), draw_key, 0
    start = _tree.vary_like(_tree.strong(start), level)
    _, _, t, found, _, _ = lax.while_loop(lambda c: ~c[3] & (c[5] < SHRINKS), draw, start)
    return point.at[d].add(jnp.where(found, t, 0.0))
