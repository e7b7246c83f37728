"""Model Breadcrumbs (Davari and Belilovsky 2023, arXiv 2312.06795), and the task arithmetic that
it refines (Ilharco et al. 2023, arXiv 2212.04089)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._types import Params, Scalar
from ._common import broken, cleaned, count_members, finite, wide


class Merged(NamedTuple):
    """One model made of a start and T task vectors."""

    params: Params  # NaN if no vector could be used
    excluded: jax.Array  # bool [T]: vectors left out, as they were not finite


def task_vectors(tuned: Params, base: Params) -> Params:
    """What each of T models has learnt: `tuned - base`, leaves [T, ...] for tuned [T, ...].

    Raises ValueError where the shapes do not match.
    """
    count_members("task_vectors", "tuned", tuned)
    _checks.same_tree("task_vectors", "tuned", _tree.take(tuned, jnp.array(0)), "`base`", base)
    return jax.tree.map(lambda x, b: x - b[None], tuned, base)


def task_arithmetic(base: Params, vectors: Params, *, scale: Scalar | float) -> Merged:
    """`base + scale * sum of vectors` for vectors [T, ...]; scale may be traced and tuned.

    A vector that is not finite is left out and reported.
    """
    vectors, excluded = sound("task_arithmetic", base, vectors)
    total = jax.tree.map(lambda x: jnp.sum(x.astype(wide(x.dtype)), axis=0), vectors)
    return add(base, total, scale, excluded)


def breadcrumbs(
    base: Params,
    vectors: Params,
    *,
    scale: Scalar | float = 0.2,
    keep: Scalar | float = 0.15,
    drop: Scalar | float = 0.006,
) -> Merged:
    """Task arithmetic with vectors from which the largest and the smallest entries were removed.

    Args:
      base: the common start.
      vectors: leaves [T, ...], see `task_vectors`.
      scale: factor of their sum.
      keep: share of entries that stay, of the largest ones after the outliers are gone.
      drop: share of entries that go as outliers, the largest.

    Row by row along the last axis of every tensor: of n entries the int(drop n) largest by
    magnitude are dropped, then of the rest all but the int(keep n) largest. Counts are cut off to
    integers, as in the authors' code; both are of n, so `keep + drop <= 1`. Biases and scalars
    (tensors of fewer than two axes) stay whole. The defaults are the authors' starting point; they
    search scale in [0.01, 1], keep in [0.05, 0.2], drop in [0.001, 0.01]. All three may be traced.
    Of equal magnitudes the earlier entries count as the smaller.

    Raises ValueError for shares outside [0, 1] or that sum to more than 1.
    """
    _check_share("breadcrumbs", keep=keep, drop=drop)
    vectors, excluded = sound("breadcrumbs", base, vectors)
    kept = jax.tree.map(lambda x: _crumbs(x, keep, drop), vectors)
    total = jax.tree.map(lambda x: jnp.sum(x.astype(wide(x.dtype)), axis=0), kept)
    return add(base, total, scale, excluded)


def _crumbs(x: jax.Array, keep, drop) -> jax.Array:
    if x.ndim < 3:  # the leading axis is of tasks
        return x
    n = x.shape[-1]
    outliers, kept = count_of(drop, n), count_of(keep, n)
    # 0 for the largest of the row
    place = n - 1 - jnp.argsort(jnp.argsort(jnp.abs(x), axis=-1, stable=True), axis=-1)
    return jnp.where((place >= outliers) & (place < outliers + kept), x, 0)


def count_of(share, n: int) -> jax.Array:
    """int(share n); a share of 0.29 of 100 is 29, though 0.29 * 100 is a little less in binary.

    Exact for a share that is known; one that is traced has the digits of its type.
    """
    known = _checks.entries(share)
    kind = jnp.result_type(share) if known is None else known.dtype
    kind = kind if jnp.issubdtype(kind, jnp.floating) else jnp.result_type(float)
    above = 1 + 2 * float(jnp.finfo(kind).eps)
    if known is not None:
        return jnp.asarray(math.floor(float(known) * n * above), jnp.int32)
    return jnp.floor(jnp.asarray(share, float) * n * above).astype(jnp.int32)


def sound(where: str, base: Params, vectors: Params) -> tuple[Params, jax.Array]:
    """The vectors with zeros for those that are not finite, and which these are."""
    count_members(where, "vectors", vectors)
    one = _tree.take(vectors, jnp.array(0))
    _checks.same_tree(where, "vectors", one, "`base`, but for the leading axis of tasks,", base)
    used = finite(vectors)
    return cleaned(vectors, used), ~used


def add(base: Params, total: Params, scale, excluded: jax.Array) -> Merged:
    moved = lambda b, t: (b.astype(t.dtype) + jnp.asarray(scale, t.dtype) * t).astype(b.dtype)
    return Merged(broken(jax.tree.map(moved, base, total), ~excluded.all()), excluded)


def _check_share(where: str, *, keep, drop) -> None:
    known = {}
    for name, value in (("keep", keep), ("drop", drop)):
        known[name] = check_share(where, name, value)
    if None not in known.values() and known["keep"] + known["drop"] > 1:
        raise ValueError(f"{where}: `keep` + `drop` must not exceed 1; got {keep!r} + {drop!r}.")


def check_share(where: str, name: str, value) -> float | None:
    found = _checks.number(where, name, value)
    if found is not None and found > 1:
        raise ValueError(f"{where}: `{name}` is a share of the entries, at most 1; got {value!r}.")
    return found
