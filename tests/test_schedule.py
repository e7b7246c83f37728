"""Recorded hyperparameters as schedules: the values that were in force, step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import jit

import hyperjax as hj

OUTER, INNER = 5, 3
SPACE = hj.space({"lr": hj.loguniform(1e-3, 1.0), "momentum": hj.uniform(0.0, 0.99)})


def loss(params, hparams, batch):
    del hparams
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)


@functools.cache
def problem():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    params = {"a": draw(4, 6), "b": draw(6)}
    raw = {"lr": draw(OUTER), "momentum": draw(OUTER)}
    return params, raw, (draw(OUTER, INNER, 10, 4), draw(OUTER, INNER, 10))


def plain(optimizer, params, batches):
    """Training as anybody writes it, without hyperjax."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(loss)(params, None, batch)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), flat)[0][0]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_plain_training_by_a_schedule_is_replay_bit_for_bit(name):
    # The same products of the same numbers in the same order: nothing is left to round. The rates
    # are made beforehand, as a bijector rounds one number and a vector of them differently.
    params, raw, batches = problem()
    make = getattr(optax, name)
    found = SPACE.constrain(raw)
    training = hj.inner(loss, lambda h: make(h["lr"]))
    replayed = jit(lambda h: hj.replay(training, params, h, batches))(found)
    train = jit(lambda h: plain(make(hj.schedule(h, INNER)), params, batches))
    trained, moved = train(found["lr"]), train(jnp.roll(found["lr"], 1))
    for a, b in zip(jax.tree.leaves(replayed), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(np.asarray(moved["a"]) != np.asarray(trained["a"]))


def test_constant_and_linear_values():
    values = jnp.asarray([3.0, 1.0, 2.0])
    counts = jnp.arange(15)
    constant = jax.vmap(hj.schedule(values, 4))(counts)
    np.testing.assert_array_equal(constant, np.repeat([3.0, 1.0, 2.0], 4).tolist() + [2.0] * 3)
    linear = jax.vmap(hj.schedule(values, 4, interpolation="linear"))(counts)
    # Quarters are exact, and so is numpy's interpolation of them.
    np.testing.assert_array_equal(linear, np.interp(np.arange(15) / 4, [0, 1, 2], values))


def test_between_whole_numbers_are_others():
    at = hj.schedule(jnp.asarray([0, 4]), 4, interpolation="linear")
    assert [float(at(i)) for i in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_trees_traced_lengths_and_derivatives():
    values = {"lr": jnp.asarray([1.0, 2.0]), "w": jnp.ones((2, 3), jnp.float32)}
    at = lambda v, every, count: hj.schedule(v, every)(count)
    row = jax.jit(at)(values, jnp.asarray(2), jnp.asarray(3))
    assert row["lr"] == 2.0 and row["w"].shape == (3,) and row["w"].dtype == jnp.float32
    many = jax.vmap(at, (None, 0, None))(values, jnp.asarray([1, 2, 4]), jnp.asarray(2))
    np.testing.assert_array_equal(many["lr"], [2.0, 2.0, 1.0])
    slope = lambda kind, count: jax.grad(
        lambda v: hj.schedule(v, 4, interpolation=kind)(jnp.asarray(count))
    )(jnp.asarray([1.0, 2.0]))
    np.testing.assert_array_equal(slope("constant", 3), [1.0, 0.0])
    np.testing.assert_array_equal(slope("linear", 3), [0.25, 0.75])


@pytest.mark.parametrize("kind", ["constant", "linear"])
def test_float32_stays(kind):
    at = hj.schedule(jnp.ones(2, jnp.float32), 2, interpolation=kind)
    assert at(jnp.asarray(1)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones(()),), "needs the same leading axis"),
        ((jnp.ones(3), 0), "`every` must be a finite number, positive; got 0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        hj.schedule(*arguments)
    with pytest.raises(ValueError, match="`interpolation` must be one of"):
        hj.schedule(jnp.ones(3), interpolation="cubic")  # pyright: ignore[reportArgumentType]
