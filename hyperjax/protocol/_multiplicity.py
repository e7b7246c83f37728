"""Predictive multiplicity (Watson-Daniels, Parkes and Ustun 2022, arXiv 2206.01131): how much
models that are as good as one another disagree on single cases."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks
from .._types import Scalar


class Multiplicity(NamedTuple):
    """Over the near-optimal members of a population. The paper maximises over all models, so
    every number here is a lower bound: "at least"."""

    members: jax.Array  # bool [P], loss within epsilon of the reference's
    reference: jax.Array  # int32, the member that others are compared with
    low: jax.Array  # [N] or [N, C], the smallest probability that a member gives: viable range
    high: jax.Array  # [N] or [N, C], the largest
    width: Scalar  # mean of high - low
    ambiguity: Scalar  # share of cases on which some member is delta or more away
    discrepancy: Scalar  # largest share of cases on which one member is delta or more away
    label_ambiguity: Scalar  # the same two for labels that differ
    label_discrepancy: Scalar


def multiplicity(
    losses: jax.Array,
    predictions: jax.Array,
    *,
    epsilon: Scalar | float,
    delta: Scalar | float,
    reference: jax.Array | int | None = None,
    threshold: Scalar | float = 0.5,
) -> Multiplicity:
    """What members with `loss <= loss of the reference + epsilon` predict.

    Args:
      losses: [P], of whatever loss or error counts.
      predictions: [P, N], probabilities of the positive class, or [P, N, C] of classes; there the
        distance is the largest over classes.
      epsilon: >= 0, in units of the loss. delta: > 0, in units of probability.
      reference: the row of the member to compare with, from 0, that of the smallest loss by default
        (the first of equals).
      threshold: for labels from [P, N].

    A member whose loss or predictions are not finite is never in the set; if none is left, or the
    reference is not, every number is NaN. All arguments may be traced. Raises ValueError for other
    shapes, and for a reference that is no member.
    """
    _check(losses, predictions, epsilon, delta, reference)
    shape = (losses.shape[0], -1)
    sound = jnp.isfinite(losses) & jnp.isfinite(predictions).reshape(shape).all(axis=1)
    ranked = jnp.where(sound, losses, jnp.inf)
    base = jnp.argmin(ranked) if reference is None else jnp.asarray(reference)
    members = sound & (losses <= losses[base] + epsilon) & sound[base]
    rows = members.reshape(-1, *(1,) * (predictions.ndim - 1))
    known = members.any()
    low = jnp.where(known, jnp.min(jnp.where(rows, predictions, jnp.inf), axis=0), jnp.nan)
    high = jnp.where(known, jnp.max(jnp.where(rows, predictions, -jnp.inf), axis=0), jnp.nan)
    distance = jnp.abs(predictions - predictions[base][None])
    binary = predictions.ndim == 2
    labels = predictions >= threshold if binary else jnp.argmax(predictions, axis=-1)
    away = distance >= delta if binary else jnp.max(distance, axis=-1) >= delta
    shares = _shares(away, members, known, low.dtype)
    labelled = _shares(labels != labels[base][None], members, known, low.dtype)
    width = jnp.mean(high - low)
    return Multiplicity(members, base.astype(jnp.int32), low, high, width, *shares, *labelled)


def _shares(apart: jax.Array, members: jax.Array, known: jax.Array, dtype) -> tuple[Scalar, Scalar]:
    """Of cases [P, N]: on which anybody stands apart, and the most on which somebody does."""
    apart = apart & members[:, None]
    anybody = jnp.mean(apart.any(axis=0), dtype=dtype)
    somebody = jnp.max(jnp.mean(apart, axis=1, dtype=dtype))
    return jnp.where(known, anybody, jnp.nan), jnp.where(known, somebody, jnp.nan)


def _check(losses, predictions, epsilon, delta, reference) -> None:
    where = "multiplicity"
    if jnp.ndim(losses) != 1 or jnp.ndim(predictions) not in (2, 3) or 0 in predictions.shape:
        raise ValueError(
            f"{where}: expected `losses` [P] and `predictions` [P, N] or [P, N, C]; got "
            f"{_checks.describe(losses)} and {_checks.describe(predictions)}."
        )
    if losses.shape[0] != predictions.shape[0]:
        raise ValueError(
            f"{where}: `losses` and `predictions` need one entry per member; got "
            f"{losses.shape[0]} and {predictions.shape[0]}."
        )
    _checks.number(where, "epsilon", epsilon)
    _checks.number(where, "delta", delta, positive=True)
    known = None if reference is None else _checks.entries(reference)
    last = losses.shape[0] - 1
    if known is not None and (known.dtype.kind not in "iu" or not 0 <= known <= last):
        raise ValueError(
            f"{where}: `reference` must be the row of a member, from 0 to {last}; got {reference}."
        )
