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
# # FedHyper: clients and a server that schedule their own learning rates
#
# In federated learning nobody can try learning rates. FedHyper (Wang, Wang and Li 2024, arXiv
# 2310.03156) moves them by hypergradients that cost nothing, since they are products of updates
# that are at hand: "G" that of the server, "CL" those of the clients from step to step. The paper
# claims 1.1 to 3 times fewer rounds than FedAvg and others, and up to 15 points more accuracy from
# a poor first rate.
#
# ```bash
# python notebooks/12_fedhyper.py
# ```
#
# | | default | `--full` |
# | --- | --- | --- |
# | time on one core | about 20 seconds | two minutes |
# | rounds, seeds | 30, 1 | 60, 5 |
#
# To reach, on handwritten digits that 20 clients hold, with first rates 500-fold apart: FedHyper's
# worst accuracy is **at least 20 points above** FedAvg's worst, and its own accuracies lie within
# **5 points** of one another.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common import BLUE, FULL, GREY, RED, band, benchmark, record

import hyperjax as hj
from hyperjax import bilevel, tasks

SEEDS, ROUNDS = (5, 60) if FULL else (1, 30)
RATES, CAP = (0.001, 0.01, 0.1, 0.5), 0.15

# %% [markdown]
# Clients have different shares of the labels, drawn from a Dirichlet distribution of 0.5. Five of
# them take part in a round, with ten steps on batches of 32. The cap on the clients' rates is ours,
# not the paper's, and it matters: FedAvg that uses the cap as its rate is the third method.

# %%
pixels, labels = tasks.digit_images()
x, y = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
model = tasks.regularized_perceptron((64, 128, 10))
rows = lambda batch: {"x": x[batch["index"]], "y": y[batch["index"]]}
entropy = lambda params, rates, batch: model.score(params, {}, rows(batch))

methods = {
    "FedAvg": lambda rate: ({}, rate),
    "FedHyper": lambda rate: (
        {
            "server": bilevel.hypergradient_rate(1 / 3, 3.0),
            "local": bilevel.hypergradient_rate(jnp.maximum(rate / 10, 1e-3), CAP),
        },
        rate,
    ),
    "FedAvg at the cap": lambda rate: ({}, CAP),
}


def split_of(seed):
    """The clients' rows, and 360 images that nobody has."""
    order = np.random.default_rng(seed).permutation(len(labels))
    clients = tasks.client_rows(labels[order[360:]], 20, 0.5, seed=seed, least=10)
    own = jnp.asarray(order[360:], jnp.int32)[clients.rows]
    return clients._replace(rows=own), jnp.asarray(order[:360], jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, None, None, 0, None))
def train(name, clients, test, rate, key):
    """Accuracy on `test` and the server's rate after every round."""
    options, first = methods[name](rate)
    tuner = bilevel.federated(entropy, entropy, **options)
    begin, draws = jax.random.split(key)
    rounds = tasks.client_rounds(draws, clients, ROUNDS, sample=5, steps=10, batch=32)
    state = tuner.init(model.init(begin), bilevel.Rates(jnp.ones(()), jnp.asarray(first)))

    def step(state, clients):
        state, metrics = tuner.step(state, hj.Split(clients, {"index": test}))
        accuracy = model.evaluate(state.params, rows({"index": test}))["accuracy"]
        return state, (accuracy, metrics.hparams.server)

    return jax.lax.scan(step, state, rounds)[1]


found = {name: [] for name in methods}
for seed in range(SEEDS):
    clients, test = split_of(seed)
    for name in methods:
        key = jax.random.key(seed)
        found[name].append(train(name, clients, test, jnp.asarray(RATES), key))
accuracy = {name: 100 * np.stack([a for a, _ in runs]) for name, runs in found.items()}
print(f"accuracy after {ROUNDS} rounds, %, by first rate; mean of {SEEDS} seeds")
print(" " * 20 + "".join(f"{rate:>8}" for rate in RATES))
for name, curves in accuracy.items():  # [seeds, rates, rounds]
    print(f"{name:20}" + "".join(f"{a:8.1f}" for a in curves[:, :, -1].mean(0)))

# %% [markdown]
# On record: `fedhyper` has all rules and competitors over 100 rounds of the digits,
# `fedhyper_mnist` 100 clients on MNIST; five seeds each.

# %%
digits, mnist = benchmark("fedhyper"), benchmark("fedhyper_mnist")
speedups = {"digits": digits["speedup_at_small_rates"], "MNIST": mnist["speedup_at_small_rates"]}
points = {"digits": digits["points_at_smallest_rate"], "MNIST": mnist["points_at_smallest_rate"]}
print("rounds of FedAvg to 85 % over FedHyper's, by first rate:", speedups)
print("points more at the smallest rate:", {k: round(v, 1) for k, v in points.items()})

figure, (left, right) = plt.subplots(1, 2)
after = np.arange(1, ROUNDS + 1)
for name, colour in (("FedAvg", GREY), ("FedHyper", BLUE), ("FedAvg at the cap", RED)):
    label = name if "cap" in name else f"{name}, from {RATES[0]}"
    band(left, after, accuracy[name][:, 0], label, colour, lw=2)
left.set(
    xlabel="round", ylabel="test accuracy, %", ylim=(0, 100), title="Here: from the smallest rate"
)
left.legend(fontsize=9)
looks = {"FedAvg": GREY, "FedExP": "#E69F00", "FedAdam": "#CC79A7", "G + CL": BLUE}
for name, colour in (looks | {"G + CL, no cap": "#56B4E9", "FedAvg at the cap": RED}).items():
    rates = [row["lr"] for row in digits["table"][name]]
    each = 100 * np.array([row["accuracy"] for row in digits["table"][name]])
    error = each.std(1, ddof=1) / np.sqrt(each.shape[1])
    right.errorbar(rates, each.mean(1), error, fmt="o-", color=colour, label=name, ms=4)
right.set(xscale="log", xlabel="first learning rate", ylabel="test accuracy, %", ylim=(70, 100))
right.set(title="On record: digits, 100 rounds, 5 seeds")
_ = right.legend(fontsize=8)

# %% [markdown]
# The claims hold from small rates, and by far more than three times. The cap does most of it: a
# client's rate reaches it within a round, and FedAvg that begins there is as good. At a rate that
# is good already there is nothing to gain, and on MNIST at 0.05 nothing is gained.

# %%
last = {name: curves[:, :, -1] for name, curves in accuracy.items()}
gain = last["FedHyper"].min(1) - last["FedAvg"].min(1)
spread = np.ptp(last["FedHyper"], axis=1)
met = [ratio >= 1.1 for part in speedups.values() for ratio in part.values()]
cap = (
    min(row["accuracy_mean"] for row in digits["table"]["FedAvg at the cap"])
    >= min(row["accuracy_mean"] for row in digits["table"]["G + CL"]) - 0.005
)
record(
    "12_fedhyper",
    {
        "seeds": SEEDS,
        "rounds": ROUNDS,
        "percent_by_rate": {"rates": RATES, **{k: v.tolist() for k, v in last.items()}},
        "speedups_on_record": speedups,
        "points_on_record": points,
        "the_cap_alone_is_as_good": bool(cap),
        "paper": {"fewer rounds": "1.1 to 3 times", "points from a poor first rate": "up to 15"},
        "rule": "reproduced: 1.1 times fewer rounds at every first rate up to 0.05 and 15 points "
        "at the smallest, on both data sets, and not by the cap alone; partly: the points",
        "verdict": "reproduced"
        if all(met) and min(points.values()) >= 15 and not cap
        else "partly"
        if min(points.values()) >= 15
        else "not",
    },
)
assert gain.min() >= 20 and spread.max() <= 5, (gain, spread)
print("reached: 20 points above FedAvg's worst, within 5 points from all first rates")
