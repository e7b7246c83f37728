"""Models whose replicas the population benchmarks train, each with AdamW in float32."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import hyperjax as hj

RATE = 1e-3


class Model(NamedTuple):
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any, Any], jax.Array]
    batches: Callable[[int], Any]  # leaves [steps, ...]
    native: Callable[[Any, Any, Any], jax.Array]  # the loss as one writes it for a single replica


def training(loss: Callable) -> hj.Inner:
    return hj.inner(loss, lambda h: optax.adamw(h["lr"]))


def models() -> dict[str, Model]:
    return {"mlp": mlp(), "cnn": cnn(), "transformer": transformer(), "gru": gru()}


def _dense(key, fan_in, fan_out):
    return {"w": jax.random.normal(key, (fan_in, fan_out)) / fan_in**0.5, "b": jnp.zeros(fan_out)}


def _apply(layer, x):
    return x @ layer["w"] + layer["b"]


def _entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp(sizes: tuple[int, ...] = (64, 128, 128, 10), batch: int = 64) -> Model:
    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        return [_dense(k, *pair) for k, pair in zip(keys, itertools.pairwise(sizes), strict=True)]

    def loss(params, h, data):
        x, y = data
        for layer in params[:-1]:
            x = jax.nn.relu(_apply(layer, x))
        return _entropy(_apply(params[-1], x), y)

    def batches(steps):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(steps, batch, sizes[0])).astype(np.float32)
        return jnp.asarray(x), jnp.asarray(rng.integers(0, sizes[-1], (steps, batch)))

    return Model(init, loss, batches, loss)


def _halved(x, axis: int):
    """The larger of every two neighbours. `max` over an axis has a derivative that costs more."""
    shape = *x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :]
    pairs = x.reshape(shape)
    pick = lambda i: lax.index_in_dim(pairs, i, axis + 1, keepdims=False)
    return jnp.maximum(pick(0), pick(1))


def cnn(batch: int = 32) -> Model:
    """3 x 3 convolutions to 16 and 32 channels, each halved by the maximum, then to ten classes."""

    def init(key):
        one, two, three = jax.random.split(key, 3)
        return {
            "one": jax.random.normal(one, (3, 3, 1, 16)) / 3,
            "two": jax.random.normal(two, (3, 3, 16, 32)) / 12,
            "out": _dense(three, 7 * 7 * 32, 10),
        }

    def loss(convolve):
        def value(params, h, data):
            x, y = data
            for name in ("one", "two"):
                x = jax.nn.relu(convolve(x, params[name]))
                x = _halved(_halved(x, 1), 2)
            return _entropy(_apply(params["out"], x.reshape(len(x), -1)), y)

        return value

    def batches(steps):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(steps, batch, 28, 28, 1)).astype(np.float32)
        return jnp.asarray(x), jnp.asarray(rng.integers(0, 10, (steps, batch)))

    native = lambda x, kernel: lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return Model(init, loss(hj.layers.conv), batches, loss(native))


WIDTH, DEPTH, LENGTH, TOKENS, HEADS = 64, 2, 64, 65, 4


def _text(batch: int) -> Callable[[int], jax.Array]:
    """Random tokens: what is in a text does not change how long a step takes."""

    def batches(steps):
        rng = np.random.default_rng(0)
        return jnp.asarray(rng.integers(0, TOKENS, (steps, batch, LENGTH + 1)))

    return batches


def transformer(batch: int = 8) -> Model:
    def block(key):
        keys = jax.random.split(key, 4)
        shapes = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
        names = ("qkv", "mix", "up", "down")
        return {n: _dense(k, *s) for n, k, s in zip(names, keys, shapes, strict=True)}

    def init(key):
        embed, place, out, *blocks = jax.random.split(key, 3 + DEPTH)
        return {
            "embed": 0.1 * jax.random.normal(embed, (TOKENS, WIDTH)),
            "place": 0.1 * jax.random.normal(place, (LENGTH, WIDTH)),
            "blocks": [block(k) for k in blocks],
            "out": _dense(out, WIDTH, TOKENS),
        }

    def attend(p, x):
        rows = x.shape[0]
        split = _apply(p["qkv"], x).reshape(rows, LENGTH, 3, HEADS, WIDTH // HEADS)
        q, k, v = jnp.moveaxis(split, 2, 0)
        scores = jnp.einsum("blhd,bmhd->bhlm", q, k) / (WIDTH // HEADS) ** 0.5
        causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        return _apply(p["mix"], jnp.einsum("bhlm,bmhd->blhd", weights, v).reshape(x.shape))

    def loss(params, h, text):
        x = params["embed"][text[:, :-1]] + params["place"][None]
        for p in params["blocks"]:
            x = x + attend(p, jax.nn.standardize(x))
            x = x + _apply(p["down"], jax.nn.gelu(_apply(p["up"], jax.nn.standardize(x))))
        return _entropy(_apply(params["out"], jax.nn.standardize(x)), text[:, 1:])

    return Model(init, loss, _text(batch), loss)


def gru(batch: int = 8) -> Model:
    def init(key):
        embed, out, *cells = jax.random.split(key, 2 + 2 * DEPTH)
        pairs = zip(cells[::2], cells[1::2], strict=True)
        return {
            "embed": 0.1 * jax.random.normal(embed, (TOKENS, WIDTH)),
            "cells": [
                {"x": _dense(a, WIDTH, 3 * WIDTH), "h": _dense(b, WIDTH, 3 * WIDTH)}
                for a, b in pairs
            ],
            "out": _dense(out, WIDTH, TOKENS),
        }

    def layer(p, x):  # [LENGTH, B, WIDTH]
        def cell(state, inputs):
            reset, update, new = jnp.split(inputs, 3, -1)
            r, z, n = jnp.split(_apply(p["h"], state), 3, -1)
            z = jax.nn.sigmoid(update + z)
            new = jnp.tanh(new + jax.nn.sigmoid(reset + r) * n)
            state = (1 - z) * new + z * state
            return state, state

        # Zeros made of the inputs vary over the devices where those do.
        return lax.scan(cell, 0 * x[0], _apply(p["x"], x))[1]

    def loss(params, h, text):
        x = params["embed"][text[:, :-1].T]
        for p in params["cells"]:
            x = layer(p, x)
        return _entropy(_apply(params["out"], x), text[:, 1:].T)

    return Model(init, loss, _text(batch), loss)
