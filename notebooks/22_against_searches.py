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
# # Against Optuna's TPE, CMA-ES and random search, at equal compute
#
# A search trains a model from start to end to learn one number. A population that descends its own
# hypergradients learns a slope every 20 steps, at some five times the cost of plain training. Here
# its members tune nine hyperparameters that way, and each search gets five times as many trainings,
# four at a time. Numbers to reach, of our own making: with the same number of training steps a
# validation loss **below random search's**; with the same compute, over the five seeds of `--full`,
# a test loss **below that of all three**. After it comes what benchmarks have on record for other
# tasks, on one of which the searches are not beaten; five more stand in `benchmarks/versus.py`.
#
# ```bash
# pip install -e ".[test]" && python notebooks/22_against_searches.py
# ```
#
# | | default | `--full` |
# | --- | --- | --- |
# | members, training steps, trainings of a search | 4, 300, 20 | 8, 600, 40 |
# | seeds; tasks | 1; digits | 5; digits, and with `HYPERJAX_DATA` a9a |
# | time on one core | 30 s | 3 minutes |

# %%
import functools
import time

import cmaes
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import optuna
from common import BLUE, DATA, FULL, GREEN, GREY, ORANGE, band, benchmark, mean_and_error, record

import hyperjax as hj
from hyperjax import tasks

optuna.logging.set_verbosity(optuna.logging.WARNING)
SEEDS = range(500, 505) if FULL else range(500, 501)
NAMES = ("digits", "a9a") if FULL and DATA else ("digits",)
MEMBERS, WINDOWS = (8, 30) if FULL else (4, 15)
WINDOW = 20  # training steps per hypergradient: 600 or 300 in all
COST, BATCH = 5, 4  # plain trainings that a tuned one costs; points per round of a search
ROUNDS = MEMBERS * COST // BATCH


def training(task):
    lifted = lambda f: task.space.lift(f)
    inner = hj.inner(lifted(task.loss), lambda raw: task.optimizer(task.space.constrain(raw)))
    return inner, hj.unroll(inner.step), lifted(task.score)


def batches(task, key, windows, steps):
    draw = jax.vmap(lambda k: task.batches(k, steps))(jax.random.split(key, windows))
    return hj.Split(draw, hj.copies(task.valid, windows))


# %% [markdown]
# ## Ours
#
# One outer step of Adam every 20 training steps, a tournament after every third: the defaults of
# `hyperjax tune`.


# %%
def tuned(task):
    inner, response, score = training(task)
    tuner = hj.tune(hj.hypergradient(response, score, inner.init), optax.adam(0.1))
    pop = hj.population(tuner, hj.exchange.tournament(hj.exchange.perturb(0.3), every=3))

    @jax.jit
    def run(key):
        weights, settings, data, exchange = jax.random.split(key, 4)
        params = jax.vmap(task.init)(jax.random.split(weights, MEMBERS))
        hparams = jax.vmap(task.space.sample)(jax.random.split(settings, MEMBERS))
        splits = batches(task, data, WINDOWS, WINDOW)
        state, metrics = hj.run(pop, pop.init(exchange, params, hparams), splits)
        scores = jnp.where(metrics.members.finite, metrics.members.value, jnp.inf)
        best = jax.tree.map(lambda v: v[jnp.argmin(scores[-1])], state.members.carry.params)
        return scores.min(1), task.evaluate(best, task.test)["loss"]

    return run


# %% [markdown]
# ## Theirs
#
# A search proposes points of the unit cube; `Space.from_unit` makes hyperparameters of them, and
# four models train at once. First weights and batches are the same for all points of a seed. The
# model of the best point is looked at on the test part, once.


# %%
def trainer(task):
    inner, response, score = training(task)
    plain = hj.tune(hj.score_only(response, score, inner.init), optax.set_to_zero())
    pop = hj.population(plain, hj.exchange.isolation())

    @jax.jit
    def evaluate(points, key):
        weights, data, unused = jax.random.split(key, 3)
        first = task.init(weights)
        params = hj.copies(first, BATCH)
        state = pop.init(unused, params, task.space.from_unit(points))
        split = jax.tree.map(lambda v: v[0], batches(task, data, 1, WINDOW * WINDOWS))
        state, metrics = pop.step(state, split)
        test = jax.vmap(lambda p: task.evaluate(p, task.test)["loss"])(state.members.carry.params)
        return metrics.members.value, test

    return evaluate


def searches(task):
    names, dim = task.space.names, len(task.space.names)
    tpe = lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    study = lambda seed: optuna.create_study(sampler=tpe(seed))
    cma = lambda seed: cmaes.CMA(np.full(dim, 0.5), 0.25, seed=seed, population_size=BATCH)
    return {
        "random search": hj.search.random(dim, BATCH),
        "Optuna TPE": hj.search.from_optuna(study, names, BATCH),
        "CMA-ES": hj.search.from_cmaes(cma, BATCH),
    }


def searched(search, evaluate, seed):
    """The least validation loss after each round, and the test loss of that model."""
    key, both = jax.random.key(seed), lambda _, points: evaluate(points, jax.random.key(seed))
    _, trials = hj.search.drive_on_host(key, search, both, ROUNDS, has_aux=True)
    scores = np.nan_to_num(np.asarray(trials.scores), nan=np.inf)
    best = np.unravel_index(scores.argmin(), scores.shape)
    return np.minimum.accumulate(scores.min(1)), np.asarray(trials.aux)[best]


# %%
OURS = f"hypergradients, {MEMBERS} members"
curves, losses, seconds = {}, {}, {}
for name in NAMES:
    task = tasks.get(name)
    evaluate, run = trainer(task), tuned(task)
    # Compiled here, so that it is not in the seconds.
    at = jax.ShapeDtypeStruct((BATCH, len(task.space.names)), jnp.float32)
    evaluate = evaluate.lower(at, jax.random.key(0)).compile()
    run = run.lower(jax.random.key(0)).compile()
    methods = {OURS: lambda seed, run=run: run(jax.random.key(seed))}
    for label, search in searches(task).items():
        methods[label] = functools.partial(searched, search, evaluate)
    for method, one in methods.items():
        began = time.process_time()
        found = [jax.device_get(one(seed)) for seed in SEEDS]
        seconds[name, method] = (time.process_time() - began) / len(SEEDS)
        curves[name, method] = np.array([curve for curve, _ in found])
        losses[name, method] = np.array([test for _, test in found], float)
    print(f"{name}, {len(task.space.names)} hyperparameters: test loss, CPU seconds per seed")
    for method in methods:
        mean, error = mean_and_error(losses[name, method])
        print(f"  {method:28}{mean:8.4f} +- {error:6.4f}{seconds[name, method]:8.2f} s")

# %% [markdown]
# ## On record
#
# Test losses over that of the best of TPE and random search, which is 1: below it we win. Digits:
# 32 members, the same number of training steps for all (so that ours took three to five times
# the seconds). MNIST and CIFAR-10: self-tuning networks (`bilevel.self_tuning`) and Delta-STN, the
# searches with twice to three times their compute. CIFAR-10 is where the first loses clearly and
# the second draws. Between the searches themselves, on noisy digits with 120 trainings each,
# CMA-ES and TPE end well below random search; no method of ours takes part.


# %%
def on_record():
    """(task, method, test losses of its seeds over the mean of the best search)."""
    rows = {row["name"]: np.array(row["test_loss"]) for row in benchmark("tune_digits")["rows"]}
    least = min(rows["random search"].mean(), rows["Optuna TPE"].mean())
    yield "digits", "population", rows["tuned (unroll)"] / least
    for name, label in (("stn_mnist", "MNIST"), ("stn_cifar", "CIFAR-10")):
        summary = benchmark(name)["summary"]
        each = {method: np.array(row["test_loss"]["each"]) for method, row in summary.items()}
        least = min(each["random search"].mean(), each["TPE"].mean())
        for method in ("STN", "Delta-STN"):
            yield label, method, each[method] / least


ratios = list(on_record())
figure, (left, right) = plt.subplots(1, 2, gridspec_kw={"width_ratios": (1.3, 1)})
COLOUR = dict(zip((OURS, *searches(task)), (BLUE, GREY, ORANGE, GREEN), strict=True))
for method, colour in COLOUR.items():
    curve = curves["digits", method]
    cost = MEMBERS * COST / curve.shape[1] * np.arange(1, curve.shape[1] + 1)
    band(left, cost, curve, method, colour, lw=2)
left.set(xlabel="compute, in plain trainings", ylabel="least validation loss, nats")
left.set(yscale="log", yticks=(0.05, 0.1, 0.2, 0.5, 1, 2), ylim=(0.04, 2.6))
left.set_yticklabels(["0.05", "0.1", "0.2", "0.5", "1", "2"])
left.minorticks_off()
left.set_title(f"Digits, nine hyperparameters, seeds: {len(SEEDS)}")
left.legend(fontsize=9)
for i, (_, _, ratio) in enumerate(ratios):
    mean, error = mean_and_error(ratio)
    right.errorbar(mean, -i, xerr=error, fmt="o", color=BLUE, ms=8, capsize=4)
right.axvline(1, color=GREY, lw=1.5, ls=":")
right.set_yticks(-np.arange(len(ratios)), [f"{label}\n{method}" for label, method, _ in ratios])
right.set(xlim=(0.5, 1.25), ylim=(0.5 - len(ratios), 0.5))
right.set(xlabel="test loss over the best search's (1 s.e.)")
right.set_title("On record, five seeds each")

searching = {k: v["median"] for k, v in benchmark("search_adapters")["rows"].items()}
print("noisy digits, 120 trainings, median validation loss:", end=" ")
print(", ".join(f"{k} {searching[k]:.3f}" for k in ("random", "TPE", "CMA-ES")))

# %% [markdown]
# Where searches win or draw: where a run is so short that no slope can be learnt, where the score
# is rugged, where the space is discrete, and on CIFAR-10 above, where random search is hard to beat
# with four trainings. Where they cannot follow: hundreds of hyperparameters.

# %%
won, clearly = {}, {}
for name in NAMES:
    ours = losses[name, OURS]
    gaps = [mean_and_error(losses[name, other] - ours) for other in COLOUR if other != OURS]
    won[name] = all(mean > 0 for mean, _ in gaps)
    clearly[name] = all(mean > 2 * error for mean, error in gaps)
record(
    "22_against_searches",
    {
        "seeds": len(SEEDS),
        "test_loss": {name: {m: losses[name, m].tolist() for m in COLOUR} for name in NAMES},
        "cpu_seconds_per_seed": {name: {m: seconds[name, m] for m in COLOUR} for name in NAMES},
        "won": won,
        "won_by_two_standard_errors": clearly,
        "on_record": [[label, method, float(r.mean())] for label, method, r in ratios],
        "paper": "none: the claim is our own",
        "verdict": "reproduced"
        if all(clearly.values())
        else "partly"
        if any(won.values())
        else "not",
        "rule": "test loss below that of every search by two standard errors of the paired "
        "difference, on every task; partly: below in the mean, on some",
    },
)
same_steps = curves["digits", "random search"][:, MEMBERS // BATCH - 1].mean()
ours = curves["digits", OURS][:, -1].mean()
assert ours < same_steps, (ours, same_steps)
means = {method: float(losses["digits", method].mean()) for method in COLOUR}
assert not FULL or min(means, key=means.get) == OURS, means
print(f"reached: {ours:.3f}, random search {same_steps:.3f} after as many training steps")
