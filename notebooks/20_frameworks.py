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
# # One model in four frameworks
#
# hyperjax has no adapters: it asks for parameters (a pytree of floats) and a pure function of them.
# This page writes one perceptron in Flax NNX, Flax Linen, Equinox and Haiku, and once with arrays
# alone, gives all five the same initial weights, and asks each for the same hypergradients while it
# is tuned. Number to reach: 10 hypergradients of 20 training steps each, the weights carried along,
# agree **to rounding**: $10^{-10}$ relative in float64. With `--full` also those by the implicit
# function theorem and in forward mode.
#
# ```bash
# pip install -e ".[test]" && python notebooks/20_frameworks.py
# ```
#
# | | default | `--full` (with `HYPERJAX_DATA`) |
# | --- | --- | --- |
# | images, pixels, hidden units | 1,000 digits, 64, 32 | 4,000 of MNIST, 784, 64 |
# | estimators, seeds | 1, 1 | 3, 5 |
# | time on one core | 30 s | some 4 minutes |

# %%
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import COLOURS, DATA, FULL, record
from flax import nnx

import hyperjax as hj
from hyperjax import tasks

jax.config.update("jax_enable_x64", True)
SEEDS, HIDDEN, CLASSES = (5, 64, 10) if FULL else (1, 32, 10)
EPSILON = 1e-5  # of the normalization; the frameworks' defaults differ


def images():
    """Training and validation rows, {"x", "y"} each."""
    if FULL and DATA:
        train, valid = tasks.small_mnist(train=2000, valid=2000, size=28)
        return jax.tree.map(lambda v: v[0], train), valid
    x, y = tasks.digit_images()
    order = np.random.default_rng(0).permutation(len(y))
    part = lambda rows: {"x": jnp.asarray(x[rows] / 16), "y": jnp.asarray(y[rows], jnp.int32)}
    return part(order[:500]), part(order[500:1000])


PIXELS = images()[0]["x"].shape[1]


def numbers(seed):
    """The initial weights, as plain arrays."""
    first, last = jax.random.split(jax.random.key(seed))
    return {
        "hidden": {
            "kernel": jax.random.normal(first, (PIXELS, HIDDEN)) / PIXELS**0.5,
            "bias": jnp.zeros(HIDDEN),
        },
        "norm": {"scale": jnp.ones(HIDDEN), "bias": jnp.zeros(HIDDEN)},
        "out": {
            "kernel": jax.random.normal(last, (HIDDEN, CLASSES)) / HIDDEN**0.5,
            "bias": jnp.zeros(CLASSES),
        },
    }


# %% [markdown]
# ## The model, five times
#
# Each function takes the weights and returns the framework's own params and `apply(params, x)`.
# What a user writes for a model of their own is the class and the last two lines.
#
# **Arrays.**

# %%


def arrays(weights):
    def apply(params, x):
        x = x @ params["hidden"]["kernel"] + params["hidden"]["bias"]
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + EPSILON)
        x = jnp.tanh(x * params["norm"]["scale"] + params["norm"]["bias"])
        return x @ params["out"]["kernel"] + params["out"]["bias"]

    return weights, apply


# %% [markdown]
# **Flax NNX.** `split` takes the module apart; `copy=True` makes new variables, which a module with
# state may then update inside `scan` or a derivative.

# %%


class Network(nnx.Module):
    def __init__(self, rngs):
        floats = {"param_dtype": jnp.float64, "rngs": rngs}
        self.hidden = nnx.Linear(PIXELS, HIDDEN, **floats)
        self.norm = nnx.LayerNorm(HIDDEN, epsilon=EPSILON, **floats)
        self.out = nnx.Linear(HIDDEN, CLASSES, **floats)

    def __call__(self, x):
        return self.out(jnp.tanh(self.norm(self.hidden(x))))


def flax_nnx(weights):
    model = Network(nnx.Rngs(0))
    nnx.update(model, weights)
    graphdef, params = nnx.split(model, nnx.Param)
    return params, lambda params, x: nnx.merge(graphdef, params, copy=True)(x)


# %% [markdown]
# **Flax Linen.** Its params are nested dictionaries, with the names used here from the beginning.

# %%


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(HIDDEN, param_dtype=jnp.float64, name="hidden")(x)
        x = nn.LayerNorm(epsilon=EPSILON, param_dtype=jnp.float64, name="norm")(x)
        return nn.Dense(CLASSES, param_dtype=jnp.float64, name="out")(jnp.tanh(x))


def flax_linen(weights):
    model = LinenNetwork()
    return weights, lambda params, x: model.apply({"params": params}, x)


# %% [markdown]
# **Equinox.** A module is a pytree already; `partition` keeps what is no float out of the way of
# the optimizer. Modules are written for one example, and weights are [out, in].

# %%


class EquinoxNetwork(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    out: eqx.nn.Linear

    def __call__(self, x):
        return self.out(jnp.tanh(self.norm(self.hidden(x))))


def equinox(weights):
    one, two = jax.random.split(jax.random.key(0))
    model = EquinoxNetwork(
        eqx.nn.Linear(PIXELS, HIDDEN, key=one),
        eqx.nn.LayerNorm(HIDDEN, eps=EPSILON),
        eqx.nn.Linear(HIDDEN, CLASSES, key=two),
    )
    places = lambda m: (
        *(m.hidden.weight, m.hidden.bias, m.norm.weight, m.norm.bias),
        *(m.out.weight, m.out.bias),
    )
    hidden, norm, out = weights["hidden"], weights["norm"], weights["out"]
    values = (hidden["kernel"].T, hidden["bias"], norm["scale"], norm["bias"])
    model = eqx.tree_at(places, model, (*values, out["kernel"].T, out["bias"]))
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, rest))(x)


# %% [markdown]
# **Haiku.** A function of the input that `transform` makes pure; params are a dictionary by module.

# %%


def haiku(weights):
    @hk.without_apply_rng
    @hk.transform
    def network(x):
        x = hk.Linear(HIDDEN, name="hidden")(x)
        x = hk.LayerNorm(-1, True, True, EPSILON, name="norm")(x)
        return hk.Linear(CLASSES, name="out")(jnp.tanh(x))

    params = {
        name: {"w" if k == "kernel" else "b" if name != "norm" and k == "bias" else
               "offset" if k == "bias" else k: v for k, v in layer.items()}
        for name, layer in weights.items()
    }  # fmt: skip
    return params, network.apply


MODELS = {
    "arrays": arrays,
    "Flax NNX": flax_nnx,
    "Flax Linen": flax_linen,
    "Equinox": equinox,
    "Haiku": haiku,
}

# %% [markdown]
# ## The same lines for all of them
#
# Three hyperparameters: learning rate, a penalty on all weights and the smoothing of labels.
# Nothing below knows which framework it tunes. An estimator is a pure function, so that the outer
# loop may be `hj.run`, or one's own as here.

# %%
STEPS, OUTER = 20, 10
space = hj.space(
    {
        "lr": hj.loguniform(1e-3, 1.0, init=0.1),
        "l2": hj.loguniform(1e-6, 1.0, init=1e-2),
        "smoothing": hj.uniform(0.0, 0.5, init=0.1),
    }
)


def estimators(apply, train, valid):
    def entropy(params, smoothing, batch):
        labels = optax.smooth_labels(jax.nn.one_hot(batch["y"], CLASSES), smoothing)
        return optax.softmax_cross_entropy(apply(params, batch["x"]), labels).mean()

    def loss(params, h, rows):
        batch = jax.tree.map(lambda v: v[rows], train)
        penalty = h["l2"] * optax.tree.norm(params, squared=True)
        return entropy(params, h["smoothing"], batch) + penalty

    score = lambda params, h, _: entropy(params, 0.0, valid)
    training = hj.inner(space.lift(loss), lambda raw: optax.sgd(space.constrain(raw)["lr"]))
    unrolled = hj.unroll(training.step)
    yield "unrolled", hj.hypergradient(unrolled, score, training.init)
    if FULL:
        all_rows = jnp.arange(len(train["y"]))
        condition = hj.stationary(space.lift(lambda params, h, _: loss(params, h, all_rows)))
        # A polynomial of the Hessian. The coefficients of conjugate gradients depend on vectors,
        # and where the Hessian is indefinite, as here, they make 5e-8 out of rounding.
        solve = hj.linsolve.neumann(20, 0.1)
        implicit = hj.implicit(unrolled, condition, solve=solve)
        yield "implicit", hj.hypergradient(implicit, score, training.init)
        yield "forward", hj.hypergradient(unrolled, score, training.init, mode="forward")


def tune(init, one, params, splits):
    """Scores and hypergradients [OUTER, 3] of ten steps of Adam."""
    raw, at = space.init(), lambda k: jax.tree.map(lambda v: v[k], splits)
    carry, outer = init(params, raw), optax.adam(0.1)
    opt_state, found = outer.init(raw), []
    for k in range(OUTER):
        estimate, carry = one(raw, carry, at(k))
        found.append((estimate.value, space.ravel(estimate.grad)))
        updates, opt_state = outer.update(estimate.grad, opt_state)
        raw = optax.apply_updates(raw, updates)
    return tuple(np.stack(column) for column in zip(*found, strict=True))


results, (train, valid) = {}, images()
for framework, make in MODELS.items():
    for name, estimator in estimators(make(numbers(0))[1], train, valid):
        one = jax.jit(estimator.estimate)
        for seed in range(SEEDS):
            params, _ = make(numbers(seed))
            shape = (OUTER, STEPS, 64)
            rows = jax.random.randint(jax.random.key(seed), shape, 0, len(train["y"]))
            splits = hj.Split(rows, jnp.zeros(OUTER))
            results[name, framework, seed] = tune(estimator.init, one, params, splits)

# %%


def differences(name, framework, seed):
    """[OUTER]: each hypergradient from that of the model of arrays, relative."""
    _, gradients = results[name, framework, seed]
    _, reference = results[name, "arrays", seed]
    return np.linalg.norm(gradients - reference, axis=1) / np.linalg.norm(reference, axis=1)


names = list(dict.fromkeys(name for name, _, _ in results))
largest = {
    name: {f: max(differences(name, f, s).max() for s in range(SEEDS)) for f in MODELS}
    for name in names
}
for name in names:
    print(f"{name:12}{'first hypergradient, in ' + ', '.join(space.names):42}largest of all")
    for framework in MODELS:
        _, gradients = results[name, framework, 0]
        entries = "".join(f"{g:11.6f}" for g in gradients[0])
        print(f"  {framework:12}{entries:40}{largest[name][framework]:10.0e}")

figure, (left, right) = plt.subplots(1, 2)
for i, framework in enumerate(MODELS):
    values, _ = results["unrolled", framework, 0]
    left.plot(range(OUTER), values, color=COLOURS[i], lw=11 - 2.3 * i, label=framework)
    if i:
        gap = np.maximum(differences("unrolled", framework, 0), 1e-17)
        right.semilogy(range(OUTER), gap, "o-", color=COLOURS[i], ms=9 - 1.5 * i, label=framework)
left.set(xlabel="outer step, of 20 training steps", ylabel="validation loss, nats")
left.set_title("Five models, one curve")
left.legend()
right.axhline(1e-10, color="0.5", ls=":", lw=1.5)
right.text(0, 1.5e-10, "asserted", color="0.4")
right.set(xlabel="outer step", ylabel="relative difference of hypergradients", ylim=(1e-17, 1e-8))
right.set_title("From the model of arrays")
_ = right.legend()

# %% [markdown]
# What differs is how a framework sums and scales inside its layers, and that is rounding. Three
# things to know for models with more in them:
#
# - **Noise** (dropout): let a key be a leaf of the batch, and give it to the model in its own way:
#   `rngs=` in Flax, `key=` in Equinox, the second argument of `apply` in Haiku. A training step is
#   then deterministic, as derivatives need it. From the same seed frameworks draw different masks.
# - **State** (running averages of a batch normalization) is no parameter. Close over it, or keep
#   to statistics of the batch; hyperjax carries the optimizer's state and nothing else of training.
# - **Precision**: all five are asked for float64 by `param_dtype` or by the weights they are given.

# %%
record(
    "20_frameworks",
    {
        "seeds": SEEDS,
        "data": "MNIST" if FULL and DATA else "digits",
        "paper": "none: the claim is our own",
        "largest_relative_difference": largest,
        "verdict": "reproduced" if max(map(lambda d: max(d.values()), largest.values())) < 1e-10
        else "not",
    },
)  # fmt: skip
for name, by_framework in largest.items():
    assert max(by_framework.values()) < 1e-10, (name, by_framework)
final = results["unrolled", "arrays", 0][0]
assert final[-1] < 0.5 * final[0], final  # tuning did something
print("reached: the same hypergradients from every framework, to rounding")
