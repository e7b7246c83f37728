"""Every solve against dense linear algebra in numpy; for cg and the Neumann series see
test_linsolve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from linear_systems import residual, solve_dense, symmetric, vector
from problems import error, jit, mesh

from hyperjax import linsolve as ls

KEY = jax.random.key(0)
N = 12
B = vector(1, N)
DEFINITE = symmetric(0, np.linspace(0.5, 5, N))
INDEFINITE = symmetric(0, np.concatenate([[-3.0, -0.4], np.linspace(0.5, 5, N - 2)]))
# The map of a fixed point: I - J with |J| < 1, far from symmetric.
JACOBIAN = np.random.default_rng(2).normal(size=(N, N))
NONSYMMETRIC = np.eye(N) - 0.7 * JACOBIAN / np.linalg.norm(JACOBIAN, 2)
# Complex pairs of eigenvalues: no multiple of A comes near the identity.
ROTATING = np.kron(np.eye(N // 2), [[0.1, 1.0], [-1.0, 0.1]]) * np.linspace(1, 2, N)[:, None]

GMRES = ls.gmres(tol=1e-13)

EXACT = {
    "cg, jacobi": (ls.cg(tol=1e-13, preconditioner=ls.jacobi(KEY)), DEFINITE),
    "cg, nystrom": (ls.cg(tol=1e-13, preconditioner=ls.nystrom_preconditioner(KEY, 3)), DEFINITE),
    "minres": (ls.minres(tol=1e-13), INDEFINITE),
    "gmres": (GMRES, NONSYMMETRIC),
    "dense, cholesky": (ls.dense(chunk=5), DEFINITE),
    "dense, lu": (ls.dense(factor="lu"), NONSYMMETRIC),
    "neumann": (ls.neumann(400), DEFINITE),
    "nystrom": (ls.nystrom(KEY, N, 1e-13), DEFINITE),
}
SOLVES = pytest.mark.parametrize("name", EXACT)


def split(v):
    return {"one": v[:3], "two": [v[3:11].reshape(4, 2), v[11]]}


def join(tree):
    return jnp.concatenate([tree["one"], tree["two"][0].ravel(), tree["two"][1][None]])


@SOLVES
def test_rows_of_a_batch_of_pytrees_against_dense_linear_algebra(name):
    # Beside one another: a system, nothing to solve, another system, one that is NaN.
    solver, a = EXACT[name]
    matrices = np.stack([a, a, a + 0.1 * np.eye(N), a * np.nan])
    b = np.stack([B, np.zeros(N), vector(3, N), B])
    solve = lambda a, b: solver(lambda t: split(a @ join(t)), split(b))
    x, info = jit(jax.vmap(lambda a, b: (lambda x, i: (join(x), i))(*solve(a, b))))(matrices, b)
    assert x.dtype == jnp.float64 and info.iterations.dtype == jnp.int32
    for row in (0, 2):
        # Condition at most 12; residuals of 1e-13 at least.
        assert error(x[row], np.linalg.solve(matrices[row], b[row])) < 1e-11
        assert info.residual[row] < 1e-12
    assert not np.any(x[1]) and info.residual[1] == 0
    assert not info.residual[3] <= 1  # nothing is claimed


@SOLVES
def test_in_float32_at_another_scale(name):
    solver, a = EXACT[name]
    if name == "nystrom":
        solver = ls.nystrom(KEY, N, 1e-5 * 1e-4)  # the damping is in the units of A
    a32, b32 = (1e-4 * a).astype(np.float32), (1e5 * B).astype(np.float32)
    x, info = solve_dense(solver, a32, b32)
    assert x.dtype == jnp.float32 and info.residual.dtype == jnp.float32
    exact = np.linalg.solve(a32.astype(np.float64), b32.astype(np.float64))
    # Condition 12 times a hundred roundings of 6e-8; the damping of nystrom is 2e-5 of A's least.
    assert error(x, exact) < 1e-4
    # The report is right up to the rounding of one product.
    assert abs(info.residual - residual(a32, x, b32)) < 3e-6


@pytest.mark.parametrize("name", ["cg, jacobi", "minres", "gmres", "dense, lu", "nystrom"])
def test_derivatives_inside_shard_map(name):
    # A is a sum over devices, as that of a loss over sharded data is; vectors are replicated.
    solver, a = EXACT[name]
    parts = np.stack([a * (i + 1) / 36 for i in range(8)])

    def value(b, part):
        product = lambda v: jax.lax.psum(part[0] @ v, "data")
        x, info = ls.linear_solve(solver, product, b)
        return jnp.sum(jnp.sin(x)), info.residual

    spec = PartitionSpec
    run = jax.shard_map(
        jax.grad(value, has_aux=True),
        mesh=mesh("data"),
        in_specs=(spec(), spec("data")),
        out_specs=spec(),
    )
    slope, left = jit(run)(B, parts)
    x = np.linalg.solve(a, B)
    assert error(slope, np.linalg.solve(a.T, np.cos(x))) < 1e-11
    assert left < 1e-12


@pytest.mark.parametrize("name", ["cg, jacobi", "minres", "gmres", "dense, lu"])
def test_derivatives_are_those_of_the_solution(name):
    solver, a = EXACT[name]
    a, b = jnp.asarray(a), jnp.asarray(B)
    # Symmetric where A is, so that it stays what the solve is for.
    slope = jnp.asarray(symmetric(5, np.linspace(-0.1, 0.1, N)))

    def ours(t):
        matrix = a + jnp.sin(t) * slope
        x, _ = ls.linear_solve(solver, lambda v: matrix @ v, b * jnp.cos(t))
        return jnp.sin(x).sum()

    dense = lambda t: jnp.sin(jnp.linalg.solve(a + jnp.sin(t) * slope, b * jnp.cos(t))).sum()
    # A gradient and its tangent, and a tangent.
    second = lambda f: lambda t: (*jax.jvp(jax.grad(f), (t,), (1.0,)), jax.jvp(f, (t,), (1.0,))[1])
    # A Hessian comes from four solves, each at 1e-11.
    assert error(jnp.stack(jit(second(ours))(0.4)), jnp.stack(jit(second(dense))(0.4))) < 1e-8


# -------------------------------------------------------------------------- warm starts

STARTED = {
    "cg": (lambda tol: ls.cg(tol=tol), symmetric(0, np.geomspace(1e-2, 1, 60))),
    "minres": (
        lambda tol: ls.minres(tol=tol),
        symmetric(0, np.concatenate([-np.geomspace(1e-2, 1, 10), np.geomspace(1e-2, 1, 50)])),
    ),
    "gmres": (
        lambda tol: ls.gmres(tol=tol, restart=60),
        np.eye(60) - 0.95 * symmetric(0, np.linspace(-1, 1, 60)) + 0.05 * symmetric(1, [1] * 60),
    ),
}


@pytest.mark.parametrize("name", STARTED)
def test_a_near_start_saves_products(name):
    make, a = STARTED[name]
    b = vector(1, 60)
    # The solution of a system whose matrix is off by 5 % in norm, relative to its smallest entry.
    off = vector(7, 60)
    near = np.linalg.solve(a, b + 0.05 * off * np.linalg.norm(b) / np.linalg.norm(off))
    run = jit(lambda b, x0: make(1e-3)(lambda v: a @ v, b, x0))
    cold, warm = run(b, np.zeros(60))[1], run(b, near)[1]
    assert cold.residual < 2e-3 and warm.residual < 2e-3
    # Both pay one product for the residual of the start.
    assert warm.iterations < cold.iterations - 2


@pytest.mark.parametrize("name", STARTED)
def test_a_start_worse_than_zero_is_dropped(name):
    make, a = STARTED[name]
    b = vector(1, 60)
    run = jit(lambda b, x0: make(1e-3)(lambda v: a @ v, b, x0))
    bad, none = run(b, 1e3 * vector(9, 60)), run(b, np.zeros(60))
    assert error(bad[0], none[0]) < 1e-12
    assert bad[1].iterations == none[1].iterations


def test_neumann_goes_on_where_it_ended():
    half, whole = ls.neumann(5, 0.2), ls.neumann(10, 0.2)
    product = lambda v: jnp.asarray(DEFINITE) @ v
    x, _ = half(product, jnp.asarray(B))
    x, info = half(product, jnp.asarray(B), x)
    expected, reference = whole(product, jnp.asarray(B))
    assert error(x, expected) < 1e-14
    assert error(info.residual, reference.residual) < 1e-12
    assert info.iterations == 5 + 1  # one for the residual of the start


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("start", [-1.0, 0.9])
@pytest.mark.parametrize("name", ["identity", "cg", "minres", "gmres"])
def test_derivatives_know_nothing_of_the_start(name, start, mode):
    # Two products are far from enough, so that a start in the tangent system would show.
    solver = ls.identity(0.1) if name == "identity" else getattr(ls, name)(maxiter=2, tol=0)
    x0 = start * np.linalg.solve(DEFINITE, B)
    weights = vector(3, N)

    def value(t, x0):
        scaled = lambda v: jnp.exp(t) * (DEFINITE @ v)
        return weights @ ls.linear_solve(solver, scaled, jnp.asarray(B) * (1 + t), x0)[0]

    # d (A^-1 b) = A^-1 (db - dA x), with A^-1 by the solve from zero and x as it is.
    x = ls.linear_solve(solver, lambda v: DEFINITE @ v, jnp.asarray(B), x0)[0]
    if mode is jax.jacrev:
        u = solver(lambda v: DEFINITE @ v, jnp.asarray(weights))[0]
        expected = u @ (B - DEFINITE @ x)
    else:
        expected = weights @ solver(lambda v: DEFINITE @ v, B - DEFINITE @ x)[0]
    assert error(jit(mode(value))(0.0, x0), expected) < 1e-11


def test_one_shot_drops_a_start_that_is_worse_than_none():
    far = 30 * vector(4, N)
    x, info = jit(lambda b, x0: ls.identity(0.1)(lambda v: DEFINITE @ v, b, x0))(B, far)
    assert error(x, 0.1 * B) < 1e-14
    assert info.iterations == 1


@pytest.mark.parametrize("solver", [ls.cg, ls.minres, ls.gmres, ls.dense])
def test_damping_may_be_traced(solver):
    x = jit(lambda d: solver(damping=d)(lambda v: DEFINITE @ v, jnp.asarray(B))[0])(0.7)
    assert error(x, np.linalg.solve(DEFINITE + 0.7 * np.eye(N), B)) < 1e-5  # the default tolerance


@pytest.mark.parametrize(
    ("solver", "others"), [(ls.identity(), []), (ls.dense(), np.diag(DEFINITE))]
)
def test_curvature_does_not_overflow(solver, others):
    # x is of the order 1e25 and its square beyond float32.
    a = (1e-25 * DEFINITE).astype(np.float32)
    b = B.astype(np.float32)
    x, info = solver(lambda v: a @ v, jnp.asarray(b))
    x = np.asarray(x, float)
    along = x @ DEFINITE @ x / (x @ x)
    assert error(info.curvature, 1e-25 * min([along, *others])) < 1e-4


def test_one_shot_corrects_its_start():
    x0 = 0.1 * B
    x, info = jit(lambda b, x0: ls.identity(0.1)(lambda v: DEFINITE @ v, b, x0))(B, x0)
    assert error(x, x0 + 0.1 * (B - DEFINITE @ x0)) < 1e-14
    assert error(info.residual, residual(DEFINITE, x, B)) < 1e-12
    assert info.iterations == 1
    x, info = solve_dense(ls.identity(), DEFINITE, B)
    assert error(x, B) < 1e-15 and info.iterations == 0
    assert error(info.curvature, B @ DEFINITE @ B / (B @ B)) < 1e-12


# ------------------------------------------------------------------------------- minres


@pytest.mark.parametrize("k", [2, 7])
def test_minres_has_the_smallest_residual_in_its_space(k):
    a = symmetric(0, np.concatenate([np.linspace(-2, -0.2, 10), np.linspace(0.3, 4, 20)]))
    b = vector(1, 30)
    krylov = [b]
    for _ in range(k - 1):
        krylov.append(a @ krylov[-1])
    basis, _ = np.linalg.qr(np.stack(krylov, 1))
    best = basis @ np.linalg.lstsq(a @ basis, b, rcond=None)[0]
    x, info = solve_dense(ls.minres(maxiter=k, tol=0), a, b)
    assert info.iterations == k
    assert error(x, best) < 1e-9
    assert error(info.residual, residual(a, best, b)) < 1e-10


def test_minres_meets_the_negative_curvature_that_cg_stops_at():
    a, b = symmetric(3, np.concatenate([[-0.5], np.linspace(0.5, 5, 19)])), vector(3, 20)
    stopped = solve_dense(ls.cg(tol=1e-10), a, b)
    assert stopped[1].curvature < 0 and stopped[1].residual > 1e-3
    x, info = solve_dense(ls.minres(tol=1e-10), a, b)
    assert -0.5 <= info.curvature < 0
    assert error(x, np.linalg.solve(a, b)) < 1e-8


def test_the_curvature_of_minres_is_that_of_lanczos_vectors_and_residuals():
    a, b = INDEFINITE, B
    _, info = solve_dense(ls.minres(maxiter=3, tol=0), a, b)
    krylov = np.stack([np.linalg.matrix_power(a, i) @ b for i in range(3)], 1)
    lanczos = np.linalg.qr(krylov)[0]
    fit = lambda k: b - a @ krylov[:, :k] @ np.linalg.lstsq(a @ krylov[:, :k], b, rcond=None)[0]
    seen = [v @ a @ v / (v @ v) for v in [*lanczos.T, *(fit(k) for k in range(3))]]
    assert error(info.curvature, min(seen)) < 1e-9


def test_minres_on_a_singular_system_reports_what_is_left():
    a = symmetric(0, [0.0, -1.0, 1.0, 2.0, 3.0])
    null = np.linalg.eigh(a)[1][:, 1]
    b = vector(1, 5)
    _, info = solve_dense(ls.minres(tol=1e-10), a, b)
    # What lies in the null space cannot be reached by any x.
    assert error(info.residual, abs(null @ b) / np.linalg.norm(b)) < 1e-6
    _, info = solve_dense(ls.minres(tol=1e-10), a, a @ b)
    assert info.residual < 1e-9


def test_damping_is_added_to_the_diagonal():
    for solver, a in (
        (ls.minres(tol=1e-13, damping=0.7), INDEFINITE),
        (ls.dense(damping=0.7), DEFINITE),
    ):
        x, info = solve_dense(solver, a, B)
        assert error(x, np.linalg.solve(a + 0.7 * np.eye(N), B)) < 1e-11
        # That of A itself, so that damping shows.
        assert error(info.residual, residual(a, x, B)) < 1e-10
        assert info.residual > 0.1


# -------------------------------------------------------------------------------- gmres


@pytest.mark.parametrize("k", [1, 6])
def test_gmres_has_the_smallest_residual_in_its_space(k):
    krylov = np.stack([np.linalg.matrix_power(ROTATING, i) @ B for i in range(k)], 1)
    basis, _ = np.linalg.qr(krylov)
    best = basis @ np.linalg.lstsq(ROTATING @ basis, B, rcond=None)[0]
    x, info = solve_dense(ls.gmres(maxiter=k, tol=0), ROTATING, B)
    assert info.iterations == k
    assert error(x, best) < 1e-10
    assert error(info.residual, residual(ROTATING, best, B)) < 1e-10


def test_gmres_that_stands_still_ends_and_says_so():
    # A cyclic shift: the Krylov space holds nothing of the solution before it is full.
    shift = np.roll(np.eye(N), 1, axis=0)
    b = np.eye(N)[0]
    x, info = solve_dense(ls.gmres(restart=N - 1, maxiter=1000), shift, b)
    assert info.residual == 1 and info.iterations < 2 * N
    x, info = solve_dense(ls.gmres(restart=N), shift, b)
    assert info.residual < 1e-12 and error(x, shift.T @ b) < 1e-12


@pytest.mark.parametrize("maxiter", [5, 6])
def test_gmres_never_spends_more_than_it_may(maxiter):
    # Cycles of 4 products, and one for the residual: 5 leave no room for more.
    _, info = solve_dense(ls.gmres(restart=4, maxiter=maxiter, tol=0), NONSYMMETRIC, B)
    assert info.iterations == {5: 4, 6: 6}[maxiter]


def test_gmres_goes_on_after_a_restart():
    x, info = solve_dense(ls.gmres(restart=4, tol=1e-12, maxiter=200), NONSYMMETRIC, B)
    assert error(x, np.linalg.solve(NONSYMMETRIC, B)) < 1e-11 and info.iterations > 10
    assert error(info.residual, residual(NONSYMMETRIC, x, B)) < 1e-2


def test_gmres_on_a_singular_matrix_keeps_what_it_had():
    singular = np.zeros((3, 3))
    singular[0, 1] = 1.0
    x, info = solve_dense(ls.gmres(), singular, np.array([0.0, 1.0, 1.0]))
    assert np.all(np.isfinite(x)) and info.residual <= 1


# -------------------------------------------------------------------------------- dense


def test_cholesky_reports_what_is_not_positive_definite():
    x, info = solve_dense(ls.dense(), INDEFINITE, B)
    assert np.all(np.isnan(x)) and np.isnan(info.residual)
    x, info = solve_dense(ls.dense(factor="lu"), INDEFINITE, B)
    assert error(x, np.linalg.solve(INDEFINITE, B)) < 1e-12
    # Not symmetric: Cholesky solves another system, and the residual of A shows it.
    _, info = solve_dense(ls.dense(), np.eye(N) + np.triu(np.ones((N, N)), 1), B)
    assert info.residual > 0.1


@pytest.mark.parametrize("first", [0.1, 50.0])
def test_dense_reports_the_smallest_of_the_diagonal_and_the_solution(first):
    # With `first` small the least is on the diagonal, otherwise along the solution.
    a = DEFINITE + 0.0
    a[0] = a[:, 0] = first * np.eye(N)[0]
    b = np.linalg.eigh(DEFINITE[1:, 1:])[1][:, 0]
    b = np.concatenate([[0.0], b])
    _, info = solve_dense(ls.dense(), a, b)
    along, diagonal = b @ a @ b / (b @ b), np.diag(a).min()
    assert (diagonal < along) == (first < 1)
    assert error(info.curvature, min(along, diagonal)) < 1e-12
    assert info.iterations == N


# ------------------------------------------------------------------------------ neumann


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_neumann_finds_its_step(scale):
    a = scale * symmetric(0, np.linspace(0.1, 4, 40))
    b = vector(1, 40)
    x, info = solve_dense(ls.neumann(50), a, b)
    assert info.iterations == 50 + 6
    # The power iterations as they are in the textbook.
    v = b
    for _ in range(6):
        v = a @ (v / np.linalg.norm(v))
    step = 1 / np.linalg.norm(v)
    assert 0.5 / (4 * scale) < step < 2 / (4 * scale)
    power = np.linalg.matrix_power(np.eye(40) - step * a, 50)
    assert error(info.residual, np.linalg.norm(power @ b) / np.linalg.norm(b)) < 1e-10
    assert error(x, np.linalg.solve(a, b - power @ b)) < 1e-10


# ----------------------------------------------------------------------------- adaptive


def test_adaptive_ties_the_tolerance_to_the_stationarity():
    rule = ls.adaptive(lambda tol: ls.cg(tol=tol), ratio=0.5, floor=1e-6, ceiling=1e-1)
    a, b = symmetric(0, np.geomspace(1e-3, 1, 80)), vector(1, 80)
    run = jit(lambda s: rule.at(s)(lambda v: a @ v, b)[1].iterations)
    expected = [int(solve_dense(ls.cg(tol=t), a, b)[1].iterations) for t in (1e-1, 5e-3, 1e-6)]
    assert [run(s) for s in (7.0, 1e-2, 1e-20)] == expected
    assert expected == sorted(set(expected))


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ls.minres(maxiter=0), "minres: `maxiter` must be an integer >= 1; got 0"),
        (lambda: ls.minres(tol=-1.0), "minres: `tol` must be a finite number, >= 0; got -1.0"),
        (lambda: ls.gmres(restart=0), "gmres: `restart` must be an integer >= 1; got 0"),
        (lambda: ls.gmres(damping=float("nan")), "gmres: `damping` must be a finite number"),
        (lambda: ls.dense(factor="qr"), "dense: `factor` must be one of 'cholesky', 'lu'"),  # pyright: ignore
        (lambda: ls.dense(chunk=0), "dense: `chunk` must be an integer >= 1; got 0"),
        (lambda: ls.neumann(3, "best"), "neumann: `scale` must be one of 'auto'; got 'best'"),  # pyright: ignore
        (lambda: ls.neumann(3, 0.0), "neumann: `scale` must be a finite number, positive"),
        (lambda: ls.identity(0.0), "identity: `scale` must be a finite number, positive"),
        (
            lambda: ls.adaptive(lambda tol: ls.cg(tol=tol), floor=0.5),
            "adaptive: `floor` must be at most `ceiling`",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        make()


def test_one_shot_refuses_what_is_no_preconditioner():
    with pytest.raises(TypeError, match="one_shot: `preconditioner` must have functions `build`"):
        ls.one_shot(lambda v: v)  # pyright: ignore
