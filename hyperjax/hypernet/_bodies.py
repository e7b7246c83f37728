"""Architectures of a generated hypernetwork: from a sequence of vectors to one of features.

The sequence has one entry per slot of the outputs: a single one if all weights come at once, one
per leaf, per chunk or per output unit otherwise. Bodies without memory treat entries one by one.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _checks
from .._types import Key, PyTree
from ._layers import conv
from ._recurrent import RecurrentWeights, gru, lstm


class Body(NamedTuple):
    """`init(key, d) -> phi`; `apply(phi, x) -> features`, x [slots, d], features [slots, width].

    No care is needed for the scale of the features: the heads are drawn for what is measured.
    """

    init: Callable[[Key, int], PyTree]
    apply: Callable[[PyTree, jax.Array], jax.Array]


def identity() -> Body:
    """The inputs themselves, so that weights are affine in them.

    The net is not `linear` for all that: the flag stands for params in `phi.base`, returned where
    hyperparameters are zero, and there is no `phi.base` here.
    """
    return Body(lambda key, size: (), lambda phi, x: x)


def mlp(
    hidden: Sequence[int] = (16, 64, 128),
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.leaky_relu,
) -> Body:
    """A perceptron with an activation after every layer; He-normal weights, zero biases.

    Raises ValueError for no layers or widths that are not positive integers, TypeError unless
    `activation` is a function.
    """
    hidden = tuple(hidden)
    for width in hidden:
        _checks.positive_int("mlp", "hidden", width)
    if not hidden:
        raise ValueError("mlp: `hidden` is empty; take `identity()` for a body without layers.")
    _checks.is_callable("mlp", "activation", activation)

    def init(key: Key, size: int) -> list:
        keys, sizes = jax.random.split(key, len(hidden)), itertools.pairwise((size, *hidden))
        return [_dense(k, m, n, 2.0) for k, (m, n) in zip(keys, sizes, strict=True)]

    def apply(layers: list, x: jax.Array) -> jax.Array:
        for layer in layers:
            x = activation(_affine(layer, x))
        return x

    return Body(init, apply)


def recurrent(width: int, *, cell: Literal["lstm", "gru"] = "lstm") -> Body:
    """A recurrent network along the slots: what is emitted first bears on what follows.

    The body of dependency-preserving hypernetworks (Chandra et al. 2023, WACV; only their abstract
    was at hand), with `per_leaf` or `chunks`. Its phi are the weights of `lstm` or `gru`, the
    layers for models; forget gates begin with a bias of 1.

    Raises ValueError unless `width` is a positive integer, and for an unknown cell.
    """
    _checks.positive_int("recurrent", "width", width)
    _checks.one_of("recurrent", "cell", cell, ("lstm", "gru"))

    def init(key: Key, size: int) -> RecurrentWeights:
        first, second = jax.random.split(key)
        columns = (4 if cell == "lstm" else 3) * width
        reader, state = _dense(first, size, columns, 1.0), _dense(second, width, columns, 1.0)
        bias = reader["b"]
        if cell == "lstm":
            bias = bias.at[width : 2 * width].set(1.0)
        return RecurrentWeights(reader["w"], state["w"], bias)

    def apply(phi: RecurrentWeights, x: jax.Array) -> jax.Array:
        return (lstm if cell == "lstm" else gru)(x, phi)[1]

    return Body(init, apply)


def attention(width: int, *, heads: int = 4, layers: int = 1) -> Body:
    """Slots that attend to one another: `layers` blocks of attention and a perceptron.

    Each block adds to its input; what it reads is divided by its root mean square. The slots know
    their place by their codes alone.

    Raises ValueError unless all are positive integers and `heads` divides `width`.
    """
    for name, value in (("width", width), ("heads", heads), ("layers", layers)):
        _checks.positive_int("attention", name, value)
    if width % heads:
        raise ValueError(f"attention: `width` must be a multiple of `heads`; got {width}, {heads}.")

    def init(key: Key, size: int) -> dict:
        first, *rest = jax.random.split(key, 1 + 4 * layers)
        shapes = {"qkv": (width, 3 * width), "out": (width, width)}
        shapes |= {"up": (width, 2 * width), "down": (2 * width, width)}
        blocks = [
            {
                n: _dense(k, *s, 1.0)
                for k, (n, s) in zip(rest[i::layers], shapes.items(), strict=True)
            }
            for i in range(layers)
        ]
        return {"first": _dense(first, size, width, 1.0), "blocks": blocks}

    def apply(phi: dict, x: jax.Array) -> jax.Array:
        x = _affine(phi["first"], x)
        for block in phi["blocks"]:
            qkv = _affine(block["qkv"], _level(x)).reshape(len(x), 3, heads, -1)
            q, k, v = jnp.moveaxis(qkv, 1, 0)
            # Not `jax.nn.dot_product_attention`, which loses double precision.
            match = jnp.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
            mixed = jnp.einsum("hij,jhd->ihd", jax.nn.softmax(match), v)
            x = x + _affine(block["out"], mixed.reshape(len(x), width))
            x = x + _affine(block["down"], jax.nn.relu(_affine(block["up"], _level(x))))
        return x

    return Body(init, apply)


def convolution(channels: Sequence[int], *, kernel: int = 3) -> Body:
    """Convolutions along the slots, padded with zeros, leaky ReLU after each.

    A body of a hypernetwork; the layer for models is `conv`.

    Raises ValueError for no channels, or numbers that are not positive integers.
    """
    channels = tuple(channels)
    _checks.positive_int("convolution", "kernel", kernel)
    if not channels:
        raise ValueError("convolution: `channels` is empty; pass one width per layer.")
    for width in channels:
        _checks.positive_int("convolution", "channels", width)

    def init(key: Key, size: int) -> list:
        keys, sizes = jax.random.split(key, len(channels)), itertools.pairwise((size, *channels))
        return [_dense(k, kernel * m, n, 2.0) for k, (m, n) in zip(keys, sizes, strict=True)]

    def apply(layers: list, x: jax.Array) -> jax.Array:
        for layer in layers:
            weight = layer["w"].reshape(kernel, -1, layer["w"].shape[-1])
            x = jax.nn.leaky_relu(conv(x, weight, layer["b"]))
        return x

    return Body(init, apply)


def _dense(key: Key, rows: int, columns: int, gain: float) -> dict:
    weight = jax.random.normal(key, (rows, columns), float) * (gain / rows) ** 0.5
    return {"w": weight, "b": jnp.zeros(columns)}


def _affine(layer: dict, x: jax.Array) -> jax.Array:
    return x @ layer["w"] + layer["b"][None]


def _level(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
