"""HDET: the spread, the controller against its closed form, and averages without the diverged."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from problems import error, jit

import hyperjax as hj
from hyperjax import _fan_out

SIZE = 8
SPACE = hj.space({"lr": hj.loguniform(1e-6, 10.0), "drop": hj.uniform(0.0, 0.9)})


class Carry(NamedTuple):
    params: dict
    rest: jax.Array


class Member(NamedTuple):
    hparams: dict
    carry: Carry


def start(size: int = SIZE, lr: float = 0.01) -> dict:
    return SPACE.unconstrain({"lr": jnp.full(size, lr), "drop": jnp.full(size, 0.3)})


def group(size: int = SIZE, hparams=None) -> Member:
    """Members whose every row is different."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(size, *shape)))
    hparams = start(size) if hparams is None else hparams
    return Member(hparams, Carry({"w": draw(3, 2), "b": draw(2)}, draw(4)))


class Trace(NamedTuple):
    """Of several calls in a row, numpy; hparams are raw, before each call."""

    members: Member
    state: hj.exchange.HdetState
    events: hj.exchange.HdetEvents
    hparams: dict


def play(rule, score_of, steps: int, members=None, seed: int = 0) -> Trace:
    """`steps` calls; `score_of(constrained hparams, step)` gives the scores [P]."""
    members = group() if members is None else members

    def step(carry, now):
        members, state = carry
        key, i = now
        score = score_of(SPACE.constrain(members.hparams), i)
        after, state, events = rule.apply(key, state, members, score)
        return (after, state), (events, members.hparams)

    def go(key):
        steps_ = (jax.random.split(key, steps), jnp.arange(steps))
        return lax.scan(step, (members, rule.init(members)), steps_)

    (members, state), (events, hparams) = jit(go)(jax.random.key(seed))
    return jax.tree.map(np.asarray, Trace(members, state, events, hparams))


flat = lambda h, i: jnp.zeros(h["lr"].shape)  # scores that say nothing
larger = lambda h, i: -1e9 * h["lr"] / h["lr"].mean()  # the larger the rate, the better, by far
smaller = lambda h, i: 1e9 * h["lr"] / h["lr"].mean()


# -------------------------------------------------------------------------------- spread


def test_spread_is_symmetric_even_and_permuted_anew():
    rule = hj.exchange.hdet(SPACE, width={"lr": 0.5, "drop": 0.2})
    seen = play(rule, flat, 40)
    places = np.linspace(-1, 1, SIZE)
    lr = np.asarray(SPACE.constrain(seen.hparams)["lr"])[1:] / 0.01 - 1
    drop = seen.hparams["drop"][1:] - np.asarray(start()["drop"])[None]
    # Through the bijector and back: last bits of a logarithm of size 10.
    np.testing.assert_allclose(np.sort(lr), np.tile(0.5 * places, (39, 1)), atol=1e-13)
    np.testing.assert_allclose(np.sort(drop), np.tile(0.2 * places, (39, 1)), atol=1e-13)
    orders = {tuple(np.argsort(row)) for row in (*lr, *drop)}
    assert len(orders) == 78  # of 8! = 40,320: two equal ones among 78 in one of 14 runs
    # Independent: the mean correlation of 39 pairs of permutations is 0 +- 1 / sqrt(7 * 39).
    assert abs(np.mean(lr * drop) / np.std(lr) / np.std(drop)) < 5 / math.sqrt(7 * 39)


def test_every_scalar_of_a_leaf_has_an_order_of_its_own():
    columns = _fan_out.offsets(jax.random.key(0), SIZE, jnp.zeros((2, 3))).reshape(SIZE, 6)
    assert len({tuple(np.argsort(c)) for c in columns.T}) == 6  # of 8! orders


def test_equal_scores_say_nothing_whatever_the_spread():
    # That of the caller is not even around the base.
    rates = SPACE.unconstrain({"lr": 3.0 ** -jnp.arange(SIZE), "drop": jnp.full(SIZE, 0.3)})
    seen = play(hj.exchange.hdet(SPACE), flat, 1, group(hparams=rates))
    np.testing.assert_allclose(seen.events.signal["lr"], 0, atol=1e-12)


def test_a_width_of_zero_keeps_a_hyperparameter_bit_for_bit():
    rule = hj.exchange.hdet(SPACE, width={"lr": 0.5, "drop": 0.0}, gain=2.0, sigma=1.0)
    seen = play(rule, larger, 5)
    first = np.tile(np.asarray(start()["drop"]), (5, 1))
    np.testing.assert_array_equal(seen.hparams["drop"], first)
    assert seen.events.base["lr"][-1] > 0.02


# ---------------------------------------------------------------------------- controller


def test_small_differences_give_the_linear_gain():
    # L = slope log(rate): signal = -Var(x) slope / sigma, Var(x) = width^2 (P + 1) / 3 (P - 1).
    # Cubic terms of the softmax, and those of the logarithm, are relative width^2: quartered
    # when the width is halved.
    slope, sigma, gaps = 0.01, 0.1, []
    for width in (0.02, 0.01):
        rule = hj.exchange.hdet(SPACE, width=width, sigma=sigma, momentum=0.0)
        seen = play(rule, lambda h, i: slope * jnp.log(h["lr"]), 2)
        expected = -(slope / sigma) * width**2 * (SIZE + 1) / (3 * (SIZE - 1))
        gaps.append(abs(seen.events.signal["lr"][1] / expected - 1))
        moved = np.log(seen.events.base["lr"][1] / seen.events.base["lr"][0])
        np.testing.assert_allclose(moved, 0.5 * seen.events.signal["lr"][1], rtol=1e-8)
    assert gaps[0] < 1e-3
    np.testing.assert_allclose(gaps[0] / gaps[1], 4, rtol=0.05)


def test_momentum_of_a_constant_signal_is_a_geometric_sum():
    # One member so much better that it has all the weight: the signal is the width itself.
    width, gain, beta, steps = 0.4, 0.5, 0.8, 12
    rule = hj.exchange.hdet(SPACE, width=width, gain=gain, momentum=beta, sigma=1.0)
    seen = play(rule, larger, steps)
    # The first call finds equal members, which have nothing to say.
    np.testing.assert_allclose(seen.events.signal["lr"], [0] + [width] * (steps - 1), atol=1e-12)
    velocity = width * (1 - beta ** np.arange(steps))
    np.testing.assert_allclose(seen.events.velocity["lr"], velocity, atol=1e-12)
    base = 0.01 * np.exp(gain * np.cumsum(velocity))
    np.testing.assert_allclose(seen.events.base["lr"], base, rtol=1e-11)


@pytest.mark.parametrize("sigma", ["running", 1e-3])
def test_one_convergence_moves_at_most_by_gain_times_width(sigma):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(60, SIZE)) * 10.0 ** rng.uniform(-6, 6, size=(60, 1))
    table[rng.random(table.shape) < 0.2] = np.nan
    rule = hj.exchange.hdet(SPACE, width=0.5, gain=0.5, sigma=sigma, momentum=0.5)
    seen = play(rule, lambda h, i: jnp.asarray(table)[i], 60)
    moves = np.abs(np.diff(np.log(seen.events.base["lr"])))
    assert np.all(np.abs(seen.events.signal["lr"]) <= 0.5 + 1e-12)
    assert moves.max() <= 0.25 + 1e-12
    assert moves.max() > 0.05  # it does move: the bound is not idle
    # So a decade takes ln 10 / 0.25 = 9.2 convergences or more.
    seen = play(rule, larger, 40)
    decade = np.flatnonzero(seen.events.base["lr"] >= 0.1)[0] + 1
    # "running" is slower, as no score is many deviations better than the others.
    assert math.log(10) / 0.25 <= decade <= (30 if sigma == "running" else 15)


def test_running_sigma_does_not_feel_the_scale_of_the_loss():
    rule = hj.exchange.hdet(SPACE, width=0.5)
    bases = []
    for scale in (1.0, 2.0**20):  # a power of two rounds nothing
        score = lambda h, i, scale=scale: scale * (jnp.log(h["lr"]) + 2.0) ** 2
        bases.append(play(rule, score, 30).events.base["lr"])
    np.testing.assert_allclose(bases[1], bases[0], rtol=1e-10)
    assert bases[0][-1] > 0.02  # towards exp(-2)


def test_one_exploding_loss_does_not_silence_the_controller():
    # In a plain mean of variances the first would drown all others for 400 convergences. The
    # second, whose square has no place in float64, comes before there is a scale as well.
    rule = hj.exchange.hdet(SPACE, width=0.5)
    rise = {}
    for spike in (1.0, 1e10, 1e200):
        when = jnp.asarray([3, 3 if spike < 1e100 else 1])
        hit = lambda i, spike=spike, when=when: jnp.where(
            (i == when).any() & (jnp.arange(SIZE) == 2), spike, 1.0
        )
        seen = play(rule, lambda h, i, hit=hit: hit(i) * (jnp.log(h["lr"]) + 2) ** 2, 30)
        rates = seen.events.base["lr"]
        rise[spike] = np.log(rates[-1] / rates[3])
        assert np.isfinite(rates).all() and np.isfinite(seen.state.base.variance)
    assert min(rise.values()) > 0.5 * rise[1.0] > 0.5


def test_rounding_is_no_signal_and_sets_no_scale():
    # Scores that differ in their last bit, for five convergences, and then in earnest.
    rule = hj.exchange.hdet(SPACE, width=0.5)
    tiny = lambda h, i: 1.0 + 2.0**-52 * (h["lr"] > h["lr"].mean())
    score = lambda h, i: jnp.where(i < 5, tiny(h, i), jnp.log(h["lr"]))
    seen = play(rule, score, 7)
    assert np.abs(seen.events.signal["lr"][:5]).max() < 1e-15
    losses = np.log(SPACE.constrain(seen.hparams)["lr"][5])
    np.testing.assert_allclose(seen.events.signal["lr"][5], by_hand(losses, 0.5), rtol=1e-9)


def by_hand(losses, width):
    """The signal of members at exp(loss), in units of the deviation of their losses."""
    weights = np.exp(-(losses - losses.mean()) / losses.std())
    ratio = np.exp(losses) / np.exp(losses).mean() - 1
    assert abs(np.abs(ratio).max() - width) < 1e-9
    return weights @ ratio / weights.sum()


def test_diverged_members_push_away():
    # All scores are equal, but half the members have none: those with the larger rates.
    rule = hj.exchange.hdet(SPACE, width=0.5, momentum=0.0)
    score = lambda h, i: jnp.where((h["lr"] > h["lr"].mean()) & (i > 0), jnp.nan, 1.0)
    seen = play(rule, score, 2)
    lower = 0.5 * np.linspace(-1, 1, SIZE)[: SIZE // 2].mean()
    np.testing.assert_allclose(seen.events.signal["lr"][1], lower, rtol=1e-10)


def test_the_linear_update_is_that_of_the_paper():
    gain, beta, width, decay = 0.5, 0.9, 0.5, 0.01
    rule = hj.exchange.hdet(
        SPACE, width=width, gain=gain, momentum=beta, sigma=0.05, update="linear", decay=decay
    )
    seen = play(rule, lambda h, i: (jnp.log(h["lr"]) + 2.0) ** 2, 20)
    base, velocity = 0.01, 0.0
    for i in range(20):
        rates = np.asarray(SPACE.constrain(seen.hparams)["lr"][i])
        loss = (np.log(rates) + 2) ** 2
        weights = np.exp((loss.mean() - loss) / 0.05)
        delta = weights @ rates / weights.sum() - rates.mean()
        velocity = beta * velocity + (1 - beta) * delta
        base = base * math.exp(-decay) + gain * velocity
        np.testing.assert_allclose(seen.events.base["lr"][i], base, rtol=1e-10)
    assert not seen.events.bounded["lr"].any()


def test_the_linear_update_is_stopped_before_it_is_negative_and_says_so():
    options: dict[str, Any] = {"width": 0.5, "gain": 30.0, "sigma": 1.0}
    linear = play(hj.exchange.hdet(SPACE, update="linear", **options), smaller, 5)
    assert linear.events.bounded["lr"].any()
    log = play(hj.exchange.hdet(SPACE, **options), smaller, 3)
    assert not log.events.bounded["lr"].any()
    for seen in (linear, log):
        rates = np.asarray(SPACE.constrain(seen.hparams)["lr"])
        assert np.all((rates > 1e-6) & (rates < 10.0))
    # The same without an end of the range would have been negative.
    assert 0.01 - 30 * 0.1 * 0.5 * 0.01 < 0


def test_bases_stop_where_all_members_fit():
    seen = play(hj.exchange.hdet(SPACE, width=0.5, gain=5.0, sigma=1.0), larger, 40)
    assert seen.events.bounded["lr"][-1] and not seen.events.bounded["lr"][:3].any()
    rates = np.asarray(SPACE.constrain(seen.hparams)["lr"])[-1]
    np.testing.assert_allclose(rates.max() / rates.mean(), 1.5, rtol=1e-9)
    assert 9 < rates.max() < 10


@pytest.mark.parametrize("update", ["log", "linear"])
def test_decay_goes_down_from_start_to_end(update):
    steps = 10
    decay = {"lr": math.log(0.01 / 1e-4) / steps, "drop": 0.0}
    rule = hj.exchange.hdet(SPACE, decay=decay, update=update)
    seen = play(rule, flat, steps)
    np.testing.assert_allclose(seen.events.base["lr"], 0.01 * 10 ** (-0.2 * np.arange(1, 11)))
    np.testing.assert_array_equal(seen.state.base.raw["drop"], start()["drop"][0])


def test_the_base_waits_for_the_warm_up():
    seen = play(hj.exchange.hdet(SPACE, width=0.5, sigma=1.0, decay=0.01, warm_up=4), larger, 6)
    np.testing.assert_allclose(seen.events.base["lr"][:4], 0.01, rtol=1e-12)
    assert seen.events.base["lr"][4] > 0.01
    assert seen.events.converged.all()


def test_members_that_descend_take_the_base_with_them():
    # Between convergences every member has moved by the same: so does the base.
    rule = hj.exchange.hdet(SPACE, sigma=1.0)
    members = group()
    moved = jax.tree.map(lambda x: x + 0.25, members.hparams)
    _, state, _ = rule.apply(
        jax.random.key(0), rule.init(members), members._replace(hparams=moved), jnp.zeros(SIZE)
    )
    assert error(state.base.raw, jax.tree.map(lambda x: x[0], moved)) < 1e-14


# ---------------------------------------------------------------------------- converging


@pytest.mark.parametrize("size", [1, 7, 8])
def test_equal_members_converge_to_themselves_bit_for_bit(size):
    # Not so for a plain mean: the sum of seven equal numbers rounds.
    one = group(1)
    members = jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape[1:])) * 0.1, one)
    rule = hj.exchange.hdet(SPACE)
    after, *_ = jit(rule.apply)(jax.random.key(0), rule.init(members), members, jnp.ones(size))
    assert error(after.carry, members.carry) == 0


def test_params_become_the_mean_and_the_rest_stays():
    seen = play(hj.exchange.hdet(SPACE), flat, 1)
    before = group()
    for name, x in before.carry.params.items():
        mean = np.broadcast_to(np.asarray(x).mean(0), x.shape)
        np.testing.assert_allclose(seen.members.carry.params[name], mean, rtol=1e-13, atol=1e-15)
    np.testing.assert_array_equal(seen.members.carry.rest, before.carry.rest)
    np.testing.assert_array_equal(seen.events.parents[0], np.arange(SIZE))


@pytest.mark.parametrize("fault", ["score", "params"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_diverged_members_are_never_averaged(fault, bad):
    members, score = group(), jnp.zeros(SIZE)
    lost = [2, 5]
    poisoned = jax.tree.map(lambda x: x.at[jnp.asarray(lost)].set(bad), members.carry)
    members = members._replace(carry=poisoned)  # the optimizer is lost with the params
    if fault == "score":
        score = score.at[jnp.asarray(lost)].set(bad)
    rule = hj.exchange.hdet(SPACE, width=0.5)
    after, state, events = jit(rule.apply)(jax.random.key(0), rule.init(members), members, score)
    kept = [i for i in range(SIZE) if i not in lost]
    for name, x in members.carry.params.items():
        mean = np.asarray(x)[kept].mean(0)
        np.testing.assert_allclose(after.carry.params[name], np.stack([mean] * SIZE), rtol=1e-12)
    np.testing.assert_array_equal(events.diverged, np.isin(np.arange(SIZE), lost))
    assert set(np.asarray(events.parents)[lost]) <= set(kept)
    np.testing.assert_array_equal(after.carry.rest, np.asarray(members.carry.rest)[events.parents])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after, state)))


def test_when_all_have_diverged_nothing_moves_and_it_is_said():
    members = group()
    rule = hj.exchange.hdet(SPACE, width=0.5)
    state = rule.init(members)
    after, new, events = jit(rule.apply)(jax.random.key(0), state, members, jnp.full(SIZE, np.nan))
    assert error(after.carry, members.carry) == 0
    assert error(new.base.raw, state.base.raw) == 0
    assert events.diverged.all() and np.isfinite(new.base.variance)


def test_convergence_waits_and_scores_are_means_over_the_wait():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(7, SIZE))
    seen = play(hj.exchange.hdet(SPACE, every=3), lambda h, i: jnp.asarray(table)[i], 7)
    np.testing.assert_array_equal(seen.events.converged, np.arange(1, 8) % 3 == 0)
    np.testing.assert_allclose(seen.events.score[2], table[:3].mean(0), rtol=1e-13)
    np.testing.assert_allclose(seen.events.score[5], table[3:6].mean(0), rtol=1e-13)
    for i in (1, 2, 4, 5):  # who waits has the hyperparameters of the step before
        same = np.array_equal(seen.hparams["lr"][i], seen.hparams["lr"][i - 1])
        assert same
    assert np.any(seen.hparams["lr"][3] != seen.hparams["lr"][2])
    assert seen.state.calls == 1


# ------------------------------------------------------------------ transforms and types


def test_seeds_vmap_and_types_stay():
    rule = hj.exchange.hdet(SPACE, width=0.3, every=2)
    members = jax.tree.map(lambda x: x.astype(jnp.float32), group())
    state = rule.init(members)
    keys = jax.random.split(jax.random.key(0), 3)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, SIZE)))

    def go(key, scores):
        def step(carry, now):
            members, state, events = rule.apply(now[0], carry[1], carry[0], now[1])
            return (members, state), events

        return lax.scan(step, (members, state), (jax.random.split(key, 4), scores))

    many = jit(jax.vmap(go))(keys, table)
    for i in range(3):
        single = jit(go)(keys[i], table[i])
        for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(single), strict=True):
            # float32: a vmapped and a single sum of eight round differently
            np.testing.assert_allclose(np.asarray(a[i], float), b, rtol=1e-4, atol=1e-5)
    kind = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    after, new, _ = jax.eval_shape(rule.apply, keys[0], state, members, table[0, 0])
    assert kind(new) == kind(state) and not any(weak for *_, weak in kind(state))
    assert kind(after) == kind(members)


@pytest.mark.parametrize("every", [1, 2])
def test_inside_shard_map(every):
    # A population on every device; their scores differ, weights before that do not.
    rule = hj.exchange.hdet(SPACE, width=0.3, every=every)
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(8, SIZE))).at[3, 2].set(jnp.nan)

    def twice(score):
        members, state = group(), rule.init(group())
        for i in range(2):
            members, state, _ = rule.apply(jax.random.key(i), state, members, score[0])
        return jax.tree.map(lambda x: x[None], members)

    lane = PartitionSpec("lane")
    spread = jax.shard_map(twice, mesh=problems.mesh("lane"), in_specs=lane, out_specs=lane)
    found, alone = jit(spread)(scores), jit(twice)
    for i in (0, 3):
        one = alone(scores[i : i + 1])
        assert error(jax.tree.map(lambda x, i=i: np.asarray(x)[i : i + 1], found), one) < 1e-14


def test_scatter_has_the_norm_it_promises():
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(40, 50))), "z": jnp.zeros(3)}
    near = hj.exchange.scatter(jax.random.key(0), params, 20, 0.01)
    apart = np.linalg.norm(np.asarray(near["w"] - params["w"][None]).reshape(20, -1), axis=1)
    # |noise| / (0.01 |w|) is 1 +- 1 / sqrt(2 * 2000) = 0.016: five deviations
    np.testing.assert_allclose(apart / 0.01 / np.linalg.norm(params["w"]), 1, atol=0.08)
    np.testing.assert_array_equal(near["z"], np.zeros((20, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 1.0}, "`width` 1.0 does not fit"),
        ({"width": -0.1}, "`width` must be a finite number, >= 0"),
        ({"width": {"lr": 0.1}}, "one per range"),
        ({"momentum": 1.0}, "`momentum` must be in"),
        ({"gain": -1.0}, "`gain` must be"),
        ({"sigma": 0.0}, "`sigma` must be a finite number, positive"),
        ({"update": "cubic"}, "`update` must be one of"),
        ({"warm_up": -1}, "`warm_up` must be an integer >= 0"),
        ({"every": 0}, "`every` must be an integer >= 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        hj.exchange.hdet(SPACE, **options)  # pyright: ignore
    with pytest.raises(TypeError, match="`space` must be a Space; got dict"):
        hj.exchange.hdet({"lr": 0.1}, **options)  # pyright: ignore
