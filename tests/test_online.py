"""Hypergradients along training: exact through the whole history, greedy, and in between."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import error, jit

import hyperjax as hj

STEPS = 5  # in each of two estimates


def rates(name: str, h):
    return {
        "sgd": lambda: optax.sgd(h["lr"]),
        "momentum": lambda: optax.sgd(h["lr"], momentum=0.7),
        "adam": lambda: optax.adam(h["lr"], eps_root=1e-8),
    }[name]()


def net(name: str) -> problems.Problem:
    """The net of `problems` with batches that differ, trained by one of three optimizers."""
    p = problems.net(steps=2 * STEPS)
    x, y = p.split.train
    scale = 1 + 0.1 * jnp.cos(jnp.arange(2 * STEPS))
    train = (x, y * scale[:, None])
    lr = 0.1 if name == "adam" else 0.3
    hparams = {"l2": p.hparams["l2"], "lr": jnp.asarray(lr)}
    return p._replace(
        inner=hj.inner(p.loss, lambda h: rates(name, h)),
        hparams=hparams,
        split=hj.Split(train, p.split.valid),
    )


def halves(split: hj.Split) -> list[hj.Split]:
    cut = lambda a, b: jax.tree.map(lambda x: x[a:b], split.train)
    return [hj.Split(cut(0, STEPS), split.valid), hj.Split(cut(STEPS, None), split.valid)]


def estimates(estimator: hj.Estimator, p: problems.Problem, splits) -> list:
    carry = estimator.init(p.params, p.hparams)
    call, results = jit(estimator.estimate), []
    for split in splits:
        result, carry = call(p.hparams, carry, split)
        results.append(result)
    return results


# ------------------------------------------------------------------------------------- rtho


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_without_decay_it_is_reverse_mode_through_the_whole_history(name):
    p = net(name)
    results = estimates(hj.online.rtho(p.inner.step, p.score, p.inner.init), p, halves(p.split))
    unrolled = jit(jax.value_and_grad(problems.objective(hj.unroll(p.inner.step), p)))
    for result, split in zip(results, (halves(p.split)[0], p.split), strict=True):
        value, grad = unrolled(p.hparams, split)
        assert error(result.value, value) < 1e-13
        assert error(result.grad, grad) < 1e-10  # float64, two orders of summation
    # Exactness is not for want of a history: the second half alone has another gradient.
    alone = unrolled(p.hparams, halves(p.split)[1])[1]
    assert error(alone, results[1].grad) > 1e-2


def test_whole_history_includes_a_start_that_depends_on_hparams():
    init = lambda params, h: hj.InnerState(h["start"] * params, ())
    step = lambda s, h, batch: s._replace(params=0.5 * s.params + batch)
    score = lambda w, h, batch: jnp.sum(w)
    estimator = hj.online.rtho(step, score, init)
    h = {"start": jnp.asarray(2.0)}
    result, _ = estimator.estimate(
        h, estimator.init(jnp.ones(3), h), hj.Split(jnp.arange(2.0), None)
    )
    assert error(result.grad, {"start": np.asarray(3 * 0.25)}) == 0


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_without_history_it_is_the_gradient_of_the_last_step(name):
    p = net(name)
    greedy = hj.online.rtho(p.inner.step, p.score, p.inner.init, decay=0.0)
    (result,) = estimates(greedy, p, [p.split])
    earlier = jax.tree.map(lambda x: x[:-1], p.split.train)
    _, before = jit(hj.unroll(p.inner.step))(p.hparams, p.inner.init(p.params, p.hparams), earlier)

    def after(h):
        state = p.inner.step(before, h, jax.tree.map(lambda x: x[-1], p.split.train))
        return p.score(state.params, h, p.split.valid)

    assert error(result.grad, jit(jax.grad(after))(p.hparams)) < 1e-12


def quadratic():
    """loss = a w^2 / 2, score = w: w_t = (1 - lr a) w_{t-1}, all in closed form."""
    a, lr, w = 0.8, 0.5, 3.0
    inner = hj.inner(lambda w, h, batch: 0.5 * a * w**2, lambda h: optax.sgd(h))
    return a, lr, w, inner, lambda w, h, batch: w


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_decay_in_closed_form(decay):
    a, lr, w, inner, score = quadratic()
    steps = 7
    # Z_t = decay (1 - lr a) Z_{t-1} - a w_{t-1} with w_t = r^t w: a geometric sum.
    r = 1 - lr * a
    expected = sum(decay**k * r**k * -a * w * r ** (steps - 1 - k) for k in range(steps))
    estimator = hj.online.rtho(inner.step, score, inner.init, decay=jnp.asarray(decay))
    h = jnp.asarray(lr)
    carry = estimator.init(jnp.asarray(w), h)
    result, _ = estimator.estimate(h, carry, hj.Split(jnp.arange(steps), None))
    assert error(result.grad, expected) < 1e-14


def test_bias_of_decay_shrinks_as_it_goes_to_one():
    p = net("sgd")
    exact = estimates(hj.online.rtho(p.inner.step, p.score, p.inner.init), p, [p.split])[0].grad
    family = lambda d: hj.online.rtho(p.inner.step, p.score, p.inner.init, decay=d)
    one = lambda d: family(d).estimate(p.hparams, family(d).init(p.params, p.hparams), p.split)
    decays = jnp.asarray([0.0, 0.5, 0.9, 0.99])
    grads = jit(jax.vmap(lambda d: one(d)[0].grad))(decays)
    errors = [error(jax.tree.map(lambda g, i=i: g[i], grads), exact) for i in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 > errors[-1] > 0


def test_a_tangent_that_overflowed_is_forgotten_without_history():
    _, lr, w, inner, score = quadratic()
    greedy = hj.online.rtho(inner.step, score, inner.init, decay=0.0)
    h = jnp.asarray(lr)
    carry = greedy.init(jnp.asarray(w), h)
    broken = carry._replace(tangent=jax.tree.map(lambda z: z + jnp.inf, carry.tangent))
    split = hj.Split(jnp.arange(2), None)
    assert error(greedy.estimate(h, broken, split)[0], greedy.estimate(h, carry, split)[0]) == 0


def test_counters_and_keys_have_no_tangent():
    class State(NamedTuple):
        params: Any
        key: jax.Array
        steps: jax.Array

    def step(s, h, batch):
        key, noise = jax.random.split(s.key)
        return State(s.params * h + jax.random.normal(noise), key, s.steps + 1)

    init = lambda params, h: State(params, jax.random.key(3), jnp.asarray(0))
    score = lambda w, h, batch: w
    split = hj.Split(jnp.arange(4), None)
    estimator = hj.online.rtho(step, score, init)
    h, w = jnp.asarray(0.7), jnp.asarray(2.0)
    result, carry = jit(estimator.estimate)(h, estimator.init(w, h), split)
    assert carry.tangent.key is None
    assert carry.tangent.steps is None
    assert carry.state.steps == 4
    response = hj.unroll(step)
    expected = jax.grad(lambda h: response(h, init(w, h), split.train)[0])(h)
    assert error(result.grad, expected) < 1e-14


# ----------------------------------------------------------------------------------- marthe


def marthe_by_hand(a, lr, w, beta, count):
    """The algorithm for one scalar parameter with score w^2 / 2, in numpy: (grads, mus, rates)."""
    z, mu, c, newest, out = 0.0, 0.0, 0.0, None, []
    for _ in range(count):
        if newest is not None:
            c = c * (mu > 0) + mu
            mu = np.clip(lr / newest, 0, 1) ** (1 / (c + 1)) if newest > 0 else 0.0
        g = a * w
        z = mu * (1 - lr * a) * z - g
        w = w - lr * g
        newest = w * g  # validation gradient times training gradient
        out.append((w * z, mu, lr))
        lr = lr - beta * w * z
    return np.asarray(out).T


def test_marthe_is_the_algorithm():
    a, lr, w, beta = 0.8, 0.1, 1.5, 0.02
    inner = hj.inner(lambda w, h, batch: 0.5 * a * w**2, lambda h: optax.sgd(h["lr"]))
    estimator = hj.online.marthe(inner.step, lambda w, h, batch: 0.5 * w**2, inner.init)
    tuner = hj.tune(estimator, optax.sgd(beta))
    state = tuner.init(jnp.asarray(w), {"lr": jnp.asarray(lr)})
    splits = hj.Split(jnp.zeros((12, 1)), jnp.zeros(12))
    _, metrics = jit(lambda s: hj.run(tuner, s, splits))(state)
    grads, mus, lrs = marthe_by_hand(a, lr, w, beta, 12)
    assert error(metrics.grad_norm, np.abs(grads)) < 1e-12
    assert error(metrics.info.decay["lr"], mus) < 1e-12
    assert error(metrics.hparams["lr"], lrs) < 1e-12
    assert mus[0] == 0
    assert np.any((mus > 0.05) & (mus < 0.95)), mus  # neither of the two extremes alone


def test_marthe_forgets_where_the_gradients_disagree():
    # The score rises where the loss falls, so that every step asks for a smaller rate.
    inner = hj.inner(lambda w, h, batch: 0.5 * w**2, lambda h: optax.sgd(h))
    estimator = hj.online.marthe(inner.step, lambda w, h, batch: -0.5 * w**2, inner.init)
    greedy = hj.online.rtho(inner.step, lambda w, h, batch: -0.5 * w**2, inner.init, decay=0.0)
    h, w, split = jnp.asarray(0.1), jnp.asarray(1.0), hj.Split(jnp.arange(1), None)
    p = problems.Problem(inner.step, inner.step, inner, w, h, split)
    for ours, other in zip(
        estimates(estimator, p, [split] * 4), estimates(greedy, p, [split] * 4), strict=True
    ):
        assert ours.info.decay == 0
        assert error(ours.grad, other.grad) < 1e-15


def test_marthe_with_several_steps_and_hparams_is_rtho_with_its_own_decay():
    # One decay for each scalar, held during an estimate: l2 and lr as if each were alone.
    p = net("adam")
    ours = hj.online.marthe(p.inner.step, p.score, p.inner.init)
    first, second = estimates(ours, p, halves(p.split))
    fixed = lambda d: hj.online.rtho(p.inner.step, p.score, p.inner.init, decay=d)
    estimate = jit(lambda d, carry, split: fixed(d).estimate(p.hparams, carry, split))
    for name in ("l2", "lr"):
        carry = fixed(1.0).init(p.params, p.hparams)
        for result, split in zip((first, second), halves(p.split), strict=True):
            expected, carry = estimate(result.info.decay[name], carry, split)
            assert error(result.grad[name], expected.grad[name]) < 1e-12
    assert first.info.decay == {"l2": 0, "lr": 0}
    assert 0.05 < second.info.decay["lr"] < 0.95
    assert second.info.decay["l2"] != second.info.decay["lr"]


# ------------------------------------------------------------------------------------- both


FAMILIES = {
    "rtho": lambda p: hj.online.rtho(p.inner.step, p.score, p.inner.init, decay=0.9),
    "marthe": lambda p: hj.online.marthe(p.inner.step, p.score, p.inner.init),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_tuned_in_one_scan_with_the_types_of_init(name):
    p = net("adam")
    tuner = hj.tune(FAMILIES[name](p), optax.adam(0.01))
    state = tuner.init(p.params, p.hparams)
    splits = jax.tree.map(lambda *x: jnp.stack(x), *halves(p.split), halves(p.split)[0])
    types = lambda tree: jax.tree.map(lambda x: (jax.typeof(x), x.weak_type), tree)
    end, metrics = jit(lambda s: hj.run(tuner, s, splits))(state)
    assert types(end) == types(state)
    assert jnp.all(metrics.finite)
    assert metrics.value[-1] < metrics.value[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_vmap_over_hparams_is_separate_runs(name):
    p = net("sgd")
    estimator = FAMILIES[name](p)

    def twice(h):
        def body(carry, split):
            result, carry = estimator.estimate(h, carry, split)
            return carry, result

        splits = jax.tree.map(lambda *x: jnp.stack(x), *halves(p.split))
        return jax.lax.scan(body, estimator.init(p.params, h), splits)[1]

    many = jax.tree.map(lambda x: x * jnp.asarray([0.5, 1.0, 1.5]), p.hparams)
    together = jit(jax.vmap(twice))(many)
    alone = jit(twice)
    for i in range(3):
        pick = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        # The order of sums in a batched product differs: a few units in the last place.
        assert error(pick(together), alone(pick(many))) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_stays_float32_beside_float64_hparams(name):
    p = net("adam")
    single = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    p = p._replace(params=single(p.params), split=single(p.split))
    estimator = FAMILIES[name](p)
    carry = estimator.init(p.params, p.hparams)
    result, after = jit(estimator.estimate)(p.hparams, carry, p.split)
    assert {x.dtype for x in jax.tree.leaves(after.state.params)} == {jnp.dtype("float32")}
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, carry)
    assert {g.dtype for g in jax.tree.leaves(result.grad)} == {jnp.dtype("float64")}


@pytest.mark.parametrize("name", ["rtho", "marthe"])
def test_inside_shard_map_it_is_the_same(name):
    p, whole = problems.net("data", steps=2), problems.net(steps=2)
    spec = problems.shard(p.split, "data")
    replicated = jax.sharding.PartitionSpec()

    def run(h, split):
        estimator = FAMILIES[name](p)
        carry = estimator.init(p.params, h)
        _, carry = estimator.estimate(h, carry, split)
        return estimator.estimate(h, carry, split)[0]

    mapped = jax.shard_map(
        run, mesh=problems.mesh("data"), in_specs=(replicated, spec), out_specs=replicated
    )
    expected = estimates(FAMILIES[name](whole), whole, [whole.split] * 2)[1]
    assert error(jit(mapped)(p.hparams, p.split), expected) < 1e-12


def test_bad_input_is_named():
    p = net("sgd")
    make = lambda **options: hj.online.rtho(p.inner.step, p.score, p.inner.init, **options)
    with pytest.raises(ValueError, match=r"rtho: `decay` must be in \[0, 1\]; got 1.5"):
        make(decay=1.5)
    with pytest.raises(ValueError, match=r"rtho: `decay` must be a finite number, >= 0; got -0.1"):
        make(decay=-0.1)
    with pytest.raises(TypeError, match="rtho: `step` must be a function"):
        hj.online.rtho(p.inner, p.score, p.inner.init)  # pyright: ignore
    for name in ("rtho", "marthe"):
        estimator = FAMILIES[name](p)
        with pytest.raises(ValueError, match=f"{name}: `hparams` has no entries"):
            estimator.init(p.params, {})
        with pytest.raises(TypeError, match=f"{name}: every leaf of `hparams` must be a real"):
            estimator.init(p.params, {"lr": jnp.asarray(1)})
    with pytest.raises(TypeError, match="rtho: `init` must return a state with a field `params`"):
        hj.online.rtho(p.inner.step, p.score, lambda p, h: p).init(p.params, p.hparams)
