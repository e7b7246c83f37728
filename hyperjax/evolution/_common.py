"""What the estimators share: keys, noise, scales, and a mean with its standard error."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _checks, _tree
from .._types import HParams, Key, Params, PyTree, Scalar

Noise = Callable[[Key, tuple[int, ...], jnp.dtype], jax.Array]


class EvolutionInfo(NamedTuple):
    """What the perturbed runs of one estimate told beside their gradient."""

    standard_error: HParams  # of each entry of the gradient; inf where fewer than two pairs count
    smoothed: Scalar  # mean score of the perturbed runs that stayed finite
    diverged: jax.Array  # int32: perturbed runs whose score was not finite


def check_factory(where: str, response, init, key: Key, chunk: int | None) -> None:
    _checks.is_callable(where, "response", response)
    _checks.is_callable(where, "init", init)
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.shape != ():
        got = _checks.describe(key) if isinstance(key, jax.Array) else type(key).__name__
        raise TypeError(
            f"{where}: `key` must be one typed PRNG key; got {got}. Pass `jax.random.key(0)`."
        )
    if chunk is not None:
        _checks.positive_int(where, "chunk", chunk)


def own_key(key: Key, params: Params, hparams: HParams) -> Key:
    """`key` with the start folded in, so that different members of a population draw apart."""
    for x in jax.tree.leaves((params, hparams)):
        bits = _bits(x)
        odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1  # the order of entries counts
        # Mixed before the sum: round numbers share most of their bits, and sums of these collide.
        mixed = _mix(bits ^ odd * jnp.uint32(0x9E3779B9))
        key = jax.random.fold_in(key, jnp.sum(mixed, dtype=jnp.uint32))
    return key


def _bits(x: jax.Array) -> jax.Array:
    """uint32 [entries]; of real and complex numbers those in float32."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.ravel(x).astype(jnp.uint32)
    x = jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x
    return lax.bitcast_convert_type(jnp.ravel(x).astype(jnp.float32), jnp.uint32)


def _mix(bits: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit moves every other: the last steps of MurmurHash3."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def draw(noise: Noise, key: Key, count: int, like: HParams) -> HParams:
    """`count` independent draws in the shape and type of each leaf: [count, ...]."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    drawn = [noise(k, (count, *x.shape), x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def check_scale(where: str, name: str, scale: PyTree) -> None:
    for keys, x in jax.tree_util.tree_leaves_with_path(scale):
        label = name + jax.tree_util.keystr(keys)
        if np.ndim(x) == 0:
            _checks.number(where, label, x, positive=True)
            continue
        known = _checks.entries(x)
        if known is not None and not np.all((known > 0) & (known < np.inf)):
            raise ValueError(f"{where}: `{label}` must be finite and positive; got {known}.")


def spread(where: str, name: str, scale: PyTree, hparams: HParams) -> HParams:
    """`scale`, one number or a tree like hparams, in the shape and type of every leaf."""
    hstructure, structure = jax.tree.structure(hparams), jax.tree.structure(scale)
    if structure == jax.tree.structure(0) and jnp.shape(scale) == ():
        scale = jax.tree.map(lambda _: scale, hparams)
    elif structure != hstructure:
        raise ValueError(
            f"{where}: `{name}` must be one number or have the structure of hparams; got "
            f"{structure}, expected {hstructure}."
        )

    def one(keys, h, s):
        try:
            return jnp.broadcast_to(jnp.asarray(s, h.dtype), h.shape)
        except ValueError:
            raise ValueError(
                f"{where}: `{name}` at {_checks.path(keys)} is {_checks.describe(s)}, which does "
                f"not broadcast to the hyperparameter {_checks.describe(h)}."
            ) from None

    return jax.tree_util.tree_map_with_path(one, hparams, scale)


def shift(hparams: HParams, scale: HParams, noise: HParams) -> HParams:
    """hparams + scale * noise for noise [N, ...]."""
    return jax.tree.map(lambda h, s, z: h[None] + s[None] * z, hparams, scale, noise)


def each(function: Callable, over: PyTree, chunk: int | None) -> PyTree:
    """`function` of every entry along the leading axis: all at once, or `chunk` at a time."""
    return jax.vmap(function)(over) if chunk is None else lax.map(function, over, batch_size=chunk)


def rows(values: jax.Array, like: jax.Array) -> jax.Array:
    """[N] in the rank and type of [N, ...]."""
    return values.astype(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def mean_and_error(terms: PyTree, sound: jax.Array) -> tuple[PyTree, PyTree]:
    """Mean over the sound among N independent terms [N, ...], and its standard error.

    The mean of none is NaN; an error from fewer than two is inf.
    """
    count = jnp.sum(sound)

    def total(x):
        return jnp.sum(_tree.where(sound, x, jnp.zeros_like(x)), axis=0)

    def mean(x):
        return total(x) / count.astype(x.dtype)

    def error(x):
        n = jnp.maximum(count, 2).astype(x.dtype)
        variance = total((x - mean(x)[None]) ** 2) / (n - 1)
        return jnp.where(count > 1, jnp.sqrt(variance / n), jnp.inf)

    return jax.tree.map(mean, terms), jax.tree.map(error, terms)


def slopes(
    rises: jax.Array, weights: HParams, scale: HParams, scores: jax.Array
) -> tuple[HParams, EvolutionInfo]:
    """The mean of rise * weight / scale over the pairs whose rise is finite.

    rises: [N], of the score per unit of noise; weights: [N, ...], in units of scale; scores: of
    all perturbed runs.
    """
    sound = jnp.isfinite(rises)
    terms = jax.tree.map(lambda z, s: rows(rises, z) * z / s[None], weights, scale)
    grad, error = mean_and_error(terms, sound)
    smoothed, _ = mean_and_error(scores, jnp.isfinite(scores))
    return grad, EvolutionInfo(error, smoothed, count_diverged(scores))


def count_diverged(scores: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(scores), dtype=jnp.int32)
