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
# # Denoising that is learned, at accuracies that are found
#
# From the root of the repository:
#
# ```bash
# pip install -e ".[test]" && python notebooks/02_learned_denoising.py
# ```
#
# | | default | `HYPERJAX_DATA` names a folder with Kodak | with `HYPERJAX_FULL=1` as well |
# | --- | --- | --- | --- |
# | time on two cores | about a minute | about two minutes | about six minutes |
# | images | handwritten digits, 48 x 48 | photographs, 64 x 64 | photographs, 96 x 96 |
#
# Numbers to reach, asserted in the last cell:
#
# 1. started from accuracies four decades apart, MAID ends within **5 %** of the same objective,
#    while the loosest fixed accuracy takes no step at all;
# 2. learned filters denoise images that nobody trained on **better than the best single weight**
#    of a grid, which is better than no tuning;
# 3. one weight per pixel, learned on one image, denoises that image under **fresh noise** better
#    than the best single weight does.
#
# To see the plots, open it in Jupyter: `jupytext --to ipynb notebooks/02_learned_denoising.py`.

# %%
import functools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import hyperjax as hj
from hyperjax import bilevel, tasks

jax.config.update("jax_enable_x64", True)
KODAK = bool(os.environ.get("HYPERJAX_DATA"))
FULL = KODAK and os.environ.get("HYPERJAX_FULL") == "1"

BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
plt.rcParams.update(
    {
        "figure.figsize": (9, 3.8),
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
)

# %% [markdown]
# ## 1. Two hyperparameters
#
# Denoising by total variation minimizes over the image $x$, with $y$ the noisy one,
# $\frac12\|x - y\|^2 + e^{\theta_0} \sum_p \sqrt{|\nabla x|_p^2 + e^{2\theta_1}}$.
# The objective compares the minimizer with clean images. Both are smooth, and the inner problem is
# strongly convex with known constants: $1$ from below and $1 + 8 e^{\theta_0 - \theta_1}$ from
# above.
#
# Without Kodak, the images are handwritten digits that come with the package, four to an image.

# %%
if KODAK:
    NOISE, SIZE = 0.1, 96 if FULL else 64
    crops = tasks.centre_crop(tasks.kodak(), SIZE)
    train, test = crops[:8], crops[18:]
else:
    NOISE = 0.2
    train, test = np.split(tasks.digit_mosaics(8), [4])
train, test = jnp.asarray(train), jnp.asarray(test)
train_noisy = tasks.add_noise(jax.random.key(0), train, NOISE)
test_noisy = tasks.add_noise(jax.random.key(1), test, NOISE)


@functools.partial(jax.jit, static_argnames=("problem", "steps", "fixed"))
def learn(problem, start, noisy, clean, accuracy, step, *, steps, fixed=False):
    """`steps` steps of MAID, or of the same with its accuracies kept."""
    tuner = bilevel.maid(
        problem.loss,
        problem.score,
        lower=bilevel.accelerated(smoothness=problem.smoothness, convexity=problem.convexity),
        convexity=problem.convexity,
        score_curvature=1 / clean.size,
        step=step,
        accuracy=accuracy,
        adjoint_accuracy=1e-3 * accuracy,
        **({"max_refinements": 0, "relax": 1.0} if fixed else {}),
    )
    state, metrics = hj.repeat(tuner, tuner.init(noisy, start), hj.Split(noisy[None], clean), steps)
    return state.hparams, metrics


@functools.partial(jax.jit, static_argnames="problem")
def denoise(problem, hparams, noisy):
    lower = bilevel.accelerated(smoothness=problem.smoothness, convexity=problem.convexity)
    return lower(problem.loss, noisy, hparams, noisy, 1e-3)[0]


def psnr(images, clean):
    return float(jnp.mean(tasks.psnr(images, clean)))


def spent(metrics):
    """Lower and CG iterations before each step: what its hyperparameters had cost."""
    each = np.asarray(metrics.info.lower_iterations + metrics.info.cg_iterations)
    return np.cumsum(each) - each


variation = tasks.total_variation()
start = {"weight": jnp.asarray(-4.0), "smoothing": jnp.asarray(-4.0)}
STEPS, STEP = 25, 30.0
curves, learned = {}, {}
for fixed, accuracies in ((False, (10.0, 0.1, 1e-3)), (True, (10.0, 0.1, 1e-3))):
    for accuracy in accuracies:
        hparams, metrics = learn(
            variation, start, train_noisy, train, accuracy, STEP, steps=STEPS, fixed=fixed
        )
        curves[fixed, accuracy] = spent(metrics), np.asarray(metrics.value)
        learned[fixed, accuracy] = hparams
        print(
            f"{'fixed' if fixed else 'MAID from'} {accuracy:<6g} objective "
            f"{metrics.value[-1]:.6f} after {curves[fixed, accuracy][0][-1]:5d} iterations, "
            f"weight {hparams['weight']:.3f}, smoothing {hparams['smoothing']:.3f}"
        )

# %% [markdown]
# An accuracy is a certified distance from the inner solution. A fixed one that is too loose cannot
# tell whether a step goes down, and takes none; one that is too tight pays for digits that no
# decision needs. MAID refines only when a test fails.

# %%
figure, axes = plt.subplots()
looks = {10.0: "-", 0.1: "--", 1e-3: ":"}
for (fixed, accuracy), (iterations, values) in curves.items():
    name = f"fixed {accuracy:g}" if fixed else f"MAID from {accuracy:g}"
    axes.plot(
        iterations + 1, values, looks[accuracy], color=RED if fixed else BLUE, lw=2, label=name
    )
axes.set(
    xscale="log",
    yscale="log",
    xlabel="lower and CG iterations",
    ylabel="objective",
    xlim=(10, None),
)
axes.set_title("Total variation: the objective against work")
_ = axes.legend(ncol=2)

# %% [markdown]
# ## 2. Images that nobody trained on
#
# The usual way to one weight is a grid. Fields of experts have many more hyperparameters: filters,
# and a weight and a smoothing for each. They start as the cosine transform without its constant.

# %%
experts = tasks.fields_of_experts()
filters = jnp.asarray(tasks.dct_filters(3))
flat = jnp.full(len(filters), -3.0)
untrained = {"filters": filters, "weight": flat, "smoothing": flat}


def best_weight(problem, hparams, noisy, clean):
    """`hparams` with the common weight that does best on these images, of 17."""
    settings = [{**hparams, "weight": 0 * hparams["weight"] + w} for w in np.linspace(-5, -1, 17)]
    scores = [psnr(denoise(problem, h, noisy), clean) for h in settings]
    return settings[int(np.argmax(scores))]


trained, metrics = learn(
    experts, untrained, train_noisy, train, 0.1, 100.0, steps=100 if FULL else 30
)
contestants = {
    "untuned": (variation, start),
    "grid, one weight": (variation, best_weight(variation, start, train_noisy, train)),
    "grid, cosine filters": (experts, best_weight(experts, untrained, train_noisy, train)),
    "learned, two numbers": (variation, learned[False, 0.1]),
    "learned filters": (experts, trained),
}
results = {name: denoise(p, h, test_noisy) for name, (p, h) in contestants.items()}
held_out = {"noisy": psnr(test_noisy, test)}
held_out |= {name: psnr(images, test) for name, images in results.items()}
for name, value in held_out.items():
    print(f"{name:22}{value:8.2f} dB")

# %%
SHOWN = 1
gallery = {
    "noisy": test_noisy,
    "untuned": results["untuned"],
    "one weight, by grid": results["grid, one weight"],
    "learned filters": results["learned filters"],
    "clean": test,
}


def show(axes, image, title, **style):
    axes.imshow(image, **{"cmap": "gray", "vmin": 0, "vmax": 1, **style})
    axes.set_title(title, loc="center", fontsize=10)
    axes.set_axis_off()


figure, row = plt.subplots(1, 5, figsize=(11, 2.7))
for axes, (name, images) in zip(row, gallery.items(), strict=True):
    level = "" if name == "clean" else f", {tasks.psnr(images, test)[SHOWN]:.1f} dB"
    show(axes, images[SHOWN], name + level)

# %%
figure, rows = plt.subplots(2, 8, figsize=(9, 2.6))
for pair, before, after in zip(rows.T, filters, trained["filters"], strict=True):
    for axes, kernel in zip(pair, (before, after - after.mean()), strict=True):
        show(axes, kernel, "", cmap="RdBu", vmin=-0.7, vmax=0.7)
_ = figure.suptitle("Filters: the cosine transform above, learned below", fontsize=11)

# %% [markdown]
# ## 3. A weight for every pixel
#
# A map of weights belongs to the image it was learned on, so it is tried on that image again, with
# noise that it has not seen. It is learned on four noisy copies.

# %%
COPIES = 4
one = test[SHOWN]
copies = jnp.broadcast_to(one, (COPIES, *one.shape))
seen = tasks.add_noise(jax.random.key(2), copies, NOISE)
fresh = tasks.add_noise(jax.random.key(3), copies, NOISE)
single = best_weight(variation, start, seen, copies)
pixelwise = {**single, "weight": jnp.full(one.shape, single["weight"])}
mapped, metrics = learn(variation, pixelwise, seen, copies, 0.1, 1e4, steps=100 if FULL else 20)
per_pixel = {
    "one weight": psnr(denoise(variation, single, fresh), copies),
    "a weight per pixel": psnr(denoise(variation, mapped, fresh), copies),
}
for name, value in per_pixel.items():
    print(f"{name:22}{value:8.2f} dB under fresh noise")

figure, row = plt.subplots(1, 4, figsize=(9, 2.6))
show(row[0], fresh[0], "fresh noise")
show(row[1], denoise(variation, single, fresh)[0], f"one weight, {per_pixel['one weight']:.1f} dB")
title = f"per pixel, {per_pixel['a weight per pixel']:.1f} dB"
show(row[2], denoise(variation, mapped, fresh)[0], title)
weights = np.asarray(mapped["weight"]) / np.log(10)
show(row[3], weights, "log10 of the weights", cmap="viridis", vmin=None, vmax=None)
_ = figure.colorbar(row[3].images[0], ax=row[3], fraction=0.046)

# %% [markdown]
# Weights fall where the image has edges and rise where it is flat. The last cell asserts the
# numbers at the top.

# %%
ends = [values[-1] for (fixed, _), (_, values) in curves.items() if not fixed]
assert max(ends) < 1.05 * min(ends), ends
assert np.all(curves[True, 10.0][1] == curves[True, 10.0][1][0])  # no step
grids = held_out["grid, one weight"], held_out["grid, cosine filters"]
assert held_out["learned filters"] > max(grids) > held_out["untuned"], held_out
assert per_pixel["a weight per pixel"] > per_pixel["one weight"], per_pixel
print("reached: one objective from every accuracy, and learned penalties above the grid's")
