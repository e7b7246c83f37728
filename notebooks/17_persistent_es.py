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
# # Persistent evolution strategies, where truncation is biased
#
# Vicol, Metz and Sohl-Dickstein 2021 (arXiv 2112.13835) tune while training runs, a short piece of
# it per update, without the bias of truncation: every particle keeps its own training state, and
# its scores are weighed by the *sum* of its perturbations since training began. Their first example
# (section 4.1) is influence balancing, where a truncated gradient has the wrong sign. Their figure:
# truncated gradients diverge, PES comes to the optimum, one step of training per update.
#
# ```bash
# pip install -e ".[test]" && python notebooks/17_persistent_es.py
# ```
#
# | | small | `--full` |
# | --- | --- | --- |
# | time on one core | 15 seconds | 1 minute |
# | seeds | 5 | 20 |
# | number of pairs against the error | | 10 to 1,000 |
#
# Number to reach: PES and noise reuse (NRES) end at a mean loss below **0.15**, where truncation
# ends above **100** and the best there is has 0.102.

# %%
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import COLOURS, FULL, GREY, SKY, band, benchmark, mean_and_error, record

import hyperjax as hj

SEEDS = 20 if FULL else 5
UPDATES, RATE, HORIZON, PAIRS, SIGMA, START = 3000, 1e-4, 500, 500, 0.1, 0.5

# %% [markdown]
# ## The problem
#
# $s \leftarrow As + \theta v$ in 23 dimensions (Tallec and Ollivier 2017, arXiv 1702.05043): $A$
# has one half on and above the diagonal, $v$ is $+1$ in the first 10 entries and $-1$ in the other
# 13. The score after each step is $(s_0 - 1)^2 / 2$. Raising $\theta$ raises $s_0$ at first; later
# the thirteen arrive and lower it. An episode has 500 steps, so what is late is what counts.


# %%
class Chain(NamedTuple):
    params: jax.Array
    total: jax.Array  # of the scores so far


def score(s, theta, batch):
    return (s[0] - 1) ** 2 / 2


def step(state, theta, batch):
    push = jnp.where(jnp.arange(23) < 10, 1.0, -1.0)
    s = (state.params + jnp.append(state.params[1:], 0.0)) / 2 + theta * push
    return Chain(s, state.total + score(s, theta, batch))


def init(s, theta):
    return Chain(s, jnp.zeros(()))


@jax.jit
def mean_score(theta):
    """Of a whole episode at one theta."""
    _, end = hj.unroll(step)(theta, init(jnp.ones(23), theta), jnp.zeros(HORIZON))
    return end.total / HORIZON


grid = jnp.linspace(-0.4, 0.6, 1001)
landscape = jax.vmap(mean_score)(grid)
best = float(grid[landscape.argmin()])
exact = float(jax.grad(mean_score)(START))
print(f"best theta {best:.3f}, loss {landscape.min():.3f}; slope at {START}: {exact:.2f}")

# %% [markdown]
# ## Five estimators, one step of training per update
#
# All of them are an `Estimator`, so `tune` and the loop know nothing of the difference. Pairs that
# are *staggered* stand at different places of the episode, so that every update sees all of it.

# %%
one = hj.unroll(step)
noisy = functools.partial(dict, pairs=PAIRS, sigma=SIGMA)
estimators = {
    "truncated, exact": lambda key: hj.hypergradient(one, score, init),
    "truncated ES": lambda key: hj.evolution.antithetic(one, score, init, key=key, **noisy()),
    "PES": lambda key: hj.evolution.persistent(
        one, score, init, key=key, horizon=HORIZON, **noisy()
    ),
    "PES, staggered": lambda key: hj.evolution.persistent(
        one, score, init, key=key, horizon=HORIZON, stagger=True, **noisy()
    ),
    "NRES, staggered": lambda key: hj.evolution.noise_reuse(
        one, score, init, key=key, horizon=HORIZON, stagger=True, **noisy()
    ),
}
pieces = hj.Split(jnp.zeros(1), jnp.zeros(()))


def descend(make, key):
    """theta before each of UPDATES updates."""
    tuner = hj.tune(make(key), optax.sgd(RATE))
    state = tuner.init(jnp.ones(23), jnp.asarray(START))
    return hj.repeat(tuner, state, pieces, UPDATES)[1].hparams


def slopes(make, episodes, key):
    """Of each of the last of `episodes` at START, the mean of its estimates."""
    estimator = make(key)
    once = lambda carry, _: estimator.estimate(jnp.asarray(START), carry, pieces)[::-1]
    carry = estimator.init(jnp.ones(23), jnp.asarray(START))
    found = jax.lax.scan(once, carry, length=HORIZON * episodes)[1]
    return found.grad.reshape(episodes, HORIZON)[-1].mean()


keys = jax.random.split(jax.random.key(0), SEEDS)
paths, gradients = {}, {}
for name, make in estimators.items():
    episodes = 2 if "staggered" in name else 1  # the first ones are cut short there
    both = lambda key, m=make, n=episodes: (descend(m, key), slopes(m, n, key))
    paths[name], gradients[name] = jax.device_get(jax.jit(jax.vmap(both))(keys))

ends = {name: np.asarray(jax.vmap(mean_score)(path[:, -1])) for name, path in paths.items()}
print(f"{'':20}{'slope at the start':>22}{'theta':>10}{'mean loss':>12}")
for name, found in gradients.items():
    mean, error = mean_and_error(found)
    print(f"{name:20}{mean:14.2f} ± {error:5.2f}{paths[name][:, -1].mean():10.3f}"
          f"{ends[name].mean():12.4f}")  # fmt: skip

# %%
figure, (left, right) = plt.subplots(1, 2)
looks = zip(paths.items(), COLOURS, ("-", ":", "-", "--", ":"), strict=False)
for (name, path), colour, line in looks:
    band(left, np.arange(UPDATES), path, name, colour, ls=line)
left.axhline(best, color=GREY, lw=1)
left.text(UPDATES, best - 0.1, "best", color=GREY, ha="right")
left.set(xlabel="update, one training step each", ylabel=r"$\theta$", ylim=(-0.3, 1.2))
left.set_title("Truncation leaves, persistence arrives")
left.legend(loc="upper right")

recorded = benchmark("influence_balancing")
rows = [r for r in recorded["rows"] if r["name"] in {*paths, "full ES"}]
means, errors = zip(*(mean_and_error(r["mean_loss"]) for r in rows), strict=True)
right.barh([r["name"] for r in rows][::-1], means[::-1], xerr=errors[::-1], color=SKY)
right.set_axisbelow(True)
right.axvline(recorded["exact"]["mean_loss"], color=GREY, label="best possible")
right.set(xscale="log", xlabel="mean loss of an episode, 5 seeds", xlim=(0.08, 500))
right.set_title("On record: influence_balancing.json")
_ = right.legend()

# %% [markdown]
# PES in lockstep ends a little low: its updates favour the end of an episode, where each estimate
# weighs the most. Full ES pays 500 training steps for every update of the others. What PES pays is
# variance: it grows with the age of an episode, as perturbations add up. In the full setting:

# %%
spread = {}
for pairs in (10, 30, 100, 300, 1000) if FULL else ():
    for name, rule in (("PES", hj.evolution.persistent), ("NRES", hj.evolution.noise_reuse)):
        make = lambda key, p=pairs, r=rule: r(
            one, score, init, key=key, pairs=p, sigma=SIGMA, horizon=HORIZON, stagger=True
        )
        found = jax.jit(jax.vmap(functools.partial(slopes, make, 2)))(keys)
        spread[f"{name}, {pairs} pairs"] = mean_and_error(found - exact), float(found.std(ddof=1))
for name, ((mean, error), deviation) in spread.items():
    print(f"{name:20} off by {mean:6.2f} ± {error:4.2f}, deviation {deviation:6.2f}")

# %%
unbiased = ("PES", "PES, staggered", "NRES, staggered")
for name in unbiased:
    mean, error = mean_and_error(gradients[name])
    assert abs(mean - exact) < 5 * error, (name, mean, error, exact)
    assert ends[name].max() < 0.15, ends
for name in ("truncated, exact", "truncated ES"):
    assert gradients[name].max() < 0 < exact and ends[name].min() > 100, ends
record(
    "17_persistent_es",
    {
        "seeds": list(range(SEEDS)),
        "exact": {"theta": best, "loss": float(landscape.min()), "slope_at_start": exact},
        "slope_at_start": {name: mean_and_error(found) for name, found in gradients.items()},
        "theta": {name: mean_and_error(path[:, -1]) for name, path in paths.items()},
        "mean_loss": {name: mean_and_error(end) for name, end in ends.items()},
        "error_by_pairs": spread,
        "paper": "arXiv 2112.13835, section 4.1, figure: truncated methods diverge, PES converges",
        "rule": "reproduced: PES below 0.15 and truncation above 100 on every seed",
        "verdict": "reproduced"
        if max(ends[n].max() for n in unbiased) < 0.15 and ends["truncated ES"].min() > 100
        else "not",
    },
)
print(f"reached: PES at {ends['PES, staggered'].max():.3f}, truncation above 100")
