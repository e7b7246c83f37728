"""Linear solves: right, honest about how they went, and differentiable to any order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_systems import residual, solve_dense, symmetric, vector
from problems import error, jit

import hyperjax as hj

# ------------------------------------------------------------------------- what cg finds


@pytest.mark.parametrize("size", [100_000, 1_000_000])
def test_cg_in_float32_is_right_at_any_size(size):
    # Eigenvalues in [1, 2]: |x - A^-1 b| <= |b - A x|, and |A^-1 b| >= |b| / 2, so that a relative
    # residual r bounds the relative error by 2 r.
    diagonal = np.random.default_rng(0).uniform(1.0, 2.0, size).astype(np.float32)
    b = vector(1, size).astype(np.float32)
    tol = 1e-5
    x, info = jit(lambda b: hj.linsolve.cg(tol=tol)(lambda v: diagonal * v, b))(b)
    exact = b.astype(np.float64) / diagonal
    # By the residual of the recurrence it has reached `tol`; rounding adds a few eps.
    bound = 2 * (tol + 8 * np.finfo(np.float32).eps)
    assert np.linalg.norm(x - exact) <= bound * np.linalg.norm(exact)
    assert info.residual <= bound / 2
    # Chebyshev: 2 ((sqrt 2 - 1) / (sqrt 2 + 1))^k, 0.172^k, falls below 1e-5 / sqrt 2 at k = 8.
    assert info.iterations <= 8


@pytest.mark.parametrize("b_scale", [1e-6, 1e6])
@pytest.mark.parametrize("a_scale", [1e-6, 1e6])
def test_cg_does_not_depend_on_units(a_scale, b_scale):
    # float32, where a fixed threshold anywhere would show at once.
    a = symmetric(0, np.linspace(1, 30, 40)).astype(np.float32)
    b = vector(1, 40).astype(np.float32)
    solver = hj.linsolve.cg(maxiter=12, tol=1e-6)
    plain, info = solve_dense(solver, a, b)
    scaled, again = solve_dense(solver, np.float32(a_scale) * a, np.float32(b_scale) * b)
    assert again.iterations == info.iterations
    # Twelve steps in float32: the scales are not powers of two, so a few eps each.
    assert error(scaled * (a_scale / b_scale), plain) < 1e-5
    assert error(again.residual, info.residual) < 1e-3
    assert error(again.curvature / a_scale, info.curvature) < 1e-5


def test_cg_takes_pytrees():
    a, b = symmetric(0, np.linspace(1, 5, 7)), vector(1, 7)
    split = lambda v: {"one": v[:3], "two": [v[3:6].reshape(3, 1), v[6]]}
    join = lambda t: jnp.concatenate([t["one"], t["two"][0].ravel(), t["two"][1][None]])
    x, _ = hj.linsolve.cg(tol=1e-12)(lambda t: split(a @ join(t)), split(jnp.asarray(b)))
    assert error(join(x), np.linalg.solve(a, b)) < 1e-11


def test_cg_cut_short_is_the_optimum_of_its_krylov_space():
    # Among all x in span {b, A b, ..., A^(k-1) b}, cg has the least error in the A-norm. Found here
    # by dense least squares in an orthonormal basis of that space.
    a, b = symmetric(0, np.linspace(1, 10, 30)), vector(1, 30)
    root = np.linalg.cholesky(a).T  # |root e| is the A-norm of e
    exact = np.linalg.solve(a, b)
    basis = b[:, None] / np.linalg.norm(b)
    for k in range(1, 9):
        coefficients = np.linalg.lstsq(root @ basis, root @ exact, rcond=None)[0]
        # tol=0: nothing else ends it. Residuals fall all along here, so the best is the last.
        x, info = solve_dense(hj.linsolve.cg(maxiter=k, tol=0), a, b)
        assert info.iterations == k
        assert error(x, basis @ coefficients) < 1e-10
        new = a @ basis[:, -1]
        new -= basis @ (basis.T @ new)
        basis = np.column_stack([basis, new / np.linalg.norm(new)])


def test_cg_damps():
    a, b = symmetric(0, np.linspace(0.1, 3, 20)), vector(1, 20)
    x, info = solve_dense(hj.linsolve.cg(tol=1e-12, damping=0.7), a, b)
    assert error(x, np.linalg.solve(a + 0.7 * np.eye(20), b)) < 1e-11
    assert info.curvature > 0.8  # of the damped matrix, as documented


def test_damping_makes_an_indefinite_matrix_solvable():
    a, b = symmetric(0, np.linspace(-1, 3, 20)), vector(1, 20)
    x, info = solve_dense(hj.linsolve.cg(tol=1e-12, damping=1.5), a, b)
    assert error(x, np.linalg.solve(a + 1.5 * np.eye(20), b)) < 1e-11
    assert info.curvature > 0


def test_zero_right_hand_side_has_a_zero_solution():
    a = jnp.asarray(symmetric(0, np.linspace(1, 2, 5)))
    for solver in (hj.linsolve.cg(), hj.linsolve.neumann(10, 0.5)):
        x, info = solver(lambda v: a @ v, jnp.zeros(5))
        assert not jnp.any(x)
        assert info.residual == 0
        assert info.curvature == jnp.inf  # no direction was looked at


# ------------------------------------------------------------- where cg is not at home


@pytest.mark.parametrize("seed", range(5))
def test_cg_stops_at_negative_curvature(seed):
    a = symmetric(seed, np.concatenate([[-1.0, -0.1], np.linspace(0.5, 5, 18)]))
    b = vector(seed, 20)
    x, info = solve_dense(hj.linsolve.cg(maxiter=100, tol=1e-10), a, b)
    assert info.curvature <= 0
    assert info.iterations < 100
    assert info.residual <= 1
    assert error(info.residual, residual(a, x, b)) < 1e-12


def test_cg_returns_its_last_iterate_where_all_curvature_is_positive():
    # Residuals rise and fall, from the start above that of x = 0, while errors only fall.
    a, b = symmetric(0, np.geomspace(1e-3, 1, 30)), vector(1, 30)
    textbook = textbook_residuals(a, b, 12)
    assert max(textbook) > 1 and np.any(np.diff(textbook) > 0)
    exact, errors = np.linalg.solve(a, b), []
    for k in (1, 4, 8, 12):
        x, info = solve_dense(hj.linsolve.cg(maxiter=k, tol=0), a, b)
        assert error(info.residual, textbook[k - 1]) < 1e-9
        errors.append(error(x, exact))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5


@pytest.mark.parametrize("seed", range(5))
def test_cg_returns_the_smallest_residual_where_it_met_negative_curvature(seed):
    a = symmetric(seed, np.concatenate([[-1e-2], np.geomspace(1e-3, 1, 30)]))
    b = vector(seed, 31)
    x, info = solve_dense(hj.linsolve.cg(maxiter=60, tol=0), a, b)
    assert info.curvature <= 0
    usable = textbook_residuals(a, b, int(info.iterations) - 1)
    assert max(usable) > 1
    assert error(residual(a, x, b), min([1.0, *usable])) < 1e-9


def textbook_residuals(a, b, steps) -> list[float]:
    x, r, p = np.zeros_like(b), b.copy(), b.copy()
    norms = []
    for _ in range(steps):
        rate = r @ r / (p @ a @ p)
        x, new = x + rate * p, r - rate * a @ p
        p, r = new + (new @ new) / (r @ r) * p, new
        norms.append(np.linalg.norm(r) / np.linalg.norm(b))
    return norms


def test_cg_in_float32_reports_the_true_residual():
    # Condition 1e4: the residual of the recurrence falls below 1e-6, the true one stays above
    # 1e-4. The report is the true one, up to the rounding of one product.
    a = symmetric(0, np.geomspace(1e-4, 1, 100)).astype(np.float32)
    b = vector(1, 100).astype(np.float32)
    x, info = solve_dense(hj.linsolve.cg(maxiter=2000, tol=1e-6), a, b)
    assert info.iterations < 2000  # it thinks that it has converged
    assert residual(a, x, b) > 1e-5
    assert error(info.residual, residual(a, x, b)) < 0.2


def test_cg_with_a_nan_matrix_returns_zero():
    x, info = hj.linsolve.cg()(lambda v: v * jnp.nan, jnp.ones(3))
    assert not jnp.any(x)
    assert not info.residual <= 1  # nothing is claimed


def test_vmapped_cg_stops_row_by_row():
    # One row converges at once, one slowly, one meets negative curvature, one has nothing to do.
    matrices = np.stack(
        [
            np.eye(12),
            symmetric(0, np.geomspace(1, 100, 12)),
            symmetric(1, np.linspace(-1, 1, 12)),
            symmetric(2, np.linspace(1, 2, 12)),
        ]
    )
    b = np.stack([vector(s, 12) for s in range(4)])
    b[3] = 0
    solver = hj.linsolve.cg(maxiter=50, tol=1e-9)
    together = jit(jax.vmap(lambda a, b: solver(lambda v: a @ v, b)))(matrices, b)
    alone = [solve_dense(solver, a, c) for a, c in zip(matrices, b, strict=True)]
    x, info = jax.tree.map(lambda *rows: np.stack(rows), *alone)
    assert info.iterations[0] == 1 and info.iterations[1] > 5 and info.iterations[3] == 0
    # Batched products are summed in another order, which the slow row amplifies by its condition:
    # after 13 products its residual is 4e-11 in the batch and 2e-10 alone. The tolerance of 1e-9
    # lies between those and the 4e-6 before, so that rounding does not decide the count.
    np.testing.assert_array_equal(together[1].iterations, info.iterations)
    np.testing.assert_allclose(together[0], x, rtol=1e-9, atol=1e-12)
    # What is left of a residual at convergence is rounding.
    np.testing.assert_allclose(together[1].residual, info.residual, rtol=1e-9, atol=1e-9)


def test_info_agrees_with_dense_linear_algebra():
    a, b = symmetric(0, np.linspace(1, 10, 25)), vector(1, 25)
    for solver in (hj.linsolve.cg(maxiter=6, tol=0), hj.linsolve.neumann(6, 0.1)):
        x, info = solve_dense(solver, a, b)
        assert info.iterations == 6 and jnp.asarray(info.iterations).dtype == jnp.int32
        assert error(info.residual, residual(a, x, b)) < 1e-12
        # A Rayleigh quotient of something, hence no less than the least eigenvalue.
        assert 1 - 1e-12 <= info.curvature <= 10
    _, info = solve_dense(hj.linsolve.cg(maxiter=1, tol=0), a, b)  # the first direction is b
    assert error(info.curvature, b @ a @ b / (b @ b)) < 1e-12


# ----------------------------------------------------------------------------- neumann


def test_neumann_is_its_series():
    a, b = symmetric(0, np.linspace(0.5, 1.5, 10)), vector(1, 10)
    step = np.eye(10) - 0.8 * a
    expected = 0.8 * sum(np.linalg.matrix_power(step, i) @ b for i in range(7))
    x, info = solve_dense(hj.linsolve.neumann(7, 0.8), a, b)
    assert error(x, expected) < 1e-14
    # b - A x = (I - scale A)^terms b
    left = np.linalg.norm(np.linalg.matrix_power(step, 7) @ b) / np.linalg.norm(b)
    assert error(info.residual, left) < 1e-13
    assert error(info.residual, residual(a, x, b)) < 1e-13


def test_neumann_reports_that_it_diverges():
    a, b = symmetric(0, np.linspace(1, 3, 10)), vector(1, 10)
    _, info = solve_dense(hj.linsolve.neumann(50, 0.8), a, b)  # 0.8 > 2 / 3
    assert info.residual > 1


def test_neumann_can_be_exact():
    # A residual of zero before the last term has no curvature, and nothing is divided by it.
    x, info = hj.linsolve.neumann(5, 0.5)(lambda v: 2 * v, jnp.ones(3))
    assert jnp.all(x == 0.5)
    assert info.residual == 0
    assert info.curvature == 2


# ------------------------------------------------------------------------ linear_solve


def lu(matvec, b, x0=None):
    """A direct solve of any matrix, as a user may pass: dense, from products with unit vectors."""
    a = jax.vmap(matvec, out_axes=1)(jnp.eye(b.size))
    x = jnp.linalg.solve(a, b)
    zero = jnp.zeros(())
    return x, hj.SolveInfo(jnp.asarray(b.size, jnp.int32), zero, zero + jnp.inf)


def nonsymmetric(t):
    rng = np.random.default_rng(0)
    base, slope = 4 * np.eye(4) + rng.normal(size=(4, 4)), rng.normal(size=(4, 4))
    return base + jnp.sin(t) * slope


def definite(t):
    root = nonsymmetric(t)
    return root @ root.T


DERIVATIVES = {
    "forward": jax.jacfwd,
    "reverse": jax.jacrev,
    "forward over reverse": lambda f: jax.jacfwd(jax.jacrev(f)),
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
}
CG = hj.linsolve.cg(tol=1e-14)


@pytest.mark.parametrize(
    ("solver", "name"),
    [*((lu, name) for name in DERIVATIVES), *((CG, name) for name in list(DERIVATIVES)[:4])],
    ids=lambda x: x if isinstance(x, str) else "lu" if x is lu else "cg",
)
def test_linear_solve_has_the_derivatives_of_the_solution(solver, name):
    # The matrix enters through a closure, the right-hand side through the argument. cg needs it
    # symmetric; any other solve does not.
    derivative, matrix = DERIVATIVES[name], nonsymmetric if solver is lu else definite
    b = lambda t: jnp.asarray([1.0, -2.0, 0.5, 3.0]) * jnp.cos(t)

    def ours(t):
        a = matrix(t)
        return hj.linsolve.linear_solve(solver, lambda v: a @ v, b(t))[0]

    dense = lambda t: jnp.linalg.solve(matrix(t), b(t))
    assert error(jit(derivative(ours))(0.4), jit(derivative(dense))(0.4)) < 1e-10


def test_linear_solve_under_vmap_of_grad():
    weights = jnp.arange(4.0)

    def ours(t):
        a = nonsymmetric(t)
        return weights @ hj.linsolve.linear_solve(lu, lambda v: a @ v, weights + t)[0]

    dense = lambda t: weights @ jnp.linalg.solve(nonsymmetric(t), weights + t)
    t = jnp.linspace(0, 1, 5)
    assert error(jit(jax.vmap(jax.grad(ours)))(t), jit(jax.vmap(jax.grad(dense)))(t)) < 1e-12


def test_info_has_no_derivative():
    def report(t):
        return hj.linsolve.linear_solve(
            hj.linsolve.cg(maxiter=2), lambda v: definite(t) @ v, jnp.ones(4)
        )[1].residual

    assert jax.grad(report)(0.3) == 0
    assert jax.jvp(report, (0.3,), (1.0,))[1] == 0
