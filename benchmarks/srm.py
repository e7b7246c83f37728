"""Learning curves of perceptrons on the digits, continued by regression (sequential regression
models, Baker et al. 2017, arXiv 1705.10823), and trainings stopped by it.

    python benchmarks/srm.py

One minute of one core. Five populations, each of 256 perceptrons 64-w-10 with six
hyperparameters (rate, momentum, decay, dropout, scale of the first weights, width w by a mask),
trained at once for 40 evaluations of the validation error, 20 steps of SGD apart. 100 of them fit
the models, 156 are forecast after 10 evaluations, and searched through in 10 random orders: a
training is stopped at its 10th evaluation if it will not beat the best so far with probability
Delta or more. "speedup" is of the 156, "speedup_in_all" counts the 100 as well.

Expected, by the specification's prototype: R^2 of the forecast 0.64 to 0.68 against 0.48 for the
value last seen, and 2.3 to 3.7 times less training at a regret of 0.002 in accuracy. It counts if
R^2 is higher by 0.1 and the speed-up is 2 or more at a regret of 0.005 or less, for Delta = 0.95.
The paper's speed-up of 6 (from memory) is for other spaces; here more than 4 is impossible.
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
from hyperjax.search import fit_curves, outclassed, predict_curve

MEMBERS, FITTED, POINTS, KNOWN, STEPS, BATCH = 256, 100, 40, 10, 20, 32
WIDEST = 64
DELTAS = (0.9, 0.95, 0.99)
ORDERS = 10
SPACE = hj.space(
    {
        "rate": hj.loguniform(1e-3, 1.0),
        "momentum": hj.uniform(0.0, 0.95),
        "decay": hj.loguniform(1e-6, 1e-1),
        "dropout": hj.uniform(0.0, 0.8),
        "scale": hj.loguniform(0.1, 3.0),
        "width": hj.loguniform(2.0, float(WIDEST)),
    }
)
PROTOTYPE = {
    "ordinary_least_squares": 0.639,
    "nu_svr": 0.682,
    "curve_only": 0.672,
    "last_seen": 0.477,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Forecasts of learning curves.")
    parser.add_argument("--seeds", type=int, default=5, help="populations")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--members", type=int, default=MEMBERS)
    options = parser.parse_args()
    start = time.perf_counter()
    train = jax.jit(population)
    populations = []
    for seed in range(options.first, options.first + options.seeds):
        curves, traits = jax.device_get(train(jax.random.key(seed), data(seed, options.members)))
        populations.append(judge(np.random.default_rng(seed), curves, traits))
        print(seed, populations[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    found = summary(populations)
    print(found)
    if by_default(parser, options):
        record("srm", {"seconds": time.perf_counter() - start, **found, "each": populations})


# --------------------------------------------------------------------------- trainings


def data(seed: int, members: int) -> dict[str, jax.Array]:
    """Digits split at random, minibatches and first weights: everything that depends on a seed."""
    rng = np.random.default_rng(seed)
    pixels, labels = tasks.digit_images()
    order = rng.permutation(len(pixels))
    x, y = jnp.asarray(pixels[order] / 16, jnp.float32), jnp.asarray(labels[order])
    rows = jnp.asarray(rng.integers(0, 1198, (POINTS, STEPS, BATCH)))
    points = jnp.asarray(rng.uniform(size=(members, len(SPACE.names))), jnp.float32)
    return {"x": x, "y": y, "rows": rows, "points": points}


def logits(params, hparams, x, keep=None):
    hidden = jax.nn.relu(x @ params["w"] + params["b"][None])
    width = jnp.arange(WIDEST) < hparams["width"]
    hidden = hidden * width[None] if keep is None else hidden * width[None] * keep
    return hidden @ params["v"] + params["c"][None]


def loss(params, hparams, batch):
    key, x, y = batch
    keep = jax.random.bernoulli(key, 1 - hparams["dropout"], (len(x), WIDEST))
    keep = keep / (1 - hparams["dropout"])
    entropy = optax.softmax_cross_entropy_with_integer_labels
    fit = entropy(logits(params, hparams, x, keep), y).mean()
    return fit + hparams["decay"] / 2 * sum(jnp.sum(params[n] ** 2) for n in ("w", "v"))


def error(params, hparams, batch):
    x, y = batch
    return jnp.mean(jnp.argmax(logits(params, hparams, x), -1) != y, dtype=jnp.float32)


def population(key: jax.Array, data: dict[str, jax.Array]):
    """Validation errors [members, POINTS] and traits [members, H]."""
    training = hj.inner(
        SPACE.lift(loss),
        lambda raw: optax.sgd(SPACE.constrain(raw)["rate"], SPACE.constrain(raw)["momentum"]),
    )
    estimator = hj.score_only(hj.unroll(training.step), SPACE.lift(error), training.init)
    group = hj.population(hj.tune(estimator, optax.set_to_zero()), hj.exchange.isolation())
    raw = SPACE.from_unit(data["points"])
    weights, noise = jax.random.split(key)
    keys = jax.random.split(weights, len(data["points"]))
    state = group.init(key, jax.vmap(first)(keys, SPACE.constrain(raw)), raw)
    noise = jax.random.split(noise, (POINTS, STEPS))
    train = (noise, data["x"][data["rows"]], data["y"][data["rows"]])
    repeat = lambda v: jnp.broadcast_to(v, (POINTS, *v.shape))
    held = repeat(data["x"][1198:]), repeat(data["y"][1198:])
    _, metrics = hj.run(group, state, hj.Split(train, held))
    # Raw values, and the logarithm of the number of parameters, which the width alone decides.
    traits = jnp.concatenate([SPACE.ravel(raw), jnp.log(75 * units(raw) + 10)[:, None]], 1)
    return metrics.members.value.T, traits


def units(raw) -> jax.Array:
    """How many the mask leaves."""
    return jnp.ceil(SPACE.constrain(raw)["width"])


def first(key, hparams):
    one, two = jax.random.split(key)
    size = hparams["scale"]
    return {
        "w": size * jax.random.normal(one, (64, WIDEST)) * (2 / 64) ** 0.5,
        "b": jnp.zeros(WIDEST),
        "v": size * jax.random.normal(two, (WIDEST, 10)) / jnp.sqrt(hparams["width"]),
        "c": jnp.zeros(10),
    }


# --------------------------------------------------------------------------- forecasts


def judge(rng: np.random.Generator, curves: np.ndarray, traits: np.ndarray) -> dict:
    order = rng.permutation(len(curves))
    fitted, rest = order[: min(FITTED, len(order) // 2)], order[min(FITTED, len(order) // 2) :]
    final = curves[rest, -1]
    forecasts = {}
    quality = {"last_seen": r2(final, curves[rest, KNOWN - 1])}
    for name, columns in (("curve_and_traits", traits), ("curve_only", traits[:, :0])):
        models = jax.jit(fit_curves)(jnp.asarray(curves[fitted]), jnp.asarray(columns[fitted]))
        ask = jnp.asarray(curves[rest]), jnp.asarray(columns[rest])
        forecast = predict_curve(models, *ask, KNOWN)
        quality[name] = r2(final, np.asarray(forecast.mean))
        forecasts[name] = jax.device_get(forecast)
    chosen, stops = forecasts["curve_and_traits"], {}
    for delta in DELTAS:
        orders = [rng.permutation(len(rest)) for _ in range(ORDERS)]
        runs = [search(order, final, chosen, delta) for order in orders]
        names = "speedup", "regret", "speedup_in_all"
        stops[str(delta)] = dict(zip(names, np.mean(runs, 0).tolist(), strict=True))
    return {"r2": quality, "stops": stops}


def r2(truth: np.ndarray, guess: np.ndarray) -> float:
    return float(1 - np.sum((truth - guess) ** 2) / np.sum((truth - truth.mean()) ** 2))


def search(order, final, forecast, delta: float) -> tuple[float, float, float]:
    """(speed-up, regret, speed-up with the fitted trainings) of early stops in `order`."""
    best, cost = np.inf, 0
    beaten = np.zeros(len(final))
    for i in order:
        if beaten[i] >= delta:
            cost += KNOWN
            continue
        cost += POINTS
        if final[i] < best:
            best = final[i]
            beaten = np.asarray(chances(forecast, best))
    whole, paid = len(order) * POINTS, FITTED * POINTS
    return whole / cost, best - final.min(), (whole + paid) / (cost + paid)


chances = jax.jit(outclassed)


def summary(populations: list[dict]) -> dict:
    quality = {n: spread([p["r2"][n] for p in populations]) for n in populations[0]["r2"]}
    stops = {
        d: {n: spread([p["stops"][d][n] for p in populations]) for n in found}
        for d, found in populations[0]["stops"].items()
    }
    gain = quality["curve_and_traits"]["mean"] - quality["last_seen"]["mean"]
    rule = stops["0.95"]
    counts = gain >= 0.1 and rule["speedup"]["mean"] >= 2 and rule["regret"]["mean"] <= 0.005
    setting = f"{MEMBERS} members, {FITTED} to fit, {KNOWN} of {POINTS} evaluations known"
    return {
        "paper": "arXiv 1705.10823: up to 6 times (from memory), in other spaces",
        "setting": setting,
        "prototype_r2": PROTOTYPE,
        "r2": quality,
        "stops": stops,
        "gain_in_r2": gain,
        "counts": bool(counts),
    }


if __name__ == "__main__":
    main()
