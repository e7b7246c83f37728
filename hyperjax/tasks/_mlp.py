"""A multilayer perceptron: pure functions of a plain dict."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .._types import Key, Params


def init(key: Key, sizes: Sequence[int]) -> Params:
    """He-normal weights and zero biases, float32.

    `sizes` are the widths from inputs to outputs. Returns
    `{"layer0": {"w": [sizes[0], sizes[1]], "b": [sizes[1]]}, "layer1": ...}`.
    """
    pairs = list(itertools.pairwise(sizes))
    keys = jax.random.split(key, len(pairs))
    params = {}
    for i, (rows, columns) in enumerate(pairs):
        # He et al., 2015, section 2.2: variance 2 / fan-in keeps the scale of relu activations.
        draw = jax.random.normal(keys[i], (rows, columns), jnp.float32)
        params[f"layer{i}"] = {
            "w": draw * (2 / rows) ** 0.5,
            "b": jnp.zeros(columns, jnp.float32),
        }
    return params


def apply(params: Params, inputs: jax.Array, factors: Sequence[jax.Array] = ()) -> jax.Array:
    """Outputs [n, sizes[-1]] for inputs [n, sizes[0]], with relu between layers.

    `factors`, if any, multiply the activations of each hidden layer: one [n, width] for each.
    """
    hidden = inputs
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        hidden = hidden @ layer["w"] + layer["b"][None, :]
        if i < len(params) - 1:
            hidden = jax.nn.relu(hidden)
            hidden = hidden * factors[i] if factors else hidden
    return hidden


def gaussian_dropout(variances: jax.Array, noise: list[jax.Array]) -> list[jax.Array]:
    """Multiplicative noise 1 + sqrt(variance) e for e standard normal, one [rows, width] a layer.

    `variances` holds one positive number for each hidden layer. The noise is a smooth function of
    it, which masks of zeros and ones are not, so that a gradient reaches it (Srivastava et al.,
    2014, section 10; variance p / (1 - p) matches a drop rate p). It is not smooth at variance 0.
    """
    deviations = jnp.sqrt(variances)
    return [1 + deviations[i] * e for i, e in enumerate(noise)]


def penalty(params: Params, strengths: jax.Array) -> jax.Array:
    """1/2 sum over layers of strength times the squared norm of the weights; biases are free."""
    squares = [jnp.sum(params[f"layer{i}"]["w"] ** 2) for i in range(len(params))]
    return jnp.sum(strengths * jnp.stack(squares)) / 2
