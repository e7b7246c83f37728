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
# # A learning rate that repairs itself: HDET
#
# HDET (arXiv 2604.24708) lets the replicas of data parallelism train with slightly different
# learning rates. Gradients are averaged at every step, so that replicas differ by their rates
# alone; now and then params are averaged too, and the base of the rates moves towards the replicas
# with the lower loss. No run is thrown away and nothing is differentiated. The paper claims a
# schedule within one run at the cost of data parallelism, on large models. An earlier study of ours
# saw starts at $10^{-5}$ to $10^{-1}$ all end below a training loss of 0.05 on digits; the two
# smallest, held constant, end at 1.62 and 0.068. Number to reach: from $10^{-4}$ **at most half**
# the training loss of the constant rate.
#
# ```bash
# pip install -e ".[test]" && python notebooks/13_hdet.py
# ```
#
# | | default | `--full` |
# | --- | --- | --- |
# | training steps, seeds | 600, 1 | 2,000, 5 |
# | time on one core | 15 s | 3 minutes |
#
# Digits here; the same over 5 seeds and on MNIST is what `python benchmarks/hdet.py` has recorded.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import COLOURS, FULL, band, benchmark, record

import hyperjax as hj
from hyperjax import tasks

STEPS, SEEDS = (2000, 5) if FULL else (600, 1)
MEMBERS, EVERY = 8, 20
STARTS = (1e-5, 1e-4, 1e-2, 1e-1) if FULL else (1e-4, 1e-1)

pixels, labels = tasks.digit_images()
x, y = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
WIDTHS = (64, 64, 64, 10) if FULL else (64, 32, 10)


def init(key):
    keys = jax.random.split(key, len(WIDTHS) - 1)
    shapes = zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    scale = lambda n: (2 / n) ** 0.5
    return [(scale(n) * jax.random.normal(k, (n, m)), jnp.zeros(m)) for k, n, m in shapes]


def loss(params, raw, rows):
    """Cross-entropy; hyperparameters are the optimizer's alone."""
    z = x[rows]
    for w, b in params[:-1]:
        z = jax.nn.relu(z @ w + b)
    w, b = params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(z @ w + b, y[rows]).mean()


def rows_of(seed):
    """[convergences, steps between two, rows]: all members see the same."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return jax.random.randint(key, (STEPS // EVERY, EVERY, 128), 0, len(y))


# %% [markdown]
# ## The controller
#
# With $x_r \in [-w, w]$ the relative offset of replica $r$ and $L_r$ its mean loss since the last
# convergence, replicas are weighted by $p = \mathrm{softmax}(-L / \sigma)$, and the base moves by
#
# $$s = \sum_r p_r x_r - \bar x, \qquad v \leftarrow 0.9\, v + 0.1\, s, \qquad
#   \log \eta \leftarrow \log \eta + \tfrac12 v.$$
#
# The logarithm is ours: with the paper's linear update velocity can push a small rate below zero.
# `all_reduce` is what makes it data parallelism: members average gradients over the named axis.

# %%
space = hj.space({"lr": hj.loguniform(1e-7, 10.0)})
adam = lambda raw: optax.chain(
    hj.exchange.all_reduce("members"), optax.adam(space.constrain(raw)["lr"])
)
tuner = hj.tune(hj.training_loss(hj.inner(loss, adam), loss), optax.set_to_zero())
rule = hj.exchange.hdet(space, width=0.5, sigma=0.002)
together = hj.population(tuner, rule, axis_name="members")


@jax.jit
def hdet(start, seed):
    """Loss over all images of the averaged params, and the rates in force, [convergences]."""
    weights, key = jax.random.split(jax.random.key(seed))
    raw = space.unconstrain({"lr": start})
    state = together.init(key, hj.copies(init(weights), MEMBERS), hj.copies(raw, MEMBERS))
    state, metrics = hj.run(together, state, hj.Split(rows_of(seed), ()))
    mean = jax.tree.map(lambda v: v.mean(0), state.members.carry.params)
    rates = jnp.append(start, metrics.events.base["lr"][:-1])  # each rules the steps after it
    return loss(mean, None, jnp.arange(len(y))), rates, metrics.events.diverged.any()


@jax.jit
def alone(rates, seed):
    """The same for one plain model along a schedule: constant, or one that HDET found."""
    optimizer = optax.adam(hj.schedule(rates, every=EVERY))
    params = init(jax.random.split(jax.random.key(seed))[0])

    def step(carry, rows):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, None, rows), state)
        return (optax.apply_updates(params, updates), state), None

    carry = params, optimizer.init(params)
    (params, _), _ = jax.lax.scan(step, carry, rows_of(seed).reshape(-1, 128))
    return loss(params, None, jnp.arange(len(y)))


constant, tuned, replayed, found = {}, {}, {}, {}
print("training loss     constant      HDET  its schedule, one model   last rate")
for start in STARTS:
    runs = [jax.device_get(hdet(start, seed)) for seed in range(SEEDS)]
    tuned[start] = [float(run[0]) for run in runs]
    found[start] = np.array([run[1] for run in runs])
    assert not any(run[2] for run in runs)  # nobody diverged
    flat = jnp.full(STEPS // EVERY, start)
    constant[start] = [float(alone(flat, seed)) for seed in range(SEEDS)]
    replayed[start] = [float(alone(found[start][seed], seed)) for seed in range(SEEDS)]
    means = (np.mean(each[start]) for each in (constant, tuned, replayed))
    print(
        "from {:<8.0e}{:14.5f}{:10.5f}{:25.5f}{:12.1e}".format(
            start, *means, np.exp(np.log(found[start][:, -1]).mean())
        )
    )

# %% [markdown]
# Left, the rates of this run. The others are on record: five seeds each, with bands of one standard
# error around the mean of $\log \eta$. On MNIST nothing was chosen: width and $\sigma$ are those of
# digits.

# %%
measured = benchmark("hdet")
NAME = "log, shared 128, sigma 0.002"
figure, panels = plt.subplots(1, 3, sharey=True, figsize=(11, 3.9))
for colour, start in zip(COLOURS, (1e-5, 1e-4, 1e-2, 1e-1), strict=False):
    if start in found:
        steps = EVERY * np.arange(found[start].shape[1])
        label = f"constant {np.mean(constant[start]):.3g}, tuned {np.mean(tuned[start]):.3g}"
        band(panels[0], steps, np.log10(found[start]), label, colour, lw=2)
    for axes, data in zip(panels[1:], ("digits", "mnist"), strict=True):
        cell = measured[data][NAME][f"{start:g}"]
        flat = measured[data]["constant rate, shared 128"][f"{start:g}"]["mean"]
        logs = np.log10(cell["rates"])
        label = f"constant {flat:.2g}, tuned {cell['mean']:.2g}"
        band(axes, EVERY * np.arange(logs.shape[1]), logs, label, colour, lw=2)
titles = ("this run", "on record: digits, 64-64-64-10", "on record: MNIST, 784-128-10")
for axes, title in zip(panels, titles, strict=True):
    axes.set(xlabel="training step", yticks=range(-5, 0), ylim=(-5.2, 0.9))
    axes.set_title(title)
    axes.legend(title="training loss", fontsize=8, title_fontsize=8, loc="upper right")
_ = panels[0].set(ylabel="base learning rate", yticklabels=[f"$10^{{{n}}}$" for n in range(-5, 0)])

# %% [markdown]
# Bad starts are repaired, and what was found is the schedule: one plain model that replays it ends
# where the averaged ones do. It is no free gain. On MNIST the start at $10^{-4}$ ends at 0.55 of
# the constant rate's loss and not at half; a constant $10^{-2}$, where somebody knows it, is better
# on digits and as good on MNIST; and with the paper's linear update and batches of 16 of their own
# for replicas, as in data parallelism over shards, luck hides the rates: from $10^{-5}$ digits then
# end at 1.3 instead of 0.001.

# %%
ratio = np.mean(tuned[1e-4]) / np.mean(constant[1e-4])
on_record = {
    data: measured[data][NAME]["0.0001"]["mean"]
    / measured[data]["constant rate, shared 128"]["0.0001"]["mean"]
    for data in ("digits", "mnist")
}
losses = {
    f"{start:g}": {"constant": constant[start], "HDET": tuned[start], "replayed": replayed[start]}
    for start in STARTS
}
everywhere = max(ratio, *on_record.values()) < 0.5
record(
    "13_hdet",
    {
        "seeds": SEEDS,
        "training_loss": losses,
        "ratio_from_1e-4": float(ratio),
        "ratio_from_1e-4_on_record": on_record,
        "paper": "arXiv 2604.24708, on large models; ours are small. The losses of an earlier "
        "study: 0.05 or less from all starts, where constant rates end at 1.62, 0.068, 0 and 1.47",
        "verdict": "reproduced" if everywhere else "partly" if ratio < 0.5 else "not",
        "rule": "from 1e-4 at most half the loss of the constant rate: here, and on digits and on "
        "MNIST in benchmarks/hdet.py; partly: here alone",
    },
)
assert ratio < 0.5, (tuned, constant)
assert on_record["digits"] < 0.5 < on_record["mnist"] < 0.6, on_record  # as said above
print("reached: from 1e-4 at most half the training loss of the constant rate")
