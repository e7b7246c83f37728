"""What an implicit hypergradient says about itself, and what it remembers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import error, jit

import hyperjax as hj


def ridge_estimate(steps, *, solve=None, convexity=None, dtype=float):
    """The estimate on ridge after so many steps, and the true gradient at the exact solution."""
    p = problems.ridge(steps=steps)
    response = hj.implicit(
        hj.unroll(p.inner.step),
        hj.stationary(p.loss),
        solve=hj.linsolve.cg(tol=1e-14) if solve is None else solve,
        convexity=convexity,
    )
    e = hj.hypergradient(response, p.score, p.inner.init)
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    h, params, split = cast(p.hparams), cast(p.params), cast(p.split)
    result, _ = jit(lambda h: e.estimate(h, e.init(params, h), split))(h)
    return result, problems.ridge_answers(p.hparams, p.split).gradient


def convexity_of_ridge() -> float:
    p = problems.ridge()
    (x, _), _ = problems.ridge_data(p.split)
    return float(np.linalg.eigvalsh(x.T @ x / len(x) + np.diag(np.exp(p.hparams))).min())


def distance(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a, np.float64) - b))


# ------------------------------------------------------------------------- the error bound


def test_bound_holds_and_shrinks_with_the_inner_error():
    mu = convexity_of_ridge()
    errors, bounds = [], []
    for steps in (1, 2, 4, 8, 16, 32):
        result, truth = ridge_estimate(steps, convexity=mu)
        errors.append(distance(result.grad, truth))
        bounds.append(float(result.info.bound))
    assert all(e <= b for e, b in zip(errors, bounds, strict=True))
    # Training contracts by one half a step at least, and the bound is linear in what is left.
    assert all(b2 < 0.75 * b1 for b1, b2 in itertools.pairwise(bounds))
    assert errors[0] > 1e-2
    # Worst directions and norms in place of the actual ones cost two orders of magnitude at most.
    assert all(b < 100 * e for e, b in zip(errors, bounds, strict=True))


@pytest.mark.parametrize("maxiter", [1, 2, 3])
def test_bound_holds_for_a_truncated_solve(maxiter):
    solve = hj.linsolve.cg(maxiter=maxiter, tol=0)
    result, truth = ridge_estimate(60, solve=solve, convexity=convexity_of_ridge())
    e = distance(result.grad, truth)
    assert 1e-6 < e <= result.info.bound < 100 * e


def test_bound_holds_without_a_quadratic():
    # Logistic regression: third derivatives are in the bound, too.
    p = problems.logistic()
    mu = float(np.exp(p.hparams).min())
    train = hj.unroll(p.inner.step)

    def estimate(steps, convexity):
        solve = hj.linsolve.cg(tol=1e-14)
        response = hj.implicit(train, hj.stationary(p.loss), solve=solve, convexity=convexity)
        e = hj.hypergradient(response, p.score, p.inner.init)
        split = p.split._replace(train=jax.tree.map(lambda x: x[:steps], p.split.train))
        return jit(lambda h: e.estimate(h, e.init(p.params, h), split)[0])(p.hparams)

    truth = np.asarray(estimate(80, None).grad)
    for steps in (2, 4, 8):
        result = estimate(steps, mu)
        assert distance(result.grad, truth) <= result.info.bound
    assert distance(estimate(2, mu).grad, truth) > 1e-3


def test_bound_of_members_inside_shard_map():
    p = problems.ridge(steps=4)
    response = hj.implicit(
        hj.unroll(p.inner.step), hj.stationary(p.loss), convexity=convexity_of_ridge()
    )
    e = hj.hypergradient(response, p.score, p.inner.init)
    bound = lambda h: e.estimate(h, e.init(p.params, h), p.split)[0].info.bound
    settings = p.hparams[None] + 0.01 * jnp.arange(8.0)[:, None]
    spec = jax.sharding.PartitionSpec("member")
    mapped = jax.shard_map(
        jax.vmap(bound), mesh=problems.mesh("member"), in_specs=spec, out_specs=spec
    )
    assert error(jit(mapped)(settings), jit(jax.vmap(bound))(settings)) < 1e-12


def test_no_bound_is_claimed_across_kinks():
    optimality = hj.proximal(problems.ridge().loss, hj.prox.non_negative(), 0.1)
    with pytest.raises(ValueError, match="`convexity` makes no bound for an optimality with kinks"):
        hj.implicit(hj.unroll(problems.ridge().inner.step), optimality, convexity=1.0)


def test_no_bound_is_claimed_without_convexity():
    result, _ = ridge_estimate(5)
    assert np.isinf(result.info.bound)


def test_bound_under_vmap_and_in_float32():
    p = problems.ridge(steps=4)
    response = hj.implicit(
        hj.unroll(p.inner.step), hj.stationary(p.loss), convexity=convexity_of_ridge()
    )
    e = hj.hypergradient(response, p.score, p.inner.init)
    estimate = lambda h: e.estimate(h, e.init(p.params, h), p.split)[0].info.bound
    settings = p.hparams[None] + jnp.asarray([[0.0], [0.1], [-0.1]])
    together = jit(jax.vmap(estimate))(settings)
    assert error(together, np.stack([jit(estimate)(h) for h in settings])) < 1e-12
    single, truth = ridge_estimate(4, convexity=convexity_of_ridge(), dtype=jnp.float32)
    assert single.info.bound.dtype == jnp.float32
    assert distance(single.grad, truth) <= single.info.bound


# --------------------------------------------------------------- what the report warns of


def test_leaves_that_optimality_does_not_see_are_reported():
    p = problems.net(steps=30)
    response = hj.implicit(
        hj.unroll(p.inner.step), hj.stationary(p.loss), solve=hj.linsolve.cg(damping=1.0)
    )
    e = hj.hypergradient(response, p.score, p.inner.init)
    result, _ = jit(lambda h: e.estimate(h, e.init(p.params, h), p.split))(p.hparams)
    assert jax.tree.map(bool, result.info.reached) == {"l2": True, "lr": False, "momentum": False}
    assert result.grad["lr"] == result.grad["momentum"] == 0 != result.grad["l2"]


def test_a_score_that_asks_for_nothing_is_no_warning():
    # The cotangent is zero, so that nothing can be said about what it would have reached.
    p = problems.ridge(steps=5)
    response = hj.implicit(hj.unroll(p.inner.step), hj.stationary(p.loss))
    e = hj.hypergradient(response, lambda w, h, b: jnp.sum(h**2), p.inner.init)
    result, _ = e.estimate(p.hparams, e.init(p.params, p.hparams), p.split)
    assert np.all(result.info.reached)
    assert error(result.grad, 2 * np.asarray(p.hparams)) < 1e-15


def test_a_solve_that_finds_nothing_is_reported():
    # Negative curvature at once: u = 0, and all that would have come through it is missing.
    p = problems.ridge(steps=5)
    negative = lambda w, h, b: jax.tree.map(jnp.negative, jax.grad(p.loss)(w, h, b))
    response = hj.implicit(hj.unroll(p.inner.step), negative)
    e = hj.hypergradient(response, p.score, p.inner.init)
    result, _ = e.estimate(p.hparams, e.init(p.params, p.hparams), p.split)
    assert result.info.solve.residual == pytest.approx(1, rel=1e-14)  # |b| / |b|, summed twice
    assert result.info.solve.curvature < 0
    assert not np.any(result.info.reached)


def test_unconverged_training_is_reported():
    far, _ = ridge_estimate(1)
    near, _ = ridge_estimate(60)
    assert far.info.stationarity > 0.1
    assert near.info.stationarity < 1e-14


# ------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_params_of_low_precision_are_solved_for_in_float32(dtype):
    p = problems.ridge()
    low = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    inner = hj.inner(p.loss, lambda _: optax.sgd(0.6))
    response = hj.implicit(hj.unroll(inner.step), hj.stationary(p.loss))
    e = hj.hypergradient(response, p.score, inner.init)
    estimate = lambda h: e.estimate(h, e.init(low(p.params), h), low(p.split))[0]
    result = jit(estimate)(low(p.hparams))
    assert result.grad.dtype == dtype
    assert result.info.solve.residual.dtype == jnp.float32
    truth = problems.ridge_answers(np.asarray(low(p.hparams), float), p.split).gradient
    # Params, data and products are rounded to eps; a few of them meet in each entry.
    assert distance(result.grad, truth) < 16 * float(jnp.finfo(dtype).eps) * np.linalg.norm(truth)


def test_complex_params_are_refused():
    train = lambda h, carry, batches: (carry, carry)
    response = hj.implicit(train, lambda w, h, b: w - h)
    e = hj.hypergradient(response, lambda w, h, b: jnp.sum(jnp.abs(w)), lambda p, h: p)
    h, w = jnp.ones(2), jnp.ones(2, complex)
    with pytest.raises(TypeError, match=r"implicit: every leaf of `params`.*complex128"):
        e.estimate(h, e.init(w, h), hj.Split(jnp.arange(1), None))


# ------------------------------------------------------------------- tolerances that follow


def test_adaptive_tolerance_follows_the_inner_error():
    solve = hj.linsolve.adaptive(
        lambda tol: hj.linsolve.cg(tol=tol), ratio=0.1, floor=1e-12, ceiling=0.5
    )
    products = []
    for steps in (1, 8, 60):
        result, truth = ridge_estimate(steps, solve=solve)
        tol = float(np.clip(0.1 * result.info.stationarity, 1e-12, 0.5))
        # The stopping test is on the residual of the recurrence, which differs by rounding.
        assert result.info.solve.residual <= tol * (1 + 1e-6) + 1e-15
        products.append(int(result.info.solve.iterations))
        exact, _ = ridge_estimate(steps)
        # Work is saved where training is the larger error: it is not doubled.
        assert distance(result.grad, truth) <= 2 * distance(exact.grad, truth) + 1e-9
    assert products == sorted(products) and products[0] < products[-1]


def test_adaptive_tolerance_in_every_mode():
    solve = hj.linsolve.adaptive(
        lambda tol: hj.linsolve.cg(tol=tol), ratio=0.1, floor=1e-14, ceiling=0.5
    )
    p = problems.ridge()
    response = hj.implicit(hj.unroll(p.inner.step), hj.stationary(p.loss), solve=solve)
    value = problems.objective(response, p)
    answers = problems.ridge_answers(p.hparams, p.split)
    assert error(jit(jax.grad(value))(p.hparams), answers.gradient) < 1e-10
    assert error(jit(jax.jacfwd(value))(p.hparams), answers.gradient) < 1e-10
    assert error(jit(jax.jacfwd(jax.grad(value)))(p.hparams), answers.hessian) < 1e-10


# ------------------------------------------------------------------------------- memory

MAXITER = 2  # of five: truncated, so that a start matters


def outer_run(estimator, p, outer, rate=0.05):
    """Hypergradient descent; the errors of the gradients on the way, against the closed form."""
    tuner = hj.tune(estimator, optax.sgd(rate))
    state = tuner.init(p.params, p.hparams)
    splits = jax.tree.map(lambda x: jnp.broadcast_to(x, (outer, *x.shape)), p.split)
    end, metrics = jit(lambda s: hj.run(tuner, s, splits))(state)
    return end, metrics


def gradient_errors(estimator, p, outer):
    """Of estimates at slowly moving hyperparameters, with the carry handed on."""
    carry = estimator.init(p.params, p.hparams)
    call, errors = jit(estimator.estimate), []
    for k in range(outer):
        h = p.hparams + 0.01 * k
        result, carry = call(h, carry, p.split)
        truth = problems.ridge_answers(h, p.split).gradient
        errors.append(distance(result.grad, truth))
    return errors, carry


def truncated(p, solver=hj.linsolve.cg, maxiter=MAXITER):
    solve = solver(maxiter=maxiter, tol=0)
    return hj.implicit(hj.unroll(p.inner.step), hj.stationary(p.loss), solve=solve)


def test_warm_starts_let_a_truncated_solve_converge():
    p = problems.ridge()
    cold, _ = gradient_errors(hj.hypergradient(truncated(p), p.score, p.inner.init), p, 8)
    warm, carry = gradient_errors(hj.warm_start(truncated(p), p.score, p.inner.init), p, 8)
    # The first start is zero, and its product is not taken from those of the solve.
    assert warm[0] == pytest.approx(cold[0], rel=1e-9)
    assert cold[-1] > 1e-3
    assert warm[-1] < 0.2 * cold[-1]
    assert carry.adjoint.shape == (problems.FEATURES,)


@pytest.mark.parametrize("solver", [hj.linsolve.cg, hj.linsolve.minres, hj.linsolve.gmres])
def test_one_product_each_is_enough_to_go_on(solver):
    p = problems.ridge()
    cold, _ = gradient_errors(
        hj.hypergradient(truncated(p, solver, 1), p.score, p.inner.init), p, 8
    )
    warm, _ = gradient_errors(hj.warm_start(truncated(p, solver, 1), p.score, p.inner.init), p, 8)
    assert warm[0] == pytest.approx(cold[0], rel=1e-9)
    assert warm[-1] < 0.5 * cold[-1]


def test_derivatives_of_a_warm_start_know_nothing_of_the_start():
    # Half a series: far from exact, so that a start in the wrong place would show.
    p = problems.ridge()
    solve = hj.linsolve.identity(0.6)
    response = hj.implicit(hj.unroll(p.inner.step), hj.stationary(p.loss), solve=solve)
    e = hj.warm_start(response, p.score, p.inner.init)
    carry = e.init(p.params, p.hparams)
    for _ in range(8):
        _, carry = jit(e.estimate)(p.hparams, carry, p.split)
    grad = lambda h: e.estimate(h, carry, p.split)[0].grad
    assert error(jit(jax.jacfwd(grad))(p.hparams), jit(jax.jacrev(grad))(p.hparams)) < 1e-12


def test_a_warm_start_that_diverged_is_dropped():
    p = problems.ridge(steps=5)
    e = hj.warm_start(truncated(p), p.score, p.inner.init)
    fresh = e.init(p.params, p.hparams)
    spoilt, carry = jit(e.estimate)(p.hparams * jnp.nan, fresh, p.split)
    assert not np.isfinite(spoilt.value)
    assert np.all(carry.adjoint == 0)


def test_a_preconditioner_serves_for_many_estimates():
    p = problems.ridge()
    builds = []

    def build(matvec, like):
        jax.debug.callback(lambda: builds.append(1))
        return jnp.stack([matvec(e) for e in jnp.eye(like.size)])

    exact = hj.Preconditioner(build, lambda matrix, v: jnp.linalg.solve(matrix, v))
    e = hj.amortize(
        truncated(p),
        p.score,
        p.inner.init,
        preconditioner=exact,
        solve=lambda q: hj.linsolve.cg(maxiter=1, tol=0, preconditioner=q),
        refresh=4,
    )
    errors, carry = gradient_errors(e, p, 8)
    jax.effects_barrier()
    assert len(builds) == 1 + 2  # one to learn its shapes
    assert carry.age == 8
    # Fresh, one step with the exact inverse is exact; aged by three moves of 0.01 nearly so.
    assert errors[0] < 1e-12 and errors[4] < 1e-12
    assert 1e-12 < max(errors) < 1e-4
    start = e.init(p.params, p.hparams)
    assert jax.tree.map(jnp.shape, carry) == jax.tree.map(jnp.shape, start)
    assert jax.tree.map(jnp.result_type, carry) == jax.tree.map(jnp.result_type, start)


@pytest.mark.parametrize("make", ["jacobi", "nystrom_preconditioner"])
def test_preconditioners_of_half_precision_are_kept_in_float32(make):
    p = problems.ridge()
    low = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    key = jax.random.key(0)
    q = hj.linsolve.jacobi(key) if make == "jacobi" else hj.linsolve.nystrom_preconditioner(key, 2)
    inner = hj.inner(p.loss, lambda _: optax.sgd(0.6))
    response = hj.implicit(hj.unroll(inner.step), hj.stationary(p.loss))
    solve = lambda q: hj.linsolve.cg(preconditioner=q)
    e = hj.amortize(response, p.score, inner.init, preconditioner=q, solve=solve, refresh=1)
    carry = e.init(low(p.params), low(p.hparams))
    assert {x.dtype for x in jax.tree.leaves(carry.factor)} == {jnp.dtype(jnp.float32)}
    result, _ = jit(e.estimate)(low(p.hparams), carry, low(p.split))
    truth = problems.ridge_answers(np.asarray(low(p.hparams), float), p.split).gradient
    # As for other solves in half precision.
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert distance(result.grad, truth) < 16 * eps * np.linalg.norm(truth)


def test_memory_goes_through_tune_and_vmap():
    p = problems.ridge(steps=30)
    warm = hj.warm_start(truncated(p), p.score, p.inner.init)
    end, metrics = outer_run(warm, p, 6)
    assert jax.tree.map(jnp.result_type, end) == jax.tree.map(
        jnp.result_type, hj.tune(warm, optax.sgd(0.05)).init(p.params, p.hparams)
    )
    assert metrics.value[-1] < metrics.value[0]
    settings = p.hparams[None] + jnp.asarray([[0.0], [0.2]])
    run = lambda h: outer_run(warm, p._replace(hparams=h), 6)[1].value
    together = jax.vmap(run)(settings)
    assert error(together, np.stack([run(h) for h in settings])) < 1e-12


@pytest.mark.parametrize("make", [hj.warm_start, lambda r, s, i: amortized(r, s, i)])
def test_only_implicit_responses_have_something_to_remember(make):
    p = problems.ridge(steps=3)
    with pytest.raises(TypeError, match="`response` must come from `implicit`"):
        make(hj.unroll(p.inner.step), p.score, p.inner.init)


def amortized(response, score, init):
    jacobi = hj.linsolve.jacobi(jax.random.key(0))
    solve = lambda q: hj.linsolve.cg(preconditioner=q)
    return hj.amortize(response, score, init, preconditioner=jacobi, solve=solve, refresh=2)
