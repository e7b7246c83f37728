"""Schedules by forward mode: the gradient of reverse mode, less work, less noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import PartitionSpec
from problems import error, jit

import hyperjax as hj


def scheduled(problem, windows, seed=0):
    """Hyperparameters that differ from window to window."""
    rng = np.random.default_rng(seed)
    vary = lambda x: x[None] * jnp.asarray(rng.uniform(0.7, 1.1, size=(windows, *x.shape)))
    return jax.tree.map(vary, problem.hparams)


def by_reverse_mode(problem, hparams, windows, split):
    """Ordinary autodiff of a plain loop that picks the row of its window."""
    steps = len(jax.tree.leaves(split.train)[0])
    ends = np.asarray([i * steps // windows for i in range(1, windows + 1)])
    which = jnp.asarray(np.searchsorted(ends, np.arange(steps), side="right"))
    row = lambda h, i: jax.tree.map(lambda x: x[i], h)

    def value(h):
        state = problem.inner.init(problem.params, row(h, 0))
        body = lambda s, now: (problem.inner.step(s, row(h, now[0]), now[1]), None)
        state, _ = jax.lax.scan(body, state, (which, split.train))
        return problem.score(state.params, row(h, -1), split.valid)

    return jit(jax.value_and_grad(value))(hparams)


def estimator_of(p, windows, **options):
    return hj.forward_sharing(p.inner.step, p.score, p.inner.init, windows=windows, **options)


def begin(p, estimator, hparams):
    return hparams, estimator.init(p.params, hparams), p.split


@pytest.mark.parametrize(("windows", "steps"), [(1, 7), (3, 17), (5, 5)])
def test_gradient_is_that_of_reverse_mode(windows, steps):
    p = problems.net(steps=steps)
    h = scheduled(p, windows)
    estimator = estimator_of(p, windows)
    result, carry = jit(estimator.estimate)(*begin(p, estimator, h))
    value, grad = by_reverse_mode(p, h, windows, p.split)
    assert error(result.value, value) < 1e-13
    assert error(result.grad, grad) < 1e-10
    assert jnp.all(result.grad["lr"] != 0)
    assert jax.tree.structure(carry) == jax.tree.structure(p.inner.init(p.params, p.hparams))


def test_batches_may_be_of_numpy():
    p = problems.net(steps=6)
    h = scheduled(p, 3)
    estimator = estimator_of(p, 3)
    split = hj.Split(jax.tree.map(np.asarray, p.split.train), p.split.valid)
    carry = estimator.init(p.params, h)
    result, _ = jax.eval_shape(lambda h: estimator.estimate(h, carry, split), h)
    assert result.grad["lr"].shape == (3,)


def test_direct_term_and_integers_in_the_state():
    # Ridge has a score with hparams in it, a vector per window; Adam counts in integers.
    p = problems.ridge(steps=9)
    p = p._replace(inner=hj.inner(p.loss, lambda h: optax.adam(0.05, eps_root=1e-8)))
    h = scheduled(p, 3)
    estimator = estimator_of(p, 3)
    result, carry = jit(estimator.estimate)(*begin(p, estimator, h))
    value, grad = by_reverse_mode(p, h, 3, p.split)
    assert error((result.value, result.grad), (value, grad)) < 1e-10
    assert carry.opt_state[0].count == 9


def test_tangents_are_paid_for_from_their_window_on():
    # Multiplications in the program: with all four tangents in every step it would be 4 * 4.
    def tangents_in_loops(windows):
        step = lambda s, h, _: s._replace(params=jnp.sin(s.params) * h)
        estimator = hj.forward_sharing(
            step, lambda p, h, b: jnp.sum(p), lambda p, h: hj.InnerState(p, ()), windows=windows
        )
        h = jnp.ones(windows)
        carry = estimator.init(jnp.ones(3), h)
        program = jax.make_jaxpr(estimator.estimate)(h, carry, hj.Split(jnp.arange(8), None))
        loops = [e for e in program.jaxpr.eqns if e.primitive.name in ("scan", "while")]
        return [max(v.aval.shape[0] for v in e.outvars if v.aval.shape[1:] == (3,)) for e in loops]

    assert tangents_in_loops(4) == [1, 2, 3, 4]


def test_vmap_scan_and_types():
    p = problems.net(steps=8)
    low = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    members = jax.tree.map(lambda *xs: jnp.stack(xs), *(scheduled(p, 2, seed) for seed in range(3)))
    estimator = estimator_of(p, 2)
    one = lambda h: estimator.estimate(*begin(p, estimator, h))[0]
    together, apart = jit(jax.vmap(one))(members), jit(functools.partial(jax.lax.map, one))(members)
    assert error(together.grad, apart.grad) < 1e-12

    tuner = hj.tune(estimator, optax.sgd(0.01))
    state = tuner.init(low(p.params), low(scheduled(p, 2)))
    split = low(p.split)
    after = jax.eval_shape(tuner.step, state, split)[0]
    same = lambda a, b: (a.dtype, a.shape, a.weak_type) == (b.dtype, b.shape, b.weak_type)
    assert jax.tree.all(jax.tree.map(lambda x, y: same(jax.typeof(x), y), state, after))
    state, metrics = jit(functools.partial(hj.run, tuner))(state, problems.repeat(split, 3))
    assert jnp.all(metrics.finite)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((state.hparams, metrics.value)))


def test_shard_map_is_one_device():
    # Data in eight parts, a pmean in loss and score.
    grads = []
    for axis in (None, "i"):
        p = problems.net(axis, steps=6)
        estimator = estimator_of(p, 2)
        grad = lambda h, split, p=p, e=estimator: e.estimate(h, e.init(p.params, h), split)[0].grad
        if axis:
            specs = (PartitionSpec(), problems.shard(p.split, axis))
            mesh = problems.mesh(axis)
            grad = jax.shard_map(grad, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
        grads.append(jit(grad)(scheduled(p, 2), p.split))
    assert error(grads[1], grads[0]) < 1e-12


def test_clipping_bounds_tangents_and_is_reported():
    # d/dh of x <- x + h is one more every step.
    step = lambda s, h, _: s._replace(params=s.params + h)
    make = functools.partial(
        hj.forward_sharing, step, lambda p, h, b: p, lambda p, h: hj.InnerState(p, ()), windows=2
    )
    for clip, grad, largest in ((None, [6, 6], 6), (4.0, [4, 4], 5), (7.0, [6, 6], 6)):
        estimator = make(clip=clip)
        h = jnp.ones(2)
        split = hj.Split(jnp.arange(12), None)
        result, _ = estimator.estimate(h, estimator.init(jnp.asarray(0.0), h), split)
        assert result.grad.tolist() == grad
        assert result.info.largest == largest


def signal_to_noise(windows: int, orders: int = 100, steps: int = 32) -> float:
    """|mean| / deviation of the hypergradient over orders of the data, averaged over windows."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(steps, 2, 5)))
    y = x @ jnp.asarray(rng.normal(size=5)) + 0.5 * jnp.asarray(rng.normal(size=(steps, 2)))
    loss = lambda w, h, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    inner = hj.inner(loss, lambda h: optax.sgd(h))
    estimator = hj.forward_sharing(inner.step, loss, inner.init, windows=windows)
    valid = (x.reshape(-1, 5), y.reshape(-1))

    def one(key):
        order = jax.random.permutation(key, steps)
        h = jnp.full(windows, 0.02)
        split = hj.Split((x[order], y[order]), valid)
        return estimator.estimate(h, estimator.init(jnp.zeros(5), h), split)[0].grad

    grads = jit(jax.vmap(one))(jax.random.split(jax.random.key(1), orders))
    return float(jnp.mean(jnp.abs(jnp.mean(grads, 0)) / jnp.std(grads, 0)))


def test_sharing_raises_the_signal_to_noise_ratio():
    # Windows of 32, 8 and 2 steps: independent noise would fall by 2 each time.
    few, some, many = (signal_to_noise(n) for n in (1, 4, 16))
    assert few > 1.3 * some > 1.3 * 1.3 * many


def test_bad_input_is_refused():
    p = problems.net(steps=4)
    estimator = estimator_of(p, 3)
    h = scheduled(p, 2)
    with pytest.raises(ValueError, match=r"leading axis of 3, one row per window; .*float64\[2\]"):
        estimator.init(p.params, h)
    estimator = estimator_of(p, 5)
    with pytest.raises(ValueError, match="there are 4 steps for 5 windows"):
        estimator.estimate(*begin(p, estimator, scheduled(p, 5)))
    with pytest.raises(ValueError, match="`windows` must be an integer >= 1; got 0"):
        estimator_of(p, 0)
    with pytest.raises(ValueError, match="`clip` must be a finite number, positive; got -1"):
        estimator_of(p, 1, clip=-1.0)
