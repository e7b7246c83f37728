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
# # Data hyper-cleaning
#
# Some training labels are wrong, nobody knows which, and a small set is known to be right. Give
# every training example a weight and tune the weights for the loss on the right ones. Franceschi et
# al. 2017 (arXiv 1703.01785, section 5.1; numbers from memory) do so on MNIST with 5,000 examples,
# half of them corrupted: test accuracy **0.90** after cleaning, 0.877 without, 0.905 with an
# oracle, and wrong labels found with F1 near **0.91**. They unroll 500 steps for each of 500 outer
# ones; here one loop moves classifier, adjoint and weights together (SOBA, Dagreou et al. 2022,
# arXiv 2201.13409).
#
# ```bash
# pip install -e ".[test]" && python notebooks/05_hyper_cleaning.py
# ```
#
# | | small | `--full`, with `HYPERJAX_DATA` |
# | --- | --- | --- |
# | time on one core | 15 seconds | 5 minutes |
# | data | handwritten digits, 8 x 8, for MNIST; 40 % spoilt | MNIST, 50 % spoilt |
# | seeds, steps of the one loop | 1, 600 | 5, 2,000 |
#
# Number to reach: the weights tell wrong labels from right ones with an AUC of at least **0.9**,
# and cleaning closes at least **half** of the gap between training on everything and the oracle.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common import BLUE, COLOURS, DATA, FULL, GREEN, GREY, RED, band, benchmark, mean_and_error
from common import record as write

import hyperjax as hj
from hyperjax import bilevel, tasks

LARGE = FULL and DATA
SEEDS, STEPS = (5, 2000) if LARGE else (1, 600)

# %% [markdown]
# ## The problem
#
# $L(w, t) = \frac1n \sum_i 2\sigma(t_i)\, \mathrm{CE}(w; x_i, y_i) + \frac{\rho}{2}\|w\|^2$,
# softmax regression, with a real number $t_i$ for every training example, 0 at the start: a weight
# of 1. The upper objective is the loss on clean validation examples. `tasks.cleaning` builds this
# from any labelled data; it spoils the labels and keeps for itself which ones.


# %%
def problem_of(seed):
    return tasks.mnist_cleaning(seed=seed) if LARGE else tasks.digits_cleaning(seed)


def minibatches(problem, key):
    """One training and one validation minibatch for each step of the one loop."""
    train, valid = jax.random.split(key)
    one = {"index": problem.task.batches(train, STEPS)["index"][:, None]}
    return hj.Split(one, {"index": problem.valid_batches(valid, STEPS)["index"]})


def study(seed):
    problem = problem_of(seed)
    task, key = problem.task, jax.random.key(seed)
    rates = {"params_rate": 0.1, "adjoint_rate": 0.1, "hparams_rate": 300.0}
    tuner = bilevel.soba(task.loss, task.score, **rates)
    state = tuner.init(task.init(key), {"trust": jnp.zeros(len(problem.corrupted))})
    state, metrics = jax.jit(lambda s, b: hj.run(tuner, s, b))(state, minibatches(problem, key))
    trust = metrics.hparams["trust"][:: STEPS // 20]
    kept = tasks.retrain(problem, state.hparams["trust"] >= 0, 1.0, steps=40).params
    references = tasks.baselines(problem, steps=40)
    found = tasks.detection(state.hparams["trust"], problem.corrupted)
    return {
        "trust": state.hparams["trust"],
        "wrong": problem.corrupted,
        "auc": jax.vmap(lambda t: tasks.auc(-t, problem.corrupted))(trust),
        "valid_loss": metrics.value,
        "f1": found.f1,
        "cleaned": task.evaluate(kept, task.test)["accuracy"],
        **{name: references[name] for name in ("everything", "clean", "valid")},
    }


runs = jax.device_get([study(seed) for seed in range(SEEDS)])
runs = jax.tree.map(lambda *leaves: np.stack(leaves), *runs)
names = {
    "everything": "all labels as they are, with the clean ones",
    "valid": "the clean ones alone",
    "cleaned": "what is kept, with the clean ones",
    "clean": "the right labels alone, which nobody knows",
}
print("test accuracy after training on")
for name, text in names.items():
    print(f"  {text:48}{runs[name].mean():.4f}")
print(f"AUC {runs['auc'][:, -1].mean():.3f}, F1 {runs['f1'].mean():.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2)
steps = np.arange(20) * (STEPS // 20)
band(left, steps, runs["auc"][:, :20], "AUC of the weights", BLUE)
left.set(xlabel="step", ylabel="AUC, wrong labels against right ones", ylim=(0.45, 1))
left.set_title("Weights learn which labels are wrong")
weights, wrong = 2 / (1 + np.exp(-runs["trust"][0])), runs["wrong"][0]
bins = np.linspace(0, 2, 30)
right.hist(weights[~wrong], bins, color=BLUE, alpha=0.7, label="right labels")
right.hist(weights[wrong], bins, color=RED, alpha=0.7, label="wrong labels")
right.set(xlabel="weight of an example, 1 at the start", ylabel="examples", title="At the end")
right.set_axisbelow(True)
_ = right.legend()

# %% [markdown]
# ## At full size, on record
#
# `benchmarks/bo_rep.py` runs the stochastic family at equal calls on MNIST, 5 seeds, and
# `benchmarks/bo_rep_text.py` cleans BANKING77 with a recurrent network, where the inner problem is
# not convex.

# %%
mnist = benchmark("bo_rep")["cleaning"]
text = {t: v["rows"] for t, v in benchmark("bo_rep_text")["tasks"].items() if "cleaning" in t}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
rows = {k: v["test"] for k, v in mnist["methods"].items()}
left.errorbar(
    [r["mean"] for r in rows.values()],
    list(rows),
    xerr=[r["sd"] / 5**0.5 for r in rows.values()],
    fmt="o",
    color=BLUE,
    label="cleaned",
)
short = {
    "everything": ("all labels", RED),
    "valid": ("clean ones", GREY),
    "clean": ("oracle", GREEN),
}
for name, (label, colour) in short.items():
    left.axvline(mnist["baselines"][name]["mean"], color=colour, ls=":", label=label)
left.set(xlabel="test accuracy, MNIST, 5 seeds", title="Which method hardly matters")
left.legend(fontsize=9, loc="center left")
order = sorted(text["cleaning 0.3"], key=lambda row: row["method"] == "none")  # the last one, grey
for row, colour in zip(order, COLOURS, strict=True):
    every = [next(r for r in rows if r["method"] == row["method"]) for rows in text.values()]
    levels = [float(name.split()[1]) for name in text]
    points = sorted(zip(levels, (r["test_accuracy"]["mean"] for r in every), strict=True))
    line = ":" if row["method"] == "none" else "-"
    right.plot(*zip(*points, strict=True), line, marker="o", color=colour, label=row["method"])
right.set(xlabel="labels drawn anew", ylabel="test accuracy, 10 intents, 5 seeds")
right.set(title="BANKING77: a few points", xticks=(0.2, 0.3, 0.4))
_ = right.legend(fontsize=9, ncol=2)

# %% [markdown]
# Weights below 1 accuse; what they accuse is thrown out, and training on the rest comes near the
# oracle. So does training on the clean examples alone, where there are as many as here: to know
# which labels are wrong is worth more than the accuracy. On texts 450 calls leave an AUC of 0.6 to
# 0.79.

# %%
gap = (runs["cleaned"] - runs["everything"]).mean() / (runs["clean"] - runs["everything"]).mean()
assert runs["auc"][:, -1].min() > 0.9, runs["auc"][:, -1]
assert gap > 0.5, gap
write(
    "05_hyper_cleaning",
    {
        "seeds": list(range(SEEDS)),
        "setting": "MNIST, 5,000 / 5,000 / 10,000, half relabelled" if LARGE else "digits",
        "auc": mean_and_error(runs["auc"][:, -1]),
        "f1": mean_and_error(runs["f1"]),
        "test_accuracy": {name: mean_and_error(runs[name]) for name in names},
        "gap_closed": float(gap),
        "paper": "arXiv 1703.01785, section 5.1, from memory: test accuracy 0.900 to 0.901 of "
        "0.877 (baseline) and 0.905 (oracle); F1 0.91 to 0.92",
        "rule": "reproduced: F1 at least 0.91 and accuracy within 0.01 of the oracle; partly: half "
        "of the gap closed",
        "verdict": "reproduced"
        if runs["f1"].mean() >= 0.91 and (runs["clean"] - runs["cleaned"]).mean() < 0.01
        else "partly",
    },
)
print(f"reached: AUC {runs['auc'][:, -1].min():.3f}, {gap:.0%} of the gap closed")
