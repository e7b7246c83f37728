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
# # Ten thousand weight decays
#
# Implicit differentiation needs vectors as large as the weights, whatever the number of
# hyperparameters. Lorraine, Vicol and Duvenaud 2020 (arXiv 1911.02590, section 5.1) give every
# weight a decay of its own and overfit a validation set of 50 images: its accuracy becomes **1**,
# by a Neumann series of $K + 1$ terms in place of the inverse Hessian, at a few times the cost of
# training.
#
# ```bash
# pip install -e ".[test]" && python notebooks/04_ten_thousand_decays.py
# ```
#
# | | small | `--full`, with `HYPERJAX_DATA` |
# | --- | --- | --- |
# | time on one core | 20 seconds | 4 minutes |
# | data | 50 + 50 handwritten digits, 8 x 8, for MNIST | 50 + 50 images of MNIST, 28 x 28 |
# | decays, seeds | 10,510, 1 | 25,450, 5 |
#
# Number to reach: validation accuracy at least **0.98**, from below 0.9 untuned. What it is worth
# on other images is reported as well.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import BLUE, DATA, FULL, GREY, RED, band, benchmark, mean_and_error, record

import hyperjax as hj
from hyperjax import tasks

LARGE = FULL and DATA
SEEDS, HIDDEN, OUTER = (5, 32, 250) if LARGE else (1, 140, 150)
ROWS, INNER, TERMS = 50, 30, (0, 20)


def images(seed):
    """Inputs [n, pixels], labels: 50 to train, 50 to validate, the others to test."""
    if LARGE:
        data = tasks.small_mnist(seed=seed, train=ROWS, valid=ROWS + 2000, size=28)
        x = jnp.concatenate([data.train["x"][0], data.valid["x"]])
        return (x - 0.13) / 0.31, jnp.concatenate([data.train["y"][0], data.valid["y"]])
    pixels, labels = tasks.digit_images()
    order = np.random.default_rng(seed).permutation(len(labels))
    return jnp.asarray(pixels[order] / 16 - 0.3) / 0.37, jnp.asarray(labels[order])


# %% [markdown]
# ## A decay for each weight
#
# $L(w, h) = \mathrm{CE}_{train}(w) + \frac12 \sum_i e^{h_i} w_i^2$, with $h$ in the shape of $w$.
# At a stationary $w$, $dV/dh = -e^h \odot w \odot u$ with $Hu = \nabla V$, and $H^{-1} \approx
# \alpha \sum_{j \le K} (I - \alpha H)^j$: each term is one product with the Hessian, which costs
# two gradients. $K = 0$, no product at all, is T1-T2 (Luketina et al. 2016, arXiv 1511.06727).


# %%
def logits(params, x):
    return jnp.maximum(x @ params["w"] + params["b"], 0) @ params["v"] + params["c"]


def cross_entropy(params, batch):
    x, y = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y))


def loss(params, log_decays, batch):
    penalty = jax.tree.map(lambda h, p: jnp.sum(jnp.exp(h) * p**2), log_decays, params)
    return cross_entropy(params, batch) + optax.tree.sum(penalty) / 2


def score(params, log_decays, batch):
    return cross_entropy(params, batch)


def network(key, pixels):
    first, last = jax.random.split(key)
    return {
        "w": jax.random.normal(first, (pixels, HIDDEN)) * (2 / pixels) ** 0.5,
        "b": jnp.zeros(HIDDEN),
        "v": jax.random.normal(last, (HIDDEN, 10)) * (2 / HIDDEN) ** 0.5,
        "c": jnp.zeros(10),
    }


inner = hj.inner(loss, lambda h: hj.guarded.adam(3e-3))
train = hj.unroll(inner.step)


def tuner(terms):
    """Descent of the decays by `terms` + 1 terms of the series; `None` trains and tunes nothing."""
    if terms is None:
        return hj.tune(hj.score_only(train, score, inner.init), optax.set_to_zero())
    solve = hj.linsolve.neumann(terms + 1, 0.05) if terms else hj.linsolve.identity(0.05)
    response = hj.implicit(train, hj.stationary(loss), solve=solve)
    # The entries begin near 1e-8: RMSprop scales each of them by itself.
    return hj.tune(hj.hypergradient(response, score, inner.init), optax.rmsprop(0.05, eps=1e-16))


def study(terms, seed):
    x, y = images(seed)
    part = lambda a, b: (x[a:b], y[a:b])
    repeated = hj.copies(part(0, ROWS), INNER)
    params = network(jax.random.key(seed), x.shape[1])
    decays = jax.tree.map(lambda p: jnp.full_like(p, -6.0), params)
    made = tuner(terms)
    split = hj.Split(repeated, part(ROWS, 2 * ROWS))
    run = jax.jit(lambda state: hj.repeat(made, state, split, OUTER))
    state, metrics = run(made.init(params, decays))
    hits = lambda rows: jnp.mean(jnp.argmax(logits(state.carry.params, rows[0]), -1) == rows[1])
    return {
        "valid_loss": metrics.value,
        "valid_accuracy": hits(split.valid),
        "test_accuracy": hits(part(2 * ROWS, None)),
        "decays": state.hparams["w"].ravel(),
    }


found = {}
for terms in (None, *TERMS):
    name = "untuned" if terms is None else f"K = {terms}"
    runs = jax.device_get([study(terms, seed) for seed in range(SEEDS)])
    found[name] = jax.tree.map(lambda *leaves: np.stack(leaves), *runs)
    facts = [found[name][k].mean() for k in ("valid_accuracy", "test_accuracy")]
    last = found[name]["valid_loss"][:, -1].mean()
    print("{:9} accuracy: validation {:.3f}, test {:.3f}".format(name, *facts), end=", ")
    print(f"validation loss {last:.2g}")
count = optax.tree.size(network(jax.random.key(0), images(0)[0].shape[1]))
print(f"{count:,} decays")

# %%
figure, (left, right) = plt.subplots(1, 2)
for name, colour in zip(found, (GREY, RED, BLUE), strict=True):
    band(left, np.arange(OUTER), found[name]["valid_loss"], name, colour)
left.set(yscale="log", xlabel=f"outer step, {INNER} training steps each")
left.set(ylabel="validation loss, nats", title=f"{count:,} decays, 50 images to tune them on")
left.legend()
bins = np.linspace(-14, 2, 60)
for name, colour in zip(list(found)[1:], (RED, BLUE), strict=True):
    spread = found[name]["decays"].ravel()
    right.hist(spread, bins, color=colour, histtype="step", lw=2, label=name)
right.axvline(-6, color=GREY, ls=":", label="where all began")
right.set(yscale="log", xlabel="log decay of a first-layer weight", ylabel="weights")
right.set_title("Where they went")
_ = right.legend()

# %% [markdown]
# The validation set is learnt by heart, through the decays alone: no gradient of it ever touched a
# weight. That is what the paper set out to show, that so many hyperparameters can be *optimized*;
# images that nobody tuned on gain little. The longer series brings a lower loss for more products.
# What it costs, beside training:

# %%
x, y = images(0)
params = network(jax.random.key(0), x.shape[1])
decays = jax.tree.map(lambda p: jnp.full_like(p, -6.0), params)
batches = hj.copies((x[:ROWS], y[:ROWS]), INNER)
split = hj.Split(batches, (x[ROWS : 2 * ROWS], y[ROWS : 2 * ROWS]))


def megabytes(estimator):
    call = jax.jit(lambda h, c: estimator.estimate(h, c, split)[0].grad)
    compiled = call.lower(decays, estimator.init(params, decays)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


solved = hj.implicit(train, hj.stationary(loss), solve=hj.linsolve.neumann(21, 0.05))
memory = {
    "training alone": megabytes(hj.score_only(train, score, inner.init)),
    "implicit, K = 20": megabytes(hj.hypergradient(solved, score, inner.init)),
    f"unrolled, {INNER} steps": megabytes(hj.hypergradient(train, score, inner.init)),
}
print(", ".join(f"{name} {size:.1f} MB" for name, size in memory.items()))
recorded = {k: row["valid_accuracy"]["mean"] for k, row in
            benchmark("many_hyperparameters_decays")["rows"].items()}  # fmt: skip
print("2,410 decays, 5 seeds, on record:", {k: round(v, 3) for k, v in recorded.items()})

# %%
tuned = [found[f"K = {k}"]["valid_accuracy"] for k in TERMS]
assert min(accuracy.min() for accuracy in tuned) >= 0.98, tuned
assert found["untuned"]["valid_accuracy"].mean() < 0.9
assert count > 10_000
assert memory["implicit, K = 20"] < memory[f"unrolled, {INNER} steps"] / 2, memory
record(
    "04_ten_thousand_decays",
    {
        "seeds": list(range(SEEDS)),
        "decays": count,
        "data": "50 + 50 images of MNIST" if LARGE else "50 + 50 digits",
        **{
            name: {k: mean_and_error(runs[k]) for k in ("valid_accuracy", "test_accuracy")}
            | {"valid_loss": mean_and_error(runs["valid_loss"][:, -1])}
            for name, runs in found.items()
        },
        "megabytes": memory,
        "paper": "arXiv 1911.02590, section 5.1, a figure: validation accuracy 1 on 50 images",
        "rule": "reproduced: validation accuracy 1 on every seed by K = 20; partly: 0.98",
        "verdict": "reproduced" if tuned[-1].min() == 1 else "partly",
    },
)
print(f"reached: validation accuracy {tuned[-1].mean():.3f} by {count:,} decays")
