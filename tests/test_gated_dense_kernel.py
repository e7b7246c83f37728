"""The kernels of gated dense are their formula: values, derivatives, transformations.

The bodies run by XLA ("interpret", the one for GPUs, and "interpret tpu"), with results that begin
as NaN. What is compared is in float64, from the same rounded arguments.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.test_util import check_grads
from problems import error, mesh

from hyperjax.kernels import _contract, gated_dense
from hyperjax.kernels import _gated_dense as module
from hyperjax.kernels._gated_dense_cases import CASES

HOWS = ("interpret", "interpret tpu")
BACKWARDS = ("xla", "kernel")
ALL = tuple(range(6))

shapes = pytest.mark.parametrize("shape", module.SHAPES.values(), ids=module.SHAPES)
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
hows = pytest.mark.parametrize("how", HOWS)
backwards = pytest.mark.parametrize("backward", BACKWARDS)


def draw(shape, dtype="float64", seed=0) -> tuple[jax.Array, ...]:
    """x, W, V, a gate for each row, b, c: the benchmark's arguments."""
    return CASES["forward"].make(jax.random.key(seed), shape, dtype)


def layer(how="interpret", backward="xla", activation=None):
    return partial(module._by_kernel, how, backward, activation)


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def exact(args) -> jax.Array:
    x, w, v, s, b, c = map(jnp.asarray, wide(args))
    return module.reference(x, w, v, s, b, c)


def limit(dtype) -> float:
    """Of |error| / |result|: three roundings to the type, and sums in float32 of some 1,000 terms,
    whose errors add up as the root of their number."""
    return 3 * float(jnp.finfo(dtype).eps) + 30 * float(jnp.finfo("float32").eps)


def bend(f):
    """A scalar with a curvature everywhere, so that a wrong second derivative cannot hide."""
    return lambda *args: jnp.mean(jnp.sin(f(*args)))


@shapes
@dtypes
@hows
def test_value(shape, dtype, how):
    args = draw(shape, dtype)
    got = jax.jit(layer(how))(*args)
    assert got.dtype == dtype
    assert error(wide(got), wide(exact(args))) < limit(dtype)


@shapes
@dtypes
@backwards
def test_gradients(shape, dtype, backward):
    # Of the sum of products with fixed numbers, so that rounding of the value plays no part.
    args, slope = draw(shape, dtype), draw(shape, dtype, seed=1)[3]
    pull = lambda f, args, slope: jax.vjp(f, *args)[1](slope)
    got = jax.jit(partial(pull, layer(backward=backward)))(args, slope)
    assert {g.dtype for g in got} == {jnp.dtype(dtype)}
    expected = pull(module.reference, tuple(map(jnp.asarray, wide(args))), jnp.asarray(wide(slope)))
    for one, other in zip(wide(got), wide(expected), strict=True):
        assert error(one, other) < limit(dtype)


@hows
@backwards
def test_second_derivatives(how, backward):
    args, tangents = draw((37, 5, 19)), draw((37, 5, 19), seed=1)

    def both(f):
        grad = jax.grad(bend(f), ALL)
        return {
            "reverse over reverse": jax.vjp(grad, *args)[1](tangents),
            "forward over reverse": jax.jvp(grad, args, tangents)[1],
        }

    got = jax.jit(partial(both, layer(how, backward, jnp.tanh)))()
    expected = both(partial(module.reference, activation=jnp.tanh))
    assert error(got, expected) < 1e-12  # float64, sums of at most 37 * 19 terms


def test_gradients_are_those_of_finite_differences():
    modes = {"xla": ("fwd", "rev"), "kernel": ("rev",)}
    for backward in BACKWARDS:
        f = layer("interpret", backward, jnp.tanh)
        check_grads(f, draw(module.SHAPES["odd"]), order=2, modes=modes[backward])


def test_forward_mode_of_the_backward_kernels_is_refused():
    args = draw(module.SHAPES["odd"])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(layer(backward="kernel"), args, args)


@pytest.mark.parametrize("given", ["none", "bias", "response bias", "both"])
@pytest.mark.parametrize("rows", ["a row each", "one for all"])
def test_biases_and_gates_for_all_rows(given, rows):
    x, w, v, s, b, c = draw((17, 5, 20))
    s = s if rows == "a row each" else s[0]
    b = b if given in ("bias", "both") else None
    c = c[None] * jnp.ones((17, 1)) if given in ("response bias", "both") else None
    # One gate for each of 17, for two inputs each.
    deep = jnp.stack([x, 2 * x], 1)
    align = lambda r: r if r is None or r.ndim < 2 else r[:, None]
    args = [deep, w, v, align(s), b, align(c)]
    present = tuple(i for i, a in enumerate(args) if a is not None)

    def of(f):
        return jax.grad(lambda *some: bend(f)(*fill(some)), tuple(range(len(present))))

    def fill(some):
        filled = list(args)
        for i, a in zip(present, some, strict=True):
            filled[i] = a
        return filled

    def op(backward, x, w, v, s, b, c):
        return gated_dense(
            x, w, v, s, bias=b, response_bias=c, implementation="interpret", backward=backward
        )

    some = [args[i] for i in present]
    for backward in BACKWARDS:
        f = partial(op, backward)
        assert error(f(*args), module.reference(*args)) < 1e-12
        assert error(jax.jit(of(f))(*some), of(module.reference)(*some)) < 1e-12


# The axes over which x, W, V, s, b and c are mapped.
MAPPED = {
    "members": (0, 0, 0, 0, 0, 0),
    "examples": (0, None, None, 0, None, None),
    "inputs": (0, None, None, None, None, None),
    "gates": (None, None, None, 0, None, None),
    "one matrix": (None, 0, None, None, None, 0),
}


@pytest.mark.parametrize("axes", MAPPED.values(), ids=MAPPED)
@backwards
def test_vmap_is_a_loop(axes, backward):
    each = [draw((6, 5, 3), seed=i) for i in range(4)]
    stacked = [jnp.stack([e[i] for e in each]) for i in ALL]
    args = [a if axis == 0 else a[0] for a, axis in zip(stacked, axes, strict=True)]
    loop = [
        [a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True)] for i in range(4)
    ]
    f = layer("interpret", backward, jnp.tanh)
    reference: Any = partial(module.reference, activation=jnp.tanh)
    values, slopes = jax.jit(
        lambda *a: (jax.vmap(f, axes)(*a), jax.vmap(jax.grad(bend(f), ALL), axes)(*a))
    )(*args)
    assert error(values, jnp.stack([reference(*a) for a in loop])) < 1e-12
    wanted = [jax.grad(bend(reference), ALL)(*a) for a in loop]
    assert error(slopes, tuple(jnp.stack(x) for x in zip(*wanted, strict=True))) < 1e-12
    # And the gradient of the map, where what is shared has the sum.
    total = lambda f: jax.grad(lambda *a: jnp.sum(jnp.sin(jax.vmap(f, axes)(*a))), ALL)
    assert error(jax.jit(total(f))(*args), total(reference)(*args)) < 1e-12


def test_examples_under_vmap_are_rows_of_one_product():
    x, w, v, s, b, c = draw((64, 5, 3))
    one = lambda x, s: layer()(x, w, v, s, b, c)
    text = str(jax.make_jaxpr(jax.vmap(one))(x, s))
    assert text.count("pallas_call") == 1
    assert "f64[64,5]" in text and "f64[64,1,5]" not in text.split("pallas_call")[1]
    # Two axes of examples as well.
    halves = lambda a: jnp.reshape(a, (2, 32, a.shape[-1]))
    got = jax.vmap(jax.vmap(one))(halves(x), halves(s))
    assert error(jnp.reshape(got, (64, 3)), module.reference(x, w, v, s, b, c)) < 1e-12


def test_gradient_of_examples_has_no_matrix_for_each():
    x, w, v, s, b, c = draw((64, 50, 30))
    loss = lambda w, v: jnp.sum(jax.vmap(lambda x, s: layer()(x, w, v, s, b, c))(x, s) ** 2)
    assert "64,50,30" not in str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(w, v))


@hows
@backwards
def test_members_on_eight_devices(how, backward):
    """Without checks of types: JAX 0.10.2 traces a kernel without them and interprets it with them.

    Nothing is shared and no collective is there to be wrong. With checks: `test_kernel_lowering`.
    """
    each = [draw((5, 4, 3), seed=i) for i in range(8)]
    args = [jnp.stack([e[i] for e in each]) for i in ALL]
    value = lambda f: jax.vmap(jax.value_and_grad(bend(f), ALL))
    on = PartitionSpec("members")
    f = value(layer(how, backward))
    split = jax.shard_map(f, mesh=mesh("members"), in_specs=on, out_specs=on, check_vma=False)
    assert error(jax.jit(split)(*args), value(module.reference)(*args)) < 1e-12


@hows
def test_nan_stays_in_its_row(how):
    x, w, v, s, b, c = draw(module.SHAPES["ragged"])
    f = jax.jit(layer(how))
    clean = np.delete(np.asarray(f(x, w, v, s, b, c)), 5, 0)
    for bad in (f(x.at[5, 0].set(jnp.nan), w, v, s, b, c), f(x, w, v, s.at[5].set(jnp.inf), b, c)):
        assert not np.isfinite(bad[5]).any()
        np.testing.assert_array_equal(np.delete(np.asarray(bad), 5, 0), clean)


@hows
@pytest.mark.parametrize("sizes", [(40, 70, 3000), (1, 1, 1), (300, 20, 600)])
def test_contraction_over_more_than_a_tile(how, sizes):
    """Several steps along every axis, the last of them ragged; operands as they are and turned."""
    m, n, k = sizes
    rng = np.random.default_rng(0)
    a, b, row = rng.normal(size=(m, k)), rng.normal(size=(n, k)), rng.normal(size=(1, n))

    def step(a, b):
        p = _contract.dot(a, b, (1, 1), a.dtype)
        return p, 2 * p

    (got,) = _contract.contract(
        step,
        lambda sums, row: (sums[0] * row + sums[1],),
        (_contract.Operand(jnp.asarray(a), "mk"), _contract.Operand(jnp.asarray(b), "nk")),
        (_contract.Operand(jnp.asarray(row), "1n"),),
        sums=2,
        results=1,
        how=how,
    )
    assert error(got, a @ b.T * row + 2 * a @ b.T) < 1e-12


def test_refusals_name_the_argument():
    x, w, v, s, _, _ = draw(module.SHAPES["odd"])
    with pytest.raises(
        ValueError, match=r"gated_dense: `backward` is 'jax', expected one of \('xla'"
    ):
        gated_dense(x, w, v, s, backward="jax")  # pyright: ignore[reportArgumentType]
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match=r"backend 'cpu', expected one of \('gpu', 'tpu'\)"):
            gated_dense(x, w, v, s, implementation="pallas")


def test_an_activation_with_arrays_of_its_own_is_for_xla(monkeypatch):
    x, w, v, s, _, _ = draw(module.SHAPES["odd"], "float32")
    slope = jnp.linspace(0.0, 1.0, 3, dtype=jnp.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(module, "FASTER_ON", ("gpu",))
    bent = lambda y: y * slope[0]
    found = gated_dense(x, w, v, s, activation=bent)
    np.testing.assert_array_equal(found, module.reference(x, w, v, s, activation=bent))
    with pytest.raises(ValueError, match="`activation` closes over arrays"):
        gated_dense(x, w, v, s, activation=bent, implementation="pallas")


def test_nothing_in_nothing_out():
    empty = gated_dense(*(jnp.zeros(s) for s in ((0, 5), (5, 3), (5, 3), (3,))))
    assert empty.shape == (0, 3)
