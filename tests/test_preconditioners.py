"""Preconditioners: what they build, what they save, and that they can be kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_systems import residual, solve_dense, symmetric, vector
from problems import error, jit

import hyperjax as hj
from hyperjax import linsolve as ls

KEY = jax.random.key(3)


def built(preconditioner, a):
    """P as a matrix."""
    a = jnp.asarray(a)
    like = jnp.zeros(len(a), a.dtype)

    def matrix(a):
        state = preconditioner.build(lambda v: a @ v, like)
        return jax.vmap(lambda v: preconditioner.apply(state, v))(jnp.eye(len(a), dtype=a.dtype))

    return np.asarray(jit(matrix)(a))


# ------------------------------------------------------------------------------- jacobi


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_jacobi_is_exact_on_a_diagonal_matrix(scale):
    diagonal = scale * np.geomspace(1e-3, 1e3, 20)
    diagonal[3] *= -1
    p = built(ls.jacobi(KEY, probes=2), np.diag(diagonal))
    assert error(p * scale, scale * np.diag(1 / np.abs(diagonal))) < 1e-12


def test_jacobi_is_the_estimate_that_it_documents():
    a, n = symmetric(0, np.linspace(-1, 4, 30)), 30
    z = np.asarray(jax.random.rademacher(KEY, (6, n), jnp.float64))
    samples = z * (z @ a)
    expected = np.abs(samples.mean(0)) + 2 * samples.std(0, ddof=1) / np.sqrt(6)
    assert error(built(ls.jacobi(KEY, probes=6), a), np.diag(1 / expected)) < 1e-12


def test_jacobi_tends_to_the_diagonal():
    a = symmetric(0, np.linspace(1, 4, 30))
    off = lambda probes: error(1 / np.diag(built(ls.jacobi(KEY, probes), a)), np.diag(a))
    # |mean - diagonal| + 2 standard errors falls as one over the root: a tenth after a hundredfold.
    errors = [off(4), off(400), off(40_000)]
    assert 5 < errors[0] / errors[1] < 20 and 5 < errors[1] / errors[2] < 20


def test_jacobi_leaves_a_row_of_zeros_finite():
    p = built(ls.jacobi(KEY), np.diag([0.0, 2.0, 4.0]))
    assert error(np.diag(p), np.array([1 / 3, 1 / 2, 1 / 4])) < 1e-15
    assert error(np.diag(built(ls.jacobi(KEY), np.zeros((3, 3)))), np.ones(3)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_jacobi_saves_products_where_the_diagonal_rules(seed):
    n = 100
    scales = np.geomspace(1e-2, 1e1, n)
    a = symmetric(seed, np.linspace(-0.3, 0.3, n)) * np.sqrt(np.outer(scales, scales))
    a += np.diag(scales)
    b = vector(seed, n)
    plain = solve_dense(ls.cg(tol=1e-8, maxiter=1000), a, b)[1]
    key = jax.random.key(seed)
    x, info = solve_dense(ls.cg(tol=1e-8, preconditioner=ls.jacobi(key)), a, b)
    # The probes are counted.
    assert info.iterations < plain.iterations / 2
    assert info.residual < 2e-8 and error(info.residual, residual(a, x, b)) < 1e-6


# ------------------------------------------------------------------------------ nystrom


@pytest.mark.parametrize("sketch", ["gaussian", "coordinates"])
@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
def test_full_rank_is_the_exact_damped_inverse(sketch, damping):
    a, n = symmetric(0, np.geomspace(1e-2, 10, 15)), 15
    p = built(ls.nystrom_preconditioner(KEY, n, damping, tail="damping", sketch=sketch), a)
    # Condition 1e3, squared where S'A S is inverted.
    assert error(p, np.linalg.inv(a + damping * np.eye(n))) < 1e-9


@pytest.mark.parametrize("sketch", ["gaussian", "coordinates"])
def test_a_matrix_of_low_rank_needs_no_more(sketch):
    root = np.random.default_rng(0).normal(size=(40, 5))
    a, b = root @ root.T, vector(1, 40)
    for dtype, bound in ((np.float64, 1e-9), (np.float32, 1e-2)):
        solver = ls.nystrom(KEY, 10, 1e-2, sketch=sketch)  # rank 5 in a sketch of 10: singular
        x, info = solve_dense(solver, a.astype(dtype), b.astype(dtype))
        assert x.dtype == dtype and info.iterations == 10
        assert error(x, np.linalg.solve(a + 1e-2 * np.eye(40), b)) < bound
        assert abs(info.residual - residual(a, x, b)) < 100 * bound


def test_nystrom_is_the_formula_of_hataya_and_yamada():
    # (H_k + rho I)^-1 = I / rho - C'(M + C C' / rho)^-1 C / rho^2 with C the rows of H at some
    # coordinates and M their columns at the same.
    a, rho = symmetric(0, np.geomspace(1e-2, 3, 25)), 0.1
    picks = np.asarray(jax.random.permutation(KEY, 25)[:6])
    c, m = a[picks], a[np.ix_(picks, picks)]
    expected = np.eye(25) / rho - c.T @ np.linalg.solve(m + c @ c.T / rho, c) / rho**2
    p = built(ls.nystrom_preconditioner(KEY, 6, rho, tail="damping", sketch="coordinates"), a)
    assert error(p, expected) < 1e-10


def test_nystrom_forgives_a_wrong_damping_where_neumann_does_not():
    # Twenty directions with curvature and forty without, as networks have them. The exact solution
    # is v / (value + damping) in each: 1 % at most for a damping of 1e-2 over values from 1.
    a = symmetric(0, np.concatenate([np.linspace(1, 10, 20), np.zeros(40)]))
    b = a @ vector(1, 60)
    spread = lambda xs: max(error(x, xs[0]) for x in xs[1:])
    ours = [solve_dense(ls.nystrom(KEY, 20, d), a, b)[0] for d in (1e-4, 1e-2)]
    series = [solve_dense(ls.neumann(20, s), a, b)[0] for s in (1e-3, 1e-1)]
    assert spread(ours) < 0.01 and spread(series) > 0.3


def test_nystrom_leaves_negative_curvature_out():
    a = symmetric(0, np.concatenate([[-2.0, -0.5], np.linspace(0.1, 4, 18)]))
    state = ls.nystrom_preconditioner(KEY, 20, 0.1).build(lambda v: a @ v, jnp.zeros(20))
    assert jnp.all(state.values >= 0)
    p = built(ls.nystrom_preconditioner(KEY, 20, 0.1), a)
    assert np.linalg.eigvalsh((p + p.T) / 2).min() > 0


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_nystrom_preconditioner_saves_iterations_in_float32_at_any_scale(scale):
    values = np.concatenate([np.geomspace(1e3, 3, 20), np.linspace(0.5, 1, 80)])
    a, b = (scale * symmetric(0, values)).astype(np.float32), vector(1, 100).astype(np.float32)
    plain = solve_dense(ls.cg(tol=1e-4, maxiter=1000), a, b)[1]
    solver = ls.cg(tol=1e-4, preconditioner=ls.nystrom_preconditioner(KEY, 30))
    x, info = solve_dense(solver, a, b)
    assert info.residual < 1e-3 and abs(info.residual - residual(a, x, b)) < 1e-4
    # Building takes 30, all at once; what is left has its eigenvalues within a factor of a few.
    assert info.iterations - 30 < plain.iterations / 3


@pytest.mark.parametrize("seed", range(2))
def test_a_sketch_kept_from_a_near_matrix_serves(seed):
    values = np.concatenate([np.geomspace(1e3, 3, 20), np.linspace(0.5, 1, 80)])
    a, b = symmetric(seed, values), vector(1, 100)
    root = np.eye(100) + 0.02 * symmetric(seed + 9, np.linspace(-1, 1, 100))
    near = root @ a @ root.T
    builder = ls.nystrom_preconditioner(KEY, 30)

    @jit
    def both(near):
        state = builder.build(lambda v: a @ v, jnp.zeros(100))
        kept = ls.prebuilt(builder, state)
        return ls.cg(tol=1e-8, maxiter=1000, preconditioner=kept)(lambda v: near @ v, b)

    x, info = both(near)
    plain = solve_dense(ls.cg(tol=1e-8, maxiter=1000), near, b)[1]
    assert info.iterations < plain.iterations / 2  # all of them its own
    assert error(x, np.linalg.solve(near, b)) < 1e-6


@pytest.mark.parametrize("solve", [ls.cg, ls.gmres])
def test_products_that_build_are_counted(solve):
    a, b = symmetric(0, np.geomspace(1, 100, 30)), vector(1, 30)
    solver = solve(maxiter=3, tol=0, preconditioner=ls.jacobi(KEY, 5))
    _, info = solve_dense(solver, a, b)
    assert info.iterations == 3 + 5


def test_preconditioners_take_pytrees_and_batches():
    n, b = 9, vector(1, 9)
    split = lambda v: {"one": v[:2], "two": [v[2:8].reshape(3, 2), v[8]]}
    join = lambda t: jnp.concatenate([t["one"], t["two"][0].ravel(), t["two"][1][None]])
    matrices = np.stack([symmetric(s, np.linspace(1, 3 + s, n)) for s in range(3)])
    for p in (ls.jacobi(KEY), ls.nystrom_preconditioner(KEY, 4, 0.1)):

        def one(a, p=p):
            state = p.build(lambda t: split(a @ join(t)), split(jnp.zeros(n)))
            return join(p.apply(state, split(jnp.asarray(b))))

        together = jit(jax.vmap(one))(matrices)
        expected = np.stack([built(p, a) @ b for a in matrices])
        # Sums in another order, condition 5.
        assert error(together, expected) < 1e-12


# ---------------------------------------------------------------------------- refusals


def test_refusals():
    with pytest.raises(ValueError, match="jacobi: `probes` must be an integer >= 2; got 1"):
        ls.jacobi(KEY, probes=1)
    with pytest.raises(ValueError, match="`rank` must be an integer >= 1; got 0"):
        ls.nystrom_preconditioner(KEY, 0)
    with pytest.raises(ValueError, match="`damping` must be a finite number, positive; got 0"):
        ls.nystrom(KEY, 3, 0.0)
    with pytest.raises(ValueError, match="positive; got"):
        ls.nystrom_preconditioner(KEY, 3, tail="damping")
    with pytest.raises(ValueError, match="`sketch` must be one of 'gaussian', 'coordinates'"):
        ls.nystrom(KEY, 3, 0.1, sketch="rows")  # pyright: ignore
    with pytest.raises(ValueError, match="`rank` must be at most the number of parameters, 3"):
        ls.nystrom(KEY, 4, 0.1)(lambda v: v, jnp.ones(3))
    with pytest.raises(TypeError, match="prebuilt: `preconditioner` must have functions"):
        ls.prebuilt(hj.linsolve.cg(), ())  # pyright: ignore
