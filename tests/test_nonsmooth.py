"""Implicit differentiation of minima with kinks and constraints, and of equilibria."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import error, jit

import hyperjax as hj

ROWS, FEATURES = 40, 8
STEPS = 600  # see `problem`
RATE = 0.5
HPARAMS = np.random.default_rng(6).uniform(-3.0, -0.5, FEATURES)


def data():
    """Half the true weights are zero or negative, so that every penalty here has something held."""
    rng = np.random.default_rng(5)
    weights = np.asarray([1.5, 0.0, -1.0, 0.0, 0.8, 0.0, -0.6, 2.0])
    sets = []
    for _ in range(2):
        x = rng.normal(size=(ROWS, FEATURES))
        sets.append((x, x @ weights + 0.5 * rng.normal(size=ROWS)))
    return sets


def half_mse(w, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def ridge_loss(w, h, batch):
    return half_mse(w, batch) + 0.5 * jnp.sum(jnp.exp(h) * w**2)


def plain_loss(w, h, batch):
    del h
    return half_mse(w, batch)


# What is fixed where, and what the free entries obey: see `closed_form`.
KINDS = {
    # loss, prox, l1(h), l2(h)
    "lasso": (plain_loss, hj.prox.lasso(jnp.exp), np.exp, np.zeros_like),
    "elastic net": (
        plain_loss,
        hj.prox.elastic_net(jnp.exp, lambda h: jnp.exp(0.5 * h)),
        np.exp,
        lambda h: np.exp(0.5 * h),
    ),
    "non-negative": (ridge_loss, hj.prox.non_negative(), np.zeros_like, np.exp),
    # Half of the weights beyond their bounds; the bounds themselves are hyperparameters.
    "box": (
        plain_loss,
        hj.prox.box(lambda h: -jnp.exp(h), lambda h: jnp.exp(0.5 * h)),
        np.zeros_like,
        np.zeros_like,
    ),
}


def estimator(kind, solve=None):
    loss, prox, *_ = KINDS[kind]
    inner = hj.proximal_descent(loss, prox, RATE)
    score = lambda w, h, batch: half_mse(w, batch)
    response = hj.implicit(hj.unroll(inner.step), hj.proximal(loss, prox, RATE), solve=solve)
    unrolled = hj.hypergradient(hj.unroll(inner.step), score, inner.init)
    return hj.hypergradient(response, score, inner.init), unrolled


def split(steps=STEPS):
    train, valid = ((jnp.asarray(x), jnp.asarray(y)) for x, y in data())
    return hj.Split(problems.repeat(train, steps), valid)


def call(e, h):
    return jit(lambda h: e.estimate(h, e.init(jnp.zeros(FEATURES), h), split()))(jnp.asarray(h))


def closed_form(kind, w, h):
    """The hypergradient from which entries are free, and the least |multiplier| of the others.

    With G = x'x / n and D = diag(l2), free entries S with signs s obey
        (G + D)_SS w_S = (x'y / n)_S - l1_S s - G_SF w_F,
    where F are the fixed entries, at zero or at a bound b(h); differentiated in h.
    """
    (x, y), (xv, yv) = data()
    _, _, l1, l2 = KINDS[kind]
    gram, target = x.T @ x / ROWS, x.T @ y / ROWS
    bounds = np.zeros(FEATURES)
    slopes = np.zeros(FEATURES)  # of the fixed entries in their own hyperparameter
    if kind == "box":
        low, high = -np.exp(h), np.exp(0.5 * h)
        at_low, at_high = np.isclose(w, low), np.isclose(w, high)
        fixed = at_low | at_high
        bounds = np.where(at_low, low, np.where(at_high, high, 0))
        slopes = np.where(at_low, low, np.where(at_high, 0.5 * high, 0))
    else:
        fixed = w == 0
    free = ~fixed
    signs = np.sign(w)
    matrix = (gram + np.diag(l2(h)))[np.ix_(free, free)]
    right = (target - l1(h) * signs - gram @ np.where(fixed, bounds, 0))[free]
    solution = np.where(fixed, bounds, 0.0)
    solution[free] = np.linalg.solve(matrix, right)

    # Column j: the derivative in h_j. exp(h) has derivative exp(h), exp(h / 2) half of itself.
    d1 = l1(h)
    d2 = 0.5 * l2(h) if kind == "elastic net" else l2(h)
    jacobian = np.diag(np.where(fixed, slopes, 0.0))
    moved = -np.diag(d1 * signs + d2 * solution) - gram @ jacobian
    jacobian[free] = np.linalg.solve(matrix, moved[free])
    gradient = jacobian.T @ (xv.T @ (xv @ solution - yv) / ROWS)
    multiplier = np.abs(gram @ solution - target)[fixed]
    slack = multiplier - l1(h)[fixed] if kind in ("lasso", "elastic net") else multiplier
    return solution, gradient, np.abs(slack).min(), fixed


@pytest.mark.parametrize("kind", KINDS)
def test_nonsmooth_hypergradients_against_the_active_set(kind):
    implicit, unrolled = estimator(kind)
    result, carry = call(implicit, HPARAMS)
    w = np.asarray(carry.params)
    solution, gradient, slack, fixed = closed_form(kind, w, HPARAMS)
    # The test is about both kinds of entry, none of them on its kink.
    assert 2 <= fixed.sum() <= FEATURES - 2
    assert slack > 1e-3
    # The curvature lies in [0.3, 2.3]: rate 0.5 contracts by 0.85 or less, 600 steps to rounding.
    assert error(w, solution) < 1e-10
    assert error(result.grad, gradient) < 1e-9
    assert result.info.stationarity < 1e-12
    assert result.info.solve.residual < 1e-6  # the default tolerance of the solve
    # A second method: through every proximal step.
    assert error(call(unrolled, HPARAMS)[0].grad, gradient) < 1e-9


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "box"])
def test_fixed_entries_have_no_influence_of_their_own(kind):
    # Along the hyperparameter of an entry that is held at zero nothing moves, exactly. (The bounds
    # of a box move what they hold.)
    result, carry = call(estimator(kind)[0], HPARAMS)
    held = np.asarray(carry.params) == 0
    assert held.any()
    assert np.all(np.asarray(result.grad)[held] == 0)


def test_prox_minimizes():
    # Against a search on a grid, entry by entry: penalties are separable.
    v, h, rate = np.asarray([1.7, -0.4, 0.1, -2.0]), np.asarray([-1.0, 0.3, -0.2, 0.0]), 0.7
    grid = np.linspace(-3, 3, 60001)
    step = grid[1] - grid[0]
    penalties = {
        "lasso": (hj.prox.lasso(jnp.exp), lambda w, h: np.exp(h) * np.abs(w)),
        "elastic net": (
            hj.prox.elastic_net(jnp.exp, jnp.cosh),
            lambda w, h: np.exp(h) * np.abs(w) + 0.5 * np.cosh(h) * w**2,
        ),
        "non-negative": (hj.prox.non_negative(), lambda w, h: np.where(w < 0, np.inf, 0)),
        "box": (
            hj.prox.box(lambda h: -jnp.exp(h), lambda h: jnp.exp(h) / 2),
            lambda w, h: np.where((w < -np.exp(h)) | (w > np.exp(h) / 2), np.inf, 0),
        ),
    }
    for prox, penalty in penalties.values():
        got = prox(jnp.asarray(v), jnp.asarray(h), rate)
        for i in range(len(v)):
            best = grid[np.argmin(0.5 * (grid - v[i]) ** 2 + rate * penalty(grid, h[i]))]
            assert abs(got[i] - best) <= step


def test_weights_of_a_prox_follow_the_tree_of_params():
    params = {"a": jnp.asarray([2.0, -1.0]), "b": jnp.asarray(0.5)}
    one = hj.prox.lasso(lambda h: h)(params, jnp.asarray(0.4), 1.0)
    each = hj.prox.lasso(lambda h: h)(params, {"a": jnp.asarray(0.4), "b": jnp.asarray(0.1)}, 1.0)
    assert error(one, {"a": np.asarray([1.6, -0.6]), "b": np.asarray(0.1)}) < 1e-15
    assert error(each, {"a": np.asarray([1.6, -0.6]), "b": np.asarray(0.4)}) < 1e-15
    with pytest.raises(ValueError, match="one array or have the structure of params"):
        hj.prox.lasso(lambda h: [h, h])(params, jnp.asarray(0.4), 1.0)


# ------------------------------------------------------------------------------ equilibria


def equilibrium(z, h, batch):
    """A layer: contracts, since |h["w"]| < 1 and tanh has slope at most 1. Not symmetric."""
    return jnp.tanh(h["w"] @ z + h["u"] @ batch)


def equilibrium_weights():
    rng = np.random.default_rng(7)
    w = rng.normal(size=(6, 6))
    return {
        "w": jnp.asarray(0.7 * w / np.linalg.norm(w, 2)),
        "u": jnp.asarray(rng.normal(size=(6, 3))),
    }


def equilibrium_score(z, h, batch):
    del h, batch
    return jnp.sum(jnp.cos(z) * jnp.arange(1.0, 7.0))


def test_deep_equilibrium_against_finite_differences():
    h, x = equilibrium_weights(), jnp.asarray(np.random.default_rng(8).normal(size=3))
    inner = hj.iterate(equilibrium)
    steps = hj.Split(problems.repeat(x, 120), None)  # 0.7^120 is 1e-19
    solve = hj.linsolve.gmres(tol=1e-12)
    response = hj.implicit(hj.unroll(inner.step), hj.fixed_point(equilibrium), solve=solve)
    e = hj.hypergradient(response, equilibrium_score, inner.init)
    estimate = jit(lambda h: e.estimate(h, e.init(jnp.zeros(6), h), steps)[0])
    result = estimate(h)
    value = lambda h: estimate(h).value
    for direction in problems.directions(h, 3)[-3:]:
        slope = problems.central_difference(value, h, direction)
        got = optax.tree.vdot(result.grad, direction)
        # Central differences at 1e-6: see there.
        assert abs(got - slope) < 1e-8 * max(1, abs(slope))
    assert result.info.solve.residual < 1e-12

    # CG takes the matrix for symmetric, and its report says that it did not work.
    # Six unknowns, six steps: down to rounding if it were.
    solve = hj.linsolve.cg(maxiter=6)
    wrong = hj.implicit(hj.unroll(inner.step), hj.fixed_point(equilibrium), solve=solve)
    e = hj.hypergradient(wrong, equilibrium_score, inner.init)
    other = jit(lambda h: e.estimate(h, e.init(jnp.zeros(6), h), steps)[0])(h)
    assert other.info.solve.residual > 1e-5


def test_a_fixed_point_has_forward_mode_and_hessians():
    h, x = equilibrium_weights(), jnp.asarray(np.random.default_rng(8).normal(size=3))
    inner = hj.iterate(equilibrium)
    solve = hj.linsolve.gmres(tol=1e-14)
    response = hj.implicit(hj.unroll(inner.step), hj.fixed_point(equilibrium), solve=solve)
    plain = hj.unroll(inner.step)
    batches = problems.repeat(x, 120)

    def value(response):
        def at(scale):
            scaled = {"w": h["w"] * jnp.tanh(scale), "u": h["u"] * scale}
            z, _ = response(scaled, inner.init(jnp.zeros(6), scaled), batches)
            return equilibrium_score(z, scaled, None)

        return at

    t = jnp.asarray(0.9)
    for d in (
        jax.jacfwd,
        jax.grad,
        lambda f: jax.jacfwd(jax.grad(f)),
        lambda f: jax.grad(jax.grad(f)),
    ):
        assert error(jit(d(value(response)))(t), jit(d(value(plain)))(t)) < 1e-10


def test_iterate_refuses_a_map_to_something_else():
    inner = hj.iterate(lambda z, h, b: z[:2])
    with pytest.raises(ValueError, match="iterate: `map` must have the shapes and types of params"):
        hj.unroll(inner.step)(0.0, inner.init(jnp.zeros(3), 0.0), jnp.arange(2))
