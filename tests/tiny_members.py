"""Members whose training is a line of arithmetic, with NumPy's answer beside it: for tests of who
trains, for how long and from where."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hyperjax as hj


class Member(NamedTuple):
    hparams: dict
    x: jax.Array  # [3]
    steps: jax.Array  # int32


class Metrics(NamedTuple):
    value: jax.Array
    finite: jax.Array


def tuner() -> hj.Tuner:
    """x goes towards the mean of the batch at its own rate; the score is a distance."""

    def init(params, hparams):
        return Member(hparams, params, jnp.int32(0))

    def step(state, split):
        x = state.x + state.hparams["rate"] * (split.train.mean(0) - state.x)
        value = jnp.sum((x - split.valid) ** 2)
        return Member(state.hparams, x, state.steps + 1), Metrics(value, jnp.isfinite(value))

    return hj.Tuner(init, step)


def doubted(rate: float) -> hj.Tuner:
    """`tuner` whose member of this rate reports that something else than its score diverged, as a
    hypergradient may."""
    plain = tuner()

    def step(state, split):
        state, metrics = plain.step(state, split)
        return state, metrics._replace(finite=metrics.finite & (state.hparams["rate"] != rate))

    return hj.Tuner(plain.init, step)


def starts(size: int, dtype: Any = np.float64):
    rng = np.random.default_rng(0)
    x, rate = rng.normal(size=(size, 3)), rng.uniform(0.02, 0.9, size)
    return jnp.asarray(x, dtype), {"rate": jnp.asarray(rate, dtype)}


def splits(steps: int, dtype: Any = np.float64) -> hj.Split:
    rng = np.random.default_rng(1)
    train, valid = rng.normal(size=(steps, 2, 3)), 0.3 * rng.normal(size=(steps, 3))
    return hj.Split(jnp.asarray(train, dtype), jnp.asarray(valid, dtype))


def train(start, rate, data: hj.Split):
    """One member by NumPy: (x after every step, score after every step)."""
    x, places, scores = np.asarray(start), [], []
    for batch, valid in zip(np.asarray(data.train), np.asarray(data.valid), strict=True):
        x = x + float(rate) * (batch.mean(0) - x)
        places.append(x)
        scores.append(np.sum((x - valid) ** 2))
    return np.stack(places), np.stack(scores)


def train_all(size: int, data: hj.Split):
    """([P, steps, 3], [P, steps])."""
    x, hparams = starts(size)
    pairs = [train(a, r, data) for a, r in zip(x, hparams["rate"], strict=True)]
    return tuple(np.stack(column) for column in zip(*pairs, strict=True))
