"""Every biased estimate on a converged, strongly convex problem: its bias shrinks with its knob.

`python tests/test_bias.py --write` writes docs/bias.md; a test compares it.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import error, jit

import hyperjax as hj

PAGE = Path(__file__).parents[1] / "docs" / "bias.md"
EXACT = 1e-9  # a knob at its end is exact to the tolerances of the solves, 1e-14, and conditioning


class Knob(NamedTuple):
    what: str
    values: tuple
    error: Callable[[Any], float]  # relative, of the hypergradient
    end: Any = None  # where the bias is gone; None if it never is


def implicit(solve, *, steps=problems.STEPS, estimator=hj.hypergradient):
    """The relative error of the gradient on ridge."""
    p = problems.ridge(steps=steps)
    response = hj.implicit(hj.unroll(p.inner.step), hj.stationary(p.loss), solve=solve)
    return gradient_error(estimator(response, p.score, p.inner.init), p)


def gradient_error(estimator, p, estimates=1) -> float:
    """Of the last of so many estimates at the same hyperparameters."""
    carry, call = estimator.init(p.params, p.hparams), jit(estimator.estimate)
    result, carry = call(p.hparams, carry, p.split)
    for _ in range(estimates - 1):
        result, carry = call(p.hparams, carry, p.split)
    return error(result.grad, problems.ridge_answers(p.hparams, p.split).gradient)


def unrolled(k):
    p = problems.ridge()
    response = hj.unroll(p.inner.step, truncate=k)
    return gradient_error(hj.hypergradient(response, p.score, p.inner.init), p)


def warm(estimates):
    p = problems.ridge()
    solve = hj.linsolve.cg(maxiter=2, tol=0)
    response = hj.implicit(hj.unroll(p.inner.step), hj.stationary(p.loss), solve=solve)
    return gradient_error(hj.warm_start(response, p.score, p.inner.init), p, estimates)


def forward(decay):
    p = problems.ridge()
    return gradient_error(hj.online.rtho(p.inner.step, p.score, p.inner.init, decay=decay), p)


def best_response(steps):
    """Of an affine map, which is right only to first order: training alone leaves a bias."""
    p = problems.ridge_hypernet(steps=steps)
    response = hj.best_response(problems.affine, hj.unroll(p.inner.step))
    return gradient_error(hj.hypergradient(response, p.score, p.inner.init), p)


def smoothed(sigma):
    """The expectation of antithetic evolution strategies, by quadrature in place of samples.

    It is E S(h + sigma z) z / sigma, a Gauss-Hermite sum in two of the dimensions. S is analytic:
    ten nodes leave far less than the bias.
    """
    p = problems.ridge()
    response = hj.unroll(p.inner.step)
    active = 2

    def value(x):
        h = p.hparams.at[:active].set(x)
        w, _ = response(h, p.inner.init(p.params, h), p.split.train)
        return p.score(w, h, p.split.valid)

    nodes, weights = np.polynomial.hermite_e.hermegauss(10)
    weights = weights / weights.sum()
    z = np.stack([g.ravel() for g in np.meshgrid(nodes, nodes, indexing="ij")], 1)
    w = np.prod(np.stack(np.meshgrid(weights, weights, indexing="ij")), 0).ravel()
    scores = jit(jax.vmap(value))(p.hparams[None, :active] + sigma * jnp.asarray(z))
    grad = (w[:, None] * np.asarray(scores)[:, None] * z / sigma).sum(0)
    return error(grad, problems.ridge_answers(p.hparams, p.split).gradient[:active])


KNOBS = {
    "`unroll(truncate=k)`": Knob("steps k", (2, 4, 8), unrolled, 60),
    "`implicit`, training cut short": Knob(
        "training steps", (2, 4, 8), lambda k: implicit(hj.linsolve.cg(tol=1e-14), steps=k), 60
    ),
    "`implicit`, `cg(maxiter=k)`": Knob(
        "products k", (1, 2, 4), lambda k: implicit(hj.linsolve.cg(maxiter=k, tol=0)), 5
    ),
    "`implicit`, `minres(maxiter=k)`": Knob(
        "products k", (1, 2, 4), lambda k: implicit(hj.linsolve.minres(maxiter=k, tol=0)), 5
    ),
    "`implicit`, `gmres(maxiter=k)`": Knob(
        "products k", (1, 2, 4), lambda k: implicit(hj.linsolve.gmres(maxiter=k, tol=0)), 5
    ),
    "`implicit`, `neumann(k, 0.6)`": Knob(
        "terms k", (1, 4, 8), lambda k: implicit(hj.linsolve.neumann(k, 0.6)), 60
    ),
    "`implicit`, `nystrom(rank=5)`": Knob(
        "damping",
        (1.0, 1e-2, 1e-4),
        lambda d: implicit(hj.linsolve.nystrom(jax.random.key(0), 5, d)),
        1e-11,
    ),
    "`implicit`, `cg(damping=d)`": Knob(
        "damping", (1.0, 1e-2, 1e-4), lambda d: implicit(hj.linsolve.cg(tol=1e-14, damping=d)), 0.0
    ),
    "`implicit`, `identity`, then `warm_start`": Knob(
        "estimates",
        (1, 4, 8),
        lambda k: warmed_identity(k),
        60,
    ),
    "`warm_start`, `cg(maxiter=2)`": Knob("estimates", (1, 2, 4), warm, 60),
    "`rtho(decay=mu)`": Knob("1 - mu", (1.0, 0.5, 0.01), lambda d: forward(1 - d), 0.0),
    "`best_response`, an affine map": Knob("training steps", (50, 100, 200), best_response),
    "`antithetic`, its expectation": Knob("sigma", (0.2, 0.1, 0.05), smoothed),
}


def warmed_identity(estimates):
    """One shot of the identity from the last adjoint: a Neumann series over outer steps."""
    p = problems.ridge()
    response = hj.implicit(
        hj.unroll(p.inner.step), hj.stationary(p.loss), solve=hj.linsolve.identity(0.6)
    )
    return gradient_error(hj.warm_start(response, p.score, p.inner.init), p, estimates)


@functools.cache
def bias(name: str) -> tuple[float, ...]:
    return tuple(KNOBS[name].error(v) for v in KNOBS[name].values)


@pytest.mark.parametrize("name", KNOBS)
def test_bias_shrinks_with_its_knob(name):
    found = bias(name)
    assert all(later < 0.7 * sooner for sooner, later in itertools.pairwise(found))
    assert min(found) > 1e-8  # there is a bias to begin with, far above rounding


@pytest.mark.parametrize("name", [name for name, knob in KNOBS.items() if knob.end is not None])
def test_bias_is_gone_at_the_end_of_the_knob(name):
    assert KNOBS[name].error(KNOBS[name].end) < EXACT


def test_smoothing_bias_is_of_second_order():
    # Halving sigma divides it by four, but for terms of fourth order.
    found = bias("`antithetic`, its expectation")
    for sooner, later in itertools.pairwise(found):
        assert 3.5 < sooner / later < 4.5


# ------------------------------------------------------------------------------- the page

HEAD = """\
# Bias

Written by `python tests/test_bias.py --write`: the relative error of a hypergradient on a ridge
regression with five penalties, in float64, training converged unless the row says otherwise. Tests
assert that every row shrinks from left to right, and that it ends at rounding where the last column
says so.

| estimate | knob | from left to right | bias | without bias at |
| --- | --- | --- | --- | --- |
"""


def text(found: Callable[[str], tuple[float, ...]]) -> str:
    lines = []
    for name, knob in KNOBS.items():
        values = ", ".join(f"{v:g}" for v in knob.values)
        errors = ", ".join(f"{e:.0e}" for e in found(name))
        end = "never" if knob.end is None else f"{knob.end:g}"
        lines.append(f"| {name} | {knob.what} | {values} | {errors} | {end} |\n")
    return HEAD + "".join(lines)


def committed(name: str) -> tuple[float, ...]:
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if cells[0].strip() == name:
            return tuple(float(e) for e in cells[3].split(", "))
    raise AssertionError(f"docs/bias.md has no row {name}: python tests/test_bias.py --write")


@pytest.mark.parametrize("name", KNOBS)
def test_page_has_what_was_found(name):
    # One digit is printed, and machines differ in far later ones.
    for there, here in zip(committed(name), bias(name), strict=True):
        assert math.isclose(there, here, rel_tol=0.6)


def test_rest_of_the_page():
    assert PAGE.read_text(encoding="utf-8") == text(committed)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_bias.py --write")
    import conftest  # noqa: F401  float64 and eight devices

    PAGE.write_text(text(bias), encoding="utf-8")
