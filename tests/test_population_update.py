"""A step of a whole population in one pass: the kernels are the formulas, in every layout."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import population_steps as steps
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads
from population_steps import LOW, VARIANTS, apply, converge, draw, ulps

from hyperjax.kernels import _population_cases as cases
from hyperjax.kernels import _population_launch as launch
from hyperjax.kernels import _population_rules as rules
from hyperjax.kernels import _population_update as op

# The same formulas, compiled apart: products and sums may be contracted, or not, and the norm of a
# member is summed in another order.
ULPS = 8


def layout(how: str, args, options):
    """`population_apply` by one of the bodies, which the backend would choose."""
    rates, params, grads, moments = args
    plan, table, seeds, streams = op._prepare(
        "test", steps.rule(rates), "params", params, grads, moments, options.get("max_norm"), None,
        options.get("master"), options.get("seed"),
    )  # fmt: skip
    run = partial(launch.step, plan, how)
    return run, (table, seeds, streams), partial(rules.reference, plan)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["interpret", "interpret tpu"])
@pytest.mark.parametrize("shape", op.SHAPES.values(), ids=op.SHAPES)
def test_every_shape(shape, how, dtype):
    """What the interpreter does not find written is NaN, so nothing is left out."""
    run, args, reference = layout(how, *draw("clip", shape, dtype))
    assert ulps(run(*args), reference(*args)) <= ULPS


@pytest.mark.parametrize("how", ["interpret", "interpret tpu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant, how):
    dtype = "bfloat16" if variant in LOW else "float32"
    run, args, reference = layout(how, *draw(variant, (5, 1100), dtype))
    actual, expected = run(*args), reference(*args)
    if variant == "stochastic":
        # A difference in the last bit moves a number across the random threshold once in 2^16.
        far = np.asarray(actual["params"] != expected["params"])
        assert far.mean() < 1e-3
        actual["params"] = jnp.where(far, expected["params"], actual["params"])
    assert ulps(actual, expected) <= ULPS


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_are_what_is_to_be_added(variant):
    dtype = "bfloat16" if variant in LOW else "float32"
    args, options = draw(variant, (3, 40), dtype)
    stepped = apply("xla", args, options)
    updated = steps.call(op.population_update, "interpret", args, options)
    assert updated.updates.dtype == jnp.float32
    assert ulps(updated[1:], stepped[1:]) <= ULPS
    added = (args[1] + updated.updates).astype(dtype)
    if variant in LOW:
        np.testing.assert_array_equal(added, stepped.params)
    else:
        assert ulps(added, stepped.params) <= ULPS


def test_the_named_implementation_is_the_one_that_runs():
    args, options = draw("adamw", (7, 3))
    found = {
        name: steps.programs(partial(apply, name, options=options), args)
        for name in ("auto", "xla", "interpret")
    }
    assert found == {"auto": [], "xla": [], "interpret": ["population_step (1, 7)"]}
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="backend 'cpu', expected one of"):
            apply("pallas", args, options)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    ("platform", "how", "call"),
    [("cuda", "gpu", "__gpu$xla.gpu.triton"), ("tpu", "tpu", "tpu_custom_call")],
)
@pytest.mark.parametrize("variant", ["momentum", "clip", *LOW])
def test_compiled_bodies_lower(variant, platform, how, call):
    dtype = "bfloat16" if variant in LOW else "float32"
    run, args, _ = layout(how, *draw(variant, (17, 1100), dtype))
    mean = partial(launch.converge, run.args[0], how, args[0], args[1], jnp.arange(17) > 2)
    for f, operands in ((run, args), (mean, args[2:])):
        text = jax.jit(f).trace(*operands).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("custom_call @") == 1
        assert call in text or "triton" in text  # by another name in later versions of JAX
        assert ("output_operand_alias" in text) == (f is run)  # in place


# ------------------------------------------------------------------------------------ derivatives


def slope(implementation, options, args):
    """A scalar with a curvature everywhere."""
    out = apply(implementation, args, options)
    return sum(jnp.sin(x.astype(float)).mean() for x in jax.tree.leaves(out))


@partial(jax.jit, static_argnums=0)
def derivatives(f, args, tangents):
    grad = jax.grad(f)
    return {
        "jvp": jax.jvp(f, (args,), (tangents,))[1],
        "grad": grad(args),
        "reverse over reverse": jax.vjp(grad, args)[1](tangents)[0],
        "forward over reverse": jax.jvp(grad, (args,), (tangents,))[1],
    }


@pytest.mark.parametrize("variant", ["momentum", "clip"])
@pytest.mark.parametrize("shape", ["one", "odd"])
def test_derivatives(variant, shape):
    args, options = draw(variant, op.SHAPES[shape], "float64")
    tangents, _ = draw(variant, op.SHAPES[shape], "float64", seed=1)
    kernel, xla = (partial(slope, name, options) for name in ("interpret", "xla"))
    # The second derivative of a quotient loses digits where the moment is small.
    assert ulps(derivatives(kernel, args, tangents), derivatives(xla, args, tangents)) < 1e4


def test_gradient_is_that_of_finite_differences():
    args, options = draw("clip", (2, 3), "float64")
    f = lambda args: apply("interpret", args, options)[:2]
    # A central difference of step h is off by h^2 times a third derivative, here up to 1e4, and by
    # 1e-16 / h times the value.
    check_grads(f, (args,), order=2, modes=("fwd", "rev"), eps=1e-6, rtol=1e-5, atol=1e-7)


def test_rounding_has_derivative_one():
    args, options = draw("stochastic", (2, 30), "bfloat16")
    rate = lambda name, options: (
        lambda lr: apply(
            name, ({**args[0], "learning_rate": lr}, *args[1:]), options
        ).params.astype(float)
    )
    exact = jax.jacfwd(rate("xla", {}))(args[0]["learning_rate"])
    for name in ("xla", "interpret"):
        found = jax.jacfwd(rate(name, options))(args[0]["learning_rate"])
        np.testing.assert_allclose(found, exact, rtol=1e-6)
        assert np.abs(np.asarray(found)).max() > 0.01


# -------------------------------------------------------------------------- vmap, jit, shard_map


@pytest.mark.parametrize("variant", VARIANTS)
def test_members_under_vmap_are_one_pass(variant):
    dtype = "bfloat16" if variant in LOW else "float32"
    args, options = draw(variant, (2, 3, 1100), dtype)
    each = lambda args, options: apply("interpret", args, options)
    both = jax.vmap(jax.vmap(each))
    assert steps.programs(both, args, options) == ["population_step (2, 6)"]
    stacked = jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), (args, options))
    expected = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), each(*stacked))
    # The same kernel on the same numbers, but for norms, which are not summed by it.
    assert ulps(both(args, options), expected) <= (ULPS if variant == "clip" else 0)


def test_vmap_over_rates_only():
    args, options = draw("adamw", (4, 30))
    rates, *rest = args
    rest = [jax.tree.map(lambda x: x[0], x) for x in rest]
    each = lambda name, rates: apply(name, (rates, *rest), options)
    actual = jax.vmap(partial(each, "interpret"))(rates)
    assert ulps(actual, jax.vmap(partial(each, "xla"))(rates)) <= ULPS
    slopes = [jax.vmap(jax.grad(lambda r, n=n: each(n, r).params.sum()))(rates)
              for n in ("interpret", "xla")]  # fmt: skip
    assert ulps(*slopes) <= 100


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4,), ("members",), axis_types=(AxisType.Auto,))


def test_shard_map_over_members():
    args, options = draw("clip", (8, 33))
    f = lambda args, options: apply("xla", args, options)
    spec = PartitionSpec("members")
    split = jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=spec, out_specs=spec))
    assert ulps(split(args, options), f(args, options)) <= ULPS


def test_shard_map_over_members_by_the_kernel():
    """Without the checks, which JAX's interpreter of kernels does not pass by itself."""
    args, options = draw("clip", (8, 33))
    f = lambda args, options: apply("interpret", args, options)
    spec = PartitionSpec("members")
    split = jax.shard_map(f, mesh=mesh(), in_specs=spec, out_specs=spec, check_vma=False)
    assert ulps(jax.jit(split)(args, options), f(args, options)) <= ULPS


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(("platform", "how"), [("cuda", "gpu"), ("tpu", "tpu")])
def test_shard_map_with_checks_lowers(platform, how):
    run, (table, seeds, streams), _ = layout(how, *draw("adamw", (8, 256)))
    spec = PartitionSpec("members")
    # Numbers are the same for all devices, streams are not: the kernel wants them alike.
    split = jax.shard_map(
        lambda table, streams: run(table, seeds, streams),
        mesh=mesh(), in_specs=(PartitionSpec(), spec), out_specs=spec,
    )  # fmt: skip
    traced = jax.jit(split).trace(table[:2], streams)
    assert "custom_call" in traced.lower(lowering_platforms=(platform,)).as_text()


# ------------------------------------------------------------------------------- diverged members


@pytest.mark.parametrize("where", ["rate", "params", "grads", "moment"])
def test_nan_stays_in_its_row(where):
    (rates, params, grads, moments), options = draw("clip", (6, 1100))
    clean = apply("interpret", (rates, params, grads, moments), options)
    bad = {
        "rate": ({**rates, "learning_rate": rates["learning_rate"].at[2].set(jnp.inf)},
                 params, grads, moments),
        "params": (rates, params.at[2, 7].set(jnp.nan), grads, moments),
        "grads": (rates, params, grads.at[2, 7].set(jnp.nan), moments),
        "moment": (rates, params, grads, (moments[0].at[2, 7].set(jnp.nan), moments[1])),
    }[where]  # fmt: skip
    out = apply("interpret", bad, options)
    assert not np.isfinite(out.params[2]).all()
    others = np.arange(6) != 2
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[others], y[others]), out, clean)


def test_traffic_is_that_of_the_arrays():
    """Of every case without a stream that is only partly needed: all that goes in and comes out."""
    shape = (3, 1000)
    for name, case in cases.CASES.items():
        dtype = case.dtypes[0]
        arrays = case.make(jax.random.key(0), shape, dtype)
        out = jax.eval_shape(partial(case.run, "xla"), *arrays)
        rates, params, _, _, master = arrays
        moved = sum(x.nbytes for x in jax.tree.leaves(arrays)) - rates.nbytes
        moved += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(out) if x.ndim == 2)
        if master is not None:
            moved -= params.nbytes  # its master is read in its place
        if name == "adamw clip":
            moved += params.nbytes  # the norm
        table = case.traffic(shape, dtype).bytes - moved
        assert 0 < table <= 4 * 3 * 12, name


def test_refusals_name_the_argument():
    args, options = draw("adamw", (4, 3))
    rates, params, grads, moments = args
    low = params.astype(jnp.bfloat16)
    adam = steps.rule(rates)
    seed = jnp.zeros(2, jnp.int32)
    refused = [
        (adam, (params[0, 0], grads, moments), {}, "`params` is float32 .., expected a float"),
        (adam, (params, grads[:, :2], moments), {}, r"`grads` has shape \(4, 2\), expected that"),
        (adam, (params, grads, moments[:1]), {}, "`moments` has 1 entries, expected"),
        (adam._replace(b1=jnp.ones(3)), (params, grads, moments), {},
         r"`b1` has shape \(3,\), expected a scalar or one number per member, \(4,\)"),
        (adam, (params, grads, moments), {"seed": seed}, "for params in float32, expected bfloat"),
        (adam, (low, grads, moments), {"seed": seed[:1]}, r"`seed` is int32 \(1,\), expected"),
        (adam, (low, grads, moments), {"seed": seed, "master": params}, "`seed` and `master` are"),
        (adam, (low, grads, moments), {"master": low}, "`master` is bfloat16, expected float32"),
        (adam, (params, grads, moments), {"norm": seed}, "`norm` is given without `max_norm`"),
        (adam, (params, grads, moments), {"implementation": "cuda"}, "`implementation` is 'cuda'"),
    ]  # fmt: skip
    for rule, arrays, more, message in refused:
        with pytest.raises(ValueError, match=message):
            op.population_apply(rule, *arrays, **more)
    with pytest.raises(TypeError, match="`rule` is dict, expected Sgd or Adam"):
        op.population_apply(rates, params, grads, moments)
    with pytest.raises(ValueError, match=r"`keep` have shapes \(4, 3\) and \(3,\), expected"):
        converge("xla", args, jnp.ones(3, bool), options)
