"""Evolution under vmap, scan, shard_map and in populations; types, keys and carries.

On a small problem, as every program is compiled anew: descent to a target that is pulled to zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import PartitionSpec
from problems import error, jit

import hyperjax as hj

KEY = jax.random.key(0)
CHOICES = (0.1, 0.2, 0.3)
PARAMS = jnp.asarray([1.0, -2.0])
RATES = {"lr": jnp.asarray(0.2), "l2": jnp.asarray([0.1, 0.3])}
SPLIT = hj.Split(jnp.asarray([[0.5, 1.0], [0.3, 1.2]]), jnp.asarray([0.4, 1.0]))


class Chain(NamedTuple):
    params: jax.Array


def descend(state: Chain, h, batch) -> Chain:
    w = state.params
    return Chain(w - h["lr"] * (jnp.tanh(w - batch) + h["l2"] * w))


def small(name: str, kind=jnp.float64, **options) -> tuple[hj.Estimator, Any]:
    """An estimator of the module, and its hparams."""
    train = hj.unroll(descend)
    score = lambda w, h, batch: jnp.sum((w - batch) ** 2)
    rates = jax.tree.map(lambda x: x.astype(kind), RATES)
    if name == "score_function":
        chosen = lambda x: rates | {"lr": jnp.asarray(CHOICES, kind)[x]}
        respond = lambda x, carry, batches: train(chosen(x), carry, batches)
        options = {"key": KEY, "samples": 4} | options
        make, choice = hj.evolution.score_function, hj.evolution.categorical()
        return make(respond, score, lambda w, x: Chain(w), choice, **options), jnp.zeros(3, kind)
    extra = {
        "antithetic": {"sigma": 0.01},
        "spsa": {"radius": 0.01},
        "persistent": {"sigma": 0.01, "horizon": 2},
        "noise_reuse": {"sigma": 0.01, "horizon": 2},
    }[name]
    make = getattr(hj.evolution, name)
    options = {"key": KEY, "pairs": 2} | extra | options
    return make(train, score, lambda w, h: Chain(w), **options), rates


NAMES = ("antithetic", "spsa", "persistent", "noise_reuse", "score_function")
every = pytest.mark.parametrize("name", NAMES)
pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)


def members(hparams, count: int):
    """The same params, and hparams that differ."""
    apart = lambda x, s: jnp.stack([x + x.dtype.type(s * i) for i in range(count)])
    return apart(PARAMS, 0), jax.tree.map(lambda x: apart(x, 0.01), hparams)


def close(got, expected, tolerance: float) -> None:
    """Equal up to rounding; keys and integers exactly."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
        else:
            np.testing.assert_array_equal(x, y)


@every
def test_members_of_a_population_are_single_runs(name):
    e, hparams = small(name)
    tuner = hj.tune(e, optax.sgd(0.01, momentum=0.5))
    start, splits = members(hparams, 16), problems.repeat(SPLIT, 3)
    single = jit(lambda params, h: hj.run(tuner, tuner.init(params, h), splits)[0])
    # The step runs in shard_map, where each device has two members, vmapped.
    many = hj.population(tuner, hj.exchange.isolation(), chunk=2, mesh=problems.mesh("member"))
    state = jit(lambda start: many.init(jax.random.key(3), *start))(start)
    state, _ = jit(lambda s: hj.run(many, s, splits))(state)
    # vmapped sums run in another order: 1e-16, by differences over 2 sigma = 0.02.
    close(
        [pick(state.members, i) for i in (0, 5)], [single(*pick(start, i)) for i in (0, 5)], 1e-12
    )


@pytest.mark.parametrize("name", ["persistent", "score_function"])
def test_inside_shard_map_from_init_on(name):
    e, hparams = small(name)
    start = members(hparams, 8)
    tuner = hj.tune(e, optax.sgd(0.01))

    def one(params, h):
        state = tuner.init(*pick((params, h), 0))
        state, metrics = hj.run(tuner, state, problems.repeat(SPLIT, 2))
        return jax.tree.map(lambda x: x[None], (state.hparams, metrics.value, metrics.info))

    along, mesh = PartitionSpec("member"), problems.mesh("member")
    got = jit(jax.shard_map(one, mesh=mesh, in_specs=along, out_specs=along))(*start)
    last = jax.tree.map(lambda x: x[7:], start)
    close(jax.tree.map(lambda x: x[7:], got), jit(one)(*last), 1e-12)


@every
@pytest.mark.parametrize("kind", [jnp.float32, jnp.float64])
def test_types_stay(name, kind):
    cast = lambda tree: jax.tree.map(lambda x: x.astype(kind), tree)
    e, hparams = small(name, kind)
    weak = jax.tree.map(lambda x: jax.lax.full_like(x, 0.1) * 1.0, hparams)
    describe = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    state = jax.eval_shape(e.init, cast(PARAMS), weak)
    result, after = jax.eval_shape(e.estimate, hparams, state, cast(SPLIT))
    assert describe(after) == describe(state)
    assert describe(result.grad) == describe(hparams)
    assert describe(result.info.standard_error) == describe(hparams)
    floats = [x for x in jax.tree.leaves((result, after)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype(kind)}


@every
def test_members_draw_apart_and_chunks_do_not_matter(name):
    e, hparams = small(name)
    start = members(hparams, 2)
    init = jit(e.init)
    keys = [jax.random.key_data(init(*pick(start, i)).key) for i in (0, 1)]
    assert np.any(keys[0] != keys[1])
    shuffled = init(PARAMS[::-1], pick(start, 0)[1]).key
    assert np.any(jax.random.key_data(shuffled) != keys[0])
    state = init(PARAMS, hparams)
    step = lambda e: jit(lambda s: e.estimate(hparams, s, SPLIT))(state)
    result, after = step(e)
    close(step(small(name, chunk=2)[0]), (result, after), 1e-12)
    # The next estimate draws anew.
    assert np.any(jax.random.key_data(after.key) != jax.random.key_data(state.key))


@pytest.mark.parametrize("name", ["antithetic", "score_function"])
def test_the_carry_goes_on_and_restart_does_not(name):
    e, hparams = small(name)
    state = e.init(PARAMS, hparams)
    cold = hj.restart(e)
    after = jit(e.estimate)(hparams, state, SPLIT)[1]
    again, trained = jit(cold.estimate)(hparams, cold.init(PARAMS, hparams), SPLIT)[1]
    if name == "antithetic":  # of score_function it is that of a sample
        close(after.carry.params, hj.unroll(descend)(hparams, state.carry, SPLIT.train)[0], 1e-14)
    assert error(after.carry.params, PARAMS) > 1e-2
    close(again.carry, state.carry, 0)
    # It does not draw the same noise every time.
    fresh = [jax.random.key_data(s.key) for s in (again, after, state)]
    assert np.array_equal(fresh[0], fresh[1]) and np.any(fresh[0] != fresh[2])
    close(trained, after, 0)
