"""Gradients averaged over members or devices, without those that diverged."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .. import _tree


def all_reduce(axis_name: Hashable | tuple[Hashable, ...]) -> optax.GradientTransformation:
    """The mean of the gradients over the named axis, to be chained before an optimizer.

    The axis is that of `population(..., axis_name=...)`, of `jax.vmap` or of a mesh inside
    `jax.shard_map`. Bit for bit `lax.pmean` as long as that is finite; otherwise the mean over the
    members whose gradient is, and NaN if there is none.
    """

    def update(updates, state, params=None):
        del params
        mean = lax.pmean(updates, axis_name)
        # Seen in the mean, which is smaller than the gradients: sound steps pay next to nothing.
        rest = lambda: _of_finite(updates, axis_name)
        return lax.cond(_tree.all_finite(mean), lambda: mean, rest), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _of_finite(grads, axis_name):
    sound = _tree.all_finite(grads)
    count = lax.psum(sound.astype(jnp.int32), axis_name)

    def one(g):
        total = lax.psum(jnp.where(sound, g, 0), axis_name)
        return jnp.where(count > 0, total / jnp.maximum(count, 1).astype(g.dtype), jnp.nan)

    return jax.tree.map(one, grads)
