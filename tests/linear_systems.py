"""Linear systems with known spectra, for the tests of solves and preconditioners."""

import jax.numpy as jnp
import numpy as np
from problems import jit


def symmetric(seed: int, eigenvalues) -> np.ndarray:
    """A matrix with these eigenvalues along random directions."""
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return basis @ np.diag(eigenvalues) @ basis.T


def vector(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size)


def solve_dense(solver, a, b):
    a, b = jnp.asarray(a), jnp.asarray(b)
    return jit(lambda b: solver(lambda v: a @ v, b))(b)


def residual(a, x, b) -> float:
    """|b - a x| / |b| in float64."""
    a, x, b = (np.asarray(v, np.float64) for v in (a, x, b))
    return float(np.linalg.norm(b - a @ x) / np.linalg.norm(b))
