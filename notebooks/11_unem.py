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
# # UNEM: few-shot classification by an unrolled EM whose settings are learnt per layer
#
# Transductive few-shot classification fits a mixture to labelled and unlabelled examples by EM.
# How strongly classes are to differ in size, and how hard assignments are, is usually found by a
# grid. UNEM (Zhou et al. 2025, arXiv 2412.16739) unrolls ten iterations into ten layers with
# settings of their own and learns them by gradient: on mini-ImageNet, five shots, 71.6 % instead of
# 62.6 % for a grid (numbers quoted by notes on it). Here the features are pixels.
#
# ```bash
# python notebooks/11_unem.py
# ```
#
# | | default | `--full` |
# | --- | --- | --- |
# | time on one core | about 20 seconds | about 40 seconds |
# | episodes to learn from, to test on; seeds | 40, 150; 1 | 100, 300; 5 |
#
# To reach, on handwritten digits with one example of each of ten classes and 45 unlabelled ones of
# three: settings learnt per layer tell **at least one point more** of these than the best of a grid
# of twelve, and **at least eight points more** than soft k-means.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import BLUE, FULL, GREEN, GREY, RED, band, benchmark, mean_and_error, record

import hyperjax as hj
from hyperjax import bilevel, tasks

SEEDS, COUNTS = (5, (100, 300)) if FULL else (1, (40, 150))
LAYERS, STEPS, CLASSES = 10, 100 if FULL else 60, 10
BALANCES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0)

pixels, labels = tasks.digit_images()
features = ((pixels / 16 - 0.3) / 0.37).astype(np.float32)
order = np.random.default_rng(0).permutation(len(labels))
halves = order[: len(order) // 2], order[len(order) // 2 :]  # to learn on, to test on

# %% [markdown]
# An episode's response is ten layers of EM, with nothing carried from one episode to the next, and
# the score is the cross-entropy of its queries. The grid is over the balance, at temperature 1.

# %%
plain = bilevel.transduce(bilevel.gaussian_em(CLASSES), LAYERS)
learnt = bilevel.gaussian_em(CLASSES, settings=bilevel.softplus_settings)
learnt = bilevel.transduce(learnt, LAYERS)
estimator = hj.hypergradient(learnt, bilevel.assignment_loss, lambda params, hparams: params)
rate = optax.exponential_decay(0.1, STEPS // 2, 0.5, staircase=True)
tuner = hj.tune(estimator, optax.adam(rate))


@jax.jit
def study(key):
    setting = dict(classes=CLASSES, effective=3, shots=1, queries=45)
    valid, test = (
        tasks.episodes(k, jnp.asarray(features[rows]), labels[rows], count=count, **setting)
        for k, rows, count in zip(jax.random.split(key), halves, COUNTS, strict=True)
    )

    def right(response, settings, episodes):
        log_assigned, _ = response(settings, (), episodes[0])
        return jnp.mean(log_assigned.argmax(-1) == episodes[1])

    fixed = lambda balance: bilevel.EMSettings(balance, jnp.float32(1), jnp.float32(1))
    balances = jnp.asarray(BALANCES, jnp.float32)
    grid = jax.lax.map(lambda b: right(plain, fixed(b), valid), balances)

    def learn(shape):
        one = jnp.log(jnp.expm1(jnp.float32(1)))  # softplus of it is 1
        start = bilevel.EMSettings(jnp.ones(shape), jnp.ones(shape), one)
        state, metrics = hj.repeat(tuner, tuner.init((), start), hj.Split(*valid), STEPS)
        return state.hparams, metrics.value

    shared, layered = learn(()), learn((LAYERS,))
    accuracy = {
        "soft k-means": right(plain, fixed(balances[0]), test),
        "grid": right(plain, fixed(balances[grid.argmax()]), test),
        "one setting, learnt": right(learnt, shared[0], test),
        "per layer, learnt": right(learnt, layered[0], test),
    }
    return accuracy, shared[1], layered[1], bilevel.softplus_settings(layered[0])


results = [study(jax.random.key(seed)) for seed in range(SEEDS)]
accuracy = {k: 100 * np.array([float(r[0][k]) for r in results]) for k in results[0][0]}
for name, values in accuracy.items():
    mean, error = mean_and_error(values)
    print(f"{name:22}{mean:6.1f}" + (f" ± {error:.1f}" if SEEDS > 1 else "") + " %")

# %% [markdown]
# On record (`benchmarks/unem.py`), five seeds at one and five shots: the same digits, and Omniglot
# within alphabets, by pixels and by a network's features.

# %%
names = {"soft k-means": GREY, "grid": GREEN, "shared": RED, "per layer": BLUE}
rows = [
    (f"{part.replace('omniglot', 'Omniglot').replace('_', ', ')}, {row['shots']}", row)
    for part in ("digits", "omniglot_pixels", "omniglot_network")
    for row in benchmark(f"unem_{part}")["rows"]
]
gains = {title: 100 * row["per_layer_minus_grid"]["mean"] for title, row in rows}

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.6), width_ratios=(1, 1, 1.2))
for i, (label, colour) in enumerate((("one setting", RED), ("per layer", BLUE))):
    band(left, range(STEPS), [r[1 + i] for r in results], label, colour, lw=2)
left.set(xlabel="outer step", ylabel="cross-entropy of queries, nats", title="Learning, here")
left.legend()
for field, colour in (("balance", BLUE), ("temperature", RED)):
    band(middle, range(1, LAYERS + 1), [getattr(r[3], field) for r in results], field, colour, lw=2)
middle.set(xlabel="layer", title="Settings learnt per layer", xticks=range(1, 11))
middle.legend()
for i, (_, row) in enumerate(rows):
    for name, colour in names.items():
        found = row["test_accuracy"][name]
        error = 100 * found["std"] / np.sqrt(len(found["each"]))
        label = name if i == 0 else None
        right.errorbar(100 * found["mean"], -i, xerr=error, fmt="o", color=colour, label=label)
right.set(yticks=-np.arange(len(rows)), yticklabels=[title for title, _ in rows])
right.set(xlabel="queries told right, %", title="On record: features, shots", xlim=(15, 135))
_ = right.legend(fontsize=8, loc="center right")
print("per layer minus grid, points, on record:", {k: round(v, 1) for k, v in gains.items()})

# %% [markdown]
# One learnt setting is about as good as the grid, or worse; a setting per layer is better on all
# features, by 0.7 to 4.5 points. The nine points of the paper are on other features.

# %%
gain = accuracy["per layer, learnt"] - accuracy["grid"]
over_means = accuracy["per layer, learnt"] - accuracy["soft k-means"]
record(
    "11_unem",
    {
        "seeds": SEEDS,
        "percent": {name: values.tolist() for name, values in accuracy.items()},
        "points_over_grid": mean_and_error(gain),
        "points_over_grid_on_record": gains,
        "paper": {"setting": "mini-ImageNet, 5 shots", "grid": 62.6, "per layer": 71.6},
        "rule": "reproduced: 9 points over the grid somewhere; partly: above it on all features",
        "verdict": "reproduced"
        if max(gains.values()) >= 9
        else "partly"
        if min(gains.values()) > 0
        else "not",
    },
)
assert gain.min() >= 1 and over_means.min() >= 8, (gain, over_means)
print("reached: a point above the grid, eight above soft k-means")
