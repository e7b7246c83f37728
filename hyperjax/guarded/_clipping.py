"""Clipping by a norm that has a derivative at zero."""

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._types import Scalar


def clip_by_global_norm(max_norm: float | Scalar) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, differentiable also where all gradients are exactly zero.

    Updates whose 2-norm over all leaves is `max_norm` or more are scaled down to it, others pass.
    In optax the norm of zero is differentiated even though nothing is clipped there, which makes
    the derivative NaN; here it is the identity. `max_norm` >= 0 may be traced.

    Raises ValueError for a negative `max_norm`.
    """
    _checks.number("guarded.clip_by_global_norm", "max_norm", max_norm)

    def update(updates, state, params=None):
        del params
        square = optax.tree.norm(updates, squared=True)
        # Chosen before the root. Not `square > 0`, which would hide a NaN.
        norm = jnp.sqrt(jnp.where(square == 0, 1, square))
        passes = (square == 0) | (norm < max_norm)
        factor = jnp.where(passes, 1, max_norm / norm)
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
