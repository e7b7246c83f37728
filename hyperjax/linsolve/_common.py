"""What iterative solves share."""

import jax
import jax.numpy as jnp

from .. import _tree
from .._types import MatVec, Params, Scalar


def scaled(b: Params) -> tuple[Scalar, Params]:
    """|b| and b / |b|, so that no test depends on units; zero stays zero."""
    size = _tree.norm(b)
    return size, _tree.scale(1 / jnp.where(size > 0, size, 1), b)


def start_from(
    matvec: MatVec, unit: Params, size: Scalar, x0: Params | None
) -> tuple[Params, Params, jax.Array]:
    """Where to start in the scaled system: x, its residual and the products that it took.

    A start that is worse than zero, as one is after hyperparameters have jumped, becomes zero.
    """
    zeros, count = _tree.zeros_like(unit), (size * 0).astype(jnp.int32)
    if x0 is None:
        return zeros, unit, count
    x = _tree.scale(1 / jnp.where(size > 0, size, 1), x0)
    r = _tree.sub(unit, matvec(x))
    better = _tree.dot(r, r) < _tree.dot(unit, unit)
    return _tree.where(better, x, zeros), _tree.where(better, r, unit), count + 1
