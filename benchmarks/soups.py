"""Model soups of digit classifiers, beside the table of their paper.

    python benchmarks/soups.py

Four minutes on one busy core; no data but the digits in the package. A perceptron 64-128-128-10 is
trained on 600 digits, shifted by a pixel and noisy; 48 copies are tuned finely on 400 clean ones
with rates, decays, smoothing, noise and mixup of their own; 400 images choose, 397 judge, as they
are and shifted with noise. Ten seeds, paired (Wortsman et al. 2022, arXiv 2203.05482).

Expected: the uniform soup beats the best single model on shifted images by 3 points at least and
lies within a point of the ensemble of all 48; the greedy soup beats the best single model where it
was chosen, by construction, and loses 0.3 points at most on the test. The paper's gain of the
greedy soup on unshifted images (0.64) is too small to be seen on 397 images.

Settings were chosen on seeds 0 to 2; reported are seeds 1000 to 1009.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import by_default, record, spread

import hyperjax as hj
from hyperjax import tasks

PAPER = {  # CLIP ViT-B/32, percent on ImageNet and mean of five shifts; the authors' result files
    "best single": (80.39, 47.97),
    "uniform soup": (79.97, 51.58),
    "greedy soup": (81.03, 50.86),
    "learned soup": (81.38, 50.87),  # by layer; the second from memory
    "logit ensemble": (81.19, 50.77),  # from memory
}
SHIFTS = ((1, 0), (-1, 0), (0, 1), (0, -1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Model soups on digits.")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=1000, help="the first seed")
    parser.add_argument("--members", type=int, default=48)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    pixels, labels = tasks.digit_images()
    start, rows = time.perf_counter(), []
    one = jax.jit(lambda key, parts: run(key, parts, options.members, options.steps))
    for seed in range(options.first, options.first + options.seeds):
        order = np.random.default_rng(seed).permutation(len(pixels))
        x, y = jnp.asarray(pixels[order] / 16, jnp.float32), jnp.asarray(labels[order], jnp.int32)
        parts = [(x[a:b], y[a:b]) for a, b in ((0, 600), (600, 1000), (1000, 1400), (1400, 1797))]
        rows.append(jax.device_get(one(jax.random.key(seed), parts)))
        print(seed, {k: [round(float(v), 3) for v in row] for k, row in rows[-1].items()})
    table = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    data = summary(table) | {"seconds": time.perf_counter() - start, "first_seed": options.first}
    print({k: v for k, v in data.items() if k in ("differences", "targets")})
    if by_default(parser, options):
        record("soups", data)


def summary(table) -> dict:
    """Accuracies in percent: held-out, test, shifts."""
    parts = ("held_out", "test", "shifts")
    accuracy = {
        name: {part: spread(100 * values[:, i]) for i, part in enumerate(parts)}
        for name, values in table.items()
        if name != "members in the greedy soup"
    }

    def gap(first, second, part):
        i = parts.index(part)
        a, b = 100 * table[first][:, i], 100 * table[second][:, i]
        if len(a) == 1:
            return {"difference": {"mean": float(a[0] - b[0])}}
        got = hj.protocol.compare(a, b)
        return got._asdict() | {"difference": got.difference._asdict()}

    gaps = {
        "uniform - best single, shifts": gap("uniform soup", "best single", "shifts"),
        "uniform - ensemble, shifts": gap("uniform soup", "logit ensemble", "shifts"),
        "uniform - ensemble, test": gap("uniform soup", "logit ensemble", "test"),
        "greedy - best single, held-out": gap("greedy soup", "best single", "held_out"),
        "greedy - best single, test": gap("greedy soup", "best single", "test"),
        "greedy - best single, shifts": gap("greedy soup", "best single", "shifts"),
        "learned - best single, shifts": gap("learned soup", "best single", "shifts"),
    }
    mean = {name: value["difference"]["mean"] for name, value in gaps.items()}
    held = 100 * (table["greedy soup"] - table["best single"])[:, 0]
    targets = {
        "uniform >= best single + 3 on shifts": mean["uniform - best single, shifts"] >= 3,
        "uniform within 1 of the ensemble": abs(mean["uniform - ensemble, test"]) <= 1
        and abs(mean["uniform - ensemble, shifts"]) <= 1,
        "greedy >= best single on held-out, every seed": bool(np.all(held >= -1e-4)),
        "greedy >= best single - 0.3 on test": mean["greedy - best single, test"] >= -0.3,
    }
    return {
        "paper": "arXiv 2203.05482, CLIP ViT-B/32: percent on ImageNet, mean of five shifts",
        "paper_accuracy": PAPER,
        "accuracy": accuracy,
        "members_in_the_greedy_soup": spread(table["members in the greedy soup"][:, 0]),
        "differences": gaps,
        "targets": targets,
    }


def run(key, parts, size: int, steps: int) -> dict[str, jax.Array]:
    """Accuracies [held-out, test, shifts] of everything that can be made of one population."""
    before, clean, held, test = parts
    begin, pre, draw, tune, noise, mixing = jax.random.split(key, 6)
    base = pretrain(begin, pre, before)
    hparams = sample(draw, size)
    keys = jax.random.split(tune, size)
    members = jax.vmap(lambda h, k: finetune(base, h, k, clean, steps))(hparams, keys)
    shifted = shifts(noise, test)

    def measure(model):  # a function from images to logits
        hits = lambda part: jnp.mean(jnp.argmax(model(part[0]), -1) == part[1])
        return jnp.stack([hits(held), hits(test), hits(shifted)])

    of = lambda params: measure(lambda x: apply(params, x))
    error = lambda params: 1 - of(params)[0]
    each = jax.lax.map(of, members)
    greedy = hj.merge.greedy(members, error)
    strict = hj.merge.greedy(members, error, ties="discard")
    order = jax.random.split(mixing, 100)
    batches = jax.vmap(lambda k: jax.random.choice(k, len(held[1]), (256,), False))(order)

    def loss(params, temperature, rows):
        logits = temperature * apply(params, held[0][rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, held[1][rows]).mean()

    learned = {
        per: hj.merge.learned(members, loss, batches, per=per) for per in ("tensor", "model")
    }
    ensemble = lambda x: jax.vmap(lambda p: apply(p, x))(members).mean(axis=0)
    return {
        "start": of(base),
        "average single": each.mean(axis=0),
        "best single": each[jnp.argmax(each[:, 0])],
        "uniform soup": of(hj.merge.uniform(members).params),
        "greedy soup": of(greedy.params),
        "greedy soup, strict": of(strict.params),
        "learned soup": of(learned["tensor"].params),
        "learned soup, one vector": of(learned["model"].params),
        "logit ensemble": measure(ensemble),
        "members in the greedy soup": jnp.sum(greedy.weights > 0)[None],
    }


def init(key, sizes=(64, 128, 128, 10)):
    keys = jax.random.split(key, len(sizes) - 1)
    draw = lambda k, m, n: jax.random.normal(k, (m, n)) * (2 / m) ** 0.5
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [{"w": draw(k, m, n), "b": jnp.zeros(n)} for k, m, n in pairs]


def apply(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def shift(x, by):
    return jnp.roll(x.reshape(-1, 8, 8), by, (1, 2)).reshape(-1, 64)


def shifts(key, part):
    """All four shifts of every image, with noise of deviation 0.35."""
    x = jnp.concatenate([shift(part[0], by) for by in SHIFTS])
    return x + 0.35 * jax.random.normal(key, x.shape), jnp.tile(part[1], len(SHIFTS))


def pretrain(begin, key, part, steps: int = 300, batch: int = 256):
    """Adam at 3e-3 on images shifted one way or another, with noise of deviation 0.25."""
    x, y = part
    every = jnp.stack([shift(x, by) for by in SHIFTS])
    optimizer = optax.adam(3e-3)

    def loss(params, key):
        a, b, c = jax.random.split(key, 3)
        rows = jax.random.randint(a, (batch,), 0, len(y))
        chosen = every[jax.random.randint(b, (batch,), 0, len(SHIFTS)), rows]
        logits = apply(params, chosen + 0.25 * jax.random.normal(c, chosen.shape))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    params = init(begin)
    keys = jax.random.split(key, steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


def sample(key, size: int):
    u = jax.random.uniform(key, (5, size))
    return {
        "rate": 10 ** (-4 + 2 * u[0]),
        "decay": 10 ** (-4 + 3 * u[1]),
        "smoothing": 0.2 * u[2],
        "noise": 0.3 * u[3],
        "mixup": 0.4 * u[4],
    }


def finetune(params, h, key, part, steps: int, batch: int = 64):
    """AdamW with a cosine rate; mixup with weights from Beta(1, 1) scaled to [0, mixup]."""
    x, y = part
    optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(h["decay"]))

    def loss(params, key):
        a, b, c = jax.random.split(key, 3)
        rows = jax.random.randint(a, (2, batch), 0, len(y))
        share = h["mixup"] * jax.random.uniform(b, (batch, 1))
        blend = lambda t: (1 - share) * t[rows[0]] + share * t[rows[1]]
        targets = optax.smooth_labels(blend(jax.nn.one_hot(y, 10)), h["smoothing"])
        inputs = blend(x) + h["noise"] * jax.random.normal(c, (batch, 64))
        return optax.softmax_cross_entropy(apply(params, inputs), targets).mean()

    def step(carry, now):
        params, state = carry
        i, key = now
        updates, state = optimizer.update(jax.grad(loss)(params, key), state, params)
        rate = h["rate"] * 0.5 * (1 + jnp.cos(jnp.pi * i / steps))
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return (optax.apply_updates(params, updates), state), None

    now = jnp.arange(steps), jax.random.split(key, steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), now)[0][0]


if __name__ == "__main__":
    main()
