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
# # Delta-STN, and a best response sampled from a population
#
# A self-tuning network learns weights and their answer to hyperparameters from perturbed
# hyperparameters. Delta-STN (Bae and Grosse 2020, arXiv 2010.13514) measures hyperparameters from
# the current ones, trains the weights there without perturbation, and learns the answer from
# linearized predictions; the paper has figures and no numbers for what this gains. The other way to
# a best response is a network over the whole range, fitted to a population of hyperparameters
# (Lorraine and Duvenaud 2018, arXiv 1802.09419; also figures). On ridge regression both can be held
# against the exact answer.
#
# ```bash
# python notebooks/07_delta_stn.py
# ```
#
# | | default | `--full` |
# | --- | --- | --- |
# | time on one core | about 15 seconds | half a minute |
# | training steps, seeds | 1,000, 1 | 3,000, 5 |
#
# To reach: Delta-STN's weights are those at the current penalty to **1e-9**, where STN's are off by
# **1e-4** or more; its derivative is **nearer than STN's** after 1,000 steps; and the global
# network, which saw only sampled penalties, finds one whose validation loss is **within 5 %** of
# the best one's.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import BLUE, FULL, GREEN, GREY, RED, band, benchmark, record

import hyperjax as hj
from hyperjax import bilevel, hypernet

jax.config.update("jax_enable_x64", True)
SEEDS, STEPS = (5, 3000) if FULL else (1, 1000)
GROUPS, EVERY, FEATURES = 8, 20, 8
LOG_PENALTY = 1.0  # where responses are compared


def problem(seed):
    """Training and validation rows as moments: X'X / n and X't / n."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(FEATURES, FEATURES)) / np.sqrt(FEATURES)
    x = rng.normal(size=(2, 40, FEATURES)) @ mix
    t = x @ rng.normal(size=FEATURES) + rng.normal(size=(2, 40))
    moments = lambda x, t: (x.T @ x / len(t), x.T @ t / len(t), t @ t / len(t))
    return [jax.tree.map(jnp.asarray, moments(*part)) for part in zip(x, t, strict=True)]


def fit(w, rows):
    a, b, c = rows
    return w @ a @ w / 2 - b @ w + c / 2


def exact(train, z):
    a, b, _ = train
    return jnp.linalg.solve(a + jnp.exp(z) * jnp.eye(FEATURES), b)


# %% [markdown]
# ## 1. The answer in a neighbourhood
#
# The weights are `w + z D`, an affine rule. Nothing is tuned (`set_to_zero`), so that what is
# learnt can be compared with the weights and the derivative in closed form, every 20 steps.


# %%
@functools.partial(jax.jit, static_argnums=0)
def learn(method, train, key):
    """Relative errors of the weights and of their derivative [records] along training."""
    at = lambda w, z, batch: fit(w, train) + jnp.exp(z) * jnp.sum(w**2) / 2
    net = hypernet.structured({"": hypernet.affine()})
    still, sgd, z = optax.set_to_zero(), optax.sgd(0.02, momentum=0.9), jnp.asarray(LOG_PENALTY)
    if method == "STN":
        tuner = bilevel.self_tuning(at, at, net, sgd, outer=still)
    else:
        tuner = bilevel.delta_self_tuning(lambda w, z, batch: w, at, at, net, sgd, outer=still)
    first, answer, draws = jax.random.split(key, 3)
    start = net.init(answer, jax.random.normal(first, (FEATURES,)), z)
    keys = jax.random.split(draws, (STEPS // EVERY, EVERY))
    data = jnp.zeros((*keys.shape, GROUPS))  # the loss has its data: a batch is only draws
    one = bilevel.Draw(data[:, 0, :1], keys[:, 0])
    right, slope = jax.jvp(lambda z: exact(train, z), (z,), (1.0,))
    off = lambda x, y: jnp.linalg.norm(x - y) / jnp.linalg.norm(y)
    where = z if method == "STN" else jnp.zeros(())  # Delta-STN sees the distance from z

    def step(state, split):
        state, _ = tuner.step(state, split)
        found = jax.jvp(lambda z: net.apply(state.params, z), (where,), (jnp.ones(()),))
        return state, (off(found[0], right), off(found[1], slope))

    state = tuner.init(start, bilevel.gaussian(z, 0.1))
    return jax.lax.scan(step, state, hj.Split(bilevel.Draw(data, keys), one))[1]


problems = [problem(seed) for seed in range(SEEDS)]
errors = {
    method: np.stack([learn(method, p[0], jax.random.key(s)) for s, p in enumerate(problems)], 1)
    for method in ("STN", "Delta-STN")
}  # [weights or derivative, seeds, records]
for method, (weights, slope) in errors.items():
    off = weights[:, -1].mean(), slope[:, -1].mean()
    print("{:10} weights off by {:.0e}, derivative by {:.2f}".format(method, *off))

# %% [markdown]
# ## 2. The answer over the whole range
#
# `amortized` trains one network on penalties sampled from all of the range. Its weights are then
# read off anywhere, and the best penalty is found without any more training.


# %%
@jax.jit
def sampled(train, valid, key):
    """Validation losses on a grid of log penalties: exact weights, predicted ones."""
    at = lambda w, z, batch: fit(w, train) + jnp.exp(z) * jnp.sum(w**2) / 2
    anywhere = lambda key, z: jax.random.uniform(key, minval=-6.0, maxval=2.0)
    net = hypernet.generated(body=hypernet.mlp((32,)))
    adam = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))
    inner = hj.inner(hypernet.amortized(at, net, anywhere), lambda z: adam)
    first, draws = jax.random.split(key)
    z = jnp.zeros(())
    batches = jnp.zeros(STEPS), jax.random.split(draws, (STEPS, GROUPS))
    phi, _ = hj.unroll(inner.step)(
        z, inner.init(net.init(first, jnp.zeros(FEATURES), z), z), batches
    )
    score = lambda weights: jax.vmap(lambda z: fit(weights(z), valid))(GRID)
    return score(lambda z: exact(train, z)), score(lambda z: net.apply(phi, z))


GRID = jnp.linspace(-6.0, 2.0, 81)
found = [np.stack(sampled(*p, jax.random.key(seed))) for seed, p in enumerate(problems)]
true, predicted = np.stack(found, 1)  # [seeds, grid]
chosen = np.take_along_axis(true, predicted.argmin(1)[:, None], 1)[:, 0]
excess = chosen / true.min(1) - 1
print(f"global network: validation loss at its penalty {excess.mean():.1%} above the best one")

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3.4))
trained = EVERY * np.arange(1, STEPS // EVERY + 1)
for method, colour in (("STN", RED), ("Delta-STN", BLUE)):
    band(left, trained, errors[method][0], method, colour, lw=2)
    band(middle, trained, errors[method][1], method, colour, lw=2)
left.set(yscale="log", xlabel="training step", ylabel="relative error", title="Weights")
middle.set(yscale="log", xlabel="training step", title="Their derivative in the penalty")
left.legend()
right.plot(GRID, true[0], color=GREY, lw=2, label="exact")
right.plot(GRID, predicted[0], "--", color=GREEN, lw=2, label="global network")
right.plot(GRID[predicted[0].argmin()], chosen[0], "o", color=GREEN)
right.set(xlabel="log penalty", ylabel="validation loss", title="Over the whole range, seed 0")
_ = right.legend()

# %% [markdown]
# On record: `delta_stn` has the same on the concrete data over five seeds, `response_fidelity` the
# cosine of the hypergradient with the exact one along whole runs, `global_best_response` a network
# from ten penalties to all weights of a classifier of digits, trained anew where it says.

# %%
ridge, fidelity, whole = map(benchmark, ("delta_stn", "response_fidelity", "global_best_response"))
for cell in ridge["rows"]:
    if cell["scale"] == 0.1:
        off = {m: cell[m]["derivative"][1] for m in ("stn", "delta_stn")}
        print(
            "concrete, log penalty {:4}: derivative off by {stn:.2f}, {delta_stn:.2f}".format(
                cell["log_penalty"], **off
            )
        )
for row in fidelity["rows"]:
    least = min(row["cosine_least_each"])
    print(f"{row['problem']:20}{row['method']:11}least cosine over five runs {least:.3f}")
losses = {name: part["mean"] for name, part in whole["valid_loss"].items()}
print("\n".join(f"{name:45}{loss:.3f}" for name, loss in losses.items()))

# %% [markdown]
# Measuring from the current hyperparameters makes the weights exact, and linearizing keeps the
# curvature of the answer out of its derivative: on a perceptron the hypergradient of Delta-STN
# never leaves the exact one by far, that of STN does.

# %%
weights = {m: e[0][:, -1] for m, e in errors.items()}
slopes = {m: e[1][:, 1000 // EVERY - 1] for m, e in errors.items()}
anew = losses["global hypernetwork, trained anew"] <= losses["best of grid, one common penalty"]
claims = {
    "weights exact": ridge["verdicts"]["weights of Delta-STN to 1e-12 in every cell"],
    "derivative no worse": ridge["verdicts"]["Delta-STN no worse at every penalty"],
    "global network no worse than a grid": anew,
}
record(
    "07_delta_stn",
    {
        "seeds": SEEDS,
        "weights_off": {m: v.tolist() for m, v in weights.items()},
        "derivative_off_after_1000": {m: v.tolist() for m, v in slopes.items()},
        "global_excess": excess.tolist(),
        "claims": claims,
        "paper": {"Delta-STN": "arXiv 2010.13514, figures", "global": "arXiv 1802.09419, figures"},
        "rule": "reproduced if all three claims hold on record, partly if some",
        "verdict": ["not", "partly", "partly", "reproduced"][sum(claims.values())],
    },
)
assert weights["Delta-STN"].max() < 1e-9 and weights["STN"].min() > 1e-4, weights
assert np.all(slopes["Delta-STN"] < slopes["STN"]), slopes
assert excess.max() < 0.05, excess
print("reached: exact weights, a nearer derivative, and a penalty within 5 % of the best")
