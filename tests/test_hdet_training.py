"""HDET while something trains: in populations that share gradients, and in a loop of one's own."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from problems import error, jit

import hyperjax as hj

SIZE = 8


# --------------------------------------------------------------- gradients in common, in runs


def test_all_reduce_is_a_mean_of_what_is_finite():
    update: Any = hj.exchange.all_reduce("m").update
    reduce = lambda g: update({"w": g}, ())[0]["w"]
    over = jit(jax.vmap(reduce, axis_name="m"))
    plain = jit(jax.vmap(lambda g: lax.pmean(g, "m"), axis_name="m"))
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)))
    np.testing.assert_array_equal(over(grads), plain(grads))
    bad = grads.at[2, 1].set(jnp.nan).at[4, 0].set(jnp.inf)
    kept = np.asarray(grads)[[0, 1, 3, 5, 6]].mean(0)
    np.testing.assert_allclose(over(bad), np.stack([kept] * 7), rtol=1e-14)
    assert np.isnan(over(jnp.full((7, 3), jnp.nan))).all()


RATE = hj.space({"lr": hj.loguniform(1e-6, 1.0)})


@functools.cache
def stream(steps: int, inner: int):
    """Batches for eight members of their own, [steps, SIZE, inner, ...], and a start."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(steps, SIZE, inner, 6, 3)))
    return {"w": jnp.asarray(rng.normal(size=3))}, (x, jnp.tanh(x.sum(-1)))


def loss(params, hparams, batch):
    del hparams
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"]) - y) ** 2)


def ensemble(rule, lr: float, steps: int = 6, inner: int = 4, mesh=None, own: bool = True):
    """A population that shares gradients, over batches of its own as in the paper, or over one."""
    optimizer = lambda raw: optax.chain(
        hj.exchange.all_reduce("m"), optax.adam(RATE.constrain(raw)["lr"])
    )
    training = hj.inner(loss, optimizer)
    tuner = hj.tune(hj.training_loss(training, loss), optax.set_to_zero())
    together = hj.population(
        tuner, rule, axis_name="m", batches="own" if own else "shared", mesh=mesh
    )
    params, batches = stream(steps, inner)
    batches = batches if own else jax.tree.map(lambda x: x[:, 0], batches)
    raw = RATE.unconstrain({"lr": jnp.asarray(lr)})
    copies = jax.tree.map(lambda x: jnp.stack([x] * SIZE), (params, raw))
    state = together.init(jax.random.key(0), *copies)
    return jit(lambda s: hj.run(together, s, hj.Split(batches, ())))(state)


def test_without_a_spread_it_is_data_parallelism_bit_for_bit():
    """All params of all members after 24 steps of Adam on averaged gradients.

    Against the same population without exchange, so that whatever is not HDET is compiled alike.
    It can be bit for bit because nothing is rounded: the mean of equal params is taken as one of
    them plus differences of zero, and a rate that moves by zero does not go through its bijector.
    """
    hdet, seen = ensemble(hj.exchange.hdet(RATE, width=0.0, every=2), 0.05)
    plain, _ = ensemble(hj.exchange.isolation(), 0.05)
    assert error(hdet.members.carry.params, plain.members.carry.params) == 0
    assert error(hdet.members.hparams, plain.members.hparams) == 0
    assert seen.events.converged.sum() == 3
    np.testing.assert_allclose(seen.events.base["lr"], 0.05, rtol=1e-14)
    # And against data parallelism by hand: all rows of the eight in one batch.
    params, (x, y) = stream(6, 4)
    rows = lambda a: jnp.swapaxes(a, 1, 2).reshape(24, SIZE * 6, *a.shape[4:])
    optimizer = optax.adam(0.05)

    def step(carry, batch):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, None, batch), state)
        return (optax.apply_updates(params, updates), state), None

    (alone, _), _ = jit(lambda c: lax.scan(step, c, (rows(x), rows(y))))(
        (params, optimizer.init(params))
    )
    # Sums in another order, carried through 24 steps.
    assert error(jax.tree.map(lambda a: a[0], hdet.members.carry.params), alone) < 1e-12


def test_a_rate_far_too_low_is_raised_within_a_run():
    rule = hj.exchange.hdet(RATE, width=0.5, momentum=0.5, gain=2.0)
    _, seen = ensemble(rule, 1e-4, steps=20, inner=2, own=False)
    _, plain = ensemble(hj.exchange.isolation(), 1e-4, steps=20, inner=2, own=False)
    base = np.asarray(seen.events.base["lr"])
    assert base[-1] > 10 * base[0]
    assert seen.members.value[-1].mean() < 0.9 * plain.members.value[-1].mean()
    # Moments saw the same gradients and are equal without ever having been averaged.
    moments = ensemble(rule, 1e-4)[0].members.carry.opt_state[1][0].mu["w"]
    np.testing.assert_array_equal(moments, np.broadcast_to(moments[:1], moments.shape))


def test_devices_do_not_matter():
    rule = hj.exchange.hdet(RATE, width=0.5)
    state, seen = ensemble(rule, 0.05, steps=3)
    spread, same = ensemble(rule, 0.05, steps=3, mesh=problems.mesh("member"))
    # sums over members in another order
    assert error(jax.tree.map(np.asarray, spread.members), state.members) < 1e-12
    assert error(jax.tree.map(np.asarray, same.events.base), seen.events.base) < 1e-12


def test_training_loss_is_the_mean_before_each_step():
    params, (x, y) = stream(6, 4)
    training = hj.inner(loss, lambda h: optax.sgd(h["lr"]))
    estimator = hj.training_loss(training, loss)
    hparams, batches = {"lr": jnp.asarray(0.1)}, (x[0, 0], y[0, 0])
    estimate, carry = estimator.estimate(
        hparams, estimator.init(params, hparams), hj.Split(batches, ())
    )
    losses, state = [], training.init(params, hparams)
    for i in range(4):
        batch = jax.tree.map(lambda a, i=i: a[i], batches)
        losses.append(loss(state.params, hparams, batch))
        state = training.step(state, hparams, batch)
    np.testing.assert_allclose(estimate.value, np.mean(losses), rtol=1e-12)
    assert error(carry, state) < 1e-12
    assert estimate.grad == {"lr": 0}


# ----------------------------------------------------------------- a loop of one's own


def devices(loop, lr: float, steps: int = 6, inner: int = 4, poison=None):
    """Data-parallel training on eight devices, written by hand; with `loop` None it is plain.

    `poison` is a (step, device) whose loss, and so its gradient, is made NaN.
    """
    params, batches = stream(steps, inner)
    start = RATE.unconstrain({"lr": jnp.asarray(lr)})
    state = None if loop is None else loop.init(jax.random.key(0), start, SIZE)
    adam, reduce = optax.scale_by_adam(), hj.exchange.all_reduce("data")
    bad = (-1, -1) if poison is None else poison

    def train(params, state, batches):
        here = lax.axis_index("data")

        def segment(carry, now):
            params, moments, state = carry
            number, batch = now
            rate = lr if loop is None else loop.hparams(state, here)["lr"]

            def step(carry, batch):
                params, moments = carry
                value, grads = jax.value_and_grad(loss)(params, None, batch)
                hit = (number == bad[0]) & (here == bad[1])
                value, grads = jax.tree.map(lambda x: jnp.where(hit, jnp.nan, x), (value, grads))
                updates, moments = adam.update(reduce.update(grads, ())[0], moments)
                params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
                params = jax.tree.map(lambda p: jnp.where(hit, jnp.nan, p), params)
                return (params, moments), value

            apart = jax.tree.map(lambda x: lax.pcast(x, "data", to="varying"), params)
            (params, moments), values = lax.scan(step, (apart, moments), batch)
            if loop is None:
                return (lax.pmean(params, "data"), moments, state), ()
            params, state, events = loop.converge(state, params, values.mean(), "data")
            return (params, moments, state), events

        numbered = (jnp.arange(steps), jax.tree.map(lambda x: x[:, 0], batches))
        (params, _, state), events = lax.scan(segment, (params, adam.init(params), state), numbered)
        return params, None if state is None else state.base, events

    rows = PartitionSpec(None, "data")
    sharded = jax.shard_map(
        train,
        mesh=problems.mesh("data"),
        in_specs=(PartitionSpec(), PartitionSpec(), rows),
        out_specs=PartitionSpec(),
    )
    return jax.tree.map(np.asarray, jit(sharded)(params, state, batches))


def test_a_loop_without_a_spread_is_data_parallelism_bit_for_bit():
    # Eight equal numbers: their sum and its eighth are exact.
    params, _, events = devices(hj.exchange.hdet_loop(RATE, width=0.0), 0.05)
    plain, *_ = devices(None, float(RATE.constrain(RATE.unconstrain({"lr": 0.05}))["lr"]))
    assert error(params, plain) == 0
    assert not events.diverged.any()


def test_the_base_of_a_loop_follows_the_losses_of_the_devices():
    # The first move by hand, from what was recorded.
    loop = hj.exchange.hdet_loop(RATE, width=0.5, sigma=0.01)
    _, _, events = devices(loop, 0.05, steps=3)
    assert np.isfinite(events.score).all() and np.unique(events.score[0]).size == SIZE
    rows = loop.init(jax.random.key(0), RATE.unconstrain({"lr": jnp.asarray(0.05)}), SIZE)
    ratio = np.asarray(RATE.constrain(rows.base.assigned)["lr"]) / 0.05 - 1
    weights = np.exp((events.score[0].mean() - events.score[0]) / 0.01)
    velocity = 0.1 * (weights @ ratio / weights.sum() - ratio.mean())
    np.testing.assert_allclose(events.base["lr"][0], 0.05 * math.exp(0.5 * velocity), rtol=1e-10)


def test_a_device_that_diverges_is_left_out_and_comes_back():
    loop = hj.exchange.hdet_loop(RATE, width=0.2)
    params, base, events = devices(loop, 0.05, poison=(2, 5))
    expected = np.zeros((6, SIZE), bool)
    expected[2, 5] = True
    np.testing.assert_array_equal(events.diverged, expected)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, base)))


def test_a_loop_knows_how_many_devices_it_is_for_and_keeps_counters():
    loop = hj.exchange.hdet_loop(RATE)
    many = 2**24 + 1  # no float32
    params = {"w": jnp.arange(4.0), "count": jnp.full(4, many, jnp.int32)}
    converge = lambda size: jax.vmap(
        lambda p, value: loop.converge(
            loop.init(jax.random.key(0), RATE.init(), size), p, value, "m"
        ),
        axis_name="m",
    )(params, jnp.asarray([0.0, 1.0, 2.0, jnp.nan]))
    with pytest.raises(ValueError, match="state is for 8 devices, but axis 'm' has 4"):
        converge(8)
    after, *_ = converge(4)
    np.testing.assert_array_equal(after["count"], [many] * 4)
    np.testing.assert_array_equal(after["w"], [1.0] * 4)
