"""One of 16 members becomes NaN at a random step: what each exchange rule promises the other 15.

Every rule of `hyperjax.exchange` must be here: a new one declares in RULES what it does about a
diverged member, and the tests hold it to that.
"""

import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import jit

import hyperjax as hj

SIZE, STEPS, INNER, EVERY = 16, 8, 2, 5
SPACE = hj.space({"lr": hj.loguniform(1e-3, 1.0)})
explore = hj.exchange.perturb(0.3)

# What happens to the diverged member; nobody else notices until the rule's next exchange.
STAYS = "stays"  # never touched: the others are bit for bit what they would have been, forever
RESEEDED = "reseeded"  # at once, from another: the others as above; from the next exchange on it
# competes again, so that who copies whom may differ, but who keeps its place keeps its bits
AVERAGED = "averaged"  # the others converge at the next exchange, to their mean without it

RULES = {
    "isolation": (STAYS, lambda every: hj.exchange.isolation()),
    "truncation": (RESEEDED, lambda every: hj.exchange.truncation(0.25, explore, every=every)),
    "tournament": (RESEEDED, lambda every: hj.exchange.tournament(explore, every=every)),
    "pb2": (RESEEDED, lambda every: hj.exchange.pb2(SPACE, every=every, window=32)),
    "hdet": (AVERAGED, lambda every: hj.exchange.hdet(SPACE, width=0.3, every=every)),
}
NEVER = 1000  # longer than any run here


def test_every_rule_declares_its_promise():
    found = set()
    for name, thing in vars(hj.exchange).items():
        if inspect.isfunction(thing) and typing.get_type_hints(thing).get("return") is hj.Exchange:
            found.add(name)
    assert found == set(RULES)


def loss(params, hparams, batch):
    """A regression, or NaN with all its derivatives."""
    del hparams
    x, y, hit = batch
    value = jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)
    return value * jnp.where(hit, jnp.nan, 1.0)


@functools.cache
def program(name: str, every: int):
    """(when, bad, seed) -> members and events after each of STEPS outer steps, compiled once."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    data = draw(STEPS, INNER, 8, 3), draw(STEPS, INNER, 8)
    params = {"a": draw(SIZE, 3, 4), "b": draw(SIZE, 4)}
    score = lambda p, h, batch: jnp.mean((jnp.tanh(batch[0] @ p["a"]) @ p["b"] - batch[1]) ** 2)
    training = hj.inner(SPACE.lift(loss), lambda raw: optax.adam(SPACE.constrain(raw)["lr"]))
    estimator = hj.score_only(hj.unroll(training.step), score, training.init)
    member = hj.tune(estimator, optax.set_to_zero())
    tuner = hj.population(member, RULES[name][1](every), batches="own")
    hparams = {"lr": jnp.linspace(-1.0, 1.0, SIZE)}

    @jit
    def go(when, bad, key):
        # The same data for all; the fault is that of a slot, whoever is in it.
        everybody = lambda x: jnp.broadcast_to(x[:, None], (STEPS, SIZE, *x.shape[1:]))
        now = jnp.arange(STEPS * INNER).reshape(STEPS, 1, INNER) == when
        hit = now & (jnp.arange(SIZE) == bad)[None, :, None]
        x, y = jax.tree.map(everybody, data)
        splits = hj.Split((x, y, hit), (x[:, :, 0], y[:, :, 0]))

        def step(state, split):
            state, metrics = tuner.step(state, split)
            return state, (state.members, metrics)

        return jax.lax.scan(step, tuner.init(key, params, hparams), splits)[1]

    return go


def runs(name: str, every: int, seed: int):
    """(outer step of the fault, member, run with it, run without it); leaves [STEPS, SIZE, ...]."""
    rng = np.random.default_rng(seed)
    when, bad = int(rng.integers(2, STEPS * INNER - 2)), int(rng.integers(SIZE))
    go, key = program(name, every), jax.random.key(seed)
    both = [jax.tree.map(np.asarray, go(w, bad, key)) for w in (when, -1)]
    return when // INNER, bad, *both


def rows(tree, step: int, keep) -> list[np.ndarray]:
    return [x[step][keep] for x in jax.tree.leaves(tree)]


def same_bits(left, right) -> None:
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", RULES)
def test_the_other_15_are_bit_for_bit_the_same(name, seed):
    """As long as the rule does not exchange for another reason: to the end of the run."""
    fault, bad, (members, metrics), (clean, calm) = runs(name, NEVER, seed)
    others = np.delete(np.arange(SIZE), bad)
    for step in range(STEPS):
        same_bits(rows(members, step, others), rows(clean, step, others))
    diverged = metrics.events.diverged
    assert diverged[fault, bad] and not calm.events.diverged.any()
    assert not diverged[:, others].any()
    params = np.isfinite(members.carry.params["a"]).all(axis=(2, 3))
    assert params[:fault].all() and params[:, others].all()
    # Before the exchange of that step it was lost; a rule that reseeds has replaced it since.
    reseeded = RULES[name][0] == RESEEDED
    assert (params[fault:, bad] == reseeded).all()
    assert (diverged[fault + 1 :, bad] != reseeded).all()


EXCHANGING = [name for name in RULES if RULES[name][0] != STAYS]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", EXCHANGING)
def test_an_exchange_never_spreads_it(name, seed):
    """The others stay finite whatever is exchanged; until the first exchange, all is the same."""
    fault, bad, (members, metrics), (clean, calm) = runs(name, EVERY, seed)
    others = np.delete(np.arange(SIZE), bad)
    parents = metrics.events.parents
    assert not np.any((parents == bad)[:, others] & metrics.events.diverged[:, [bad]])
    finite = np.isfinite(members.carry.params["a"]).all(axis=(2, 3))
    assert finite[:, others].all()
    first = next(i for i in range(EVERY - 1, STEPS, EVERY) if i >= fault) if fault < 5 else STEPS
    for step in range(min(first, STEPS)):
        same_bits(rows(members, step, others), rows(clean, step, others))
    if RULES[name][0] == RESEEDED and first == fault:
        kept = [i for i in others if parents[first, i] == i == calm.events.parents[first, i]]
        assert len(kept) >= SIZE // 4
        same_bits(rows(members, first, kept), rows(clean, first, kept))


@pytest.mark.parametrize("seed", range(3))
def test_hdet_converges_to_the_mean_of_the_others(seed):
    fault, bad, (members, metrics), _ = runs("hdet", EVERY, seed)
    _, _, (apart, _), _ = runs("hdet", NEVER, seed)
    step = EVERY - 1
    keep = np.delete(np.arange(SIZE), bad) if fault <= step else np.arange(SIZE)
    assert metrics.events.converged[step]
    for name in ("a", "b"):  # one sum of 15 numbers in two orders
        mean = apart.carry.params[name][step][keep].mean(0)
        got = members.carry.params[name][step]
        np.testing.assert_allclose(got, np.broadcast_to(mean, got.shape), rtol=1e-12, atol=1e-14)
