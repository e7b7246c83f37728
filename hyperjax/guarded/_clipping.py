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
    the derivative NaN; here it is the identity. The norm is taken in float32 at least, in optax in
    the type of the updates. `max_norm` >= 0 may be traced.

    Raises ValueError for a negative `max_norm`.
    """
    _checks.number("guarded.clip_by_global_norm", "max_norm", max_norm)

    def update(updates, state, params=None):
        del params
        # In float16 the square of 256 would overflow, and that of 1e-4 vanish.
        wide = lambda u: u.astype(jnp.promote_types(u.dtype, jnp.float32))
        square = optax.tree.norm(jax.tree.map(wide, updates), squared=True)
        # Chosen before the root. Not `square > 0`, which would hide a NaN.
        norm = jnp.sqrt(jnp.where(square == 0, 1, square))
        passes = (square == 0) | (norm < max_norm)
        # Chosen before the quotient, whose derivative at a small norm would overflow.
        factor = jnp.where(passes, 1, max_norm / jnp.where(passes, 1, norm))
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
