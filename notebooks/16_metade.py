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
# # Differential evolution that tunes itself: MetaDE
#
# MetaDE (arXiv 2502.10470) lets an outer differential evolution choose what an inner one does:
# which vectors it adds, how many, how far, and how it crosses them. The paper reports wins over
# fixed strategies on CEC 2022 with budgets of its own. Number to reach: on a rotated Rastrigin
# function of ten variables the found strategy ends **below the best of four usual ones**, run from
# the same seed as long. What it found is partly a fit to that seed, and how much is below.
#
# ```bash
# pip install -e ".[test]" && python notebooks/16_metade.py
# ```
#
# | | default | `--full` |
# | --- | --- | --- |
# | problems, outer rounds | 1, 6 | 5, 15 |
# | time on one core | 20 s | 2 minutes |

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common import BLUE, FULL, GREY, ORANGE, RED, benchmark, record

from hyperjax import search

jax.config.update("jax_enable_x64", True)
DIM, POINTS, STEPS, LONGER = 10, 32, 100, 5
GENES, ROUNDS, SEEDS = (32, 15, 5) if FULL else (16, 6, 1)
USUAL = {
    "rand/1/bin": search.genes(0.5, 0.9),
    "best/1/bin": search.genes(0.5, 0.9, "best"),
    "current-to-best/1/bin": search.genes(0.5, 0.9, "current", "best"),
    "rand/2/exp": search.genes(0.5, 0.9, "rand", differences=2, crossover="exponential"),
}


def rastrigin(key):
    """Its minimum, 0, moved within the middle 60 % of the box, its axes turned."""
    shift, turn = jax.random.split(key)
    optimum = jax.random.uniform(shift, (DIM,), minval=-3.0, maxval=3.0)
    rotation = jnp.linalg.qr(jax.random.normal(turn, (DIM, DIM)))[0]

    def one(point):
        y = rotation @ (5.12 * (2 * point - 1) - optimum)
        return jnp.sum(y**2 + 10 - 10 * jnp.cos(2 * jnp.pi * y))

    return lambda key, points: jax.vmap(one)(points)


# %% [markdown]
# ## Three lines
#
# A search is a value whose parameters may be traced, so that one search may be the objective of
# another: `meta` makes an `evaluate` of a map from points to searches, and `drive` runs it. The
# same number of genes drawn at random is the control that the paper's claim needs.


# %%
inner = lambda genes: search.differential_evolution(DIM, POINTS, genes)
make = lambda point: inner(search.genes_from_unit(point))


@jax.jit
def contest(key):
    place, fit, outer_key, unseen = jax.random.split(key, 4)
    evaluate = rastrigin(place)
    score = search.meta(make, evaluate, STEPS, key=fit)  # the paper's: every gene, one inner seed

    def finish(genes, key):
        return search.drive(key, inner(genes), evaluate, LONGER * STEPS)[1].scores.min(1)

    ends = {}
    outer = search.differential_evolution(6, GENES, search.genes(0.5, 0.9), most=1)
    for name, chooser in {"MetaDE": outer, "random genes": search.random(6, GENES)}.items():
        _, trials = search.drive(outer_key, chooser, score, ROUNDS)
        ends[name] = search.genes_from_unit(trials.point), trials.scores.min(1)
    # One program for all strategies: genes are numbers
    genes = [genes for genes, _ in ends.values()] + list(USUAL.values())
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(v) for v in leaves]), *genes)
    seeds = jax.random.split(unseen, 5)
    curves = jax.lax.map(lambda g: finish(g, fit), stacked)
    others = jax.lax.map(lambda g: jax.vmap(lambda k: finish(g, k)[-1])(seeds), stacked)
    return jnp.stack([found for _, found in ends.values()]), curves, others


keys = jax.random.split(jax.random.key(0), SEEDS)
found = [jax.device_get(contest(key)) for key in keys]
METHODS = ("MetaDE", "random genes", *USUAL)
outer_curves = np.array([f[0] for f in found])  # [problems, 2, outer rounds]
curves = np.minimum.accumulate(np.array([f[1] for f in found]), axis=2)
same = np.median(curves[:, :, -1], 0)
other = np.median(np.median([f[2] for f in found], axis=2), 0)
print(f"{'Rastrigin, medians':26}{'its seed':>10}{'others':>10}")
for i, method in enumerate(METHODS):
    print(f"{method:26}{same[i]:10.3g}{other[i]:10.3g}")

# %%
figure, (left, right) = plt.subplots(1, 2, gridspec_kw={"width_ratios": (1, 1.25)})
looks = [(BLUE, "-"), (ORANGE, "-"), (RED, "-"), (GREY, "-"), (GREY, "--"), (RED, "--")]
for i, (method, (colour, line)) in enumerate(zip(METHODS, looks, strict=True)):
    left.plot(np.median(curves[:, i], 0), line, color=colour, lw=2, label=method)
left.set(xlabel=f"round of {POINTS} points", ylabel="least value so far", yscale="log")
left.set_title(f"Rastrigin, {DIM} variables, problems: {SEEDS}")
left.legend(fontsize=8)

rows = benchmark("metade")["rows"]
marks = {"MetaDE, power-up": (BLUE, "o", "MetaDE, its seed")}
marks["MetaDE, another seed"] = (BLUE, "D", "MetaDE, other seeds")
marks["random + up"] = (ORANGE, "o", "random genes, their seed")
marks["random, another seed"] = (ORANGE, "D", "random genes, other seeds")
for i, row in enumerate(rows.values()):
    best = row["medians"][row["best_fixed"]]
    for j, (name, (colour, mark, label)) in enumerate(marks.items()):
        decades = np.log10(row["medians"][name] / best)
        filled = colour if mark == "o" else "none"
        place = i + 0.15 * (j - 1.5)
        right.plot(place, np.clip(decades, -4, 4), mark, color=colour, mfc=filled, ms=8,
                   label=label if i == 0 else None)  # fmt: skip
right.axhline(0, color=GREY, ls=":", lw=1.5)
right.set(xticks=range(len(rows)), xticklabels=[name.capitalize() for name in rows])
right.set(ylabel="decades above the best usual strategy", ylim=(-4.5, 7.8))
right.set_yticks((-4, -2, 0, 2, 4), ["≤ −4", "−2", "0", "2", "≥ 4"])
right.set_title("On record, medians of five seeds: lower is better")
_ = right.legend(fontsize=8)

# %% [markdown]
# On record MetaDE is below the best usual strategy on four functions of five where it runs the seed
# it was fitted to, and on one of five from seeds that it has not seen: most of its gain is luck,
# selected. As many genes drawn at random, the best of them run on as long, win four of five and
# three of five. Our default gives every outer round a new inner seed (`meta(..., key=None)`), which
# wins two of five from other seeds.

# %%
usual = same[2:].min()
won = {
    "its seed": int(sum(row["beats_best_fixed"] for row in rows.values())),
    "other seeds": int(sum(row["beats_best_fixed_from_another_seed"] for row in rows.values())),
}
record(
    "16_metade",
    {
        "seeds": SEEDS,
        "medians_of_its_seed": dict(zip(METHODS, same.tolist(), strict=True)),
        "medians_of_other_seeds": dict(zip(METHODS, other.tolist(), strict=True)),
        "won_on_record_of_5": won,
        "paper": "arXiv 2502.10470, CEC 2022 with budgets of its own: wins over fixed strategies",
        "verdict": "reproduced" if same[0] < usual and won["other seeds"] >= 3
        else "partly" if same[0] < usual else "not",
        "rule": "below the best usual strategy on Rastrigin; partly: if so from its own seed, but "
        "from other seeds on fewer than 3 functions of 5 (benchmarks/metade.py)",
    },
)  # fmt: skip
assert same[0] < usual, dict(zip(METHODS, same, strict=True))
print("reached: a strategy that ends below the best of four usual ones")
