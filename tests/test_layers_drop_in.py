"""Flax models for populations by one argument: the same parameters, outputs and training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import lax

import hyperjax as hj

FAST: dict[str, Any] = {"conv_general_dilated": hj.layers.conv_general_dilated}
# Float64, sums of at most some hundred terms in another order.
ATOL = 1e-12

CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((8, 7, 3), {"kernel_size": (3, 3)}),
    "strided": ((8, 7, 3), {"kernel_size": (3, 2), "strides": 2, "padding": "VALID"}),
    "depthwise": ((8, 7, 6), {"kernel_size": (3, 3), "feature_group_count": 6}),
    "circular, dilated": (
        (8, 7, 4),
        {"kernel_size": (3, 3), "padding": "CIRCULAR", "kernel_dilation": (1, 2)},
    ),
    "causal": ((9, 4), {"kernel_size": (4,), "padding": "CAUSAL", "feature_group_count": 2}),
    "spread": (
        (5, 6, 2),
        {"kernel_size": (3, 3), "input_dilation": (2, 1), "padding": ((2, 1), (1, 1))},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_nnx_conv_gives_the_same(rng, name):
    shape, options = CASES[name]
    x = jnp.asarray(rng.normal(size=(2, *shape)))
    make = lambda **more: nnx.Conv(
        shape[-1], 12, **options, **more, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    plain, fast = make(), make(**FAST)
    np.testing.assert_array_equal(plain.kernel[...], fast.kernel[...])
    np.testing.assert_allclose(fast(x), plain(x), rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", CASES)
def test_linen_conv_gives_the_same(rng, key, name):
    shape, options = CASES[name]
    x = jnp.asarray(rng.normal(size=(2, *shape)))
    plain = linen.Conv(12, **options, param_dtype=jnp.float64)
    fast = linen.Conv(12, **options, **FAST, param_dtype=jnp.float64)
    variables = plain.init(key, x)
    assert jax.tree.map(jnp.shape, fast.init(key, x)) == jax.tree.map(jnp.shape, variables)
    got, expected = (jnp.asarray(m.apply(variables, x)) for m in (fast, plain))
    np.testing.assert_allclose(got, expected, rtol=0, atol=ATOL)


class Network(nnx.Module):
    def __init__(self, convolve, rngs: nnx.Rngs):
        more = {"conv_general_dilated": convolve, "param_dtype": jnp.float64, "rngs": rngs}
        self.wide = nnx.Conv(1, 4, (3, 3), **more)
        self.deep = nnx.Conv(4, 8, (3, 3), strides=2, feature_group_count=4, **more)
        self.head = nnx.Linear(8, 3, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.deep(jnp.tanh(self.wide(x))))
        return self.head(jnp.mean(x, (1, 2)))


def training(convolve):
    """A whole run of one member, [steps, ...] batches, as a function of its state and rate."""
    graph = nnx.graphdef(Network(convolve, nnx.Rngs(0)))

    def loss(params, batch):
        x, y = batch
        logits = nnx.merge(graph, params, copy=True)(x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    def run(params, rate, batches):
        def step(params, batch):
            value, grads = jax.value_and_grad(loss)(params, batch)
            return jax.tree.map(lambda p, g: p - rate * g, params, grads), value

        return lax.scan(step, params, batches)

    return run


def test_a_population_of_networks_trains_as_its_members_do(rng, key):
    batches = jnp.asarray(rng.normal(size=(4, 5, 6, 6, 1))), jnp.asarray(rng.integers(0, 3, (4, 5)))
    rates = jnp.asarray([0.1, 0.5, 1.0])
    born = lambda k: nnx.state(Network(lax.conv_general_dilated, nnx.Rngs(k)), nnx.Param)
    members = jax.vmap(born)(jax.random.split(key, 3))
    fast = training(hj.layers.conv_general_dilated)
    program = jax.jit(jax.vmap(fast, (0, 0, None))).lower(members, rates, batches)
    assert "convolution" not in program.as_text()
    params, losses = program.compile()(members, rates, batches)
    alone = jax.jit(training(lax.conv_general_dilated))
    member = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
    for i in range(3):
        expected = alone(member(members, i), rates[i], batches)
        got = member((params, losses), i)
        # Four steps of gradients that agree to rounding: some 1e-15 of entries near one.
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=ATOL)
