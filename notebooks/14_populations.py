# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Populations: who copied whom, and what remains of it
#
# Population based training (arXiv 1711.09846) trains models side by side; now and then the worst
# copy the best, weights and hyperparameters, and explore. On the toy problem of the paper's first
# figures that ends at the optimum, 1.2, where a grid search is stuck; the figure has no numbers.
# PB2 (arXiv 2002.02518) lets a bandit explore, and claims the advantage for small populations.
# Numbers to reach: a mean of **1.199** on the toy where a grid search ends at 0.39; and on digits
# the history of the best model, traced through all copies and replayed in one ordinary run, ends at
# the same weights, to **1e-9** in float64.
#
# ```bash
# pip install -e ".[test]" && python notebooks/14_populations.py
# ```
#
# | | default | `--full` |
# | --- | --- | --- |
# | toy: seeds; digits: seeds, members | 5; 1, 8 | 20; 5, 16 |
# | time on one core | 20 s | 1 minute |

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import BLUE, FULL, GREY, ORANGE, RED, band, benchmark, mean_and_error, record

import hyperjax as hj
from hyperjax import tasks

jax.config.update("jax_enable_x64", True)
TOY_SEEDS, SEEDS, MEMBERS = (20, 5, 16) if FULL else (5, 1, 8)

# %% [markdown]
# ## The toy of the paper
#
# Two workers maximize $Q = 1.2 - t_0^2 - t_1^2$, but each descends a surrogate,
# $h_0 t_0^2 + h_1 t_1^2$, with $h$ of its own, $(1, 0)$ and $(0, 1)$ at first: alone, each moves
# one coordinate. After every fourth step the worse copies the better, and explores.

# %%
ROUNDS, READY = 50, 4


def wander(key, h):
    return jnp.clip(h + 0.1 * jax.random.normal(key, h.shape), 0.0, 1.0)


surrogate = hj.inner(lambda t, h, batch: jnp.sum(h * t**2), lambda h: optax.sgd(0.02))
miss = lambda t, h, batch: jnp.sum(t**2) - 1.2  # minus Q
worker = hj.score_only(hj.unroll(surrogate.step), miss, surrogate.init)


def toy(rule):
    pop = hj.population(hj.tune(worker, optax.set_to_zero()), rule)

    def one(key):
        def step(state, split):
            state, metrics = pop.step(state, split)
            return state, (metrics.members.value, state.members.carry.params)

        state = pop.init(key, jnp.full((2, 2), 0.9), jnp.eye(2))
        splits = hj.Split(jnp.zeros((ROUNDS, READY)), jnp.zeros(ROUNDS))
        return jax.lax.scan(step, state, splits)[1]

    keys = jax.random.split(jax.random.key(0), TOY_SEEDS)
    values, places = jax.device_get(jax.jit(jax.vmap(one))(keys))
    return -values.min(axis=2), places  # [seeds, rounds], [seeds, rounds, workers, 2]


grid, _ = toy(hj.exchange.isolation())
pbt, places = toy(hj.exchange.truncation(0.5, wander))
closed_form = 1.2 - 0.81 - (0.9 * 0.96 ** (ROUNDS * READY)) ** 2
print(f"grid search {grid[:, -1].mean():.5f} (closed form {closed_form:.5f})")
print(
    f"PBT         {pbt[:, -1].mean():.5f} (optimum 1.2; least of the seeds {pbt[:, -1].min():.5f})"
)

for row in benchmark("pbt_toy")["rows"]:  # 20 seeds; "exploit only" copies weights and keeps h
    print(f"on record   {row['mean']:.5f} {row['rule']}")

figure, (left, right) = plt.subplots(1, 2, gridspec_kw={"width_ratios": (1.1, 1)})
rounds = READY * np.arange(1, ROUNDS + 1)
band(left, rounds, pbt, f"PBT, {TOY_SEEDS} seeds", BLUE, lw=2)
band(left, rounds, grid, "grid search", GREY, lw=2)
left.set(xlabel="training steps", ylabel="Q of the better worker", ylim=(-0.5, 1.3))
left.set_title("The toy of arXiv 1711.09846")
left.legend(loc="lower right")

rows = benchmark("pb2")["rows"]
rules = ("fixed random", "PBT", "PB2")
for i, (rule, colour) in enumerate(zip(rules, (GREY, BLUE, RED), strict=True)):
    for members in (4, 8):
        row = next(r for r in rows if (r["rule"], r["members"]) == (rule, members))
        place = (members // 4 - 1) * 4 + i
        right.bar(place, row["mean"], color=colour, label=rule if members == 4 else None)
        error = row["mean"] - np.array(row["interval"])[:1]
        right.errorbar(place, row["mean"], error, color="k", capsize=3)
right.set(xticks=(1, 5), xticklabels=("4 members", "8 members"), ylim=(0, 46))
right.set(ylabel="total reward, at most 40 (mean, 2 s.e.)")
right.set_title("A drifting optimum, 24 seeds, on record")
_ = right.legend(ncols=3, loc="upper left", fontsize=9)

# %% [markdown]
# ## Digits, and a family tree
#
# A perceptron 64-32-10; learning rate and penalty. The worst quarter copies one of the best quarter
# every 20 steps. `events.parents[t, i]` is the slot whose state slot `i` holds from update `t` on:
# walked backwards from the best model, it gives the slots that its ancestors were in.

# %%
pixels, labels = tasks.digit_images()
order = np.random.default_rng(0).permutation(len(labels))
x, y = jnp.asarray(pixels[order] / 16), jnp.asarray(labels[order], jnp.int32)
TRAIN, VALID = 600, 600  # and the rest to test
UPDATES, STEPS = 20, 20
space = hj.space({"lr": hj.loguniform(1e-4, 1.0), "l2": hj.loguniform(1e-6, 1e-1)})


def init(key):
    one, two = jax.random.split(key)
    normal = lambda key, n, m: jax.random.normal(key, (n, m)) / n**0.5
    return {"w": normal(one, 64, 32), "v": normal(two, 32, 10), "b": jnp.zeros(32)}


def entropy(p, rows):
    logits = jnp.tanh(x[rows] @ p["w"] + p["b"]) @ p["v"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()


valid_rows, test_rows = jnp.arange(TRAIN, TRAIN + VALID), jnp.arange(TRAIN + VALID, len(y))
loss = lambda p, h, rows: entropy(p, rows) + h["l2"] * optax.tree.norm(p, squared=True)
score = lambda p, h, _: entropy(p, valid_rows)
training = hj.inner(space.lift(loss), lambda raw: optax.sgd(space.constrain(raw)["lr"], 0.9))
member = hj.score_only(hj.unroll(training.step), score, training.init)


def batches(key):
    rows = jax.random.randint(key, (UPDATES, STEPS, 32), 0, TRAIN)
    return hj.Split(rows, jnp.zeros(UPDATES))


def study(rule):
    pop = hj.population(hj.tune(member, optax.set_to_zero()), rule)

    @jax.jit
    def run(key):
        weights, hparams, data, exchange = jax.random.split(key, 4)
        start = jax.vmap(init)(jax.random.split(weights, MEMBERS))
        hparams = jax.vmap(space.sample)(jax.random.split(hparams, MEMBERS))
        splits = batches(data)
        state, metrics = hj.run(pop, pop.init(exchange, start, hparams), splits)
        return start, splits.train, state.members.carry.params, metrics.members, metrics.events

    return run


evolve = study(hj.exchange.truncation(0.25, hj.exchange.resample(space)))
search = study(hj.exchange.isolation())
replay = jax.jit(lambda start, h, rows: hj.replay(training, start, h, rows))
pick = lambda tree, *index: jax.tree.map(lambda v: v[index], tree)
found = []
for seed in range(SEEDS):
    start, train_rows, params, metrics, events = jax.device_get(evolve(jax.random.key(seed)))
    best = int(np.nanargmin(metrics.value[-1]))
    slots = np.asarray(hj.exchange.lineage(events.parents, best))
    schedule = pick(metrics.hparams, np.arange(UPDATES), slots)  # raw values, [UPDATES]
    again = replay(pick(start, slots[0]), schedule, train_rows)
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), again, pick(params, best))
    row = {"seed": seed, "replay_differs_by": float(max(jax.tree.leaves(gaps)))}
    row |= {"copies": int((events.parents != np.arange(MEMBERS)).sum())}
    row |= {"ancestors": len(set(slots)), "test": float(entropy(pick(params, best), test_rows))}
    if FULL:  # the schedule with weights and batches that it has not seen; and no exchange at all
        fresh = jax.random.key(1000 + seed)
        anew = replay(init(fresh), schedule, batches(fresh).train)
        row["replayed_anew"] = float(entropy(anew, test_rows))
        _, _, alone, independent, _ = jax.device_get(search(jax.random.key(seed)))
        least = int(np.nanargmin(independent.value[-1]))
        row["random_search"] = float(entropy(pick(alone, least), test_rows))
    found.append(row)
    print(row)

# %%
figure, axes = plt.subplots()
rates = np.asarray(space.constrain(metrics.hparams)["lr"])  # [UPDATES, MEMBERS]
time = np.arange(UPDATES)
for i in range(MEMBERS):
    axes.plot(time, rates[:, i], ".", color=GREY, ms=4)
for t in range(UPDATES - 1):
    for child, parent in enumerate(events.parents[t]):
        copied = child != parent
        line = {"color": ORANGE if copied else "0.8", "lw": 1.2 if copied else 0.8}
        axes.plot([t, t + 1], [rates[t, parent], rates[t + 1, child]], zorder=1 + copied, **line)
axes.plot([], [], color=ORANGE, lw=1.2, label="copied from another, and explored")
axes.plot([], [], color="0.8", lw=0.8, label="went on")
axes.plot(time, rates[time, slots], color=RED, lw=3, label="ancestors of the best model")
axes.set(yscale="log", xlabel="update, of 20 training steps", ylabel="learning rate", xticks=time)
axes.set(ylim=(0.2 * rates.min(), 3 * rates.max()))
axes.set_title(f"{MEMBERS} members; the schedule that made the best one, replayed, makes it again")
_ = axes.legend(loc="lower left", ncols=3, fontsize=9)

# %% [markdown]
# The red line is all that the population knows and one run can use: `hj.replay` trains along it,
# and `hj.schedule(values, every=20)` hands it to any optax optimizer. What it is worth on data and
# weights that it has not seen, and whether the population beats as many members that never exchange
# (random search), is in the record of the full setting: on digits, with one rate to find, the
# population does not.

# %%
toy_mean, toy_error = mean_and_error(pbt[:, -1])
worst = max(row["replay_differs_by"] for row in found)
reproduced = toy_mean > 1.199 and worst < 1e-9 and benchmark("pb2")["apart_at_4"]
gap = (0.0, 1.0)
if FULL:
    gap = mean_and_error([row["random_search"] - row["test"] for row in found])
    for name in ("test", "replayed_anew", "random_search"):
        print(f"test loss, {name:15}{np.mean([row[name] for row in found]):8.4f}")
record(
    "14_populations",
    {
        "seeds": {"toy": TOY_SEEDS, "digits": SEEDS},
        "toy": {
            "PBT": toy_mean,
            "standard_error": toy_error,
            "grid search": float(grid.mean(0)[-1]),
        },
        "digits": found,
        "paper": "arXiv 1711.09846, a figure without numbers: the optimum is 1.2, grid search ends "
        "near 0.4; arXiv 2002.02518: PB2 above PBT with 4 members, on other tasks",
        "random_search_minus_PBT_on_digits": gap,
        "verdict": "not" if not reproduced else "reproduced" if gap[0] > 2 * gap[1] else "partly",
        "rule": "toy mean above 1.199, replays equal to 1e-9, intervals of PB2, PBT and fixed "
        "rates apart with 4 members (benchmarks/pb2.py); partly: without PBT below random search "
        "on digits by two standard errors",
    },
)
assert toy_mean > 1.199 and np.allclose(grid[:, -1], closed_form), (toy_mean, grid[:, -1])
assert worst < 1e-9, found
print("reached: PBT at the optimum of the toy; a lineage replayed ends at the same weights")
