"""Every estimator at 64 hyperparameter settings: one vmapped program against 64 calls of one.

    python benchmarks/vmapped.py            # some five minutes on two cores

The ridge regression of the tests, and softmax regression and a small perceptron on the embedded
digits with one l2 penalty per row of the image (eight hyperparameters) and 20 full-batch steps; all
in float32. "Chunks" is the same program by `lax.map` in batches of eight, as `population(chunk=8)`
does. All programs are compiled before the clock starts; the calls come one after another, as in a
loop over settings, and each is waited for before the next, as a loop that looks at them would.
Medians of five turns.
"""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import ROOT, compiled, median_times, record

import hyperjax as hj

sys.path.insert(0, str(ROOT / "tests"))
import estimator_zoo
import problems
from problems import Problem

SETTINGS, CHUNK, STEPS, REPEATS = 64, 8, 20, 5


def digits() -> list[tuple[jax.Array, jax.Array]]:
    """Training and validation images [599, 64] in [0, 1] and their labels."""
    archive = np.load(ROOT / "hyperjax" / "tasks" / "data" / "digits.npz")
    images = archive["images"].reshape(-1, 64) / 16
    order = np.random.default_rng(0).permutation(len(images))
    parts = order[:599], order[599:1198]
    return [(jnp.asarray(images[p], jnp.float32), jnp.asarray(archive["labels"][p])) for p in parts]


def problem(hidden: int | None) -> Problem:
    train, valid = digits()
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)
    params = {"in": draw(64, hidden or 10)} | ({"out": draw(hidden, 10)} if hidden else {})

    def logits(w, x):
        return jnp.tanh(x @ w["in"]) @ w["out"] if hidden else x @ w["in"]

    def cross_entropy(w, batch):
        x, y = batch
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(w, x), y)
        return jnp.mean(losses)

    def loss(w, h, batch):
        del batch
        penalty = jnp.repeat(jnp.exp(h), 8)[:, None]
        return cross_entropy(w, train) + 0.5 * jnp.sum(penalty * w["in"] ** 2)

    score = lambda w, h, batch: cross_entropy(w, valid)
    inner = hj.inner(loss, lambda h: optax.sgd(0.5))
    split = hj.Split(jnp.arange(STEPS), jnp.zeros(()))
    return Problem(loss, score, inner, params, jnp.full(8, -4.0, jnp.float32), split)


def ridge() -> Problem:
    p = problems.ridge(steps=STEPS)
    return p._replace(hparams=p.hparams.astype(jnp.float32))


def contest(make: Callable, p: Problem) -> dict:
    estimator = make(p)
    carry = estimator.init(p.params, p.hparams)
    estimate = lambda h: estimator.estimate(h, carry, p.split)[0].grad
    noise = 0.3 * jax.random.normal(jax.random.key(0), (SETTINGS, 8))
    settings = p.hparams + noise[:, : p.hparams.size]
    together, vmapped = compiled(jax.vmap(estimate), settings)
    chunks, _ = compiled(lambda s: jax.lax.map(estimate, s, batch_size=CHUNK), settings)
    one = jax.jit(estimate).lower(p.hparams).compile()
    each = list(settings)
    sequential = lambda: [jax.block_until_ready(one(h)) for h in each]
    times = median_times({"vmapped": together, "chunks": chunks, "sequential": sequential}, REPEATS)
    alone = times["sequential"]["wall_s"]
    speedup = {name: alone / times[name]["wall_s"] for name in ("vmapped", "chunks")}
    expected = np.stack([one(h) for h in each])
    # Zero where the gradient is: undamped CG may meet negative curvature at once, and reports it.
    size = np.abs(expected).max() or 1.0
    spread = float(np.abs(together() - expected).max() / size)
    return {"speedup": speedup, "difference": spread, **times, "compile": vmapped}


def main() -> None:
    results: dict = {}
    contests = {
        "ridge": ridge(),
        "softmax regression": problem(None),
        "perceptron, 32 hidden": problem(32),
    }
    for label, p in contests.items():
        results[label] = {}
        for name, kind in estimator_zoo.KINDS.items():
            results[label][name] = row = contest(kind.make, p)
            times = ", ".join(
                f"{way} {1e3 * row[way]['wall_s']:7.1f} ms"
                for way in ("sequential", "chunks", "vmapped")
            )
            faster = " and ".join(f"{x:.1f}" for x in row["speedup"].values())
            print(f"{label:22} {name:15} {times}; {faster} x as fast", flush=True)
    record("vmapped", {"settings": SETTINGS, "chunk": CHUNK, "steps": STEPS, "results": results})


if __name__ == "__main__":
    main()
