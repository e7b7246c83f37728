"""PBT's exploration: draws, factors and bounds; and its toy problem with four known means."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import jit
from scipy import stats

import hyperjax as hj

SPACE = hj.space(
    {
        "rate": hj.loguniform(1e-4, 1.0),
        "width": hj.integers(2, 40),
        "momentum": hj.uniform(0.0, 0.99, shape=(2,)),
        "scale": hj.positive(),
        "shift": hj.real(),
        "kind": hj.choice(3),
    }
)
VALUES = {
    "rate": jnp.asarray(0.01),
    "width": jnp.asarray(20.0),
    "momentum": jnp.asarray([0.5, 0.7]),
    "scale": jnp.asarray(2.0),
    "shift": jnp.asarray(-3.0),
    "kind": jnp.asarray([0.0, 1.0, 0.0]),
}


def explored(count: int, values=VALUES, **options):
    """Constrained values after `count` explorations of the same setting."""
    explore = hj.exchange.resample(SPACE, **options)
    raw = SPACE.unconstrain(values)
    keys = jax.random.split(jax.random.key(0), count)
    raws = jit(jax.vmap(explore, (0, None)))(keys, raw)
    return jax.tree.map(np.asarray, SPACE.constrain(raws))


def test_values_are_multiplied_by_either_factor():
    after = explored(400, probability=0.0)
    np.testing.assert_array_equal(after.pop("kind"), np.tile(VALUES["kind"], (400, 1)))
    for name, values in after.items():
        ratio = values / np.asarray(VALUES[name])
        near = np.where(ratio < 1, 0.8, 1.2)
        np.testing.assert_allclose(ratio, near, rtol=1e-9)  # through exp, log and their inverses
        # 200 +- 10 of 400 are the larger, and five deviations are allowed
        assert np.all(np.abs((near > 1).sum(0) - 200) < 50)
    ratios = after["momentum"] / np.asarray(VALUES["momentum"]) > 1
    assert abs((ratios[:, 0] == ratios[:, 1]).sum() - 200) < 50  # each scalar for itself


def test_a_quarter_is_drawn_anew_from_the_range():
    after = explored(2000)
    for name in ("rate", "momentum", "scale", "shift"):
        ratio = after[name] / np.asarray(VALUES[name])
        drawn = ~(np.isclose(ratio, 0.8) | np.isclose(ratio, 1.2))
        # 500 +- 19 of 2000
        assert np.all(np.abs(drawn.sum(0) - 500) < 97)
    drawn = after["rate"][~np.isin(np.round(after["rate"], 9), (0.008, 0.012))]
    uniform = np.log(drawn / 1e-4) / np.log(1e4)
    assert stats.kstest(uniform, "uniform").pvalue > 1e-4
    # a choice stays, or is drawn anew as a whole: (1 + 2 * 3) / 12 and 1 / 12 twice
    counts = after["kind"].sum(0)
    assert np.all(np.abs(counts - 2000 * np.asarray([1 / 12, 10 / 12, 1 / 12])) < 5 * 17)


def test_values_stop_at_their_bounds():
    edges = {
        "rate": jnp.asarray(0.9),
        "width": jnp.asarray(40.0),
        "momentum": jnp.asarray([0.98, 0.5]),
        "scale": jnp.asarray(1.0),
        "shift": jnp.asarray(1.0),
        "kind": jnp.asarray([1.0, 0.0, 0.0]),
    }
    after = explored(50, edges, probability=0.0, factors=(1.2, 100.0))
    # raw values stay 13.8 from 0, a millionth of the range or of its logarithm
    np.testing.assert_allclose(after["rate"], 1.0, rtol=1.1e-6 * np.log(1e4))
    np.testing.assert_array_equal(after["width"], 40.0)
    np.testing.assert_allclose(after["momentum"][:, 0], 0.99, rtol=1.1e-6)
    assert after["scale"].max() == pytest.approx(100) and after["shift"].max() == pytest.approx(100)
    explore = hj.exchange.resample(SPACE, probability=0.0, factors=(1e-9, 1e-9))
    again = explore(jax.random.key(0), SPACE.unconstrain(edges))
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(again))
    low = SPACE.constrain(again)
    np.testing.assert_allclose(low["rate"], 1e-4, rtol=1.1e-6 * np.log(1e4))
    assert low["width"] == 2.0


def test_types_stay_in_a_population_of_single_precision():
    explore = hj.exchange.resample(SPACE)
    raw = jax.tree.map(lambda x: x.astype(jnp.float32), SPACE.unconstrain(VALUES))
    after = jit(explore)(jax.random.key(0), raw)
    kind = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert kind(after) == kind(raw)
    assert jax.tree.structure(after) == jax.tree.structure(raw)
    assert not any(x.weak_type for x in jax.tree.leaves(after))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 1.5}, r"`probability` must be in \[0, 1\]; got 1.5"),
        ({"factors": (0.0, 1.2)}, r"`factors` must be two positive numbers; got \(0.0, 1.2\)"),
        ({"factors": (0.8,)}, r"`factors` must be two positive numbers; got \(0.8,\)"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        hj.exchange.resample(SPACE, **options)


def test_hparams_must_be_those_of_the_space():
    with pytest.raises(ValueError, match="resample: hyperparameters must have the structure"):
        hj.exchange.resample(SPACE)(jax.random.key(0), {"rate": jnp.zeros(())})


# ------------------------------------------------------- the toy of the paper's first figure

RATE, ROUNDS, READY = 0.02, 50, 4
SLOW = 0.9 * (1 - 2 * RATE) ** (ROUNDS * READY / 2)  # a coordinate descended half of the time
FAST = 0.9 * (1 - 2 * RATE) ** (ROUNDS * READY)  # and all of the time


def wander(key, h):
    return jnp.clip(h + 0.1 * jax.random.normal(key, h.shape), 0.0, 1.0)


def own_hparams(rule, explore):
    """`rule`, after which every member explores from the hyperparameters it had before."""

    def apply(key, state, members, score):
        exchange, rest = jax.random.split(key)
        after, state, events = rule.apply(exchange, state, members, score)
        keys = jax.random.split(rest, score.shape[0])
        return after._replace(hparams=jax.vmap(explore)(keys, members.hparams)), state, events

    return rule._replace(apply=apply)


STAY = lambda key, h: h
TOY = {  # exchange, the mean of the best reward, tolerance
    "neither": (hj.exchange.isolation(), 1.2 - 0.9**2 - FAST**2, 1e-12),
    "explore only": (own_hparams(hj.exchange.isolation(), wander), 1.177, 0.03),
    # Members take turns: the larger coordinate is descended by its member, which the other copies.
    "exploit only": (
        own_hparams(hj.exchange.truncation(0.5, STAY), STAY),
        1.2 - 2 * SLOW**2,
        1e-12,
    ),
    # With the weights they copy the hyperparameters, and both descend the same coordinate for good.
    "exploit, hyperparameters too": (hj.exchange.truncation(0.5, STAY), 0.39, 1e-3),
    "both": (hj.exchange.truncation(0.5, wander), 1.2, 1e-3),
}


@pytest.mark.parametrize("name", TOY)
def test_toy(name):
    # Q = 1.2 - |t|^2 is wanted; two workers descend one coordinate of t each.
    rule, expected, tolerance = TOY[name]
    training = hj.inner(lambda t, h, batch: jnp.sum(h * t**2), lambda h: optax.sgd(RATE))
    score = lambda t, h, batch: jnp.sum(t**2) - 1.2
    tuner = hj.score_only(hj.unroll(training.step), score, training.init)
    pop = hj.population(hj.tune(tuner, optax.set_to_zero()), rule)
    splits = hj.Split(jnp.zeros((ROUNDS, READY)), jnp.zeros(ROUNDS))

    def run(key):
        state = pop.init(key, jnp.full((2, 2), 0.9), jnp.eye(2))
        return -hj.run(pop, state, splits)[1].value[-1]

    rewards = jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 20))
    assert abs(rewards.mean() - expected) < tolerance
