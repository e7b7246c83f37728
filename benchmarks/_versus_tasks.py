"""The five problems of `versus.py`: a model, what may be tuned of it, and where each may lie.

A problem is the same for all methods: model, data, optimizer, length of a training, batches and
noise, bounds and start of the hyperparameters. A seed chooses the rows, the first weights and the
order of the batches. Noise comes out of a bank of 64 draws per seed, since on a CPU drawing it anew
would take longer than the training step that it is for.
"""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hyperjax as hj
from hyperjax import tasks
from hyperjax.tasks import _mlp
from hyperjax.tasks._data import A9A, read
from hyperjax.tasks._mnist import images
from hyperjax.tasks._weight_penalties import area_average

Data = dict[str, Any]
BANK = 64


class Problem(NamedTuple):
    """`data(seed)` has leaves of the same shapes for all seeds; hparams are constrained values."""

    title: str
    space: hj.Space
    steps: int  # of one training
    trainings: int  # full ones in the budget of a search
    together: int  # trainings in one vmapped program: as many as make it fastest on a core
    rows: tuple[int, int]  # of a training batch and of the validation set: what a gradient costs
    data: Callable[[int], Data]
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any, Any, Data], jax.Array]  # (params, hparams, batch, data)
    optimizer: Callable[[Any], optax.GradientTransformation]
    batch: Callable[[Data, jax.Array], Any]  # (data, key) -> batch
    valid: Callable[[Any, Data], jax.Array]
    test: Callable[[Any, Data], jax.Array]
    unit: str = "cross-entropy"


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# ----------------------------------------------------------------------- a9a: 123 penalties


def a9a(folder: str | None) -> Problem:
    """500 rows to train, 2,000 to validate, the official 16,281 to test: one penalty a feature."""
    archive = np.load(io.BytesIO(read(A9A, folder)))
    table = lambda part: np.unpackbits(archive[f"{part}_bits"], axis=1)[:, :123]
    x, y = table("train").astype(np.float32), archive["train_y"].astype(np.float32)
    test_x, test_y = jnp.asarray(table("test")), jnp.asarray(archive["test_y"], jnp.float32)
    train, valid = 500, 2_000

    def data(seed: int) -> Data:
        order = np.random.default_rng(seed).permutation(len(y))[: train + valid]
        parts = {"x": x[order[:train]], "y": y[order[:train]]}
        return parts | {"valid_x": x[order[train:]], "valid_y": y[order[train:]]}

    def fit(params, x, y):
        return jnp.mean(jax.nn.softplus(-y * (x @ params["w"] + params["b"])))

    def loss(params, h, batch, data):
        return fit(params, data["x"], data["y"]) + jnp.sum(h["l2"] * params["w"] ** 2) / 2

    return Problem(
        title="a9a: logistic regression, 123 penalties",
        space=hj.space({"l2": hj.loguniform(1e-5, 1.0, init=1e-2, shape=(123,))}),
        steps=180,
        trainings=60,
        together=5,
        rows=(train, valid),
        data=data,
        init=lambda key: {"w": jnp.zeros(123), "b": jnp.zeros(())},
        loss=loss,
        # The largest eigenvalue of the Hessian is below 4 on all seeds.
        optimizer=lambda h: optax.sgd(0.25, momentum=0.9, nesterov=True),
        batch=lambda data, key: (),
        valid=lambda params, data: fit(params, data["valid_x"], data["valid_y"]),
        test=lambda params, data: fit(params, test_x.astype(jnp.float32), test_y),
    )


# --------------------------------------------------------------------------- ETT: 13 penalties

LAGS, AHEAD, MONTH = 96, 24, 30 * 24
GROUPS = (1, 4, 12, 24, 48)  # where a new group of lags begins, in hours


def ett(folder: str | None) -> Problem:
    """The oil temperature a day ahead from 96 hours of 7 channels, by ridge regression.

    The penalty of a weight is that of its channel times that of its group of lags. 400 hours of the
    first 12 months to train, 1,440 of the next 4 to validate, every second of the last 4 to test;
    all in units of the training deviation. What is forecast is the change from now: nothing
    learnt is to say that tomorrow is as today.
    """
    series = tasks.ett(folder)
    ends = [months * MONTH for months in (12, 16, 20)]
    past = series.values[: ends[0]]
    values = ((series.values - past.mean(0)) / past.std(0)).astype(np.float32)
    train, valid = 400, 1_440
    group = np.digitize(np.arange(LAGS), GROUPS)

    def pairs(times):
        x = tasks.lagged(values, times, lags=LAGS).reshape(len(times), -1)
        return x, values[times + AHEAD, -1] - values[times, -1]

    test_x, test_y = map(jnp.asarray, pairs(np.arange(ends[1] + LAGS, ends[2] - AHEAD, 2)))

    def data(seed: int) -> Data:
        rng = np.random.default_rng(seed)
        x, y = pairs(rng.choice(np.arange(LAGS, ends[0] - AHEAD), train, replace=False))
        times = np.arange(ends[0] + LAGS, ends[1] - AHEAD)
        valid_x, valid_y = pairs(rng.choice(times, valid, replace=False))
        return {"x": x, "y": y, "valid_x": valid_x, "valid_y": valid_y}

    def fit(params, x, y):
        return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)

    def penalties(h):
        return (h["lags"][group][:, None] * h["channels"][None]).ravel()

    def loss(params, h, batch, data):
        penalty = jnp.sum(penalties(h) * params["w"] ** 2)
        return (fit(params, data["x"], data["y"]) + penalty) / 2

    def optimizer(h):
        # A penalty of 1,000 on one weight must not slow down the others.
        scale = {"w": 1 / (1 + penalties(h)), "b": jnp.ones(())}
        rescale = optax.stateless(lambda g, p: jax.tree.map(jnp.multiply, scale, g))
        return optax.chain(rescale, optax.sgd(0.004, momentum=0.98, nesterov=True))

    return Problem(
        title="ETTh1: ridge forecaster, 13 penalties",
        space=hj.space(
            {
                "channels": hj.loguniform(1e-1, 1e3, init=1.0, shape=(len(series.names),)),
                "lags": hj.loguniform(1e-1, 1e1, init=1.0, shape=(len(GROUPS) + 1,)),
            }
        ),
        steps=360,
        trainings=60,
        together=5,
        rows=(train, valid),
        data=data,
        init=lambda key: {"w": jnp.zeros(values.shape[1] * LAGS), "b": jnp.zeros(())},
        loss=loss,
        optimizer=optimizer,
        batch=lambda data, key: (),
        valid=lambda params, data: fit(params, data["valid_x"], data["valid_y"]),
        test=lambda params, data: fit(params, test_x, test_y),
        unit="squared error",
    )


# ------------------------------------------------------------------ digits: a perceptron, 9


def digits(folder: str | None) -> Problem:
    """The perceptron 64-128-128-10 and the nine hyperparameters of `hyperjax tune digits`."""
    pixels, labels = tasks.digit_images()
    sizes = (64, 128, 128, 10)
    part, size = 599, 64

    def data(seed: int) -> Data:
        order = np.random.default_rng(seed).permutation(len(labels))
        train, valid, test = order[:part], order[part : 2 * part], order[2 * part :]
        return _images(pixels / 1.0, labels, train, valid, test) | _bank(
            seed, size, sum(sizes[:-1])
        )

    def loss(params, h, batch, data):
        jitter, *dropout = jnp.split(batch["noise"], np.cumsum(sizes[:-2]).tolist(), axis=-1)
        inputs = batch["x"] + h["jitter"] * jitter
        logits = _mlp.apply(params, inputs, _mlp.gaussian_dropout(h["dropout"], dropout))
        return _smoothed(logits, batch["y"], h["smoothing"]) + _mlp.penalty(params, h["l2"])

    return Problem(
        title="digits: perceptron, 9 hyperparameters",
        space=tasks.digits().space,
        steps=630,
        trainings=40,
        together=1,
        rows=(size, part),
        data=data,
        init=lambda key: _mlp.init(key, sizes),
        loss=loss,
        optimizer=lambda h: optax.sgd(h["lr"], momentum=h["momentum"]),
        batch=_minibatch(size),
        **_scores(_mlp.apply),
    )


# -------------------------------------------------------------- MNIST: a convolutional net, 9


def mnist(folder: str | None) -> Problem:
    """Two convolutions and a dense layer, 14 x 14 pixels: 1,000 images to train, to validate."""
    pixels, labels, official = images(folder)
    small = area_average(pixels.reshape(-1, 28, 28).astype(np.float32), 14).reshape(-1, 196)
    channels, size = (8, 16), 32
    widths = (196, 7 * 7 * channels[0], 3 * 3 * channels[1])  # of the inputs of the three layers

    def data(seed: int) -> Data:
        rng = np.random.default_rng(seed)
        rows = rng.permutation(official)[:2_000]
        test = official + rng.permutation(len(labels) - official)[:4_000]
        found = _images(small, labels, rows[:1_000], rows[1_000:], test)
        return found | _bank(seed, size, sum(widths))

    def init(key):
        keys = jax.random.split(key, 3)
        shapes = ((3, 3, 1, channels[0]), (3, 3, *channels), (widths[2], 10))
        return {
            f"layer{i}": {
                "w": jax.random.normal(k, shape) * (2 / np.prod(shape[:-1])) ** 0.5,
                "b": jnp.zeros(shape[-1]),
            }
            for i, (k, shape) in enumerate(zip(keys, shapes, strict=True))
        }

    def apply(params, x, factors=None):
        x = x.reshape(-1, 14, 14, 1)
        for i in range(2):
            layer = params[f"layer{i}"]
            x = jax.nn.relu(hj.layers.conv(x, layer["w"]) + layer["b"])
            even = x.shape[1] // 2 * 2
            x = x[:, :even, :even].reshape(x.shape[0], even // 2, 2, even // 2, 2, -1).max((2, 4))
            x = x if factors is None else x * factors[i].reshape(x.shape)
        return x.reshape(x.shape[0], -1) @ params["layer2"]["w"] + params["layer2"]["b"]

    def loss(params, h, batch, data):
        jitter, *dropout = jnp.split(batch["noise"], np.cumsum(widths[:-1]).tolist(), axis=-1)
        inputs = batch["x"] + h["jitter"] * jitter
        logits = apply(params, inputs, _mlp.gaussian_dropout(h["dropout"], dropout))
        return _smoothed(logits, batch["y"], h["smoothing"]) + _mlp.penalty(params, h["l2"])

    return Problem(
        title="MNIST: convolutional net, 9 hyperparameters",
        space=tasks.digits().space,
        steps=180,
        trainings=30,
        together=1,
        rows=(size, 1_000),
        data=data,
        init=init,
        loss=loss,
        optimizer=lambda h: optax.sgd(h["lr"], momentum=h["momentum"]),
        batch=_minibatch(size),
        **_scores(apply),
    )


# ---------------------------------------------------------- Shakespeare: a transformer, 14

WIDTH, HEADS, LAYERS, CONTEXT = 32, 2, 1, 24
PARTS = ("embed", "attention", "mlp", "head")  # each with a rate and a decay of its own


def text(folder: str | None) -> Problem:
    """A transformer on characters: one block of width 32, windows of 24, trained by AdamW."""
    corpus = tasks.shakespeare(folder)
    size, valid, test = 12, 144, 720
    train = jnp.asarray(corpus.train)
    windows = lambda rng, part, count: np.asarray(part)[
        rng.integers(0, len(part) - CONTEXT, count)[:, None] + np.arange(CONTEXT + 1)
    ]

    def data(seed: int) -> Data:
        rng = np.random.default_rng(seed)
        found = {
            "valid": windows(rng, corpus.valid, valid),
            "test": windows(rng, corpus.test, test),
        }
        return found | _bank(seed, size, (1 + 2 * LAYERS) * WIDTH)

    def batch(data, key):
        where, noise = jax.random.split(key)
        start = jax.random.randint(where, (size,), 0, len(corpus.train) - CONTEXT)
        tokens = train[start[:, None] + jnp.arange(CONTEXT + 1)]
        return {"tokens": tokens, "noise": _pick(data, noise)}

    def loss(params, h, batch, data):
        # One draw a row and unit, the same at all places, as in variational dropout.
        noise = jnp.split(batch["noise"][:, None], 1 + 2 * LAYERS, axis=-1)
        rates = [h["dropout"][0], *jnp.tile(h["dropout"][1:], LAYERS)]
        factors = [1 + jnp.sqrt(r) * e for r, e in zip(rates, noise, strict=True)]
        logits = _transformer(params, batch["tokens"][:, :-1], factors)
        return _smoothed(logits, batch["tokens"][:, 1:], h["smoothing"])

    def optimizer(h):
        part = lambda i: hj.guarded.adamw(
            h["lr"][i], h["b1"], 1 - h["forget"], weight_decay=h["decay"][i]
        )
        parts = {name: part(i) for i, name in enumerate(PARTS)}
        return optax.partition(parts, {name: name for name in PARTS})

    def score(name):
        def one(params, data):
            tokens = data[name]
            return cross_entropy(_transformer(params, tokens[:, :-1]), tokens[:, 1:])

        return one

    return Problem(
        title="Shakespeare: transformer, 14 hyperparameters",
        space=hj.space(
            {
                "lr": hj.loguniform(1e-4, 1e-1, init=1e-3, shape=(len(PARTS),)),
                "decay": hj.loguniform(1e-5, 10.0, init=1e-2, shape=(len(PARTS),)),
                "b1": hj.uniform(0.0, 0.99, init=0.9),
                "forget": hj.loguniform(1e-3, 0.5, init=1e-2),
                "dropout": hj.loguniform(1e-3, 2.0, init=0.02, shape=(3,)),
                "smoothing": hj.uniform(0.0, 0.5, init=0.02),
            }
        ),
        steps=180,
        trainings=30,
        together=1,
        rows=(size, valid),
        data=data,
        init=lambda key: _init_transformer(key, len(corpus.names)),
        loss=loss,
        optimizer=optimizer,
        batch=batch,
        valid=score("valid"),
        test=score("test"),
    )


def _init_transformer(key, tokens: int):
    keys = iter(jax.random.split(key, 4 + 4 * LAYERS))
    draw = lambda *shape: jax.random.normal(next(keys), shape) * shape[0] ** -0.5
    ones = lambda: jnp.ones(WIDTH)
    blocks = range(LAYERS)
    return {
        "embed": {
            "token": 0.3 * jax.random.normal(next(keys), (tokens, WIDTH)),
            "place": 0.3 * jax.random.normal(next(keys), (CONTEXT, WIDTH)),
        },
        "attention": [
            {"norm": ones(), "in": draw(WIDTH, 3 * WIDTH), "out": draw(WIDTH, WIDTH)}
            for _ in blocks
        ],
        "mlp": [
            {"norm": ones(), "in": draw(WIDTH, 4 * WIDTH), "out": draw(4 * WIDTH, WIDTH)}
            for _ in blocks
        ],
        "head": {"norm": ones(), "w": draw(WIDTH, tokens), "b": jnp.zeros(tokens)},
    }


def _transformer(params, tokens, factors=None):
    factors = [1.0] * (1 + 2 * LAYERS) if factors is None else factors
    length = tokens.shape[1]
    x = params["embed"]["token"][tokens] + params["embed"]["place"][None, :length]
    x = x * factors[0]
    causal = jnp.tril(jnp.ones((length, length), bool))
    for i in range(LAYERS):
        a, m = params["attention"][i], params["mlp"][i]
        y = (_normal(x) * a["norm"]) @ a["in"]
        q, k, v = (part.reshape(*part.shape[:2], HEADS, -1) for part in jnp.split(y, 3, axis=-1))
        weights = jnp.einsum("bihc,bjhc->bhij", q, k) * (WIDTH // HEADS) ** -0.5
        weights = jax.nn.softmax(jnp.where(causal, weights, -1e9))
        y = jnp.einsum("bhij,bjhc->bihc", weights, v).reshape(x.shape)
        x = x + (y @ a["out"]) * factors[1 + 2 * i]
        y = jax.nn.gelu((_normal(x) * m["norm"]) @ m["in"])
        x = x + (y @ m["out"]) * factors[2 + 2 * i]
    return (_normal(x) * params["head"]["norm"]) @ params["head"]["w"] + params["head"]["b"]


def _normal(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


# ---------------------------------------------------------------------------- what they share


def _images(pixels, labels, train, valid, test) -> Data:
    mean, deviation = pixels[train].mean(), pixels[train].std()
    found = {}
    for name, rows in (("", train), ("valid_", valid), ("test_", test)):
        found[f"{name}x"] = ((pixels[rows] - mean) / deviation).astype(np.float32)
        found[f"{name}y"] = labels[rows].astype(np.int32)
    return found


def _bank(seed: int, rows: int, width: int) -> Data:
    draw = np.random.default_rng((seed, 1)).standard_normal((BANK, rows, width), np.float32)
    return {"bank": draw}


def _pick(data: Data, key) -> jax.Array:
    return data["bank"][jax.random.randint(key, (), 0, BANK)]


def _minibatch(size: int):
    def batch(data, key):
        rows, noise = jax.random.split(key)
        rows = jax.random.randint(rows, (size,), 0, data["y"].shape[0])
        return {"x": data["x"][rows], "y": data["y"][rows], "noise": _pick(data, noise)}

    return batch


def _smoothed(logits, labels, smoothing):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def _scores(apply) -> dict[str, Callable]:
    one = lambda part: (
        lambda params, data: cross_entropy(apply(params, data[f"{part}_x"]), data[f"{part}_y"])
    )
    return {"valid": one("valid"), "test": one("test")}


TASKS = {"a9a": a9a, "ett": ett, "digits": digits, "text": text, "mnist": mnist}
