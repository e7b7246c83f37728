"""Solvers of the lower problem to an accuracy that is certified.

Where the loss is mu-strongly convex in params, |params - solution| <= |gradient| / mu. So a solver
is asked for a norm of the gradient, and reports the one it reached: whoever knows mu has a
certified distance, whether or not the tolerance was met.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .. import _checks, _tree
from .._types import Batch, HParams, Loss, Params, PyTree, Scalar

Constant: TypeAlias = float | Scalar | Callable[[HParams, Batch], Scalar]


class LowerInfo(NamedTuple):
    """How a lower solve went."""

    iterations: jax.Array  # int32
    gradients: jax.Array  # int32: of the loss, the one at the start included
    stationarity: Scalar  # |gradient| at the params returned, 2-norm
    reached: jax.Array  # bool: stationarity <= tolerance
    # False: it stopped since iterates did not do what theory promises; either a constant that the
    # solver was given is wrong, or rounding allows no smaller gradient.
    contracting: jax.Array


class LowerSolve(Protocol):
    """Params with |d loss / d params| <= tolerance, searched from `params`.

    Where the tolerance is not met: the iterate with the smallest gradient, and a report.
    """

    def __call__(
        self,
        loss: Loss,
        params: Params,
        hparams: HParams,
        batch: Batch,
        tolerance: float | Scalar,
        /,
    ) -> tuple[Params, LowerInfo]: ...


def constant(where: str, name: str, value: Constant) -> Callable[[HParams, Batch], Scalar]:
    """A positive number or a function of (hparams, batch), as a function."""
    if callable(value):
        return lambda hparams, batch: jnp.asarray(value(hparams, batch))
    _checks.number(where, name, value, positive=True)
    return lambda hparams, batch: jnp.asarray(value)


# ----------------------------------------------------------------------- accelerated gradient


def accelerated(*, smoothness: Constant, convexity: Constant, maxiter: int = 2000) -> LowerSolve:
    """Nesterov's method for a loss that is L-smooth and mu-strongly convex in params.

    Step 1 / L and momentum (1 - sqrt(mu / L)) / (1 + sqrt(mu / L)). The gradient after k
    iterations is at most sqrt(2) (L / mu) (1 - sqrt(mu / L))^(k / 2) times the first: the Lyapunov
    function loss(x) - least loss + mu |z - x*|^2 / 2 contracts by 1 - sqrt(mu / L), and the point
    where the gradient is taken lies between x and z. A gradient above that proves that L is too
    small or mu too large, up to rounding; the search then stops and says so.

    Args:
      smoothness: L, an upper bound on the curvature; a number, or a function (hparams, batch).
      convexity: mu, a lower bound on it, positive; likewise. Take the true one: a smaller one
        costs iterations. A larger one is found out only by a search that it makes slower than
        promised; where the tolerance is met before that, nothing shows.
      maxiter: most iterations, one gradient each.

    Raises ValueError at trace time for numbers out of range.

    Reference: Nesterov 2004, Introductory Lectures on Convex Optimization, scheme (2.2.11).
    """
    _checks.positive_int("accelerated", "maxiter", maxiter)
    top_at = constant("accelerated", "smoothness", smoothness)
    low_at = constant("accelerated", "convexity", convexity)

    def solve(
        loss: Loss, params: Params, hparams: HParams, batch: Batch, tolerance: float | Scalar, /
    ) -> tuple[Params, LowerInfo]:
        gradient = lambda p: jax.grad(loss)(p, hparams, batch)
        slope = gradient(params)
        size = _tree.norm(slope)
        top, low = (at(hparams, batch).astype(size.dtype) for at in (top_at, low_at))
        root = jnp.sqrt(low / top)

        def advance(s: _Walk) -> _Walk:
            x = _tree.axpy(-1 / top, s.slope, s.y)
            y = _tree.axpy((1 - root) / (1 + root), _tree.sub(x, s.x), x)
            slope = gradient(y)
            size = _tree.norm(slope)
            best = _tree.where(size < s.best_size, y, s.best)
            least = jnp.minimum(s.best_size, size)
            promise = s.promise * jnp.sqrt(jnp.maximum(1 - root, 0))
            return _Walk(x, y, slope, size, best, least, promise, s.steps + 1)

        promise = jnp.sqrt(2.0).astype(size.dtype) * (top / low) * size
        none = jnp.zeros((), jnp.int32)
        start = _Walk(params, params, slope, size, params, size, promise, none)
        start = _tree.vary_like(start, (start, top, low, tolerance))
        # A NaN fails both comparisons and stops.
        running = lambda s: (s.size > tolerance) & (s.size <= s.promise) & (s.steps < maxiter)
        end = lax.while_loop(running, advance, start)
        reached = end.best_size <= tolerance
        info = LowerInfo(
            iterations=end.steps,
            gradients=end.steps + 1,
            stationarity=end.best_size,
            reached=reached,
            contracting=reached | (end.size <= end.promise),
        )
        return end.best, info

    return solve


class _Walk(NamedTuple):
    x: Params  # after the last gradient step
    y: Params  # x with momentum: where the gradient is
    slope: Params
    size: Scalar  # |slope|
    best: Params
    best_size: Scalar
    promise: Scalar  # above |slope| if the constants are right
    steps: jax.Array


# ------------------------------------------------------------------------------------ L-BFGS


def lbfgs(*, memory: int = 10, maxiter: int = 500) -> LowerSolve:
    """L-BFGS of optax with its zoom line search, for a smooth loss of unknown constants.

    Args:
      memory: pairs of differences that approximate the Hessian.
      maxiter: most iterations; each takes one gradient or a few, which the report counts.

    It also stops, and reports `contracting` False, where the line search no longer moves params.
    Raises ValueError at trace time for numbers out of range.

    Reference: Nocedal and Wright 2006, Algorithms 7.5 and 3.5.
    """
    _checks.positive_int("lbfgs", "memory", memory)
    _checks.positive_int("lbfgs", "maxiter", maxiter)
    optimizer = optax.lbfgs(memory_size=memory)

    def solve(
        loss: Loss, params: Params, hparams: HParams, batch: Batch, tolerance: float | Scalar, /
    ) -> tuple[Params, LowerInfo]:
        value_at = lambda p: loss(p, hparams, batch)

        def advance(s: _Descent) -> _Descent:
            updates, state = optimizer.update(
                s.slope, s.state, s.params, value=s.value, grad=s.slope, value_fn=value_at
            )
            params = _tree.cast_like(optax.apply_updates(s.params, updates), s.params)
            value, slope = optax.tree.get(state, "value"), optax.tree.get(state, "grad")
            size = _tree.norm(slope)
            best = _tree.where(size < s.best_size, params, s.best)
            search = optax.tree.get(state, "info")
            new = _Descent(
                params=params,
                value=value,
                slope=slope,
                size=size,
                best=best,
                best_size=jnp.minimum(s.best_size, size),
                state=state,
                steps=s.steps + 1,
                gradients=s.gradients + search.num_linesearch_steps,
                moving=_tree.norm(_tree.sub(params, s.params)) > 0,
            )
            return _tree.cast_like(new, s)

        value, slope = jax.value_and_grad(value_at)(params)
        size = _tree.norm(slope)
        one = jnp.ones((), jnp.int32)
        state = _tree.strong(optimizer.init(params))
        start = _Descent(
            params, value, slope, size, params, size, state, 0 * one, one, jnp.asarray(True)
        )
        start = _tree.vary_like(start, (start, tolerance))
        running = lambda s: (s.size > tolerance) & s.moving & (s.steps < maxiter)
        end = lax.while_loop(running, advance, start)
        reached = end.best_size <= tolerance
        going = reached | (end.moving & jnp.isfinite(end.size))
        return end.best, LowerInfo(end.steps, end.gradients, end.best_size, reached, going)

    return solve


class _Descent(NamedTuple):
    params: Params
    value: Scalar
    slope: Params
    size: Scalar
    best: Params
    best_size: Scalar
    state: PyTree  # of optax
    steps: jax.Array
    gradients: jax.Array
    moving: jax.Array
