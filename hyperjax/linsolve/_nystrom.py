"""The Nystrom approximation: a symmetric matrix from its products with a few vectors."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from .. import _checks, _tree
from .._types import Key, LinearSolve, MatVec, Params, Preconditioner, State
from ._common import flat, products
from ._one_shot import one_shot

Sketch = Literal["gaussian", "coordinates"]


def nystrom(key: Key, rank: int, damping: float, *, sketch: Sketch = "gaussian") -> LinearSolve:
    """x = x0 + (A_k + damping I)^-1 (b - A x0) with A_k the Nystrom approximation of `rank`.

    It takes `rank` products, all of which are independent of one another, and no iteration.
    `SolveInfo.residual` is that of A itself, without damping. To keep A_k over outer steps, build
    `nystrom_preconditioner(..., tail="damping")` once and solve by `one_shot(prebuilt(...))`.

    Args:
      key, rank, sketch: see `nystrom_preconditioner`.
      damping: > 0, in the units of A: directions outside the sketch are divided by it.

    With rank n it is the exact solve of the damped system.

    Reference: Hataya and Yamada 2023 (arXiv 2302.09478), section 3, which samples coordinates.
    """
    _checks.number("nystrom", "damping", damping, positive=True)
    return one_shot(
        nystrom_preconditioner(key, rank, damping, tail="damping", sketch=sketch),
    )


def nystrom_preconditioner(
    key: Key,
    rank: int,
    damping: float = 0.0,
    *,
    tail: Literal["smallest", "damping"] = "smallest",
    sketch: Sketch = "gaussian",
) -> Preconditioner:
    """The inverse of A_k + damping I, where A_k = (A S)(S'A S)^+ (A S)' for a random S [n, k].

    Args:
      key: of S; the same key gives the same S.
      rank: k, the number of products, at most n.
      damping: >= 0, in the units of A.
      tail: what A_k + damping I is taken to be on vectors orthogonal to A_k. "smallest", the
        smallest eigenvalue of A_k plus damping, is right for `cg`, which it spares the largest
        eigenvalues; "damping" is the inverse itself, for `one_shot`, and needs damping > 0.
      sketch: "gaussian", with orthonormal columns, or "coordinates": columns of A at random. The
        latter misses what the few coordinates do not touch.

    A should be positive semidefinite. Of the small matrix S'A S only eigenvalues above rounding
    are inverted, so that a negative part that the sketch meets is left out of A_k, and A_k stays
    positive semidefinite. The state is (eigenvectors, eigenvalues, tail): k + 1 vectors in all;
    see `prebuilt`.

    Raises ValueError for arguments out of range.

    Reference: Frangella, Tropp and Udell 2021 (arXiv 2110.02820), Algorithm 2.1 and equation 5.3.
    They shift S'A S and take its Cholesky factor, which fails where A is indefinite.
    """
    where = "nystrom_preconditioner"
    _checks.positive_int(where, "rank", rank)
    _checks.number(where, "damping", damping, positive=tail == "damping")
    _checks.one_of(where, "tail", tail, ("smallest", "damping"))
    _checks.one_of(where, "sketch", sketch, ("gaussian", "coordinates"))

    def build(matvec: MatVec, like: Params) -> State:
        vector, _ = ravel_pytree(like)
        if rank > vector.size:
            raise ValueError(
                f"{where}: `rank` must be at most the number of parameters, {vector.size}; "
                f"got {rank}. `dense` solves a system this small directly."
            )
        test = _tree.vary_like(_sketch(key, rank, vector, sketch), vector)
        vectors, values = _factor(test, products(flat(matvec, like), test.T, rank).T)
        # Eigenvalues that rounding has eaten do not count as the smallest.
        least = jnp.min(jnp.where(values > 0, values, jnp.inf))
        least = jnp.where(jnp.isfinite(least), least, 0)
        rest = damping + (least if tail == "smallest" else 0 * least)
        rest = jnp.where(rest == 0, 1, rest)
        # A dropped direction has no eigenvector either; its column is zero.
        return _LowRank(vectors, values + damping, rest)

    def apply(state: _LowRank, v: Params) -> Params:
        flat_v, unravel = ravel_pytree(v)
        project = lambda u: state.vectors @ (state.vectors.T @ u)
        # Twice: what one projection leaves of the span by rounding would be divided by the tail.
        rest = flat_v - project(flat_v)
        rest = rest - project(rest)
        kept = state.values > 0
        gain = jnp.where(kept, 1 / jnp.where(kept, state.values, 1), 0)
        along = state.vectors @ (gain * (state.vectors.T @ flat_v))
        return unravel(along + rest / state.tail)

    return Preconditioner(build, apply, rank)


class _LowRank(NamedTuple):
    vectors: jax.Array  # [n, k], orthonormal columns or zero
    values: jax.Array  # [k], of the matrix with damping
    tail: jax.Array  # what it is on the rest


def _sketch(key: Key, rank: int, like: jax.Array, kind: Sketch) -> jax.Array:
    """[n, rank] with orthonormal columns."""
    n = like.size
    if kind == "coordinates":
        picks = jax.random.permutation(key, n)[:rank]
        return jnp.zeros((n, rank), like.dtype).at[picks, jnp.arange(rank)].set(1)
    return jnp.linalg.qr(jax.random.normal(key, (n, rank), like.dtype))[0]


def _factor(test: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors [n, k] and eigenvalues [k] of A_k from S and A S."""
    small = test.T @ image
    theta, w = jnp.linalg.eigh((small + small.T) / 2)
    # Rounding of the products is of the size of eps |A S|, which is above the eigenvalues of S'A S.
    noise = jnp.sqrt(1.0 * len(test)) * jnp.finfo(theta.dtype).eps * jnp.linalg.norm(image)
    kept = theta > noise
    root = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, theta, 1)), 0)
    vectors, sigma, _ = jnp.linalg.svd(image @ (w * root[None]), full_matrices=False)
    values = sigma**2
    kept = values > noise
    return jnp.where(kept[None], vectors, 0), jnp.where(kept, values, 0)
