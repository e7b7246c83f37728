"""HDET (arXiv 2604.24708): bad starting rates repaired within one run, on digits and on MNIST.

    python benchmarks/hdet.py --data-dir DIR

About ten minutes on two idle cores. DIR holds mnist/ (see `hyperjax data list`); without it
HYPERJAX_DATA names the folder. Draws docs/images/hdet.png from the record.

Perceptrons (digits: 64-64-64-10, MNIST: 784-128-10), Adam, 8 members, 2,000 steps, a convergence
every 20, gain 0.5, momentum 0.9; training loss over all training images of the averaged params.
Width and sigma were chosen on digits, on seeds 100 and 101; nothing was chosen on MNIST.

Expected on digits (prototype of the specification, 3 to 5 seeds, beside each row):
1. With the update in log space and one batch of 128 for all members, starts at 1e-5, 1e-4, 1e-2
   and 1e-1 all end below 0.05; constant rates end at 1.62, 0.068, about 0 and 1.47.
2. A spread alone, at 1e-3, is never worse than data parallelism by more than 2 %.
3. From 1e-4 the controller ends at half the loss of the constant rate or less.
4. Less than 1 % is added to a step.
5. At 1e-1 no NaN and no negative rate, or a report of it; also with the linear update.
6. From 1e-5 a shared batch ends below 0.02, batches of 16 of one's own above 0.5 (linear update,
   sigma 0.002).
"""

import argparse
import functools
import json
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import RESULTS, ROOT, by_default, compiled, median_times, record, spread

import hyperjax as hj
from hyperjax import tasks
from hyperjax.tasks import _mlp, _mnist

PICTURE = ROOT / "docs" / "images" / "hdet.png"
MEMBERS, EVERY = 8, 20
STARTS = (1e-5, 1e-4, 1e-2, 1e-1)
SPACE = hj.space({"lr": hj.loguniform(1e-7, 10.0)})
LOG = functools.partial(hj.exchange.hdet, SPACE, width=0.5)


class Data(NamedTuple):
    x: jax.Array
    y: jax.Array
    sizes: tuple[int, ...]


class Method(NamedTuple):
    rule: hj.Exchange
    own: int  # images of its own for each member and step; 0: all share a batch of 128
    said: dict  # training loss by start, in the prototype


METHODS = {
    "log, shared 128, sigma 0.002": Method(
        LOG(sigma=0.002), 0, {1e-5: 5e-5, 1e-4: 5e-5, 1e-2: 5e-5, 1e-1: 0.028}
    ),
    "log, shared 128, running sigma": Method(LOG(), 0, {}),
    "linear, shared 128, sigma 0.002": Method(
        LOG(sigma=0.002, update="linear"), 0, {1e-5: 8e-4, 1e-4: 3e-4}
    ),
    "linear, own 16, sigma 0.002": Method(
        LOG(sigma=0.002, update="linear"), 16, {1e-5: 1.05, 1e-4: 0.0197, 1e-2: 5e-5}
    ),
    "linear, own 16, sigma 0.1": Method(
        LOG(sigma=0.1, update="linear"), 16, {1e-5: 1.320, 1e-4: 0.0264, 1e-1: 0.094}
    ),
    "spread alone, own 16": Method(
        hj.exchange.hdet(SPACE, gain=0.0), 16, {1e-5: 1.619, 1e-4: 0.0684, 1e-3: 5e-4, 1e-1: 1.38}
    ),
    "data parallel, own 16": Method(
        hj.exchange.hdet(SPACE, width=0.0), 16, {1e-5: 1.619, 1e-4: 0.0684, 1e-3: 5e-4, 1e-1: 1.47}
    ),
}
ON_MNIST = ("log, shared 128, sigma 0.002", "log, shared 128, running sigma")


def main() -> None:
    parser = argparse.ArgumentParser(description="HDET on digits and MNIST.")
    parser.add_argument("--data-dir", help="folder that holds mnist/")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", choices=("digits", "mnist", "cost", "plot"))
    options = parser.parse_args()
    parts = {
        "digits": lambda: study(digits(), METHODS, options),
        "mnist": lambda: study(mnist(options.data_dir), ON_MNIST, options),
        "cost": cost,
    }
    began = time.perf_counter()
    found = {name: part() for name, part in parts.items() if options.only in (None, name)}
    if by_default(parser, options):
        seconds = time.perf_counter() - began
        record("hdet", {"seconds": seconds, "paper": "arXiv 2604.24708", **found})
    if by_default(parser, options) or options.only == "plot":
        plot(json.loads((RESULTS / "hdet.json").read_text()))


def digits() -> Data:
    pixels, labels = tasks.digit_images()
    return Data(jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(labels), (64, 64, 64, 10))


def mnist(data_dir: str | None) -> Data:
    pixels, labels, count = _mnist.images(data_dir)
    x = jnp.asarray(pixels[:count] / np.float32(255))
    return Data(x, jnp.asarray(labels[:count], jnp.int32), (784, 128, 10))


def loss(data: Data, params, rows):
    logits = _mlp.apply(params, data.x[rows])
    return optax.softmax_cross_entropy_with_integer_labels(logits, data.y[rows]).mean()


def group(data: Data, rule: hj.Exchange, own: bool, size: int = MEMBERS) -> hj.Tuner:
    score = lambda params, raw, rows: loss(data, params, rows)
    optimizer = lambda raw: optax.chain(
        hj.exchange.all_reduce("members"), optax.adam(SPACE.constrain(raw)["lr"])
    )
    training = hj.inner(score, optimizer)
    tuner = hj.tune(hj.training_loss(training, score), optax.set_to_zero())
    batches = "own" if own else "shared"
    return hj.population(tuner, rule, axis_name="members", batches=batches)


def begin(data: Data, tuner: hj.Tuner, start, seed, size: int = MEMBERS):
    """State of a population of equal members."""
    begin, now = jax.random.split(jax.random.key(seed))
    raw = {"lr": SPACE.unconstrain({"lr": start})["lr"]}
    copy = lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x)))
    params = jax.tree.map(copy, _mlp.init(begin, data.sizes))
    return tuner.init(now, params, jax.tree.map(copy, raw))


def rows_of(data: Data, seed, steps: int, own: int) -> jax.Array:
    shape = (MEMBERS, EVERY, own) if own else (EVERY, 128)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return jax.random.randint(key, (steps // EVERY, *shape), 0, len(data.y))


def whole(data: Data, params) -> jax.Array:
    """Training loss over all images, in pieces that fit a cache."""
    pieces = jnp.arange(len(data.y) // 599 * 599).reshape(-1, 599)
    return jax.lax.map(lambda rows: loss(data, params, rows), pieces).mean()


def train(data: Data, method: Method, steps: int):
    tuner = group(data, method.rule, bool(method.own))

    @jax.jit
    def run(start, seed):
        rows = rows_of(data, seed, steps, method.own)
        state, metrics = hj.run(tuner, begin(data, tuner, start, seed), hj.Split(rows, ()))
        params = jax.tree.map(lambda x: x.mean(0), state.members.carry.params)
        events = metrics.events
        return {
            "loss": whole(data, params),
            "base": events.base["lr"],
            "bounded": events.bounded["lr"].any(),
            "diverged": events.diverged.any(),
        }

    return run


def along(data: Data, steps: int):
    """Plain Adam on the shared batches, along a schedule [convergences] of rates."""

    @jax.jit
    def run(rates, seed):
        optimizer = optax.adam(hj.schedule(rates, EVERY))
        params = _mlp.init(jax.random.split(jax.random.key(seed))[0], data.sizes)

        def step(carry, rows):
            params, state = carry
            grads = jax.grad(lambda p: loss(data, p, rows))(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        rows = rows_of(data, seed, steps, 0).reshape(-1, 128)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), rows)
        return whole(data, params)

    return run


def study(data: Data, names, options) -> dict:
    seeds, replay = range(options.seeds), along(data, options.steps)
    count = options.steps // EVERY
    constant = {
        f"{start:g}": spread([float(replay(jnp.full(count, start), s)) for s in seeds])
        for start in (1e-3, *STARTS)
    }
    print("constant", {k: round(v["mean"], 5) for k, v in constant.items()}, flush=True)
    found = {"constant rate, shared 128": constant}
    for name in names:
        method, cells = METHODS[name], {}
        run = train(data, method, options.steps)
        alone = "parallel" in name or "alone" in name
        for start in (1e-3, *STARTS) if alone else STARTS:
            runs = [jax.device_get(run(start, seed)) for seed in seeds]
            cells[f"{start:g}"] = {
                **spread([float(r["loss"]) for r in runs]),
                "prototype": method.said.get(start) if data.sizes[0] == 64 else None,
                "final_rate": [float(r["base"][-1]) for r in runs],
                "least_rate": float(min(r["base"].min() for r in runs)),
                "bounded": any(bool(r["bounded"]) for r in runs),
                "diverged": any(bool(r["diverged"]) for r in runs),
            }
            if name.startswith("log"):  # base after convergence k is that of the steps after it
                rates = [np.concatenate([[start], r["base"][:-1]]) for r in runs]
                cells[f"{start:g}"]["rates"] = [[float(f"{v:.4g}") for v in r] for r in rates]
                again = [
                    float(replay(jnp.asarray(r), s)) for r, s in zip(rates, seeds, strict=True)
                ]
                cells[f"{start:g}"]["replayed_plain"] = spread(again)
            print(name, start, {k: v for k, v in cells[f"{start:g}"].items() if k != "rates"},
                  flush=True)  # fmt: skip
        found[name] = cells
    return found


def cost() -> dict:
    """Wall time of an outer step with HDET and without any exchange, by turns in one process."""
    data, found = digits(), {}
    rules = {"hdet": LOG(), "no exchange": hj.exchange.isolation()}
    for every in (20, 100):
        calls = {}
        for name, rule in rules.items():
            tuner = group(data, rule, True)
            state = begin(data, tuner, 1e-3, 0)
            rows = jax.random.randint(jax.random.key(0), (10, MEMBERS, every, 16), 0, 1797)
            go = lambda s, r, tuner=tuner: hj.run(tuner, s, hj.Split(r, ()))[0]
            calls[name], _ = compiled(go, state, rows)
        times = median_times(calls, 31)
        ratio = times["hdet"]["wall_s"] / times["no exchange"]["wall_s"]
        best = times["hdet"]["wall_min_s"] / times["no exchange"]["wall_min_s"]
        found[f"every {every}"] = {"times": times, "ratio": ratio, "ratio_of_least": best}
        print(f"every {every}: {ratio:.4f} (median), {best:.4f} (least)", flush=True)
    return found


def plot(data: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    titles = {"digits": "Digits, 64-64-64-10", "mnist": "MNIST, 784-128-10: nothing chosen here"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        cells = data[name][ON_MNIST[0]]
        for i, (start, cell) in enumerate(cells.items()):
            rates = np.asarray(cell["rates"])
            steps = EVERY * np.arange(rates.shape[1])
            for j, row in enumerate(rates):
                label = f"from {start}: loss {cell['mean']:.4f}" if j == 0 else None
                axes.plot(steps, row, color=f"C{i}", lw=1, alpha=0.8, label=label)
        axes.set(title=title, xlabel="training step", yscale="log")
        axes.legend(fontsize=8)
    panels[0].set_ylabel("base learning rate of Adam")
    figure.suptitle("HDET, 8 members, a shared batch of 128: one line per seed", fontsize=11)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
