"""Every estimator on the ridge of `problems`, for tests that hold for all of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import problems

import hyperjax as hj

NORMAL = hj.evolution.Distribution(
    sample=lambda key, h: h + 0.1 * jax.random.normal(key, h.shape),
    log_prob=lambda h, x: -0.5 * jnp.sum(((x - h) / 0.1) ** 2),
)


def key() -> jax.Array:
    """Not a constant, since a key made at import would start the backend before its settings."""
    return jax.random.key(11)


class Kind(NamedTuple):
    make: Callable[[problems.Problem], hj.Estimator]
    exact: bool  # the gradient is that of the closed form, from a fresh carry
    steps: int = problems.STEPS


def _implicit(p):
    optimality = hj.stationary(p.loss)
    solver = hj.linsolve.cg(maxiter=20, tol=1e-14)
    return hj.implicit(hj.unroll(p.inner.step), optimality, solve=solver)


def _amortize(p):
    return hj.amortize(
        _implicit(p),
        p.score,
        p.inner.init,
        preconditioner=hj.linsolve.jacobi(key(), 4),
        solve=lambda q: hj.linsolve.cg(maxiter=20, tol=1e-14, preconditioner=q),
        refresh=2,
    )


def _shared(p):
    """A schedule of two windows with the same values in both: its derivatives add up."""
    e = hj.forward_sharing(p.inner.step, p.score, p.inner.init, windows=2)
    both = lambda h: jnp.stack([h, h])

    def estimate(h, carry, split):
        result, carry = e.estimate(both(h), carry, split)
        return result._replace(grad=result.grad.sum(0)), carry

    return hj.Estimator(lambda params, h: e.init(params, both(h)), estimate)


def _reversible(p):
    # Two complex roots of modulus sqrt(0.5) for curvatures in [0.9, 2.4]: 100 steps leave 1e-15.
    init, response = hj.reversible(p.loss, lambda h, t: 0.6, lambda h, t: 0.5, least_momentum=0.5)
    return hj.hypergradient(response, p.score, init)


def _sampled(make, **options):
    return lambda p: make(hj.unroll(p.inner.step), p.score, p.inner.init, key=key(), **options)


KINDS = {
    "reverse": Kind(
        lambda p: hj.hypergradient(hj.unroll(p.inner.step), p.score, p.inner.init), True
    ),
    "forward": Kind(
        lambda p: hj.hypergradient(hj.unroll(p.inner.step), p.score, p.inner.init, mode="forward"),
        True,
    ),
    "reversible": Kind(_reversible, True, 100),
    "planned": Kind(lambda p: hj.planned(p.inner.step, p.score, p.inner.init, budget=10**7), True),
    "forward_sharing": Kind(_shared, True),
    "implicit": Kind(lambda p: hj.hypergradient(_implicit(p), p.score, p.inner.init), True),
    "warm_start": Kind(lambda p: hj.warm_start(_implicit(p), p.score, p.inner.init), True),
    "amortize": Kind(_amortize, True),
    "rtho": Kind(lambda p: hj.online.rtho(p.inner.step, p.score, p.inner.init), True),
    "marthe": Kind(lambda p: hj.online.marthe(p.inner.step, p.score, p.inner.init), False),
    "antithetic": Kind(_sampled(hj.evolution.antithetic, pairs=3, sigma=0.1), False),
    "persistent": Kind(_sampled(hj.evolution.persistent, pairs=3, sigma=0.1, horizon=2), False),
    "noise_reuse": Kind(_sampled(hj.evolution.noise_reuse, pairs=3, sigma=0.1, horizon=2), False),
    "spsa": Kind(_sampled(hj.evolution.spsa, pairs=3, radius=0.1), False),
    "score_function": Kind(
        lambda p: hj.evolution.score_function(
            hj.unroll(p.inner.step), p.score, p.inner.init, NORMAL, key=key(), samples=3
        ),
        False,
    ),
}


class Case(NamedTuple):
    problem: problems.Problem
    estimate: Callable[..., Any]  # (hparams, carry, split) -> (Estimate, carry)
    estimator: hj.Estimator
    carry: Any  # fresh
    exact: bool


@functools.cache
def case(name: str, axis: str | None = None) -> Case:
    kind = KINDS[name]
    p = problems.ridge(axis, steps=kind.steps)
    estimator = kind.make(p)
    carry = estimator.init(p.params, p.hparams)
    return Case(p, estimator.estimate, estimator, carry, kind.exact)
