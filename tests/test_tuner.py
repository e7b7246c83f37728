"""The outer loop: types that stay, losses that are traced once, steps that do no harm."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import error, jit

import hyperjax as hj

STEPS = 4  # inner steps where only types or traces are looked at


def weak_net(dtype=jnp.float64) -> problems.Problem:
    """The net with hparams as users write them: Python numbers and weakly typed arrays."""
    p = problems.net(steps=STEPS)
    hparams = {"lr": 0.1, "momentum": jnp.full((), 0.5), "l2": np.float32(0.01)}
    params = jax.tree.map(lambda x: x.astype(dtype), p.params)
    return p._replace(hparams=hparams, params=params)


INNER = {
    "sgd": lambda h: optax.sgd(h["lr"], momentum=h["momentum"]),
    "adam": lambda h: optax.adamw(h["lr"], b1=h["momentum"], weight_decay=h["l2"], eps_root=1e-8),
}
OUTER = {
    "sgd": optax.sgd(0.01, momentum=0.9),
    "adam": optax.adam(0.01),
    "none": optax.set_to_zero(),
}


def estimators(p, inner):
    unroll, optimality = hj.unroll(inner.step), hj.stationary(p.loss)
    make = lambda response, **options: hj.hypergradient(response, p.score, inner.init, **options)
    yield "unroll", make(unroll)
    yield "forward", make(unroll, mode="forward")
    yield "sqrt", make(hj.unroll(inner.step, checkpoint="sqrt"))
    yield "binomial", make(hj.unroll(inner.step, checkpoint="binomial"))
    yield "truncate", make(hj.unroll(inner.step, truncate=2))
    yield "cg", make(hj.implicit(unroll, optimality))
    yield "neumann", make(hj.implicit(unroll, optimality, solve=hj.linsolve.neumann(3, 0.1)))
    yield "score_only", hj.score_only(unroll, p.score, inner.init)
    yield "restart", hj.restart(make(unroll))


ESTIMATORS = [name for name, _ in estimators(weak_net(), hj.inner(weak_net().loss, INNER["sgd"]))]


def types(tree):
    """Path, shape, type and weakness of every leaf."""
    return [
        (jax.tree_util.keystr(k), x.shape, x.dtype, x.weak_type)
        for k, x in jax.tree_util.tree_leaves_with_path(tree)
    ]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(("inner", "outer"), [("sgd", "adam"), ("adam", "sgd"), ("adam", "none")])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_types_of_a_state_never_change(name, inner, outer, dtype):
    # Otherwise `lax.scan` refuses the carry, and jit compiles the second step anew.
    p = weak_net(dtype)
    estimator = dict(estimators(p, hj.inner(p.loss, INNER[inner])))[name]
    tuner = hj.tune(estimator, OUTER[outer])
    state = jax.eval_shape(tuner.init, p.params, p.hparams)
    after, _ = jax.eval_shape(tuner.step, state, p.split)
    assert types(after) == types(state)
    assert not any(weak for *_, weak in types(state))
    # Each leaf keeps the precision it came with: the batch is float64.
    carry = state.carry.trained if name == "restart" else state.carry
    assert {x.dtype for x in jax.tree.leaves(carry.params)} == {jnp.dtype(dtype)}
    assert state.hparams["l2"].dtype == jnp.float32


def test_a_best_response_keeps_its_types():
    p = problems.ridge_hypernet(steps=STEPS)
    phi = {"a": jnp.full((5,), 0.0), "b": jnp.full((5, 5), 0.0)}  # weakly typed
    respond = hj.best_response(problems.affine, hj.unroll(p.inner.step))
    tuner = hj.tune(hj.hypergradient(respond, p.score, p.inner.init), optax.adam(0.1))
    state = jax.eval_shape(tuner.init, phi, p.hparams)
    assert types(jax.eval_shape(tuner.step, state, p.split)[0]) == types(state)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adam(0.1)])
def test_types_of_an_inner_state_never_change(optimizer):
    inner = hj.inner(lambda w, h, batch: jnp.sum(w["a"] ** 2) + w["b"] ** 2, lambda h: optimizer)
    state = inner.init({"a": jnp.full((2,), 0.1), "b": 0.5}, 1.0)  # weakly typed
    assert types(jax.eval_shape(inner.step, state, 1.0, None)) == types(state)


@pytest.mark.parametrize("make", [hj.hypergradient, hj.score_only])
def test_an_init_of_the_users_own_may_be_weakly_typed(make):
    train = lambda h, carry, batches: (h * carry["x"], {"x": carry["x"] * 0.5, "n": carry["n"] + 1})
    begin = lambda params, h: {"x": 0.1, "n": 0}
    tuner = hj.tune(make(train, lambda w, h, batch: w**2, begin), optax.sgd(0.1))
    state = tuner.init(None, 1.0)
    after, _ = jax.eval_shape(tuner.step, state, hj.Split(jnp.arange(2), None))
    assert types(after) == types(state)


# ------------------------------------------------------------------------------ traces


class Counter:
    """Counts the calls of a loss, hence its traces under jit."""

    def __init__(self, loss):
        self.loss, self.calls = loss, 0

    def __call__(self, params, hparams, batch):
        self.calls += 1
        return self.loss(params, hparams, batch)


def traces(name, outer_steps, inner_steps):
    """Traces of loss and score in a first run, and in a second one with other values."""
    p = problems.net(steps=inner_steps)
    loss, score = Counter(p.loss), Counter(p.score)
    p = p._replace(loss=loss, score=score)
    inner = hj.inner(loss, INNER["sgd"])
    tuner = hj.tune(dict(estimators(p, inner))[name], optax.adam(0.01))
    go = jax.jit(lambda state, splits: hj.run(tuner, state, splits))
    counts = []
    for scale in (1.0, 0.9):
        before = loss.calls, score.calls
        hparams = jax.tree.map(lambda x, scale=scale: scale * x, p.hparams)
        state, _ = go(tuner.init(p.params, hparams), problems.repeat(p.split, outer_steps))
        go(state, problems.repeat(p.split, outer_steps))
        counts.append((loss.calls - before[0], score.calls - before[1]))
    return counts


@pytest.mark.parametrize("name", ESTIMATORS)
def test_losses_are_traced_once_and_then_never(name):
    first, second = traces(name, outer_steps=2, inner_steps=STEPS)
    assert first > (0, 0)
    assert second == (0, 0)


@pytest.mark.parametrize("name", ["unroll", "cg", "binomial"])
def test_traces_do_not_grow_with_the_run(name):
    short, _ = traces(name, outer_steps=1, inner_steps=5)
    long, _ = traces(name, outer_steps=7, inner_steps=40)
    assert long == short
    assert max(long) <= 12  # JAX looks at a loop's body several times, whatever its length


# --------------------------------------------------------------------------- the steps


def test_tuning_finds_the_leader():
    g = problems.game()
    p = g.problem
    response = hj.implicit(
        hj.unroll(p.inner.step), hj.stationary(p.loss), solve=hj.linsolve.cg(tol=1e-14)
    )
    estimator = hj.hypergradient(response, p.score, p.inner.init)
    tuner = hj.tune(estimator, optax.sgd(float(1 / np.linalg.norm(g.hessian, 2))))
    # Descent at that rate contracts by 1 - 1 / condition.
    steps = math.ceil(math.log(1e-12) / math.log(1 - 1 / np.linalg.cond(g.hessian)))
    state, metrics = jit(lambda s, x: hj.run(tuner, s, x))(
        tuner.init(p.params, p.hparams), problems.repeat(p.split, steps)
    )
    assert error(state.hparams, g.leader) < 1e-8
    assert error(state.carry.params, g.respond(g.leader)) < 1e-8
    assert metrics.grad_norm[-1] < 1e-8 < metrics.grad_norm[0]
    assert jnp.all(metrics.finite)


def test_run_is_its_steps():
    p = problems.net(steps=STEPS)
    estimator = hj.hypergradient(hj.unroll(p.inner.step), p.score, p.inner.init)
    tuner = hj.tune(estimator, optax.adam(0.01))
    splits = jax.tree.map(
        lambda x: x * jnp.linspace(0.9, 1.1, 3).reshape(3, *[1] * (x.ndim - 1)),
        problems.repeat(p.split, 3),
    )
    start = tuner.init(p.params, p.hparams)
    end, metrics = jit(lambda s, x: hj.run(tuner, s, x))(start, splits)
    state, step = start, jit(tuner.step)
    for i in range(3):
        expected = state.hparams
        state, one = step(state, jax.tree.map(lambda x, i=i: x[i], splits))
        row = jax.tree.map(lambda x, i=i: x[i], metrics)
        assert one.finite and row.finite
        assert error(one._replace(finite=1), row._replace(finite=1)) < 1e-13
        assert error(one.hparams, expected) == 0  # in force during the step, not after it
    assert error(end, state) < 1e-13


def test_a_step_is_the_optimizer_applied_to_the_estimate():
    p = problems.net(steps=STEPS)
    estimator = hj.hypergradient(hj.unroll(p.inner.step), p.score, p.inner.init)
    tuner = hj.tune(estimator, optax.sgd(0.3))
    state = tuner.init(p.params, p.hparams)
    estimate, carry = jit(estimator.estimate)(state.hparams, state.carry, p.split)
    after, metrics = jit(tuner.step)(state, p.split)
    moved = jax.tree.map(lambda h, g: h - 0.3 * g, state.hparams, estimate.grad)
    assert error(after.hparams, moved) < 1e-14
    assert error(after.carry, carry) < 1e-13
    assert error(metrics.value, estimate.value) < 1e-14
    assert error(metrics.grad_norm, optax.tree.norm(estimate.grad)) < 1e-14


# ------------------------------------------------------------------------- what is not finite

Fault = collections.namedtuple("Fault", "value grad")
FAULTS = {
    "nan value": Fault(np.nan, 1.0),
    "inf value": Fault(np.inf, 1.0),
    "nan gradient": Fault(1.0, np.nan),
    "inf gradient": Fault(1.0, -np.inf),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_finite_moves_nothing_and_is_reported(fault):
    # An estimator that gives what its batch says; the second of three steps is at fault.
    value, slope = FAULTS[fault]

    def estimate(h, carry, split):
        value, slope = split.valid
        grad = {"a": jnp.stack([jnp.ones(()), slope]), "b": jnp.ones(())}
        return hj.Estimate(value, grad, ()), carry + 1

    tuner = hj.tune(hj.Estimator(lambda p, h: jnp.zeros((), int), estimate), optax.adam(0.1))
    state = tuner.init(None, {"a": jnp.zeros(2), "b": jnp.zeros(())})
    step = jit(tuner.step)
    batch = lambda value, slope: hj.Split((), (jnp.asarray(value), jnp.asarray(slope)))
    state, metrics = step(state, batch(1.0, 1.0))
    assert metrics.finite
    after, metrics = step(state, batch(value, slope))
    assert not metrics.finite
    assert error((after.hparams, after.opt_state), (state.hparams, state.opt_state)) == 0
    assert after.carry == 2  # training has gone on
    last, metrics = step(after, batch(1.0, 1.0))
    assert metrics.finite
    assert all(
        jnp.all(x != y)
        for x, y in zip(*map(jax.tree.leaves, (last.hparams, after.hparams)), strict=True)
    )


def test_a_diverged_inner_run_is_reported():
    p = problems.net(steps=60)
    hparams = {**p.hparams, "lr": jnp.asarray(1e9)}
    estimator = hj.restart(hj.hypergradient(hj.unroll(p.inner.step), p.score, p.inner.init))
    tuner = hj.tune(estimator, optax.sgd(0.1))
    state = tuner.init(p.params, hparams)
    after, metrics = jit(tuner.step)(state, p.split)
    assert not metrics.finite
    assert error(after.hparams, state.hparams) == 0


# --------------------------------------------------------------------------- replay


def test_replay_is_a_loop_over_the_schedule():
    p = problems.net(steps=STEPS)
    training = hj.inner(p.loss, INNER["sgd"])
    schedule = jax.tree.map(lambda x: x * jnp.asarray([1.0, 0.5, 0.1]), p.hparams)
    batches = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), p.split.train)
    got = jit(lambda s: hj.replay(training, p.params, s, batches))(schedule)
    state = training.init(p.params, jax.tree.map(lambda x: x[0], schedule))
    for t in range(3):
        for k in range(STEPS):
            row, batch = jax.tree.map(lambda x, t=t: x[t], (schedule, batches))
            state = jit(training.step)(state, row, jax.tree.map(lambda x, k=k: x[k], batch))
    assert error(got, state.params) < 1e-12  # the same operations, fused differently


def test_replay_of_a_run_without_perturbation_is_the_run():
    p = problems.net(steps=STEPS)
    training = hj.inner(p.loss, INNER["sgd"])
    tuner = hj.tune(
        hj.hypergradient(hj.unroll(training.step), p.score, training.init), optax.sgd(0.01)
    )
    splits = hj.Split(
        *jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), (p.split.train, p.split.valid))
    )
    state, metrics = jit(lambda s: hj.run(tuner, s, splits))(tuner.init(p.params, p.hparams))
    assert jnp.any(metrics.hparams["lr"][0] != metrics.hparams["lr"][1])
    again = jit(lambda s: hj.replay(training, p.params, s, splits.train))(metrics.hparams)
    assert error(again, state.carry.params) < 1e-12


def test_replay_of_a_schedule_that_a_self_tuning_network_found(key):
    """The means of its distribution are hyperparameters of an ordinary model."""
    loss = lambda w, z, batch: jnp.sum((w - batch) ** 2) + jnp.exp(z["l2"]) * jnp.sum(w**2)
    score = lambda w, z, batch: jnp.sum((w - batch) ** 2)
    net = hj.hypernet.structured({"": hj.hypernet.affine()})
    raw, steps = {"l2": jnp.asarray(-1.0)}, 3
    tuner = hj.bilevel.self_tuning(loss, score, net, optax.sgd(0.05), outer=optax.sgd(0.2))
    phi = net.init(key, jnp.ones(2), raw)
    data = jax.random.normal(key, (steps, STEPS, 2))
    keys = jax.random.split(key, (steps, STEPS))
    train = hj.bilevel.Draw(data[:, :, None], keys)
    valid = hj.bilevel.Draw(data[:, :1], keys[:, 0])
    start = tuner.init(phi, hj.bilevel.gaussian(raw, 0.3))
    _, metrics = jit(lambda s: hj.run(tuner, s, hj.Split(train, valid)))(start)
    schedule = metrics.hparams.mean
    got = hj.replay(hj.inner(loss, lambda z: optax.sgd(0.05)), jnp.ones(2), schedule, data)
    w = np.ones(2)
    for l2, batches in zip(np.asarray(schedule["l2"]), np.asarray(data), strict=True):
        for batch in batches:
            w = w - 0.05 * 2 * ((w - batch) + np.exp(l2) * w)
    assert len(np.unique(schedule["l2"])) == steps
    assert error(got, w) < 1e-12  # twelve steps, written otherwise


@pytest.mark.parametrize(
    "batches",
    [jnp.zeros(3), (jnp.zeros((3, 2)), jnp.zeros((3, 4))), jnp.zeros((3, 0, 2))],
    ids=["none", "different ones", "an empty one"],
)
def test_replay_refuses_batches_without_one_inner_axis(batches):
    training = hj.inner(lambda w, h, batch: w**2 * h, lambda h: optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"replay: .*same two axes first.*`x\[:, None\]`"):
        hj.replay(training, jnp.ones(()), jnp.ones(3), batches)


def test_replay_refuses_a_schedule_of_another_length():
    p = problems.net(steps=STEPS)
    training = hj.inner(p.loss, INNER["sgd"])
    batches = jax.tree.map(lambda x: x[None], p.split.train)
    schedule = jax.tree.map(lambda x: jnp.stack([x] * 3), p.hparams)
    with pytest.raises(ValueError, match=r"`schedule` need the leading axis of `batches`, 1 outer"):
        hj.replay(training, p.params, schedule, batches)
