"""Gated dense is its formula, under every transformation, and refuses what it cannot do."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from hyperjax.kernels import _gated_dense as module
from hyperjax.kernels import gated_dense

# float64 sums of at most 784 products of numbers of order one, in another order.
EXACT = 1e-12


def draw(shape, dtype=jnp.float64, seed=0, rows=True):
    """x, weight, response, gate, bias, response bias; a gate per row, or one for all."""
    n, wide, out = shape
    rng = np.random.default_rng(seed)
    make = lambda *s: jnp.asarray(rng.normal(size=s), dtype)
    scale = wide**-0.5
    gate = make(n, out) if rows else make(out)
    return (
        make(n, wide),
        scale * make(wide, out),
        scale * make(wide, out),
        gate,
        make(out),
        make(out),
    )


def call(x, w, v, s, b, c, implementation: Any = "auto"):
    return gated_dense(x, w, v, s, bias=b, response_bias=c, implementation=implementation)


def formula(x, w, v, s, b, c):
    return (x @ w + b) + s * (x @ v + c)


@pytest.mark.parametrize("rows", [True, False], ids=["gate per row", "one gate"])
@pytest.mark.parametrize("shape", module.SHAPES.values(), ids=module.SHAPES)
def test_is_the_formula(shape, rows):
    args = draw(shape, rows=rows)
    expected = formula(*map(np.asarray, args))
    for implementation in ("auto", "xla"):
        assert (
            problems.error(jax.jit(partial(call, implementation=implementation))(*args), expected)
            < EXACT
        )
    x, w, v, s, b, _ = map(np.asarray, args)
    assert problems.error(gated_dense(*args[:4]), x @ w + s * (x @ v)) < EXACT
    assert problems.error(gated_dense(*args[:4], bias=args[4]), x @ w + b + s * (x @ v)) < EXACT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_type_and_error_of_small_floats(dtype):
    args = draw(module.SHAPES["ragged"], dtype)
    y = call(*args)
    assert y.dtype == dtype
    expected = formula(*[np.asarray(a, np.float64) for a in args])
    # Two sums of products that XLA accumulates in float32 at least, then a few roundings of numbers
    # of order one.
    assert problems.error(np.asarray(y, np.float64), expected) < 2 * float(jnp.finfo(dtype).eps)


def test_gradients_are_those_of_finite_differences():
    f = lambda *args: jnp.mean(jnp.sin(call(*args)))
    check_grads(f, draw(module.SHAPES["odd"]), order=2, modes=("fwd", "rev"))


def test_vmap_over_gates_is_a_loop():
    x, w, v, _, b, c = draw(module.SHAPES["odd"])
    gates = draw((4, 1, 3), seed=1)[3]
    together = jax.vmap(call, (None, None, None, 0, None, None))(x, w, v, gates, b, c)
    each = jnp.stack([call(x, w, v, s, b, c) for s in gates])
    assert problems.error(together, each) < EXACT
    # A gate per row by broadcasting is one by vmap over rows.
    gate = draw(module.SHAPES["odd"], seed=2)[3]
    rows = jax.vmap(call, (0, None, None, 0, None, None))(x, w, v, gate, b, c)
    assert problems.error(rows, call(x, w, v, gate, b, c)) < EXACT


def test_more_axes_and_rows_of_biases():
    x, w, v, s, b, c = draw(module.SHAPES["odd"])
    both = s + b[None], s * c[None]
    rows = call(x, w, v, s, *both)
    expected = formula(*map(np.asarray, (x, w, v, s, *both)))
    assert problems.error(rows, expected) < EXACT
    # [7, 2, in] with one gate for each of the 7.
    deep = jnp.stack([x, 2 * x], axis=1)
    got = call(deep, w, v, s[:, None], b, c)
    assert problems.error(got[:, 1], call(2 * x, w, v, s, b, c)) < EXACT


def test_members_on_eight_devices():
    args = draw((8, 5, 3), seed=3)
    f = lambda *args: jnp.sin(call(*args))
    specs = tuple(PartitionSpec("rows") if k in (0, 3) else PartitionSpec() for k in range(6))
    split = jax.shard_map(
        f, mesh=problems.mesh("rows"), in_specs=specs, out_specs=PartitionSpec("rows")
    )
    slope = lambda f: jax.jit(jax.value_and_grad(lambda *a: jnp.mean(f(*a)), tuple(range(6))))
    assert problems.error(slope(split)(*args), slope(f)(*args)) < EXACT


def test_nan_stays_in_its_row():
    x, w, v, s, b, c = draw(module.SHAPES["ragged"])
    clean = np.delete(np.asarray(call(x, w, v, s, b, c)), 5, axis=0)
    for bad in (
        call(x.at[5, 0].set(jnp.nan), w, v, s, b, c),
        call(x, w, v, s.at[5].set(jnp.inf), b, c),
    ):
        assert not np.all(np.isfinite(bad[5]))
        np.testing.assert_array_equal(np.delete(np.asarray(bad), 5, axis=0), clean)


def test_refusals_name_the_argument():
    x, w, v, s, b, c = draw(module.SHAPES["odd"])
    refused = {
        r"`implementation` is 'triton', expected \('auto', 'xla', 'pallas', 'int": lambda: call(
            x, w, v, s, b, c, "triton"
        ),
        r"`x` and `weight` have shapes \(7, 3\) and \(5, 3\)": lambda: call(
            x[:, :3], w, v, s, b, c
        ),
        r"`response` has shape \(4, 3\), expected that of `weight`": lambda: call(
            x, w, v[:4], s, b, c
        ),
        r"`gate` has shape \(6, 3\), expected \(3,\) or \(7, 3\)": lambda: call(
            x, w, v, s[:6], b, c
        ),
        r"`response_bias` has shape \(2,\), expected \(3,\)": lambda: call(x, w, v, s, b, c[:2]),
        "`gate` is float32, expected the dtype of `x`, float64": lambda: call(
            x, w, v, s.astype(jnp.float32), b, c
        ),
    }
    for message, wrong in refused.items():
        with pytest.raises(ValueError, match=f"gated_dense: {message}"):
            wrong()
