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
# # One model out of many: soups
#
# A search over fine-tuning leaves many models and keeps one. Model soups (arXiv 2203.05482) average
# their weights instead: on ImageNet (CLIP ViT-B/32) the uniform soup gains 3.6 points over the best
# single model under distribution shift and loses 0.4 without; the greedy soup, which adds a model
# only if held-out accuracy allows it, gains 2.9 and 0.6. Number to reach on digits: under shift the
# uniform soup **3 points above the best single model**, and the greedy soup nowhere below it on the
# images that chose.
#
# ```bash
# pip install -e ".[test]" && python notebooks/15_soups.py
# ```
#
# | | default | `--full` |
# | --- | --- | --- |
# | models, training steps, seeds | 12, 200, 1 | 48, 400, 5 |
# | time on one core | 15 s | 2 minutes |

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import BLUE, FULL, GREEN, GREY, ORANGE, PURPLE, RED, benchmark, mean_and_error, record

import hyperjax as hj
from hyperjax import merge, tasks

MODELS, STEPS, SEEDS = (48, 400, 5) if FULL else (12, 200, 1)
pixels, labels = tasks.digit_images()
WIDTHS = (64, 128, 128, 10)
SHIFTS = ((1, 0), (-1, 0), (0, 1), (0, -1))


def data(seed):
    """To train before, to fine-tune, to choose, to test: images [n, 64] and labels."""
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = jnp.asarray(pixels[order] / 16, jnp.float32), jnp.asarray(labels[order], jnp.int32)
    return [(x[a:b], y[a:b]) for a, b in ((0, 600), (600, 1000), (1000, 1400), (1400, 1797))]


def init(key):
    keys = jax.random.split(key, len(WIDTHS) - 1)
    shapes = zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    return [((2 / n) ** 0.5 * jax.random.normal(k, (n, m)), jnp.zeros(m)) for k, n, m in shapes]


def apply(params, x):
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    return x @ params[-1][0] + params[-1][1]


def shifted(key, part):
    """Every image moved by a pixel in four directions, with noise of deviation 0.35."""
    moved = [jnp.roll(part[0].reshape(-1, 8, 8), by, (1, 2)).reshape(-1, 64) for by in SHIFTS]
    x = jnp.concatenate(moved)
    return x + 0.35 * jax.random.normal(key, x.shape), jnp.tile(part[1], len(SHIFTS))


# %% [markdown]
# ## Fine-tuned apart
#
# One perceptron learns shifted, noisy digits. Its copies then learn 400 clean ones, each with a
# rate, decay, smoothing and noise of its own: a population in which nobody exchanges anything.

# %%
space = hj.space(
    {
        "lr": hj.loguniform(1e-4, 3e-3),
        "decay": hj.loguniform(1e-4, 1e-1),
        "smoothing": hj.uniform(0.0, 0.25),
        "noise": hj.uniform(0.0, 0.3),
    }
)


def loss(params, h, batch):
    x, y, key = batch
    labels = optax.smooth_labels(jax.nn.one_hot(y, 10), h["smoothing"])
    logits = apply(params, x + h["noise"] * jax.random.normal(key, x.shape))
    return optax.softmax_cross_entropy(logits, labels).mean()


def batches(key, part, steps, size):
    rows, noise = jax.random.split(key)
    rows = jax.random.randint(rows, (steps, size), 0, len(part[1]))
    return part[0][rows], part[1][rows], jax.random.split(noise, steps)


adamw = lambda h: optax.adamw(h["lr"], weight_decay=h["decay"])
first = hj.inner(loss, adamw)
training = hj.inner(space.lift(loss), lambda raw: adamw(space.constrain(raw)))
zero = hj.score_only(hj.unroll(training.step), lambda params, h, _: jnp.zeros(()), training.init)
tuning = hj.population(hj.tune(zero, optax.set_to_zero()), hj.exchange.isolation())


@jax.jit
def study(key, parts):
    """The common start and the models [MODELS, ...] made of it."""
    before, clean, _, _ = parts
    weights, moving, draws, settings, drawn, unused = jax.random.split(key, 6)
    h = {"lr": 3e-3, "decay": 0.0, "smoothing": 0.0, "noise": 0.25}
    wide = shifted(moving, before)
    start, _ = hj.unroll(first.step)(
        h, first.init(init(weights), h), batches(draws, wide, 300, 256)
    )
    hparams = jax.vmap(space.sample)(jax.random.split(settings, MODELS))
    copies = hj.copies(start, MODELS)
    state = tuning.init(unused, copies, hparams)
    state, _ = tuning.step(state, hj.Split(batches(drawn, clean, STEPS, 64), ()))
    return start, state.members.carry.params


# %% [markdown]
# ## Mixed
#
# `uniform` averages all; `greedy` tries them from the best on and keeps what does not hurt on
# held-out images; `learned` descends the mixing weights there. Beside them the ensemble, which
# averages logits and costs as many models as it has.


# %%
@jax.jit
def soups(start, models, parts, key):
    """Accuracies [held-out, test, shifted test] in percent, and the size of the greedy soup."""
    _, _, held, test = parts
    noise, drawn = jax.random.split(key)
    measured = (held, test, shifted(noise, test))

    def accuracy(logits):
        hits = [jnp.mean(jnp.argmax(logits(x), -1) == y) for x, y in measured]
        return 100 * jnp.stack(hits)

    of = lambda params: accuracy(lambda x: apply(params, x))
    each = jax.lax.map(of, models)
    greedy = merge.greedy(models, lambda params: -of(params)[0], scores=-each[:, 0])
    recipe = lambda params, temperature, batch: optax.softmax_cross_entropy_with_integer_labels(
        temperature * apply(params, batch[0]), batch[1]
    ).mean()
    learned = merge.learned(models, recipe, batches(drawn, held, 60, 256)[:2])
    return each, jnp.sum(greedy.weights > 0), {
        "start": of(start),
        "best single": each[jnp.argmax(each[:, 0])],
        "uniform soup": of(merge.uniform(models).params),
        "greedy soup": of(greedy.params),
        "learned soup": of(learned.params),
        "ensemble": accuracy(lambda x: jax.vmap(lambda p: apply(p, x))(models).mean(0)),
    }  # fmt: skip


found = []
for seed in range(2000, 2000 + SEEDS):
    parts, (one, two) = data(seed), jax.random.split(jax.random.key(seed))
    start, models = study(one, parts)
    each, size, rows = jax.device_get(soups(start, models, parts, two))
    found.append({"models": each, "size": int(size), **rows})
NAMES = ("start", "best single", "uniform soup", "greedy soup", "learned soup", "ensemble")
percent = {name: np.array([row[name] for row in found]) for name in NAMES}  # [seeds, 3]
print(f"{MODELS} models, seeds: {SEEDS}     held-out      test   shifted")
for name in NAMES:
    print(f"{name:28}" + "".join(f"{v:10.1f}" for v in percent[name].mean(0)))

# %%
figure, (left, right) = plt.subplots(1, 2, gridspec_kw={"width_ratios": (1, 1.2)})
COLOURS = dict(zip(NAMES, (PURPLE, RED, BLUE, GREEN, ORANGE, "k"), strict=True))
left.plot(found[0]["models"][:, 1], found[0]["models"][:, 2], "o", color=GREY, alpha=0.6)
left.plot([], [], "o", color=GREY, label=f"each of {MODELS} models")
for name in NAMES[1:]:
    left.plot(*percent[name][0, 1:], "D", color=COLOURS[name], ms=9, label=name)
left.set(xlim=(found[0]["models"][:, 1].min() - 2.5, None))  # room for the legend
left.set(xlabel="accuracy on test images, %", ylabel="accuracy on shifted test images, %")
left.set_title("This run, its first seed")
left.legend(fontsize=9, loc="lower left")

on_record, paper = benchmark("soups")["accuracy"], benchmark("soups")["paper_accuracy"]
shown = ("uniform soup", "greedy soup", "learned soup", "logit ensemble")
for i, name in enumerate(shown):
    for j, (part, at) in enumerate((("test", 0), ("shifts", 1))):
        best = np.array(on_record["best single"][part]["each"])
        mean, error = mean_and_error(np.array(on_record[name][part]["each"]) - best)
        theirs = paper[name][at] - paper["best single"][at]
        look = {"color": (GREEN, BLUE)[j], "label": ("test", "shifted")[j] if i == 0 else None}
        right.bar(3 * i + j, mean, yerr=error, capsize=3, width=0.9, **look)
        right.plot(3 * i + j, theirs, "k_", ms=16, mew=2.5, label="paper" if i + j == 0 else None)
right.set(xticks=3 * np.arange(4) + 0.5, xticklabels=[name.replace(" ", "\n") for name in shown])
right.set(ylabel="points above the best single model")
right.set_title("On record: 48 models, ten seeds")
_ = right.legend(fontsize=9)

# %% [markdown]
# Under shift averaging wins because fine-tuning had lost: the common start, which learnt shifted
# images, is better there than anything made of it, and the uniform soup goes part of the way back.
# The greedy soup's gain without shift, 0.6 points in the paper, is too small to be seen on 400
# images. Merging models of *different* tasks is harder: on record, Model Breadcrumbs
# (arXiv 2312.06795), meant to beat task arithmetic, ends below it.

# %%
crumbs = benchmark("breadcrumbs")["training"]["far"]["percent_of_tuned"]
for name in ("not merged", "task arithmetic", "breadcrumbs", "TIES"):
    print(f"eight tasks, {name:18}{crumbs[name]['mean']:6.1f} % of the models tuned for each")

gain = {
    name: (percent[name] - percent["best single"]).mean(0).tolist()
    for name in ("uniform soup", "greedy soup", "learned soup")
}
held = min((percent["greedy soup"] - percent["best single"])[:, 0])
reached = gain["uniform soup"][2] >= 3 and held > -1e-4
record(
    "15_soups",
    {
        "seeds": SEEDS,
        "accuracy": {name: values.mean(0).tolist() for name, values in percent.items()},
        "parts": ["held-out", "test", "shifted test"],
        "gain_over_best_single": gain,
        "members_in_the_greedy_soup": [row["size"] for row in found],
        "paper": "arXiv 2203.05482, CLIP ViT-B/32 on ImageNet and five shifts: uniform soup -0.42 "
        "and +3.61 over the best single model, greedy soup +0.64 and +2.89",
        "verdict": "reproduced" if reached and gain["greedy soup"][1] > 0.3
        else "partly" if reached else "not",
        "rule": "uniform soup 3 points above the best single model under shift, greedy soup never "
        "below it on held-out images; partly: without 0.3 points for the greedy soup on the test",
    },
)  # fmt: skip
assert gain["uniform soup"][2] >= 3, gain
assert held > -1e-4, percent
print("reached: the uniform soup 3 points above the best model under shift, greedy never below")
