"""Buckets: members of different shapes, in populations of equal ones, and back in order."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import jit

import hyperjax as hj

WIDTHS = [3, 5, 3, 4, 5, 3]


def member(width: int, seed: int):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=width))}, {"lr": jnp.asarray(0.1 + 0.1 * seed)}


def training() -> hj.Tuner:
    loss = lambda params, hparams, batch: jnp.sum((params["w"] - batch) ** 2)
    steps = hj.inner(loss, lambda h: optax.sgd(h["lr"]))
    estimator = hj.score_only(hj.unroll(steps.step), loss, steps.init)
    return hj.tune(estimator, optax.set_to_zero())


def test_members_are_stacked_with_their_like():
    members = [member(width, i) for i, width in enumerate(WIDTHS)]
    parts = hj.buckets(members)
    assert [part.order for part in parts] == [(0, 2, 5), (1, 4), (3,)]
    for part in parts:
        for row, i in enumerate(part.order):
            np.testing.assert_array_equal(part.params["w"][row], members[i][0]["w"])
            np.testing.assert_array_equal(part.hparams["lr"][row], members[i][1]["lr"])
    back = hj.unbucket(parts, [(part.params, part.hparams) for part in parts])
    for one, two in zip(members, back, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, two)


def test_types_and_structures_tell_buckets_apart():
    a = ({"w": jnp.zeros(3)}, {"lr": jnp.zeros(())})
    b = ({"w": jnp.zeros(3, jnp.float32)}, {"lr": jnp.zeros(())})
    c = ({"v": jnp.zeros(3)}, {"lr": jnp.zeros(())})
    d = ({"w": jnp.zeros(3)}, {"lr": jnp.zeros(2)})
    assert [part.order for part in hj.buckets([a, b, c, d, a])] == [(0, 4), (1,), (2,), (3,)]


def test_populations_of_buckets_are_single_runs():
    members = [member(width, i) for i, width in enumerate(WIDTHS)]
    pop = hj.population(training(), hj.exchange.isolation())
    parts = hj.buckets(members)
    data = hj.Split(jnp.arange(6.0).reshape(3, 2), jnp.ones(3))  # 3 outer steps of 2
    keys = jax.random.split(jax.random.key(0), len(parts))
    go = jit(lambda key, params, hparams: hj.run(pop, pop.init(key, params, hparams), data))
    done = [go(key, part.params, part.hparams) for key, part in zip(keys, parts, strict=True)]
    final = hj.unbucket(parts, [state.members.carry.params for state, _ in done])
    scores = hj.unbucket(parts, [metrics.members.value.T for _, metrics in done])
    for (params, hparams), w, values in zip(members, final, scores, strict=True):
        expected, losses = params["w"], []
        for pair in np.arange(6.0).reshape(3, 2):
            for target in pair:
                expected = expected - hparams["lr"] * 2 * (expected - target)
            losses.append(jnp.sum((expected - 1) ** 2))
        # A dozen operations in float64 on either side.
        np.testing.assert_allclose(w["w"], expected, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(values, losses, rtol=1e-12)


def test_results_must_fit_their_buckets():
    with pytest.raises(ValueError, match="`members` is empty"):
        hj.buckets([])
    parts = hj.buckets([member(3, 0), member(3, 1), member(4, 2)])
    with pytest.raises(ValueError, match="one entry per bucket, 2; got 1"):
        hj.unbucket(parts, [jnp.zeros(2)])
    with pytest.raises(ValueError, match=r"bucket, 2 members; got the root: float64\[3\]"):
        hj.unbucket(parts, [jnp.zeros(3), jnp.zeros(1)])
