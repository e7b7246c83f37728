"""Recorded hyperparameters as a schedule."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from . import _checks
from ._types import HParams, PyTree, Scalar


def schedule(
    values: HParams,
    every: int | Scalar = 1,
    *,
    interpolation: Literal["constant", "linear"] = "constant",
) -> Callable[[int | Scalar], PyTree]:
    """A function of the step count from recorded values [K, ...], for any optax optimizer.

        found = space.constrain(metrics.hparams)["lr"]              # [outer steps]
        optimizer = optax.adam(hj.schedule(found, every=inner_steps))

    "constant" holds values[k] for the steps k `every` <= count < (k + 1) `every`, which is how they
    were in force: plain training then equals `replay` of the same values bit for bit. "linear"
    passes through values[k] at count k `every`. After the last entry both hold it.

    `values` may be a pytree; the schedule then gives a tree. Values, `every` and the count may be
    traced, and the schedule has derivatives in the values. Raises ValueError for values without a
    leading axis or an `every` that is not positive.
    """
    steps = _checks.count_steps("schedule", values)
    _checks.number("schedule", "every", every, positive=True)
    _checks.one_of("schedule", "interpolation", interpolation, ("constant", "linear"))

    def constant(count):
        index = jnp.clip(count // every, 0, steps - 1).astype(jnp.int32)
        return jax.tree.map(lambda x: jnp.asarray(x)[index], values)

    def linear(count):
        place = jnp.clip(jnp.asarray(count, float) / every, 0, steps - 1)
        left = jnp.floor(place).astype(jnp.int32)
        right = jnp.minimum(left + 1, steps - 1)

        def one(x):
            x = jnp.asarray(x)
            x = x.astype(jnp.result_type(x, float))  # whole numbers have others between them
            share = (place - left).astype(x.dtype)
            return x[left] + share * (x[right] - x[left])

        return jax.tree.map(one, values)

    return constant if interpolation == "constant" else linear
