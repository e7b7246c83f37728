"""The population hypergradient (`secant`) beside its two parts: first order alone, secants alone.

    python benchmarks/population_hypergradient.py

About three minutes on two idle cores; needs no data but the digits that come with the package.
Ours: there is no paper to compare with.

1. Ridge with five strengths of l2, where the hypergradient is known: 60 steps of descent of which
   the last K are differentiated (the bias), and normal noise on the scores of 16 replicas. Relative
   errors over 10 problems and 100 draws of the noise each. Expected: first order is best without a
   bias, secants without noise; in between, where a bias can just be seen through the noise, the
   combination beats both, and it is never far from the better one.
2. Digits, a perceptron 64-64-10 under SGD: log rate, raw momentum, log l2; the derivative of the
   validation loss after t steps in hyperparameters that were constant for all of them, while the
   last 10 steps are differentiated. Relative errors against forward mode through all steps.
3. The same problem tuned: 60 outer steps of 10, from a rate of 0.003, by each of the three at equal
   cost (8 replicas). Loss on all validation images at the end.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import by_default, record, spread

import hyperjax as hj
from hyperjax import _fan_out, tasks
from hyperjax.tasks import _mlp

PARTS = ("combined", "first_order", "secant")
REPLICAS, WIDTH, STEPS = 16, 0.1, 60
WINDOWS, NOISES = (1, 2, 4, 8, 60), (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
HORIZONS, WINDOW = (20, 50, 100, 200), 10
OUTER, TUNED, SPEED = 60, 8, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description="Population hypergradients.")
    parser.add_argument("--problems", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--only", choices=("ridge", "digits", "tuned"))
    options = parser.parse_args()
    parts = {
        "ridge": lambda: ridge(options.problems),
        "digits": lambda: horizons(options.seeds),
        "tuned": lambda: tuned(options.seeds),
    }
    began = time.perf_counter()
    found = {name: part() for name, part in parts.items() if options.only in (None, name)}
    if by_default(parser, options):
        record("population_hypergradient", {"seconds": time.perf_counter() - began, **found})


def pick(estimator: hj.Estimator, name: str) -> hj.Estimator:
    """The combined gradient, or one of its parts, at the same cost."""
    if name == "combined":
        return estimator

    def estimate(hparams, carry, split):
        found, carry = estimator.estimate(hparams, carry, split)
        return found._replace(grad=getattr(found.info, name)), carry

    return hj.Estimator(estimator.init, estimate)


def relative(got, truth) -> jax.Array:
    flat = lambda t: jax.flatten_util.ravel_pytree(t)[0]
    return jnp.linalg.norm(flat(got) - flat(truth)) / jnp.linalg.norm(flat(truth))


# ------------------------------------------------------------------------------- 1. ridge


def ridge(problems: int, draws: int = 100) -> dict:
    jax.config.update("jax_enable_x64", True)  # a regression of differences of scores near 1
    rows = {}
    for window in WINDOWS:
        run = jax.jit(jax.vmap(functools.partial(ridge_errors, window, draws)))
        table = run(jax.random.split(jax.random.key(0), problems))  # [problems, noises, draws]
        for i, noise in enumerate(NOISES):
            cell = {
                name: spread(np.sqrt(np.mean(np.asarray(x)[:, i] ** 2, axis=-1)))
                for name, x in table.items()
            }
            means = {name: cell[name]["mean"] for name in PARTS}
            best = min(means, key=means.__getitem__)
            rows[f"window {window}, noise {noise:g}"] = {**cell, "best": best}
            print(window, noise, {k: round(v, 5) for k, v in means.items()}, best, flush=True)
    jax.config.update("jax_enable_x64", False)
    return {"setting": f"{REPLICAS} replicas, width {WIDTH}, 5 scalars", "rows": rows}


def ridge_errors(window: int, draws: int, key):
    """Relative errors [noises, draws] of each part on one random problem."""
    keys = jax.random.split(key, 6)
    weights = jax.random.normal(keys[0], (5,))

    def rows(a, b):
        x = jax.random.normal(a, (40, 5))
        return x, x @ weights + 0.5 * jax.random.normal(b, (40,))

    train, valid = rows(keys[1], keys[2]), rows(keys[3], keys[4])
    half = lambda w, data: 0.5 * jnp.mean((data[0] @ w - data[1]) ** 2)
    loss = lambda w, h, data: half(w, data) + 0.5 * jnp.sum(jnp.exp(h) * w**2)
    score = lambda w, h, data: half(w, data)
    # Rate 0.4 is below 2 over the largest eigenvalue, about 3.5 with l2.
    training = hj.inner(loss, lambda _: optax.sgd(0.4))
    split = hj.Split(jax.tree.map(lambda x: jnp.broadcast_to(x, (STEPS, *x.shape)), train), valid)
    build = lambda **cut: (
        hj.hypergradient(hj.unroll(training.step, **cut), score, training.init).estimate
    )
    begin = jax.vmap(training.init, (None, 0))
    h = jnp.full(5, -0.5)
    truth = build()(h, training.init(jnp.zeros(5), h), split)[0].grad
    cut = {} if window == STEPS else {"truncate": window}

    def once(key):
        offset_key, noise_key = jax.random.split(key)
        offsets = WIDTH * _fan_out.mirrored(offset_key, REPLICAS, h)
        around = h[None] + offsets
        found, _ = jax.vmap(build(**cut), (0, 0, None))(around, begin(jnp.zeros(5), around), split)
        noise = jax.random.normal(noise_key, (REPLICAS,))

        def at(scale):
            grad, info = hj.secant_gradient(found.value + scale * noise, around, found.grad)
            parts = {"combined": grad, "first_order": info.first_order, "secant": info.secant}
            return {name: relative(g, truth) for name, g in parts.items()}

        return jax.vmap(at)(jnp.asarray(NOISES))

    table = jax.lax.map(once, jax.random.split(keys[5], draws), batch_size=10)
    return jax.tree.map(lambda x: x.T, table)


# ------------------------------------------------------------------------ 2. and 3. digits


@functools.cache
def digits():
    pixels, labels = tasks.digit_images()
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = np.asarray(pixels[order] / 16, np.float32), labels[order]
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


def entropy(params, rows):
    x, y = rows
    logits = _mlp.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def loss(params, h, rows):
    return entropy(params, rows) + 0.5 * jnp.exp(h["l2"]) * optax.tree.norm(params, squared=True)


def score(params, h, rows):
    del h
    return entropy(params, rows)


def optimizer(h):
    return optax.sgd(jnp.exp(h["lr"]), momentum=jax.nn.sigmoid(h["momentum"]))


TRAINING = hj.inner(loss, optimizer)


def start(rate: float) -> dict:
    return {"lr": jnp.log(rate), "momentum": jnp.asarray(0.0), "l2": jnp.log(1e-3)}


def stream(key, outer: int) -> hj.Split:
    """Minibatches of 64, [outer, WINDOW, ...], and all validation images each time."""
    (x, y), valid = digits()
    index = jax.random.randint(key, (outer, WINDOW, 64), 0, len(y))
    many = jax.tree.map(lambda v: jnp.broadcast_to(v, (outer, *v.shape)), valid)
    return hj.Split((jnp.asarray(x)[index], jnp.asarray(y)[index]), many)


def horizons(seeds: int) -> dict:
    """The last window differentiated, against all t steps, at constant hyperparameters."""
    inside = hj.hypergradient(hj.unroll(TRAINING.step), score, TRAINING.init)
    around = hj.secant(inside, jax.random.key(1), size=REPLICAS, width=WIDTH)
    still = hj.tune(around, optax.set_to_zero())
    h = start(0.05)

    def one(outer, key):
        begin, order = jax.random.split(key)
        params, splits = _mlp.init(begin, (64, 64, 10)), stream(order, outer)
        state = still.init(params, h)
        state, _ = hj.run(still, state, jax.tree.map(lambda x: x[:-1], splits))
        found, _ = around.estimate(h, state.carry, jax.tree.map(lambda x: x[-1], splits))

        def whole(h):  # score after all steps
            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), splits.train)
            step = lambda s, batch: (TRAINING.step(s, h, batch), None)
            end, _ = jax.lax.scan(step, TRAINING.init(params, h), flat)
            return score(end.params, h, digits()[1])

        truth = jax.jacfwd(whole)(h)
        info = found.info
        parts = {"combined": found.grad, "first_order": info.first_order, "secant": info.secant}
        return {**{n: relative(g, truth) for n, g in parts.items()}, "share": info.share}

    rows = {}
    for steps in HORIZONS:
        run = jax.jit(functools.partial(one, steps // WINDOW))
        cells = [jax.device_get(run(jax.random.key(seed))) for seed in range(seeds)]
        rows[f"{steps} steps"] = {n: spread([float(c[n]) for c in cells]) for n in cells[0]}
        means = {n: round(v["mean"], 4) for n, v in rows[f"{steps} steps"].items()}
        print(steps, means, flush=True)
    return rows


def tuned(seeds: int) -> dict:
    """Loss at the end of tuning while training, by each part."""
    inside = hj.hypergradient(hj.unroll(TRAINING.step), score, TRAINING.init)
    around = hj.secant(inside, jax.random.key(1), size=TUNED, width=WIDTH, every=10)

    def one(tuner, key):
        begin, order = jax.random.split(key)
        state = tuner.init(_mlp.init(begin, (64, 64, 10)), start(0.003))
        state, metrics = hj.run(tuner, state, stream(order, OUTER))
        return metrics.value[-1], jnp.exp(state.hparams["lr"])

    rows = {}
    methods = {name: pick(around, name) for name in PARTS}
    for name, estimator in {**methods, "constant": methods["combined"]}.items():
        still = name == "constant"
        tuner = hj.tune(estimator, optax.set_to_zero() if still else optax.adam(SPEED))
        run = jax.jit(functools.partial(one, tuner))
        cells = [jax.device_get(run(jax.random.key(seed))) for seed in range(seeds)]
        rows[name] = {
            n: spread([float(c[i]) for c in cells]) for i, n in enumerate(("loss", "rate"))
        }
        print(name, {n: round(v["mean"], 4) for n, v in rows[name].items()}, flush=True)
    return rows


if __name__ == "__main__":
    main()
