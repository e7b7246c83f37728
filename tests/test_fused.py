"""Fused optimizers are those of optax, for one member, for many, and inside a population."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import population_steps as steps
import pytest
from jax import lax

import hyperjax as hj
from hyperjax import _fused, _tree
from hyperjax._fused import fused_adam, fused_adamw, fused_sgd

MEMBERS = 3
RATES = {
    "lr": jnp.array([0.1, 0.01, 0.03], jnp.float32),
    "b1": jnp.array([0.9, 0.8, 0.5], jnp.float32),
    "b2": jnp.array([0.999, 0.99, 0.9], jnp.float32),
    "decay": jnp.array([0.0, 0.1, 0.01], jnp.float32),
}
# Ours, and what it is to equal, as functions of a member's numbers.
PAIRS: dict[str, Any] = {
    "sgd": (
        lambda h, **kw: fused_sgd(h["lr"], **kw),
        lambda h: optax.sgd(h["lr"]),
    ),
    "momentum": (
        lambda h, **kw: fused_sgd(h["lr"], h["b1"], h["decay"], **kw),
        lambda h: optax.chain(
            optax.trace(h["b1"]), optax.add_decayed_weights(h["decay"]), optax.scale(-h["lr"])
        ),
    ),
    "adam": (
        lambda h, **kw: fused_adam(h["lr"], h["b1"], h["b2"], eps_root=1e-6, **kw),
        lambda h: optax.adam(h["lr"], h["b1"], h["b2"], eps_root=1e-6),
    ),
    "plain": (lambda h, **kw: fused_adam(h["lr"], **kw), lambda h: optax.adam(h["lr"])),
    "adamw": (
        lambda h, **kw: fused_adamw(h["lr"], h["b1"], h["b2"], weight_decay=h["decay"], **kw),
        lambda h: optax.adamw(h["lr"], h["b1"], h["b2"], weight_decay=h["decay"]),
    ),
    "clip": (
        lambda h, **kw: fused_adamw(h["lr"], max_norm=0.1 * h["b1"], **kw),
        lambda h: optax.chain(optax.clip_by_global_norm(0.1 * h["b1"]), optax.adamw(h["lr"])),
    ),
}


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def weights(key, dtype=jnp.float32, members=()):
    a, b = jax.random.split(key)
    return {
        "w": jax.random.normal(a, (*members, 4, 3), dtype),
        "b": jax.random.normal(b, (*members, 3), dtype),
    }


def loss(params, hparams, batch):
    del hparams
    return jnp.mean(jnp.square(jnp.tanh(batch @ params["w"] + params["b"][None]) - 0.5))


def train(optimizer, dtype, count=6):
    """Trained params of one member, as a function of its numbers."""
    training = hj.inner(loss, optimizer)
    batches = jax.random.normal(jax.random.key(1), (count, 5, 4), dtype)

    def trained(hparams):
        state = training.init(weights(jax.random.key(0), dtype), hparams)
        step = lambda state, batch: (training.step(state, hparams, batch), None)
        return lax.scan(step, state, batches)[0]

    return trained


# Double precision leaves no room for another formula: a few roundings per step and entry.
@pytest.mark.parametrize("name", PAIRS)
def test_training_is_that_of_optax(name):
    ours, theirs = PAIRS[name]
    rates = cast(RATES, jnp.float64)
    found, expected = (
        jax.jit(jax.vmap(train(f, jnp.float64)))(rates).params for f in (ours, theirs)
    )
    assert steps.ulps(found, expected) < 1000


def exact(name, rates, params, grads, moments, count):
    """The update in float64 of numbers in float32, and the terms of the bound, of one member."""
    wide = lambda x: np.asarray(x, np.float64)
    lr, b1, b2 = rates["lr"], rates["b1"], rates["b2"]
    # Rounded as everybody rounds them.
    rest = [wide(1 - b) for b in (b1, b2)]
    scale = [wide(1 - b**count) for b in (b1, b2)]
    lr, b1, b2, decay = (wide(x) for x in (lr, b1, b2, rates["decay"] if name == "adamw" else 0.0))
    p, g, mu, nu = (wide(x) for x in (params, grads, *moments))
    first = (rest[0] * g + b1 * mu) / scale[0]
    root = np.sqrt((rest[1] * g * g + b2 * nu) / scale[1] + (1e-6 if name == "adam" else 0))
    size = (np.abs(rest[0] * g) + np.abs(b1 * mu)) / scale[0] / (root + 1e-8)
    update = -lr * (first / (root + 1e-8) + decay * p)
    return update, lr * (11 * size + 3 * decay * np.abs(p))


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_on_the_difference_from_optax(name, seed):
    """Both are within it of exact arithmetic, so within twice of one another.

    Every operation is rounded once, to within u: 3 for a moment, of which the second counts half
    under the root, 2 of a quotient and the root, one each for eps_root, eps, the division, the
    decay, the sum and the rate. First order in u; the second is a part of 1e-6 of it.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    make = lambda key, scale: scale * jax.random.normal(key, (MEMBERS, 2000))
    params, grads, mu = (
        cast(make(k, s), jnp.float32) for k, s in zip(keys[:3], (1, 1, 0.3), strict=True)
    )
    nu = cast(jnp.square(make(keys[3], 0.5)) + 0.01, jnp.float32)
    count = jnp.asarray(200_000, jnp.int32)
    ours, theirs = PAIRS[name]
    results = {}
    for implementation in ("xla", "interpret"):
        optimizer = partial(ours, implementation=implementation)

        def update(h, mu, nu, g, p, optimizer=optimizer):
            return optimizer(h).update(g, _fused.FusedState(count, (mu, nu), None), p)[0]

        results[implementation] = jax.jit(jax.vmap(update))(RATES, mu, nu, grads, params)

    def optax_update(h, mu, nu, g, p):
        state = theirs(h).init(p)
        adam = optax.ScaleByAdamState(count, mu, nu)
        return theirs(h).update(g, (adam, *state[1:]), p)[0]

    results["optax"] = jax.jit(jax.vmap(optax_update))(RATES, mu, nu, grads, params)
    unit = np.finfo(np.float32).eps / 2
    for member in range(MEMBERS):
        h, p, g, moments = _tree.take((RATES, params, grads, (mu, nu)), jnp.asarray(member))
        expected, bound = exact(name, h, p, g, moments, count + 1)
        for who, found in results.items():
            error = np.abs(np.asarray(found[member], np.float64) - expected) / (unit * bound)
            assert error.max() < 1 + 1e-5, who
            # And the bound is of the size of what happens.
            assert error.max() > 0.05, who


def test_plain_numbers_are_taken_as_optax_takes_them():
    """1 - 0.999 in double precision, which differs in the fifth digit from float32."""
    params, grads = weights(jax.random.key(0)), weights(jax.random.key(1))
    found, _ = fused_adam(0.1).update(grads, fused_adam(0.1).init(params), params)
    expected, _ = optax.adam(0.1).update(grads, optax.adam(0.1).init(params), params)
    assert steps.ulps(found, expected) <= 2


@pytest.mark.parametrize("name", ["momentum", "clip"])
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_members_in_a_population_are_those_trained_alone(name, implementation):
    optimizer = partial(PAIRS[name][0], implementation=implementation)
    trained = train(optimizer, jnp.float32)
    together = jax.jit(jax.vmap(trained))(RATES).params
    for member in range(MEMBERS):
        mine = partial(_tree.take, index=jnp.asarray(member))
        assert steps.ulps(mine(together), jax.jit(trained)(mine(RATES)).params) < 50


def test_a_leaf_is_one_kernel_for_all_members():
    optimizer = partial(PAIRS["clip"][0], implementation="interpret")
    programs = steps.programs(jax.vmap(train(optimizer, jnp.float32)), RATES)
    assert programs == [f"population_step (1, {MEMBERS})"] * 2  # w and b, inside the scan


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_stacked_trees(implementation):
    """Leaves [R, ...] with numbers [R], without vmap."""
    keys = jax.random.split(jax.random.key(2), 2)
    params, grads = (weights(k, members=(MEMBERS,)) for k in keys)
    optimizer = lambda h: PAIRS["clip"][0](h, implementation=implementation)
    state = optimizer(RATES).init(params)
    found, after = jax.jit(lambda h, s: optimizer(h).update(grads, s, params))(RATES, state)
    assert after.steps.shape == ()

    def one(h, g, p):
        return optimizer(h).update(g, optimizer(h).init(p), p)

    expected, each = jax.jit(jax.vmap(one))(RATES, grads, params)
    assert steps.ulps(found, expected) <= 4
    assert steps.ulps(after.moments, each.moments) <= 4


@pytest.mark.parametrize("name", PAIRS)
def test_apply_is_update_and_sum(name):
    params, grads = weights(jax.random.key(0)), weights(jax.random.key(1))
    optimizer = PAIRS[name][0](jax.tree.map(lambda x: x[1], RATES))
    state = optimizer.init(params)
    new, after = jax.jit(optimizer.apply)(grads, state, params)
    updates, expected = jax.jit(optimizer.update)(grads, state, params)
    assert steps.ulps(new, optax.apply_updates(params, updates)) <= 1
    assert steps.ulps(after, expected) <= 1
    jax.tree.map(lambda x, y: x.dtype == y.dtype or pytest.fail("types"), state, after)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_hypergradient(implementation):
    """Through training by members of a population, as through optax."""
    ours, theirs = PAIRS["adam"]
    rates = {k: v.astype(jnp.float64) for k, v in RATES.items()}
    size = lambda f: (
        lambda h: sum(
            jnp.square(x).sum() for x in jax.tree.leaves(train(f, jnp.float64, 3)(h).params)
        )
    )
    slopes = lambda f: jax.jit(jax.vmap(jax.grad(size(f))))(rates)
    found, expected = slopes(partial(ours, implementation=implementation)), slopes(theirs)
    for name in ("lr", "b1", "b2"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9)


def test_schedules_and_chains():
    schedule = lambda count: 0.1 / (1.0 + count)
    params, grads = weights(jax.random.key(0)), weights(jax.random.key(1))
    ours = optax.chain(optax.scale(2.0), fused_adam(schedule))
    theirs = optax.chain(optax.scale(2.0), optax.adam(schedule))
    states = ours.init(params), theirs.init(params)
    for _ in range(3):
        found, first = ours.update(grads, states[0], params)
        expected, second = theirs.update(grads, states[1], params)
        states = first, second
        assert steps.ulps(found, expected) <= 4


@pytest.mark.parametrize("rounding", ["nearest", "master", "stochastic"])
def test_bfloat16(rounding):
    """Params keep their type, moments and master are in float32, and updates add up exactly."""
    params, grads = (weights(jax.random.key(k), jnp.bfloat16) for k in (0, 1))
    key = jax.random.key(5) if rounding == "stochastic" else None
    optimizer: Any = fused_adamw(0.01, rounding=rounding, key=key)
    state = optimizer.init(params)
    assert {x.dtype for x in jax.tree.leaves(state.moments)} == {jnp.dtype("float32")}
    updates, after = optimizer.update(grads, state, params)
    added = optax.apply_updates(params, updates)
    new, _ = optimizer.apply(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, added, new)
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
    if rounding == "master":
        jax.tree.map(np.testing.assert_array_equal, cast(after.master, jnp.bfloat16), new)
        assert steps.ulps(after.master, cast(new, jnp.float32)) > 100  # and it holds more
    if rounding == "stochastic":
        again, _ = optimizer.apply(grads, after, params)
        assert any(jnp.any(x != y) for x, y in zip(new.values(), again.values(), strict=True))


def test_training_makes_no_updates():
    """`inner` takes new params in one pass, and never asks for what is to be added."""
    whole = fused_adam(0.1)
    refuse = lambda *args: pytest.fail("updates were asked for")
    parts = hj.FusedTransformation(whole.init, refuse, whole.apply)
    outcomes = [hj.inner(loss, lambda h, o=o: o) for o in (whole, parts)]
    batch = jnp.ones((5, 4))
    one, other = (
        t.step(t.init(weights(jax.random.key(0)), None), None, batch).params for t in outcomes
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_keys_of_members():
    params, grads = (weights(jax.random.key(k), jnp.bfloat16, (MEMBERS,)) for k in (0, 1))
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[0], x.shape), (params, grads))
    keys = jax.random.split(jax.random.key(5), MEMBERS)
    for key, alike in ((keys[0], True), (keys, False)):
        rate = jnp.full(MEMBERS, 0.01, jnp.float32)
        optimizer = fused_sgd(rate, rounding="stochastic", key=key)
        new, _ = optimizer.apply(same[1], optimizer.init(same[0]), same[0])
        assert (bool(jnp.all(new["w"][0] == new["w"][1]))) is alike


def test_inside_a_population():
    """Truncation selection over members that train with rates of their own."""
    space = hj.space({"lr": hj.loguniform(1e-3, 1.0)})
    optimizer = lambda raw: fused_sgd(space.constrain(raw)["lr"], 0.9, implementation="interpret")
    training = hj.inner(space.lift(loss), optimizer)
    tuner = hj.tune(
        hj.score_only(hj.unroll(training.step), space.lift(loss), training.init),
        optax.set_to_zero(),
    )
    pop = hj.population(tuner, hj.exchange.truncation(0.25, hj.exchange.perturb(0.3)))
    params = weights(jax.random.key(0), members=(4,))
    rates = {"lr": jnp.linspace(-2.0, 2.0, 4, dtype=jnp.float32)}
    state = pop.init(jax.random.key(2), params, rates)
    batch = jax.random.normal(jax.random.key(3), (2, 5, 4), jnp.float32)
    splits = hj.Split(batch[None].repeat(2, 0), batch)
    after, metrics = hj.run(pop, state, splits)
    del metrics
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


def test_refusals():
    params, grads = weights(jax.random.key(0)), weights(jax.random.key(1))
    with pytest.raises(ValueError, match="fused_adam: `rounding` must be one of 'nearest', 'mas"):
        fused_adam(0.1, rounding="up")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="fused_sgd: `key` must be given for stochastic"):
        fused_sgd(0.1, rounding="stochastic")
    with pytest.raises(ValueError, match="fused_sgd: `key` must be given for stochastic"):
        fused_sgd(0.1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="fused_sgd: `key` is uint32, expected one of"):
        fused_sgd(0.1, rounding="stochastic", key=jax.random.PRNGKey(0))
    many = fused_sgd(jnp.ones(3))
    with pytest.raises(ValueError, match=r"for 3 members, and a gradient has shape \(4, 3\), exp"):
        many.update(grads, many.init(params))
    optimizer = fused_adamw(0.1)
    with pytest.raises(ValueError, match="fused_adamw: `params` must be given to update"):
        optimizer.update(grads, optimizer.init(params))
    optimizer = fused_adam(jnp.ones(3), jnp.ones(2))
    with pytest.raises(ValueError, match="fused_adam: numbers must be scalars, or one per member"):
        optimizer.update(grads, optimizer.init(params), params)
