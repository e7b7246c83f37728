"""Binary tournament (population based training, Jaderberg et al. 2017, arXiv 1711.09846)."""

import jax
import jax.numpy as jnp

from .. import _checks
from .._types import Exchange
from ._replace import Clock, Events, Explore, clock, random_finite, replace, when_due


def tournament(explore: Explore, *, every: int = 1) -> Exchange:
    """Each member meets a random other one and, if that is better, copies it and explores.

    Args:
      explore: (key, hparams) -> hparams, applied to copies only.
      every: outer steps between exchanges. Diverged members are reseeded at every step, from any
        member that has not diverged.

    Members are tuner states with a field `hparams`.

    Raises TypeError unless `explore` is a function, ValueError unless `every` is a positive
    integer.
    """
    _checks.is_callable("tournament", "explore", explore)
    _checks.positive_int("tournament", "every", every)

    def apply(key, state, members, score):
        size = score.shape[0]
        meet, reseed, mutate = jax.random.split(key, 3)
        own = jnp.arange(size)
        # 1 to P - 1 places further on: anybody but oneself (a population of one meets itself)
        rival = (own + jax.random.randint(meet, (size,), 1, max(size, 2))) % size
        parents = jnp.where(score[rival] < score, rival, own)  # False for a NaN on either side
        parents = jnp.where(jnp.isfinite(score), parents, random_finite(reseed, score, (size,)))
        parents = when_due(state, every, score, parents)
        members = replace(mutate, members, parents, explore, every)
        return members, Clock(state.calls + 1), Events(parents, ~jnp.isfinite(score))

    return Exchange(clock, apply)
