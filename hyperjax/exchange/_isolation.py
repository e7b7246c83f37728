"""No exchange: members that never meet."""

import jax.numpy as jnp

from .._types import Exchange
from ._replace import Clock, Events, clock


def isolation() -> Exchange:
    """Nobody copies anybody, diverged or not: random and grid search, or independent descents."""

    def apply(key, state, members, score):
        del key
        own = jnp.arange(score.shape[0], dtype=jnp.int32)
        return members, Clock(state.calls + 1), Events(own, ~jnp.isfinite(score))

    return Exchange(clock, apply)
