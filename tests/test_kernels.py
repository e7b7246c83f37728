"""An op equals its reference: values, derivatives, transformations, and what it refuses."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from hyperjax.kernels import _op_template as template

# One row per op: the public function and its module.
OPS = {"scale_rows": (template.scale_rows, template)}
DTYPES = ("float32", "bfloat16", "float64")
# Units in the last place of the result: the same products, rounded once or twice.
ULPS = 2

op_rows = pytest.mark.parametrize(("op", "module"), OPS.values(), ids=OPS)


def cases(*dtypes):
    """Every op on every one of its shapes, in each of these dtypes."""
    rows = [
        pytest.param(op, module, shape, dtype, id=f"{name}-{shape_name}-{dtype}")
        for name, (op, module) in OPS.items()
        for shape_name, shape in module.SHAPES.items()
        for dtype in dtypes
    ]
    return pytest.mark.parametrize(("op", "module", "shape", "dtype"), rows)


def draw(shape, dtype, batch=(), seed=0) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 2)
    x = jax.random.normal(keys[0], (*batch, *shape), dtype)
    return x, jax.random.normal(keys[1], (*batch, shape[0]), dtype)


def assert_same(actual: Any, expected: Any) -> None:
    def compare(a: jax.Array, b: jax.Array) -> None:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        rtol = ULPS * float(jnp.finfo(b.dtype).eps)
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=rtol, atol=rtol)

    jax.tree.map(compare, actual, expected)


def bend(f):
    """A scalar with a curvature everywhere, so that a wrong second derivative cannot hide."""
    return lambda *args: jnp.mean(jnp.sin(f(*args).astype(jnp.float64)))


@partial(jax.jit, static_argnums=0)
def derivatives(f, args, tangents):
    """Forward and reverse, then products with the Hessian taken either way around."""
    grad = jax.grad(f, (0, 1))
    return {
        "jvp": jax.jvp(f, args, tangents)[1],
        "grad": grad(*args),
        "reverse over reverse": jax.vjp(grad, *args)[1](tangents),
        "forward over reverse": jax.jvp(grad, args, tangents)[1],
    }


@cases(*DTYPES)
@pytest.mark.parametrize("implementation", ["auto", "xla", "interpret"])
def test_value(op, module, shape, dtype, implementation):
    args = draw(shape, dtype)
    f = partial(op, implementation=implementation)
    assert_same(f(*args), module.reference(*args))
    assert_same(jax.jit(f)(*args), module.reference(*args))


@cases("float32", "bfloat16")
def test_derivatives(op, module, shape, dtype):
    args, tangents = draw(shape, dtype), draw(shape, dtype, seed=1)
    f = bend(partial(op, implementation="interpret"))
    assert_same(derivatives(f, args, tangents), derivatives(bend(module.reference), args, tangents))


@op_rows
def test_gradient_is_that_of_finite_differences(op, module):
    check_grads(
        partial(op, implementation="interpret"),
        draw(module.SHAPES["odd"], jnp.float64),
        order=2,
        modes=("fwd", "rev"),
    )


@cases("float32", "bfloat16")
def test_vmap(op, module, shape, dtype):
    def results(f, x, scale):
        return {
            "both": jax.vmap(f)(x, scale),
            "one": jax.vmap(f, (0, None))(x, scale[0]),
            "grad": jax.vmap(jax.grad(bend(f), (0, 1)))(x, scale),
        }

    args = draw(shape, dtype, batch=(3,))
    run = jax.jit(results, static_argnums=0)
    f = partial(op, implementation="interpret")
    assert_same(run(f, *args), run(module.reference, *args))


@op_rows
def test_named_implementation_is_the_one_that_ran(op, module):
    args = draw(module.SHAPES["odd"], jnp.float32)
    programs = {
        name: str(jax.make_jaxpr(partial(op, implementation=name))(*args))
        for name in ("auto", "xla", "interpret")
    }
    assert {name: "pallas_call" in text for name, text in programs.items()} == {
        "auto": False,
        "xla": False,
        "interpret": True,
    }
    assert "interpret=True" in programs["interpret"]


@cases("float32", "bfloat16")  # TPUs have no float64
def test_compiled_body_lowers_for_tpu(op, module, shape, dtype):
    # `op` asks for the machine's own backend, so lowering for another starts one level below.
    compiled = jax.jit(partial(module._pallas, interpret=False))
    traced = compiled.trace(*draw(shape, dtype))
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


@op_rows
def test_nan_stays_in_its_row(op, module):
    x, scale = draw(module.SHAPES["ragged"], jnp.float32)
    bad = 5
    for args in ((x.at[bad, 0].set(jnp.nan), scale), (x, scale.at[bad].set(jnp.inf))):
        out = op(*args, implementation="interpret")
        np.testing.assert_array_equal(out, module.reference(*args))
        clean = np.delete(np.asarray(out), bad, axis=0)
        np.testing.assert_array_equal(clean, np.delete(module.reference(x, scale), bad, axis=0))


@op_rows
def test_refusals_name_the_argument(op, module):
    x, scale = draw((4, 3), jnp.float32)
    with pytest.raises(ValueError, match="`implementation` is 'triton', expected"):
        op(x, scale, implementation="triton")
    with pytest.raises(ValueError, match=r"`scale` have shapes \(4, 3\) and \(3,\), expected"):
        op(x, scale[:3])
    with pytest.raises(ValueError, match="`scale` is bfloat16, expected the dtype of `x`, float32"):
        op(x, scale.astype(jnp.bfloat16))


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="the compiled kernel runs here")
@op_rows
def test_compiled_kernel_raises_where_it_cannot_run(op, module):
    with pytest.raises(ValueError, match=r"backend '\w+', expected one of \('tpu',\)"):
        op(*draw((4, 3), jnp.float32), implementation="pallas")
