"""Optimizers that tune their own rates, on full MNIST, beside the numbers of their papers.

    python benchmarks/online_mnist.py --data-dir DIR

Six minutes on two cores that had other work as well. DIR holds mnist/train-images-idx3-ubyte.gz
and its three siblings (see `hyperjax data list`); without it HYPERJAX_DATA names the folder.

1. Hypergradient descent (Baydin et al. 2018, arXiv 1703.04782): logistic regression, 10 epochs,
   the three methods without and with it. Expected: test losses within 0.01 of those in the
   authors' result files.
2. The ultimate optimizer (Chandra et al. 2022, arXiv 1909.13371): a perceptron 784-128-10 with
   tanh, 5 epochs, SGD under towers of SGD of height 0 to 3, every level starting at one rate.
   Expected: SGD at 0.01 has an error near 9 %, tuned by SGD at 0.01 below 5 %; tall towers make
   small first rates harmless and large ones worse.
"""

import argparse
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import record

import hyperjax as hj
from hyperjax import tasks

MEAN, DEVIATION = 0.1307, 0.3081  # of the training pixels in [0, 1], as the authors rounded them
ALPHA, DECAY = 1e-3, 1e-4  # first rate, weight decay

# name: direction, beta, and final test loss in the authors' result files, plain and with HD
METHODS = {
    "SGD": (optax.identity(), 1e-3, (0.374, 0.288)),
    "SGDN": (optax.trace(0.9, nesterov=True), 1e-3, (0.285, 0.272)),
    "Adam": (optax.scale_by_adam(), 1e-7, (0.272, 0.272)),
}
RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HEIGHTS = (0, 1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Self-tuning optimizers on MNIST.")
    parser.add_argument("--data-dir", help="folder that holds mnist/")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    data = load(options.data_dir)
    seeds = range(options.seeds)
    start = time.perf_counter()
    rows = [logistic(data, name, hd, seeds) for name in METHODS for hd in (False, True)]
    cells = [tower(data, height, seeds) for height in HEIGHTS]
    record(
        "online_mnist",
        {
            "seconds": time.perf_counter() - start,
            "seeds": options.seeds,
            "hypergradient_descent": {
                "paper": "arXiv 1703.04782; authors' result files, final validation loss",
                "setting": "logistic regression, 10 epochs, batches of 128, alpha 1e-3, decay 1e-4",
                "rows": rows,
            },
            "ultimate": {
                "paper": "arXiv 1909.13371; 8.99 and 4.81 % from memory, not looked up again",
                "paper_error_percent": {"sgd 0.01": 8.99, "sgd 0.01 / sgd 0.01": 4.81},
                "setting": "784-128-10 tanh, 5 epochs, batches of 256, all levels at one rate",
                "rates": RATES,
                "test_error_percent_by_height": cells,
            },
        },
    )


def load(data_dir: str | None) -> dict[str, jax.Array]:
    files = {status.file.name: status.file for status in tasks.catalogue(data_dir)}

    def read(name, header):  # IDX: 16 bytes before images, 8 before labels
        return np.frombuffer(tasks.read(files[name], data_dir), np.uint8)[header:]

    def images(name):
        pixels = read(name, 16).reshape(-1, 784).astype(np.float32) / 255
        return jnp.asarray((pixels - MEAN) / DEVIATION)

    labels = lambda name: jnp.asarray(read(name, 8).astype(np.int32))
    return {
        "x": images("mnist-train-images"),
        "y": labels("mnist-train-labels"),
        "test_x": images("mnist-test-images"),
        "test_y": labels("mnist-test-labels"),
    }


def init(key: jax.Array, sizes: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    """Uniform within 1 / sqrt(inputs), as the authors' framework does by default."""
    layers = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        key, w, b = jax.random.split(key, 3)
        draw = functools.partial(jax.random.uniform, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)
        layers.append({"w": draw(w, (fan_in, fan_out)), "b": draw(b, (fan_out,))})
    return layers


def logits(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def train(data, optimizer, key, *, sizes, epochs, batch, watch):
    """Params after training, and `watch(optimizer state)` at every step."""
    begin, order = jax.random.split(key)
    params = init(begin, sizes)
    count = len(data["y"])

    def step(carry, rows):
        params, state = carry
        grads = jax.grad(loss)(params, data["x"][rows], data["y"][rows])
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), watch(state)

    def epoch(carry, key):  # the rest of an epoch that makes no batch is left out
        rows = jax.random.permutation(key, count)[: count // batch * batch].reshape(-1, batch)
        return jax.lax.scan(step, carry, rows)

    carry = params, optimizer.init(params)
    (params, _), seen = jax.lax.scan(epoch, carry, jax.random.split(order, epochs))
    return params, seen


def logistic(data, name: str, hd: bool, seeds) -> dict:
    direction, beta, published = METHODS[name]
    if hd:
        last = hj.online.hypergradient_descent(direction, ALPHA, beta)
        watch = lambda state: state[1].learning_rate
    else:
        last = optax.chain(direction, optax.scale_by_learning_rate(ALPHA))
        watch = lambda state: ()
    optimizer = optax.chain(optax.add_decayed_weights(DECAY), last)

    @jax.jit
    def run(data, key):
        params, rates = train(
            data, optimizer, key, sizes=(784, 10), epochs=10, batch=128, watch=watch
        )
        part = loss(params, data["x"][:10_000], data["y"][:10_000])
        return part, loss(params, data["test_x"], data["test_y"]), rates

    runs = [jax.device_get(run(data, jax.random.key(seed))) for seed in seeds]
    row = {
        "method": name + (" with HD" if hd else ""),
        "train_loss": [float(r[0]) for r in runs],
        "test_loss": [float(r[1]) for r in runs],
        "test_loss_mean": float(np.mean([r[1] for r in runs])),
        "test_loss_paper": published[hd],
    }
    if hd:
        row["largest_rate"] = [float(r[2].max()) for r in runs]
    print(row, flush=True)
    return row


def tower(data, height: int, seeds) -> dict:
    """Test errors in percent: rates by seeds."""
    sgd = lambda h: optax.sgd(h)

    def optimizer(rate):
        level = optax.sgd(rate)
        for _ in range(height):
            level = hj.online.ultimate(sgd, rate, level)
        return level

    @jax.jit
    def run(data, key, rate):
        params, _ = train(
            data,
            optimizer(rate),
            key,
            sizes=(784, 128, 10),
            epochs=5,
            batch=256,
            watch=lambda state: (),
        )
        guess = jnp.argmax(logits(params, data["test_x"]), -1)
        return 100 * jnp.mean(guess != data["test_y"])

    errors = {
        f"{rate:g}": [float(run(data, jax.random.key(seed), rate)) for seed in seeds]
        for rate in RATES
    }
    row = {"height": height, "error": errors}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
