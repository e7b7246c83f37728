"""How one leaf of params answers to hyperparameters.

z [h] is the vector of all hyperparameters; a leaf is an array of any rank, whose last axis is that
of the outputs.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from .. import _checks
from .._types import Key, PyTree


class Gated(NamedTuple):
    """The weight base + response * gate, not yet added up.

    Layers that know it (`dense` and others) apply the gate to what comes out of them, and so never
    hold a weight per example. `gate` has the rank of the leaf, with size 1 on every axis but that
    of the outputs.
    """

    base: jax.Array  # [..., out]
    response: jax.Array  # [..., out]
    gate: jax.Array  # [1, ..., out]


Weight: TypeAlias = jax.Array | Gated


class Rule(NamedTuple):
    """How one leaf answers.

    `init(key, leaf, h) -> response`; `weight(leaf, response, z) -> Weight`. A `linear` rule gives
    the leaf itself at z = 0, and an answer proportional to z.

    `fit(leaf, jacobian) -> response` is for `localize`: the response, like that of `init`, whose
    answer is nearest to `jacobian` [h, *leaf], or None where none is known. Leave it out where the
    answer depends on the leaf or is not proportional to z.
    """

    init: Callable[[Key, jax.Array, int], PyTree]
    weight: Callable[[jax.Array, PyTree, jax.Array], Weight]
    linear: bool
    fit: Callable[[jax.Array, jax.Array], PyTree | None] | None = None


class Gate(NamedTuple):
    response: jax.Array  # [..., out]
    gate: jax.Array  # [h, out]
    bias: jax.Array | None  # [out]; None for a linear gate


class LowRank(NamedTuple):
    left: jax.Array  # [in, rank], where `in` is the product of all axes but the last
    gate: jax.Array  # [h, rank]
    right: jax.Array  # [rank, out]


def gate(
    *, scale: float = 0.01, activation: Callable[[jax.Array], jax.Array] | None = None
) -> Rule:
    """leaf + response * (z' gate), one gate per output: two products in place of one.

    The layer of self-tuning networks (MacKay et al. 2019, arXiv 1903.03088, eq. 10), made a
    transformation of a weight. `response` begins as a copy of the leaf (ones for vectors, since
    biases begin at zero), `gate` as normal noise of deviation `scale`; they are drawn as an
    ordinary layer there, which differs by nothing but the draw. The scalar by which the authors'
    code multiplies the elementary weights is left out: it adds nothing that they cannot express.

    With an `activation`, leaf + response * activation(z' gate + bias): with the logistic function
    it is the exact best response of a linear network with two layers under an L2 or a
    Jacobian-norm penalty (their theorem 2), but no longer linear in z. Where activation(0) is not
    0, `response` begins at zero: at z = 0 the weights are the model's to begin with.

    Raises ValueError for a scale that is not a finite number >= 0, TypeError unless `activation` is
    a function.
    """
    _checks.number("gate", "scale", scale)
    if activation is not None:
        _checks.is_callable("gate", "activation", activation)

    def init(key: Key, leaf: jax.Array, count: int) -> Gate:
        # A buffer of its own, since one that is in a tree twice cannot be donated.
        response = jnp.copy(leaf) if leaf.ndim > 1 else jnp.ones_like(leaf)
        if activation is not None:
            response = jnp.where(activation(jnp.zeros_like(leaf)) == 0, response, 0)
        noise = scale * jax.random.normal(key, (count, *leaf.shape[-1:]), leaf.dtype)
        bias = None if activation is None else jnp.zeros(leaf.shape[-1:], leaf.dtype)
        return Gate(response, noise, bias)

    def weight(leaf: jax.Array, response: Gate, z: jax.Array) -> Gated:
        opening = _combine(z, response.gate)
        if activation is not None and response.bias is not None:
            opening = activation(opening + response.bias)
        shape = (1,) * (leaf.ndim - 1) + leaf.shape[-1:]
        return Gated(leaf, response.response, jnp.reshape(opening, shape))

    linear = activation is None
    return Rule(init, weight, linear, _fit_gate if linear else None)


def low_rank(rank: int, *, scale: float = 0.01) -> Rule:
    """leaf + left diag(z' gate) right: an answer of rank `rank`, which turns inputs too.

    The leaf is taken as a matrix [in, out], `out` its last axis. `left` and `right` begin as
    normal noise of variance 1 / in and 1 / rank, `gate` of deviation `scale`. For leaves with two
    axes or more.

    Raises ValueError unless `rank` is a positive integer and the leaf has two axes or more.
    """
    _checks.positive_int("low_rank", "rank", rank)
    _checks.number("low_rank", "scale", scale)

    def init(key: Key, leaf: jax.Array, count: int) -> LowRank:
        if leaf.ndim < 2:
            raise ValueError(
                f"low_rank: needs a leaf of two axes or more; got {_checks.describe(leaf)}. Take "
                "`gate()` or `affine()` for it."
            )
        wide, out = math.prod(leaf.shape[:-1]), leaf.shape[-1]
        left, middle, right = jax.random.split(key, 3)
        normal = lambda k, *shape: jax.random.normal(k, shape, leaf.dtype)
        return LowRank(
            normal(left, wide, rank) / math.sqrt(wide),
            scale * normal(middle, count, rank),
            normal(right, rank, out) / math.sqrt(rank),
        )

    def weight(leaf: jax.Array, response: LowRank, z: jax.Array) -> jax.Array:
        scaled = response.left * _combine(z, response.gate)[None]
        return leaf + jnp.reshape(scaled @ response.right, leaf.shape)

    def fit(leaf: jax.Array, jacobian: jax.Array) -> LowRank | None:
        return _fit_low_rank(leaf, jacobian[0], rank) if len(jacobian) == 1 else None

    return Rule(init, weight, True, fit)


def affine() -> Rule:
    """leaf + z' response, with a full response [h, *leaf.shape], which begins at zero.

    The most that a linear answer can express, at h times the memory: for small models and biases.
    """

    def init(key: Key, leaf: jax.Array, count: int) -> jax.Array:
        return jnp.zeros((count, *leaf.shape), leaf.dtype)

    def weight(leaf: jax.Array, response: jax.Array, z: jax.Array) -> jax.Array:
        return leaf + _combine(z, response)

    return Rule(init, weight, True, lambda leaf, jacobian: jacobian)


def none() -> Rule:
    """The leaf itself, whatever the hyperparameters: for normalisation and the like."""
    nothing = lambda leaf, jacobian: ()
    return Rule(lambda key, leaf, count: (), lambda leaf, response, z: leaf, True, nothing)


def _fit_gate(leaf: jax.Array, jacobian: jax.Array) -> Gate:
    """For every output the best of rank one of its [h, in] block (Eckart and Young 1936)."""
    count, out = len(jacobian), (leaf.shape or (1,))[-1]
    blocks = jnp.moveaxis(jacobian.reshape(count, -1, out), -1, 0)  # [out, h, in]
    left, sizes, right = jnp.linalg.svd(_widened(blocks), full_matrices=False)
    # Only the product counts. The response gets the norm that it has in training from the start.
    wide = _widened(leaf).reshape(-1, out)
    norm = jnp.linalg.norm(wide, axis=0) if leaf.ndim > 1 else jnp.ones_like(wide[0])
    norm = jnp.where(norm > 0, norm, 1)
    response = (right[:, 0] * norm[:, None]).T.reshape(leaf.shape)
    gate = (left[:, :, 0] * (sizes[:, 0] / norm)[:, None]).T.reshape(count, *leaf.shape[-1:])
    return Gate(response.astype(leaf.dtype), gate.astype(leaf.dtype), None)


def _fit_low_rank(leaf: jax.Array, jacobian: jax.Array, rank: int) -> LowRank:
    wide = _widened(jacobian).reshape(-1, leaf.shape[-1])
    left, sizes, right = jnp.linalg.svd(wide, full_matrices=False)
    lack = max(0, rank - len(sizes))  # more than there is to say: the rest answers nothing
    pad = lambda x, *widths: jnp.pad(x, widths).astype(leaf.dtype)
    scale = math.sqrt(rank)  # `right` has columns of norm one in expectation, as `low_rank` draws
    return LowRank(
        pad(left[:, :rank], (0, 0), (0, lack)),
        pad(sizes[None, :rank] * scale, (0, 0), (0, lack)),
        pad(right[:rank] / scale, (0, lack), (0, 0)),
    )


def _widened(x: jax.Array) -> jax.Array:
    """At least in float32, which decompositions need."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _combine(z: jax.Array, table: jax.Array) -> jax.Array:
    """sum_i z_i table_i, for a table [h, ...]."""
    if z.shape[0] != table.shape[0]:
        raise ValueError(
            f"structured: `phi` was made for {table.shape[0]} hyperparameters, counted as scalars; "
            f"got {z.shape[0]}. Give `init` and `apply` hyperparameters of the same structure."
        )
    return jnp.tensordot(z, table, axes=1)


def materialize(weight: Weight) -> jax.Array:
    """The weight as one array."""
    if isinstance(weight, Gated):
        return weight.base + weight.response * weight.gate
    return weight
