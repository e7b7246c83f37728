"""The diagonal of a matrix, from products."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from .. import _checks, _tree
from .._types import Key, MatVec, Params, Preconditioner, State
from ._common import flat, products


def jacobi(key: Key, probes: int = 4) -> Preconditioner:
    """Division by an estimate of the diagonal of A.

    For vectors z of random signs, z * A z is the diagonal in expectation, with the rest of the row
    as noise. Taken is |mean| + 2 standard errors over the probes: an entry that is lost in noise is
    divided by the size of the noise, since too small a divisor harms more than one too large. It is
    exact, with one probe as with many, where A is diagonal. Entries whose whole row is zero are
    divided by the mean of the others.

    It helps where curvature differs from one parameter to the other, as with one penalty each.
    Every probe costs a product, and on the problem of benchmarks/implicit.py a few probes leave
    more of a budget to `cg` than they take: 3 to 5 were the best of 20 products.

    Args:
      key: of the random signs; the same key gives the same probes.
      probes: at least 2, for the standard error.

    Raises ValueError if `probes` is no integer >= 2.

    Reference: Bekas, Kokiopoulou and Saad 2007, An estimator for the diagonal of a matrix; the
    standard error is ours.
    """
    _checks.positive_int("jacobi", "probes", probes, least=2)

    def build(matvec: MatVec, like: Params) -> State:
        vector, unravel = ravel_pytree(like)
        signs = jax.random.rademacher(key, (probes, vector.size), vector.dtype)
        signs = _tree.vary_like(signs, vector)
        samples = signs * products(flat(matvec, like), signs, probes)
        mean = jnp.mean(samples, axis=0)
        error = jnp.std(samples, axis=0, ddof=1) / probes**0.5
        diagonal = jnp.abs(mean) + 2 * error
        found = diagonal > 0
        typical = jnp.sum(diagonal) / jnp.maximum(jnp.sum(found), 1)
        diagonal = jnp.where(found, diagonal, jnp.where(typical > 0, typical, 1))
        return unravel(1 / diagonal)

    def apply(inverse: State, v: Params) -> Params:
        return jax.tree.map(jnp.multiply, inverse, v)

    return Preconditioner(build, apply, probes)
