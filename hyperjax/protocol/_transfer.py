"""Tuned here, judged elsewhere (GTEP; Cha and Cho 2024, "Hyperparameters in continual learning: a
reality check", arXiv 2403.09066)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks
from .._types import Scalar


class Transfer(NamedTuple):
    """Scores on the evaluation runs of configurations that were chosen in three ways."""

    conventional: Scalar  # chosen on the evaluation runs themselves, as is often done
    same: Scalar  # chosen on other runs of the same data set
    transferred: Scalar  # chosen on the other data set: what a new user gets
    overestimate: Scalar  # transferred - conventional, >= 0: what the usual protocol hides
    choices: jax.Array  # int32 [3]: the configurations, in the order above; -1 if all had failed


def transfer(source: jax.Array, target: jax.Array, evaluation: jax.Array) -> Transfer:
    """The price of hyperparameters that were tuned on another data set.

    Args:
      source: [N, S], scores of N configurations over S runs (seeds, orders of classes) on the data
        set to tune on; smaller is better.
      target: [N, T], on the data set to judge on, over runs other than those judged.
      evaluation: [N, E], on that data set over the runs that are judged.

    A choice is by the mean over runs; a configuration with a run that is not finite is never
    chosen, and if there is no other the score is NaN. A judged run that fails shows as NaN. Pure;
    vmap over methods for a leaderboard. Raises ValueError for shapes that disagree.
    """
    tables = {"source": source, "target": target, "evaluation": evaluation}
    if any(jnp.ndim(x) != 2 or 0 in jnp.shape(x) for x in tables.values()) or (
        len({jnp.shape(x)[0] for x in tables.values()}) > 1
    ):
        got = ", ".join(f"`{name}` {_checks.describe(x)}" for name, x in tables.items())
        raise ValueError(f"transfer: expected [N, runs] with the same N three times; got {got}.")
    judged = jnp.mean(evaluation, axis=1)
    chosen = jnp.stack([_choose(x) for x in (evaluation, target, source)])
    scores = jnp.where(chosen >= 0, judged[jnp.maximum(chosen, 0)], jnp.nan)
    return Transfer(scores[0], scores[1], scores[2], scores[2] - scores[0], chosen)


def _choose(scores: jax.Array) -> jax.Array:
    mean = jnp.mean(scores, axis=1)
    sound = jnp.isfinite(mean)
    best = jnp.argmin(jnp.where(sound, mean, jnp.inf)).astype(jnp.int32)
    return jnp.where(sound.any(), best, -1)
