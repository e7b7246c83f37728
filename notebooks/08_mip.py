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
# # Magnitude invariant parametrizations
#
# A hypernetwork maps a hyperparameter $\gamma$ to all weights of a model. With zero biases and
# relus it is homogeneous at the start: the weights are proportional to $\gamma$, and so is nearly
# everything that follows, gradients included. Ortiz, Guttag and Dalca 2024 (arXiv 2304.07645)
# encode $\gamma$ by $(\cos\frac{\pi\gamma}{2}, \sin\frac{\pi\gamma}{2})$, whose norm is 1, and add
# the output to weights of their own. Their claim: faster and steadier training by SGD and by Adam,
# whatever the model (their tables were not at hand).
#
# ```bash
# pip install -e ".[test]" && python notebooks/08_mip.py
# ```
#
# | | small | `--full`, with `HYPERJAX_DATA` |
# | --- | --- | --- |
# | time on one core | 20 seconds | 4 minutes |
# | data | handwritten digits, 8 x 8, for MNIST | MNIST, 12 x 12 |
# | seeds, training steps | 2, 400 | 5, 1,000 |
#
# Numbers to reach: the slope of $\log\|\theta\|$ against $\log\gamma$ is **1** without and below
# **0.1** with it; Adam's excess loss at the end of this short training is **lower** with it.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import BLUE, DATA, FULL, GREEN, RED, band, benchmark, mean_and_error, record

from hyperjax import hypernet as hn
from hyperjax import tasks

LARGE = FULL and DATA
SEEDS, STEPS, EVERY, BATCH = (5, 1000, 50, 64) if LARGE else (2, 400, 50, 64)

# %% [markdown]
# ## The problem
#
# A perceptron with 64 hidden units, whose loss is $(1-\gamma)\,\mathrm{CE}(\text{label}) +
# \gamma\,\mathrm{CE}(\text{next label})$ for $\gamma$ in $[0, 1]$: the least it can be is the
# entropy of $\gamma$, and what counts is the excess over it. A hypernetwork is built in one line
# and changed in another:

# %%
plain = hn.generated(body=hn.mlp((16, 128)))
variants = {
    "default": plain,
    "encoding only": hn.encoded(plain, hn.cos_sin()),
    "MIP": hn.magnitude_invariant(plain),  # encoding, and additive output
}
optimizers = {
    "Adam 3e-4": optax.adam(3e-4),
    "SGD 0.01": optax.sgd(0.01, momentum=0.9, nesterov=True),
}


def images():
    if LARGE:
        data = tasks.small_mnist(train=20_000, valid=2_000)
        x = jnp.concatenate([data.train["x"][0], data.valid["x"]])
        return (x - 0.13) / 0.28, jnp.concatenate([data.train["y"][0], data.valid["y"]]), 20_000
    pixels, labels = tasks.digit_images()
    order = np.random.default_rng(0).permutation(len(labels))
    return jnp.asarray(pixels[order] / 16 - 0.3) / 0.37, jnp.asarray(labels[order]), 1_200


x, y, train = images()


def model(key):
    first, last = jax.random.split(key)
    return {
        "w": jax.random.normal(first, (x.shape[1], 64)) * (2 / x.shape[1]) ** 0.5,
        "b": jnp.zeros(64),
        "v": jax.random.normal(last, (64, 10)) * (2 / 64) ** 0.5,
        "c": jnp.zeros(10),
    }


def loss(params, gamma, rows):
    logits = jnp.maximum(x[rows] @ params["w"] + params["b"], 0) @ params["v"] + params["c"]
    logs = jax.nn.log_softmax(logits)
    entropies = [-jnp.mean(logs[jnp.arange(len(rows)), (y[rows] + k) % 10]) for k in (0, 1)]
    return (1 - gamma[0]) * entropies[0] + gamma[0] * entropies[1]


# %% [markdown]
# ## Before the first step

# %%
gammas = jnp.geomspace(0.01, 1, 13)
norms, gradients = {}, {}
for name, net in variants.items():

    @jax.jit
    def measure(key, net=net):
        phi = net.init(key, model(key), jnp.ones(1))
        of = lambda p, g: loss(net.apply(p, g[None]), g[None], jnp.arange(64))
        weights = lambda g: optax.tree.norm(net.apply(phi, g[None]))
        slope = lambda g: optax.tree.norm(jax.grad(of)(phi, g))
        return jax.lax.map(weights, gammas), jax.lax.map(slope, gammas)

    found = jax.device_get([measure(jax.random.key(seed)) for seed in range(5)])
    norms[name], gradients[name] = (np.stack(part) for part in zip(*found, strict=True))
fit = lambda runs: np.polyfit(np.log(gammas), np.log(runs).T, 1)[0]
slopes = {name: (fit(norms[name]), fit(gradients[name])) for name in variants}
print(f"{'slope against log gamma, 5 seeds':34}{'log |weights|':>16}{'log |gradient|':>18}")
for name, pair in slopes.items():
    print(f"{name:34}" + "".join(f"{s.mean():12.3f} ± {s.std(ddof=1):.3f}" for s in pair))

# %% [markdown]
# ## Training
#
# One $\gamma$ and one minibatch per step.


# %%
@functools.partial(jax.jit, static_argnums=(0, 1))
def curve(variant, optimizer, key):
    net, rule = variants[variant], optimizers[optimizer]
    held_out = jnp.arange(train, min(len(y), train + 500))

    def excess(phi):
        entropy = lambda g: jnp.sum(jax.scipy.special.entr(jnp.array([g, 1 - g])))
        one = lambda g: loss(net.apply(phi, g[None]), g[None], held_out) - entropy(g)
        return jnp.mean(jax.lax.map(one, jnp.linspace(0, 1, 5)))

    def step(carry, key):
        phi, state = carry
        first, second = jax.random.split(key)
        rows, gamma = (
            jax.random.randint(first, (BATCH,), 0, train),
            jax.random.uniform(second, (1,)),
        )
        grads = jax.grad(lambda p: loss(net.apply(p, gamma), gamma, rows))(phi)
        updates, state = rule.update(grads, state, phi)
        return (optax.apply_updates(phi, updates), state), None

    def stretch(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, excess(carry[0])

    first, second, third = jax.random.split(key, 3)
    phi = net.init(first, model(second), jnp.ones(1))
    keys = jax.random.split(third, (STEPS // EVERY, EVERY))
    return jax.lax.scan(stretch, (phi, rule.init(phi)), keys)[1]


keys = [jax.random.key(seed) for seed in range(SEEDS)]
curves = {
    (variant, optimizer): np.stack([curve(variant, optimizer, key) for key in keys])
    for optimizer in (optimizers if FULL else ("Adam 3e-4",))
    for variant in ("default", "MIP")
}

# %%
figure, (left, right) = plt.subplots(1, 2)
for (name, runs), colour in zip(norms.items(), (RED, GREEN, BLUE), strict=True):
    band(left, gammas, runs, name, colour)
left.set(xscale="log", yscale="log", xlabel=r"$\gamma$", ylabel=r"norm of the weights $\theta$")
left.set_title("Before the first step")
left.legend()
for (variant, optimizer), runs in curves.items():
    colour, line = RED if variant == "default" else BLUE, "-" if "Adam" in optimizer else ":"
    band(right, EVERY * np.arange(1, STEPS // EVERY + 1), runs, f"{variant}, {optimizer}", colour,
         ls=line)  # fmt: skip
right.set(xlabel="step", ylabel="excess loss, nats", yscale="log", title="Held-out images")
_ = right.legend()

# %% [markdown]
# The record at full size (`benchmarks/mip.py`, 3,000 steps, 5 seeds): steps that the default takes
# to the loss which MIP has after a third of them.

# %%
recorded = benchmark("mip")
print(f"{'median over 5 seeds':24}{'MIP':>8}{'default':>10}")
times = {}
for data, steps in (("digits", 1000), ("mnist", 300)):
    for optimizer in optimizers:
        reached = recorded[data][optimizer]["default"]["steps_to_the_loss_of_mip_at_a_third"]
        times[data, optimizer] = float(np.median([np.inf if t is None else t for t in reached]))
        print(f"{data + ', ' + optimizer:24}{steps:8}{times[data, optimizer]:10.0f}")

# %% [markdown]
# With Adam the claim holds: three times the steps, or never. With SGD it does not: at 0.01 the
# default is as fast, at 0.03 seeds diverge with either. Our default starts from hyperfan-in, which
# already fits the variance of the weights it makes; the paper compares with plain initialization.

# %%
lower = curves["default", "Adam 3e-4"][:, -1] - curves["MIP", "Adam 3e-4"][:, -1]
assert np.allclose(slopes["default"][0], 1, atol=0.01), slopes
assert np.abs(slopes["MIP"][0]).max() < 0.1 and slopes["default"][1].mean() > 0.7, slopes
assert lower.mean() > 0, curves
record(
    "08_mip",
    {
        "seeds": list(range(SEEDS)),
        "data": "MNIST, 12 x 12" if LARGE else "digits",
        "slope_of_weights": {name: mean_and_error(pair[0]) for name, pair in slopes.items()},
        "slope_of_gradient": {name: mean_and_error(pair[1]) for name, pair in slopes.items()},
        "excess_at_the_end": {
            f"{v}, {o}": mean_and_error(c[:, -1]) for (v, o), c in curves.items()
        },
        "steps_on_record": {f"{d}, {o}": t for (d, o), t in times.items()},
        "paper": "arXiv 2304.07645: faster and steadier with SGD and Adam; tables not at hand",
        "rule": "reproduced: slopes as claimed and the default takes three times the steps by Adam "
        "and by SGD, on record; partly: by one of them",
        "verdict": "reproduced"
        if all(times["digits", o] >= 3000 for o in ("Adam 3e-4", "SGD 0.01"))
        else "partly",
    },
)
print(f"reached: slope 1 without, {np.abs(slopes['MIP'][0]).max():.3f} with; excess lower by "
      f"{lower.mean():.3f}")  # fmt: skip
