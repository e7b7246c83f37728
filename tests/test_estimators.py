"""Estimators: the gradient of the score with its direct term, and what they say about it."""

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import case, error, jit, last

import hyperjax as hj


def start(p: problems.Problem, estimator: hj.Estimator):
    return p.hparams, estimator.init(p.params, p.hparams), p.split


def test_estimate_is_value_and_grad_of_the_score():
    p = problems.net(steps=10)
    response = hj.unroll(p.inner.step)
    for mode in ("reverse", "forward"):
        estimator = hj.hypergradient(response, p.score, p.inner.init, mode=mode)
        result, carry = jit(estimator.estimate)(*start(p, estimator))
        value, grad = jit(jax.value_and_grad(problems.objective(response, p)))(p.hparams)
        assert error((result.value, result.grad), (value, grad)) < 1e-13
        assert result.info == ()
        trained, _ = response(p.hparams, p.inner.init(p.params, p.hparams), p.split.train)
        assert error(carry.params, trained) < 1e-13


def test_direct_term_alone():
    # A response that does not depend on hparams leaves the direct term.
    response = lambda h, carry, batches: (carry, carry)
    score = lambda w, h, batch: jnp.sum(w * h["a"]) + h["b"] ** 2
    estimator = hj.hypergradient(response, score, lambda params, h: params)
    h = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray(3.0)}
    result, _ = estimator.estimate(h, jnp.asarray([5.0, 7.0]), hj.Split(jnp.arange(2), None))
    assert error(result.value, 5 + 14 + 9) == 0
    assert error(result.grad, {"a": np.asarray([5.0, 7.0]), "b": np.asarray(6.0)}) == 0


class Reporting:
    """A response that makes its own estimate and has something to tell."""

    def __call__(self, hparams, carry, batches):
        raise AssertionError("its estimate should have been asked for")

    def estimate(self, score, hparams, carry, split):
        value = score(2 * hparams, hparams, split.valid)
        return hj.Estimate(value, 3 * hparams, "report"), carry


def test_response_with_an_estimate_of_its_own_is_asked_for_it():
    estimator = hj.hypergradient(Reporting(), lambda w, h, b: jnp.sum(w), lambda p, h: p)
    result, _ = estimator.estimate(jnp.ones(2), (), hj.Split(jnp.arange(2), None))
    assert result.value == 4
    assert jnp.all(result.grad == 3)
    assert result.info == "report"


@pytest.mark.parametrize("solver", [hj.linsolve.cg(maxiter=3, tol=0), hj.linsolve.neumann(4, 0.6)])
def test_info_of_implicit_is_that_of_the_adjoint_system(solver):
    p = problems.ridge(steps=10)
    response = hj.implicit(hj.unroll(p.inner.step), hj.stationary(p.loss), solve=solver)
    estimator = hj.hypergradient(response, p.score, p.inner.init)
    result, carry = jit(estimator.estimate)(*start(p, estimator))
    # The adjoint system in numpy: A u = slope of the score at the params that came out.
    (x, _), _ = problems.ridge_data(p.split)
    a = x.T @ x / len(x) + np.diag(np.exp(p.hparams))
    w = carry.params
    slope = problems.ridge_score_slope(w, p.hparams, p.split)
    u, info = solver(lambda v: jnp.asarray(a) @ v, jnp.asarray(slope))
    assert error(result.info.solve.residual, info.residual) < 1e-10
    assert error(info.residual, np.linalg.norm(slope - a @ u) / np.linalg.norm(slope)) < 1e-10
    assert error(result.info.solve.curvature, info.curvature) < 1e-10
    assert result.info.solve.iterations == info.iterations
    gradient = jax.grad(p.loss)(w, p.hparams, last(p.split.train))
    # 4e-6 after ten steps, by cancellation of terms of order one: ten digits are left.
    assert error(result.info.stationarity, np.linalg.norm(gradient)) < 1e-9


def test_estimates_through_implicit_can_be_differentiated_again():
    # The params move with hparams even though training is not differentiated.
    c = case("implicit")
    p = c.problem
    estimator = hj.hypergradient(c.response, p.score, p.inner.init)
    estimate = lambda h: estimator.estimate(h, estimator.init(p.params, h), p.split)[0]
    answers = c.answers(p.hparams)
    assert error(jit(jax.grad(lambda h: estimate(h).value))(p.hparams), answers.gradient) < 1e-12
    assert error(jit(jax.jacrev(lambda h: estimate(h).grad))(p.hparams), answers.hessian) < 1e-12


def test_carry_goes_on_and_restart_does_not():
    p = problems.net(steps=5)
    warm = hj.hypergradient(hj.unroll(p.inner.step), p.score, p.inner.init)
    cold = hj.restart(warm)
    twice, once = {}, None
    for name, estimator in (("warm", warm), ("cold", cold)):
        hparams, carry, split = start(p, estimator)
        call = jit(estimator.estimate)
        first, carry = call(hparams, carry, split)
        once = carry if name == "warm" else once
        second, carry = call(hparams, carry, split)
        twice[name] = first, second, carry
    assert error(twice["cold"][0], twice["warm"][0]) == 0
    assert error(twice["cold"][1], twice["cold"][0]) == 0
    begun, trained = twice["cold"][2]
    assert error(begun, p.inner.init(p.params, p.hparams)) == 0
    assert error(trained, once) == 0
    # Two times five steps are ten.
    ten = problems.repeat(last(p.split.train), 10)
    params, _ = hj.unroll(p.inner.step)(p.hparams, warm.init(p.params, p.hparams), ten)
    assert error(twice["warm"][2].params, params) < 1e-13
    assert twice["warm"][1].value < twice["warm"][0].value


def test_score_only_has_the_score_and_no_gradient():
    p = problems.net(steps=5)
    response = hj.unroll(p.inner.step)
    blind = hj.score_only(response, p.score, p.inner.init)
    seeing = hj.hypergradient(response, p.score, p.inner.init)
    result, carry = jit(blind.estimate)(*start(p, blind))
    expected, same = jit(seeing.estimate)(*start(p, seeing))
    assert error(result.value, expected.value) < 1e-14
    assert error(carry, same) < 1e-14
    assert jax.tree.structure(result.grad) == jax.tree.structure(p.hparams)
    assert not any(jnp.any(g) for g in jax.tree.leaves(result.grad))


def test_forward_mode_needs_no_reverse_rule():
    # A loop whose length depends on values has forward mode only.
    def train(h, carry, batches):
        shrink = lambda s: (s[0] * jnp.exp(-h), s[1] + 1)
        w, _ = jax.lax.while_loop(lambda s: s[0] > 0.1, shrink, (carry, 0))
        return w, carry

    estimator = hj.hypergradient(train, lambda w, h, b: w, lambda p, h: p, mode="forward")
    result, _ = estimator.estimate(jnp.asarray(1.0), jnp.asarray(1.0), hj.Split(None, None))
    # Three factors exp(-h) bring 1 below 0.1.
    assert error(result.value, np.exp(-3.0)) < 1e-14
    assert error(result.grad, -3 * np.exp(-3.0)) < 1e-14
    reverse = hj.hypergradient(train, lambda w, h, b: w, lambda p, h: p)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        reverse.estimate(jnp.asarray(1.0), jnp.asarray(1.0), hj.Split(None, None))


def test_game_has_the_gradient_of_its_closed_form():
    g = problems.game()
    p = g.problem
    response = hj.implicit(
        hj.unroll(p.inner.step), hj.stationary(p.loss), solve=hj.linsolve.cg(tol=1e-14)
    )
    estimator = hj.hypergradient(response, p.score, p.inner.init)
    at = lambda h: jit(estimator.estimate)(h, estimator.init(p.params, h), p.split)[0]
    assert jnp.linalg.norm(at(jnp.asarray(g.leader)).grad) < 1e-12
    assert jnp.linalg.norm(at(p.hparams).grad) > 0.1
