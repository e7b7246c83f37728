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
# # The bilevel family on one page: objective against gradient calls
#
# Bilevel algorithms move parameters, hyperparameters and the adjoint vector together. Two claims:
# with variance reduction, SABA converges to the solution at constant steps, as no other stochastic
# one does (Dagréou et al. 2022, arXiv 2201.13409); and BO-REP, whose outer steps have a length that
# is chosen, is ahead where curvature grows with the gradient, as in recurrent networks (Hao et al.
# 2024, arXiv 2401.09587). Both papers have figures and no numbers. Five algorithms run here on a
# finite sum whose solution is known; all fourteen, on three problems, are on record.
#
# ```bash
# python notebooks/10_bilevel_family.py
# ```
#
# | | default | `--full` |
# | --- | --- | --- |
# | time on one core | about 20 seconds | about a minute |
# | passes over the training rows, seeds | 200, 1 | 400, 5 |
#
# To reach, in equal numbers of calls: the gap of SABA is **under a hundredth** of that of every
# other stochastic method, and each of these has closed **nine tenths** of the gap.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common import BLUE, FULL, GREEN, ORANGE, PURPLE, RED, benchmark, record

import hyperjax as hj
from hyperjax import bilevel

jax.config.update("jax_enable_x64", True)
SEEDS, PASSES = (5, 400) if FULL else (1, 200)
ROWS, BATCH, SIZE, DIMS = 1024, 32, 40, 10

# %% [markdown]
# Each row $i$ has a quadratic $\frac12 y'A_iy - c_i'y - y'Bx$ in the parameters $y$, with
# eigenvalues of the mean from 0.1 to 1; the score is $\frac12\|y - t_i\|^2 + 0.05\|x\|^2$ over as
# many rows. So $y^*(x)$ is linear in the hyperparameters $x$ and the best $x$ is known.


# %%
def quadratic(seed):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    mean = basis * np.geomspace(0.1, 1, SIZE) @ basis.T
    noise = rng.normal(size=(ROWS, SIZE))
    noise -= noise.mean(0)  # rows differ in slope and in curvature along the first axes
    arrays = {
        "mean": mean,
        "scale": 1 + 0.5 * np.sign(rng.permutation(ROWS) - ROWS / 2 + 0.5),
        "cross": rng.normal(size=(SIZE, DIMS)) / np.sqrt(SIZE),
        "shift": noise / np.sqrt(SIZE) + rng.normal(size=SIZE) / np.sqrt(SIZE),
        "goal": rng.normal(size=SIZE) + rng.normal(size=(ROWS, SIZE)),
    }
    return jax.tree.map(jnp.asarray, arrays)


def losses(d):
    def loss(y, x, rows):
        curve = jnp.mean(d["scale"][rows]) * (y @ d["mean"] @ y) / 2
        return curve - jnp.mean(d["shift"][rows], 0) @ y - y @ d["cross"] @ x

    def score(y, x, rows):
        return jnp.mean(jnp.sum((y - d["goal"][rows]) ** 2, -1)) / 2 + 0.05 * jnp.sum(x**2)

    return loss, score


def gaps(d, x):
    """(F - F*) / (F at zero - F*) for hyperparameters [steps, 10]."""
    slope = jnp.linalg.solve(d["mean"], d["cross"])
    miss = jnp.linalg.solve(d["mean"], d["shift"].mean(0)) - d["goal"].mean(0)
    best = -jnp.linalg.solve(slope.T @ slope + 0.1 * jnp.eye(DIMS), slope.T @ miss)
    value = lambda x: jnp.sum((slope @ x + miss) ** 2) / 2 + 0.05 * jnp.sum(x**2)
    low = value(best)
    return (jax.vmap(value)(x) - low) / (value(jnp.zeros(DIMS)) - low)


# %% [markdown]
# A factory per algorithm, with the step sizes that the benchmark found; all are tuners. What
# differs is how many minibatches a step wants. HOAG sees all rows and is charged for them.

# %%
rates = {"params_rate": 0.4, "adjoint_rate": 0.4, "hparams_rate": 1e-3}
grow = lambda k: 1 + 0.1 * k ** (1 / 3)
family = {  # name: factory, minibatches of a step (0: all rows at once), colour
    "soba": (functools.partial(bilevel.soba, **rates), 1, BLUE),
    "saba": (
        functools.partial(
            bilevel.saba, **rates, train_blocks=ROWS // BATCH, valid_blocks=ROWS // BATCH
        ),
        1,
        RED,
    ),
    "bo_rep": (
        functools.partial(bilevel.bo_rep, params_rate=0.8, adjoint_rate=0.8, distance=3e-3),
        4,
        GREEN,
    ),
    "f2sa": (
        functools.partial(
            bilevel.f2sa,
            inner_rate=0.8,
            outer_rate=lambda k: 0.1 / grow(k),
            multiplier=lambda k: 3 * grow(k),
        ),
        11,
        ORANGE,
    ),
    "hoag": (
        functools.partial(
            bilevel.hoag,
            lower=bilevel.accelerated(smoothness=1.01, convexity=0.099),
            tolerances=bilevel.geometric_tolerance(0.1, 0.9),
            cg_maxiter=200,
        ),
        0,
        PURPLE,
    ),
}
PER_STEP = {
    "soba": 3,
    "saba": 3,
    "bo_rep": 4,
    "f2sa": 32,
    "hoag": 17 * ROWS // BATCH,
}  # calls, about


@functools.partial(jax.jit, static_argnums=0)
def trace(name, d, key):
    """Passes and gap after every step, until all rows have been looked at PASSES times."""
    make, batches, _ = family[name]
    tuner, steps = make(*losses(d)), PASSES * ROWS // BATCH // PER_STEP[name]
    state = tuner.init(jnp.zeros(SIZE), jnp.zeros(DIMS))
    if batches:
        number = jax.random.randint(key, (2, steps, batches), 0, ROWS // BATCH, jnp.int32)
        rows = number[..., None] * BATCH + jnp.arange(BATCH, dtype=jnp.int32)
        blocks = bilevel.Block(number, rows) if name == "saba" else rows
        split = hj.Split(*(jax.tree.map(lambda v, i=i: v[i], blocks) for i in (0, 1)))
        split = split._replace(valid=jax.tree.map(lambda v: v[:, 0], split.valid))
        state, metrics = hj.run(tuner, state, split)
    else:
        everything = jnp.arange(ROWS, dtype=jnp.int32)
        state, metrics = hj.repeat(tuner, state, hj.Split(everything[None], everything), steps)
    asked = metrics.info.calls
    rows = BATCH if batches else ROWS
    passes = jnp.cumsum(asked.gradients + asked.products) * rows / ROWS
    return passes - passes[0], gaps(d, metrics.hparams)


runs = {
    name: [trace(name, quadratic(seed), jax.random.key(seed)) for seed in range(SEEDS)]
    for name in family
}
grid = np.geomspace(1, PASSES, 60)
curves = {
    name: np.stack([np.exp(np.interp(grid, p, np.log(np.maximum(g, 1e-16)))) for p, g in found])
    for name, found in runs.items()
}
print(f"gap after {PASSES} passes, median of {SEEDS} seeds")
for name, found in curves.items():
    print(f"{name:8}{np.median(found[:, -1]):10.1e}")

# %% [markdown]
# On record (`bilevel_curves`): fourteen algorithms and three problems, over five seeds, with
# step sizes chosen for each; bands are the range of the seeds. `bo_rep_text` has the reduced tasks
# of BO-REP's paper: short texts read by a recurrent network.

# %%
problems = benchmark("bilevel_curves")["problems"]
figure, axes = plt.subplots(1, 4, figsize=(11, 4))
for name, (*_, colour) in family.items():
    middle = np.median(curves[name], 0)
    axes[0].loglog(grid, middle, color=colour, lw=2, label=name)
    axes[0].fill_between(grid, curves[name].min(0), curves[name].max(0), color=colour, alpha=0.2)
final = {}
for axis, (problem, found) in zip(axes[1:], problems.items(), strict=True):
    final[problem], x = {}, np.geomspace(1, found["passes_budget"], 80)
    for name, algorithm in found["algorithms"].items():
        values = np.stack(
            [
                np.interp(
                    x, run["passes"], np.log(np.maximum([m[0] for m in run["measures"]], 1e-16))
                )
                for run in algorithm["runs"]
            ]
        )
        final[problem][name] = float(np.exp(np.median(values[:, -1])))
        colour = family[name][-1] if name in family else "#cccccc"
        order = dict(color=colour, zorder=3 if name in family else 1)
        axis.plot(x, np.exp(np.median(values, 0)), lw=1.8, **order)
        if name in family:
            low, high = np.exp(values.min(0)), np.exp(values.max(0))
            axis.fill_between(x, low, high, alpha=0.2, lw=0, **order)
    axis.set(xscale="log", yscale="log", title=f"On record: {problem}")
    axis.set(xlabel="passes", ylabel=found["measures"][0].split(",")[0])
axes[2].set(ylim=(0.32, 0.5), yticks=(0.33, 0.4, 0.5), yticklabels=("0.33", "0.4", "0.5"))
axes[3].set(ylim=(0.25, 2.5), yticks=(0.3, 0.5, 1, 2), yticklabels=("0.3", "0.5", "1", "2"))
for axis in axes[2:]:
    axis.minorticks_off()
axes[0].set(xlabel="passes", ylabel="(F - F*) / (F at the start - F*)", title="Here")
_ = axes[0].legend(loc="lower left")

texts = benchmark("bo_rep_text")["tasks"]
place = {task: 1 + part["order_by_validation_loss"].index("bo_rep") for task, part in texts.items()}
print(
    "\nfirst on record, by problem:", {p: min(found, key=found.get) for p, found in final.items()}
)
print("place of bo_rep among seven, by task of its paper:", place)

# %% [markdown]
# SABA's gap falls on, the others end at a floor set by their constant steps, and HOAG, which looks
# at all rows and finds its steps itself, is erratic at first. On MNIST cleaning BO-REP comes first,
# on the short texts it does not: its length of step, chosen on other seeds like all others' rates,
# is no advantage there.

# %%
end = {name: found[:, -1] for name, found in curves.items()}
others = np.min([end[name] for name in ("soba", "bo_rep", "f2sa")], axis=0)
claims = {
    "SABA first on a finite sum": min(final["quadratic"], key=final["quadratic"].get) == "saba",
    "BO-REP first on texts": all(p == 1 for p in place.values()),
}
record(
    "10_bilevel_family",
    {
        "seeds": SEEDS,
        "passes": PASSES,
        "gap": {name: values.tolist() for name, values in end.items()},
        "on_record": final,
        "bo_rep_place_of_seven": place,
        "claims": claims,
        "paper": {"SABA": "arXiv 2201.13409, figures", "BO-REP": "arXiv 2401.09587, figures"},
        "rule": "reproduced if both claims hold on record, partly if one",
        "verdict": ["not", "partly", "reproduced"][sum(claims.values())],
    },
)
assert np.all(end["saba"] < 0.01 * others), end
assert max(end[name].max() for name in ("soba", "saba", "bo_rep", "f2sa")) < 0.1, end
print("reached: SABA a hundred times nearer than the others, and all within a tenth")
