"""Every response gives the hypergradient it promises, wherever it runs."""

import collections
import functools
import itertools
import re
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from problems import CONTRACTION, RESPONSES, STEPS, case, central_difference, directions, error, jit

import hyperjax as hj

EXACT = 1e-8  # relative, in float64; most are at 1e-15


def estimate(c: problems.Case, mode: Literal["reverse", "forward"] = "reverse"):
    """(hparams, split) -> (value, grad), through `hypergradient`."""
    estimator = hj.hypergradient(c.response, c.problem.score, c.problem.inner.init, mode=mode)

    def call(hparams, split, params=c.problem.params):
        carry = estimator.init(params, hparams)
        result, _ = estimator.estimate(hparams, carry, split)
        return result.value, result.grad

    return call


def expected(c: problems.Case, hparams):
    answers = c.answers(hparams)
    return answers.value, answers.gradient


# ------------------------------------------------------------- where an estimate may run


def eager(make):
    c = make(None)
    h = c.problem.hparams
    return error(estimate(c)(h, c.problem.split), expected(c, h))


def jitted(make):
    c = make(None)
    h = c.problem.hparams
    return error(jit(estimate(c))(h, c.problem.split), expected(c, h))


def forward_mode(make):
    c = make(None)
    h = c.problem.hparams
    return error(jit(estimate(c, "forward"))(h, c.problem.split), expected(c, h))


def vmapped(make):
    c = make(None)
    h = settings(c, 3)
    got = jit(jax.vmap(estimate(c), (0, None)))(h, c.problem.split)
    return error(got, stacked(c, h))


def sharded_data(make):
    c = make(None)
    mesh, h = problems.mesh("data"), c.problem.hparams
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    split = jax.tree.map(place, c.problem.split, problems.shard(c.problem.split, "data"))
    return error(jit(estimate(c))(h, split), expected(c, h))


def shard_map_data(make):
    c = make("data")  # the loss takes a pmean over the axis
    h, split = c.problem.hparams, c.problem.split
    mapped = jax.shard_map(
        estimate(c),
        mesh=problems.mesh("data"),
        in_specs=(PartitionSpec(), problems.shard(split, "data")),
        out_specs=PartitionSpec(),
    )
    return error(jit(mapped)(h, split), expected(make(None), h))


def shard_map_members(make):
    c = make(None)
    h = settings(c, 16)  # two on each device
    # Every member starts from params of its own. Replicated ones would be replicated all along:
    # inside shard_map the gradient in them is that of the sum over devices.
    params = problems.repeat(c.problem.params, 16)
    members = PartitionSpec("member")
    mapped = jax.shard_map(
        jax.vmap(estimate(c), (0, None, 0)),
        mesh=problems.mesh("member"),
        in_specs=(members, PartitionSpec(), members),
        out_specs=members,
    )
    return error(jit(mapped)(h, c.problem.split, params), stacked(c, h))


def settings(c, count):
    h = c.problem.hparams
    return h[None] + 0.2 * jax.random.normal(jax.random.key(5), (count, *h.shape))


def stacked(c, hparams):
    rows = [expected(c, h) for h in hparams]
    return tuple(np.stack(column) for column in zip(*rows, strict=True))


PLACES = (eager, jitted, vmapped, sharded_data, shard_map_data, shard_map_members)


# The same code as another one's, with another number in it: under jit only, to save time.
ALIKE = {"implicit, neumann", "unroll, checkpoint='sqrt'"}
RUNS = [(name, place) for name in RESPONSES for place in PLACES]


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, place) for name, place in RUNS if place is jitted or name not in ALIKE],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_estimate_is_the_closed_form(name, place):
    assert place(functools.partial(case, name)) < EXACT


@pytest.mark.parametrize("name", [n for n in RESPONSES if "binomial" not in n])
def test_forward_mode_is_the_closed_form(name):
    assert forward_mode(functools.partial(case, name)) < EXACT


def test_ridge_contracts_as_stated():
    # Other tolerances rest on it. The settings above reach further out than any other test's.
    c = case("unroll")
    (x, _), _ = problems.ridge_data(c.problem.split)
    for h in settings(c, 16):
        eigenvalues = np.linalg.eigvalsh(x.T @ x / len(x) + np.diag(np.exp(h)))
        assert np.abs(1 - 0.6 * eigenvalues).max() < CONTRACTION


# -------------------------------------------------- against finite differences, to 1e-6


def converged_net() -> problems.Problem:
    """3,000 steps with much momentum bring the net to a stationary point: a test checks it."""
    return problems.net(steps=3000, momentum=0.9)


@functools.cache
def slopes(make):
    """A problem, directions in its hparams, and the central differences along them."""
    p = make()
    value = jit(problems.objective(hj.unroll(p.inner.step), p))
    along = directions(p.hparams, count=3)
    return p, along, [central_difference(value, p.hparams, d) for d in along]


def check(grad, make):
    _, along, differences = slopes(make)
    size = optax.tree.norm(grad)
    for direction, difference in zip(along, differences, strict=True):
        assert abs(optax.tree.vdot(direction, grad) - difference) < 1e-6 * size


@pytest.mark.parametrize("name", list(problems.UNROLLS)[:4])
@pytest.mark.parametrize("make", [problems.logistic, problems.net])
def test_unroll_agrees_with_central_differences(make, name):
    p, _, _ = slopes(make)
    response = hj.unroll(p.inner.step, **problems.UNROLLS[name])
    check(jit(jax.grad(problems.objective(response, p)))(p.hparams), make)


@pytest.mark.parametrize("make", [problems.logistic, problems.net])
def test_forward_mode_agrees_with_central_differences(make):
    p, _, _ = slopes(make)
    value = problems.objective(hj.unroll(p.inner.step), p)
    check(jit(jax.jacfwd(value))(p.hparams), make)


@pytest.mark.parametrize("make", [problems.logistic, converged_net])
def test_implicit_agrees_with_central_differences(make):
    p, _, _ = slopes(make)
    train = hj.unroll(p.inner.step)
    response = hj.implicit(train, hj.stationary(p.loss), solve=hj.linsolve.cg(tol=1e-12))
    estimator = hj.hypergradient(response, p.score, p.inner.init)
    carry = p.inner.init(p.params, p.hparams)
    result, _ = jit(estimator.estimate)(p.hparams, carry, p.split)
    assert result.info.stationarity < 1e-10
    assert result.info.solve.residual < 1e-11
    check(result.grad, make)


# ------------------------------------------------------- known bias, which a knob removes


def gradient_error(response, problem):
    got = jit(jax.grad(problems.objective(response, problem)))(problem.hparams)
    return error(got, problems.ridge_answers(problem.hparams, problem.split).gradient)


def test_truncation_bias_shrinks_with_the_contraction():
    p = problems.ridge()
    tails = (1, 4, 16)
    bias = [gradient_error(hj.unroll(p.inner.step, truncate=k), p) for k in tails]
    assert all(later < sooner for sooner, later in itertools.pairwise(bias))
    # Shaban et al. 2019, Proposition 3.1: what is left out contracts once per step kept.
    assert all(1e-10 < b < CONTRACTION**k for b, k in zip(bias, tails, strict=True))
    assert gradient_error(hj.unroll(p.inner.step, truncate=STEPS), p) < 1e-14


def test_truncated_gradient_is_that_of_the_tail():
    # On a run that has not converged, with another batch at each step: the state after the first
    # ten steps is a constant.
    p = problems.net(steps=16)
    p = p._replace(split=p.split._replace(train=varied(p.split.train)))
    head, tail = (
        jax.tree.map(lambda x, s=s: x[s], p.split.train) for s in (slice(10), slice(10, 16))
    )
    run = hj.unroll(p.inner.step)
    _, middle = run(p.hparams, p.inner.init(p.params, p.hparams), head)
    only_tail = jax.grad(lambda h: p.score(run(h, middle, tail)[0], h, p.split.valid))
    truncated = jax.grad(problems.objective(hj.unroll(p.inner.step, truncate=6), p))
    assert error(jit(truncated)(p.hparams), jit(only_tail)(p.hparams)) < 1e-14


@pytest.mark.parametrize("checkpoint", [4, "binomial"])
def test_truncation_and_checkpoints_combine(checkpoint):
    p = problems.net(steps=16)
    plain = jax.grad(problems.objective(hj.unroll(p.inner.step, truncate=9), p))
    both = hj.unroll(p.inner.step, truncate=9, checkpoint=checkpoint)
    combined = jax.grad(problems.objective(both, p))
    assert error(jit(combined)(p.hparams), jit(plain)(p.hparams)) < 1e-14


def test_neumann_bias_shrinks_with_its_terms():
    p = problems.ridge()
    counts = (1, 4, 16)
    optimality, train = hj.stationary(p.loss), hj.unroll(p.inner.step)
    bias = [
        gradient_error(hj.implicit(train, optimality, solve=hj.linsolve.neumann(k, 0.6)), p)
        for k in counts
    ]
    assert all(later < sooner for sooner, later in itertools.pairwise(bias))
    assert all(1e-10 < b < CONTRACTION**k for b, k in zip(bias, counts, strict=True))
    assert (
        gradient_error(hj.implicit(train, optimality, solve=hj.linsolve.neumann(STEPS, 0.6)), p)
        < 1e-14
    )


def test_truncated_cg_is_biased_until_it_has_all_directions():
    p = problems.ridge()
    optimality, train = hj.stationary(p.loss), hj.unroll(p.inner.step)
    bias = [
        gradient_error(hj.implicit(train, optimality, solve=hj.linsolve.cg(maxiter=k, tol=0)), p)
        for k in (1, problems.FEATURES - 1, problems.FEATURES)
    ]
    assert all(later < sooner for sooner, later in itertools.pairwise(bias))
    assert bias[-2] > 1e-6
    assert bias[-1] < 1e-13


# ------------------------------------------------------------------ the response itself


def varied(train):
    """Another batch at each step."""
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.3 * noise.normal(size=x.shape), train)


@pytest.mark.parametrize("options", problems.UNROLLS.values(), ids=list(problems.UNROLLS))
def test_unroll_is_the_loop_over_its_batches(options):
    p = problems.net(steps=53)
    train = varied(p.split.train)
    start = p.inner.init(p.params, p.hparams)
    params, state = jit(hj.unroll(p.inner.step, **options))(p.hparams, start, train)
    expected, step = start, jit(p.inner.step)
    for i in range(53):
        expected = step(expected, p.hparams, jax.tree.map(lambda x, i=i: x[i], train))
    assert error(state, expected) < 1e-12
    assert error(params, expected.params) < 1e-12


@pytest.mark.parametrize("options", problems.UNROLLS.values(), ids=list(problems.UNROLLS))
def test_batches_may_be_of_numpy(options):
    # Closed over, they reach the loop as what they are; under `jit` they would be traced.
    p = problems.net(steps=53)
    train = jax.tree.map(np.asarray, p.split.train)
    start = p.inner.init(p.params, p.hparams)

    def value(h):
        params, _ = hj.unroll(p.inner.step, **options)(h, start, train)
        return p.score(params, h, p.split.valid)

    grad = jax.eval_shape(jax.grad(value), p.hparams)
    assert jax.tree.structure(grad) == jax.tree.structure(p.hparams)


# Half a run is shorter than the tail of the truncated one.
@pytest.mark.parametrize("name", [n for n in RESPONSES if "truncate" not in n])
def test_carry_continues_the_run(name):
    # Two halves, one after the other, are the whole run.
    c = case(name)
    p = c.problem
    halves = [jax.tree.map(lambda x, s=s: x[s], p.split.train) for s in (slice(30), slice(30, 60))]
    run = jit(c.response)
    whole = run(p.hparams, p.inner.init(p.params, p.hparams), p.split.train)
    _, carry = run(p.hparams, p.inner.init(p.params, p.hparams), halves[0])
    assert error(run(p.hparams, carry, halves[1]), whole) < 1e-14


def test_implicit_does_not_depend_on_the_start():
    c = case("implicit")
    p = c.problem
    value = lambda params: p.score(
        c.response(p.hparams, p.inner.init(params, p.hparams), p.split.train)[0],
        p.hparams,
        p.split.valid,
    )
    assert not jnp.any(jax.grad(value)(p.params))


def opaque(x):
    """x itself, by a detour that raises when it is differentiated, forward or in reverse."""
    return jax.pure_callback(lambda y: y, x, x)


def descend_until_flat(problem):
    """Training of which nothing can be differentiated: not the loop in reverse, nor its input."""

    def train(hparams, carry, batches):
        hparams, batch = opaque(hparams), problems.last(batches)
        slope = lambda w: jax.grad(problem.loss)(w, hparams, batch)
        steep = lambda w: jnp.linalg.norm(slope(w)) > 1e-13
        return lax.while_loop(steep, lambda w: w - 0.6 * slope(w), carry), carry

    return train


def test_implicit_never_differentiates_training():
    p = problems.ridge(steps=1)
    response = hj.implicit(
        descend_until_flat(p), hj.stationary(p.loss), solve=hj.linsolve.cg(tol=1e-14)
    )
    value = problems.objective(response, p, lambda params, h: params)
    answers = problems.ridge_answers(p.hparams, p.split)
    assert error(jit(jax.grad(value))(p.hparams), answers.gradient) < EXACT
    assert error(jit(jax.hessian(value))(p.hparams), answers.hessian) < EXACT


def test_implicit_reports_a_run_that_is_not_done():
    p = problems.ridge(steps=3)
    response = hj.implicit(hj.unroll(p.inner.step), hj.stationary(p.loss))
    estimator = hj.hypergradient(response, p.score, p.inner.init)
    result, carry = estimator.estimate(p.hparams, estimator.init(p.params, p.hparams), p.split)
    batch = problems.last(p.split.train)
    slope = jnp.linalg.norm(jax.grad(p.loss)(carry.params, p.hparams, batch))
    assert slope > 1e-3
    assert error(result.info.stationarity, slope) < 1e-14


# ------------------------------------------------------------------------ best response


def test_best_response_never_differentiates_training():
    p = problems.ridge_hypernet(steps=20)
    fit = hj.unroll(p.inner.step)

    def train(hparams, carry, batches):
        return fit(opaque(hparams), carry, batches)

    response = hj.best_response(problems.affine, train)
    phi, _ = fit(p.hparams, p.inner.init(p.params, p.hparams), p.split.train)
    answers = problems.affine_answers(phi, p.hparams, p.split)
    got = jit(jax.grad(problems.objective(response, p)))(p.hparams)
    assert error(got, answers.gradient) < EXACT


def test_best_response_learns_the_direction_of_the_exact_hypergradient():
    p = problems.ridge_hypernet(steps=2000)
    response = hj.best_response(problems.affine, hj.unroll(p.inner.step))
    got = jit(jax.grad(problems.objective(response, p)))(p.hparams)
    plain = hj.Split(p.split.train[:2], p.split.valid)
    exact = problems.ridge_answers(p.hparams, plain).gradient
    cosine = got @ exact / (np.linalg.norm(got) * np.linalg.norm(exact))
    assert cosine > 0.95


def test_best_response_of_the_game_is_exact():
    # The follower's answer is affine in the leader's move, so a hypernetwork can hold it exactly.
    g = problems.game()
    p = g.problem
    at = lambda h: jnp.asarray(g.respond(h))
    origin = np.zeros(2)
    phi = {"a": at(origin), "b": jnp.stack([at(e) - at(origin) for e in np.eye(2)], axis=1)}
    response = hj.best_response(problems.affine, lambda h, phi, batches: (phi, phi))
    got = jax.grad(lambda h: p.score(response(h, phi, p.split.train)[0], h, p.split.valid))
    unrolled = jax.grad(problems.objective(hj.unroll(p.inner.step), p))
    assert error(got(p.hparams), unrolled(p.hparams)) < 1e-13
    assert np.linalg.norm(got(jnp.asarray(g.leader))) < 1e-13


# ----------------------------------------------------------------------- numerical traps


def dead_feature(eps_root: float):
    """Hypergradient in the learning rate when one gradient entry is exactly zero."""
    x = jnp.asarray([[1.0, 0.0], [2.0, 0.0]])
    loss = lambda w, h, batch: jnp.mean((x @ w - 1.0) ** 2)
    inner = hj.inner(loss, lambda h: optax.adam(h, eps_root=eps_root))
    respond = hj.unroll(inner.step)
    start, lr = jnp.asarray([0.3, 0.0]), jnp.asarray(0.01)
    value = lambda h: loss(respond(h, inner.init(start, h), jnp.arange(5))[0], h, None)
    return jax.grad(value)(lr), central_difference(value, lr, jnp.asarray(1.0))


def test_adam_without_eps_root_has_a_nan_meta_gradient():
    # d sqrt(v) / dv is infinite at v = 0, and the chain rule multiplies it by zero. If this ever
    # passes without eps_root, the advice in `inner` can go.
    grad, difference = dead_feature(eps_root=0.0)
    assert jnp.isnan(grad) and np.isfinite(difference)


def test_adam_with_eps_root_has_a_meta_gradient():
    grad, difference = dead_feature(eps_root=1e-8)
    assert abs(grad - difference) < 1e-7


def test_unroll_compiles_to_what_one_would_write_by_hand():
    p = problems.net(steps=10)
    e = hj.hypergradient(hj.unroll(p.inner.step), p.score, p.inner.init)
    ours = lambda h, params, split: e.estimate(h, p.inner.init(params, h), split)[0].grad

    def by_hand(h, params, split):
        def value(h):
            step = lambda state, batch: (p.inner.step(state, h, batch), None)
            state, _ = jax.lax.scan(step, p.inner.init(params, h), split.train)
            return p.score(state.params, h, split.valid)

        return jax.grad(value)(h)

    # Timings never decide a test; the same operations, each as often, take the same time.
    count = lambda f: collections.Counter(
        re.findall(r"= [^=]*?\b([a-z-]+)\(", compiled(f, p).as_text() or "")
    )
    assert count(ours) == count(by_hand)


def compiled(f, p):
    return jax.jit(f).lower(p.hparams, p.params, p.split).compile()
