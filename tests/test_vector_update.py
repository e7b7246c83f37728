"""The vector update is its four formulas, in one pass, under every transformation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.test_util import check_grads
from problems import error, mesh

from hyperjax.kernels import _vector_update as module
from hyperjax.kernels._vector_update import vector_update

HOWS = ("interpret", "interpret tpu")
CASE = module.CASES["conjugate gradients"]

shapes = pytest.mark.parametrize("shape", module.SHAPES.values(), ids=module.SHAPES)
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
hows = pytest.mark.parametrize("how", HOWS)


def draw(shape, dtype="float64", seed=0):
    return CASE.make(jax.random.key(seed), shape, dtype)


def op(how):
    return partial(module._by_kernel, how)


def scalar(f):
    def of(*args):
        x, r, rr, pq = f(*args)
        return jnp.sum(jnp.sin(x) + jnp.cos(r)) + jnp.sin(rr) * pq

    return of


@shapes
@dtypes
@pytest.mark.parametrize("how", [*HOWS, "xla"])
def test_is_the_formulas(shape, dtype, how):
    args = draw(shape, dtype)
    f = partial(vector_update, implementation="xla") if how == "xla" else op(how)
    got = jax.jit(f)(*args)
    assert (got.x.dtype, got.r.dtype, got.rr.dtype, got.pq.dtype) == (
        dtype,
        dtype,
        *["float32"] * 2,
    )
    x, r, p, q, step = (np.asarray(a, np.float64) for a in args)
    # One rounding to the type; the sums are of numbers of the type, in float32.
    once = float(jnp.finfo(dtype).eps)
    assert error(np.asarray(got.x, np.float64), x + step * p) < once
    assert error(np.asarray(got.r, np.float64), r - step * q) < once
    left = np.asarray(got.r, np.float64)
    assert error(np.asarray(got.rr, np.float64), left @ left) < 1e-6
    most = np.abs(p) @ np.abs(q)  # p'q is a sum of both signs
    assert abs(float(got.pq) - p @ q) < 1e-6 * most


@hows
def test_derivatives(how):
    args, tangents = draw((37,)), draw((37,), seed=1)

    def both(f):
        grad = jax.grad(scalar(f), range(5))
        return {
            "jvp": jax.jvp(scalar(f), args, tangents)[1],
            "reverse over reverse": jax.vjp(grad, *args)[1](tangents),
            "forward over reverse": jax.jvp(grad, args, tangents)[1],
        }

    assert error(jax.jit(partial(both, op(how)))(), both(module.reference)) < 1e-12


def test_gradients_are_those_of_finite_differences():
    check_grads(scalar(op("interpret")), draw((7,)), order=2, modes=("fwd", "rev"))


@hows
@pytest.mark.parametrize("steps", ["a step each", "one step"])
def test_vmap_is_a_loop(how, steps):
    each = [draw((300,), seed=i) for i in range(3)]
    args = [jnp.stack([e[i] for e in each]) for i in range(5)]
    axes = (0, 0, 0, 0, 0 if steps == "a step each" else None)
    args[4] = args[4] if steps == "a step each" else args[4][0]
    got = jax.jit(jax.vmap(op(how), axes))(*args)
    pick = lambda i: [a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True)]
    loop = [module.reference(*pick(i)) for i in range(3)]
    assert error(got, jax.tree.map(lambda *x: jnp.stack(x), *loop)) < 1e-12


@hows
def test_members_on_eight_devices(how):
    """Without checks of types: JAX 0.10.2 traces a kernel without them and interprets it with them.

    Nothing is shared and no collective is there to be wrong. With checks: `test_kernel_lowering`.
    """
    each = [draw((40,), seed=i) for i in range(8)]
    args = [jnp.stack([e[i] for e in each]) for i in range(5)]
    f = jax.vmap(jax.grad(scalar(op(how)), range(5)))
    on = PartitionSpec("members")
    split = jax.shard_map(f, mesh=mesh("members"), in_specs=on, out_specs=on, check_vma=False)
    expected = jax.vmap(jax.grad(scalar(module.reference), range(5)))(*args)
    assert error(jax.jit(split)(*args), expected) < 1e-12


@hows
def test_any_shape_and_nan_stays_where_it_was(how):
    flat = draw((3000,))
    args = [a.reshape(30, 100) for a in flat[:4]] + [flat[4]]
    got, clean = jax.jit(op(how))(*args), module.reference(*args)
    assert error(got, clean) < 1e-12
    bad = jax.jit(op(how))(args[0].at[3, 4].set(jnp.nan), *args[1:])
    assert np.isnan(bad.x[3, 4]) and np.isnan(bad.x).sum() == 1
    assert error(tuple(bad[1:]), tuple(got[1:])) == 0


@hows
def test_a_solver_made_of_it_solves(how):
    """The Neumann series and conjugate gradients, written with the op, on a system of 40."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(40, 40)) / 40**0.5
    matrix = jnp.asarray(np.eye(40) + root @ root.T)
    b = jnp.asarray(rng.normal(size=40))
    exact = np.linalg.solve(matrix, b)
    scale = 1 / np.linalg.eigvalsh(matrix)[-1]

    def series(state, _):
        x, r = state
        x, r, _, _ = op(how)(x, r, r, matrix @ r, jnp.asarray(scale))
        return (x, r), None

    def gradients(state, _):
        x, r, p, rr = state
        q = matrix @ p
        x, r, new, _ = op(how)(x, r, p, q, rr / (p @ q))
        return (x, r, r + new / rr * p, new), None

    begin = jnp.zeros(40), b
    (x, _), _ = jax.jit(lambda s: jax.lax.scan(series, s, None, length=200))(begin)
    assert error(x, exact) < 1e-10  # the condition is near 5: 0.8^200
    state = (*begin, b, b @ b)
    (x, *_), _ = jax.jit(lambda s: jax.lax.scan(gradients, s, None, length=30))(state)
    assert error(x, exact) < 1e-10


def test_refusals_name_the_argument():
    x, r, p, q, step = draw((7,), "float32")
    with pytest.raises(ValueError, match=r"`implementation` is 'triton', expected \('auto'"):
        vector_update(x, r, p, q, step, implementation="triton")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"`q` is float32\[6\], expected the shape and dtype of"):
        vector_update(x, r, p, q[:6], step)
    with pytest.raises(ValueError, match=r"`p` is bfloat16\[7\]"):
        vector_update(x, r, p.astype("bfloat16"), q, step)
    with pytest.raises(ValueError, match=r"`step` has shape \(7,\), expected a scalar"):
        vector_update(x, r, p, q, x)
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match=r"backend 'cpu', expected one of \('gpu', 'tpu'\)"):
            vector_update(x, r, p, q, step, implementation="pallas")
