"""Step and mean in one pass, without those that diverged, and rounding below float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import population_steps as steps
import pytest
from population_steps import LOW, VARIANTS, apply, converge, draw, ulps

from hyperjax import _fan_out
from hyperjax.kernels import _population_launch as launch
from hyperjax.kernels import _population_rules as rules
from hyperjax.kernels import _population_update as op

ULPS = 8
MANY = jnp.arange(7) != 3  # members to keep


@pytest.mark.parametrize("variant", ["momentum", "clip", "master"])
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_it_is_the_step_and_then_the_mean(variant, implementation):
    dtype = "bfloat16" if variant in LOW else "float32"
    args, options = draw(variant, (7, 1100), dtype)
    found = converge(implementation, args, MANY, options)
    stepped = apply("xla", args, options)
    assert ulps(found.moments, stepped.moments) <= ULPS
    np.testing.assert_array_equal(found.sound, MANY)
    mean = _fan_out.average(stepped.params if stepped.master is None else stepped.master, MANY)
    assert (variant == "master") is (found.master is not None)
    if found.master is not None:
        assert ulps(found.master, mean) <= ULPS
        mean = found.master.astype(dtype)
    assert ulps(found.params, mean) <= ULPS


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (9, 2051)])
@pytest.mark.parametrize("how", ["interpret", "interpret tpu"])
@pytest.mark.parametrize("variant", ["adamw", "stochastic"])
def test_every_layout(variant, how, shape):
    dtype = "bfloat16" if variant in LOW else "float32"
    (rates, params, grads, moments), options = draw(variant, shape, dtype)
    prepared = op._prepare("test", steps.rule(rates), "params", params, grads, moments,
                           None, None, None, options.get("seed"))  # fmt: skip
    plan, table, seeds, streams = prepared
    kept = jnp.arange(shape[0]) >= shape[0] // 3
    actual, sound = launch.converge(plan, how, table, seeds, kept, streams)
    expected, _ = rules.reference_converge(plan, table, seeds, kept, streams)
    assert sound.all() and sound.shape == shape[:1]
    far = actual["params"] != expected["params"]
    if variant == "stochastic":  # see the same in test_population_update
        assert far.mean() < 2e-3
        actual["params"] = jnp.where(far, expected["params"], actual["params"])
    assert ulps(actual, expected) <= ULPS


def test_equal_rows_stay_what_they_are():
    (_, params, grads, moments), options = draw("momentum", (5, 300))
    row = lambda x: jnp.broadcast_to(x[0], x.shape)
    rates = {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.1}
    args = (rates, row(params), row(grads), (row(moments[0]),))
    for implementation in ("xla", "interpret"):
        found = converge(implementation, args, jnp.ones(5, bool), options)
        np.testing.assert_array_equal(found.params, row(found.params))
        assert ulps(found.params, apply("xla", args, options).params) <= ULPS


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_a_member_that_goes_in_this_step_touches_nobody(implementation):
    """Not even with those of its entries that are finite."""
    (rates, params, grads, moments), options = draw("adamw", (7, 300))
    lost = grads.at[5, 4].set(jnp.inf)
    found = converge(implementation, (rates, params, lost, moments), MANY, options)
    sound = MANY & (jnp.arange(7) != 5)
    np.testing.assert_array_equal(found.sound, sound)
    expected = converge(implementation, (rates, params, grads, moments), sound, options)
    assert ulps(found.params, expected.params) <= ULPS
    assert np.isfinite(found.params).all()


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_members_that_are_not_kept_may_be_anything(implementation):
    (rates, params, grads, moments), options = draw("adamw", (7, 30))
    bad = (rates, params.at[3].set(jnp.nan), grads.at[3].set(jnp.inf), moments)
    found = converge(implementation, bad, MANY, options)
    clean = converge(implementation, (rates, params, grads, moments), MANY, options)
    np.testing.assert_array_equal(found.params, clean.params)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_with_nobody_left_everybody_keeps_their_own(implementation):
    args, options = draw("adamw", (4, 30))
    found = converge(implementation, args, jnp.zeros(4, bool), options)
    assert ulps(found.params, apply("xla", args, options).params) <= ULPS
    assert not found.sound.any()


def test_one_pass_under_jit_and_vmap():
    args, options = draw("adamw", (2, 3, 30))
    keep = jnp.array([[True, True, False], [False, True, True]])
    run = lambda name: jax.jit(
        jax.vmap(lambda args, keep: converge(name, args, keep, options), (0, 0))
    )
    # The step and its mean; then, as vmap takes every branch, again without who diverged in it, and
    # the step alone.
    kernels = steps.programs(run("interpret"), args, keep)
    assert kernels == ["population_converge (2, 1)"] * 2 + ["population_step (1, 6)"]
    assert ulps(run("interpret")(args, keep), run("xla")(args, keep)) <= ULPS


def test_derivative():
    args, options = draw("adamw", (3, 4), "float64")
    keep = jnp.array([True, False, True])
    f = lambda name, args: jnp.sin(converge(name, args, keep, options).params).sum()
    grads = {name: jax.jit(jax.grad(partial(f, name)))(args) for name in ("interpret", "xla")}
    assert ulps(grads["interpret"], grads["xla"]) < 1e3
    step = lambda args: apply("xla", args, options).params
    mean = lambda args: jnp.sin(_fan_out.average(step(args), keep)).sum()
    assert ulps(grads["xla"], jax.grad(mean)(args)) < 1e3
    # Gradients of a member that is left out do nothing.
    assert not np.asarray(grads["xla"][2][1]).any()


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("when", ["before", "in this step"])
def test_a_lost_member_takes_no_derivative_with_it(implementation, when):
    """That in a rate which all share is what it is without the member."""
    (rates, params, grads, moments), options = draw("adamw", (5, 12), "float64")
    alive = jnp.arange(5) != 2
    keep = alive if when == "before" else jnp.ones(5, bool)

    def mean(rate, members, keep):
        rates, params, grads, moments = members
        args = ({**rates, "learning_rate": rate}, params, grads, moments)
        return jnp.sin(converge(implementation, args, keep, options).params[0]).sum()

    slope = lambda members, keep: jax.grad(mean)(0.1, members, keep)
    found = slope((rates, params, grads.at[2, 3].set(jnp.nan), moments), keep)
    rest = jax.tree.map(lambda x: x[alive], (rates, params, grads, moments))
    np.testing.assert_allclose(found, slope(rest, jnp.ones(4, bool)), rtol=1e-12)


def test_a_mean_of_nobody_has_the_derivative_of_the_step():
    args, options = draw("adamw", (3, 4), "float64")
    total = lambda out: jnp.sin(out.params).sum()
    found = jax.grad(lambda args: total(converge("xla", args, jnp.zeros(3, bool), options)))(args)
    expected = jax.grad(lambda args: total(apply("xla", args, options)))(args)
    assert ulps(found, expected) < 100


# ------------------------------------------------------------------------------------- rounding


def rounded(x: jax.Array, seed: tuple[int, int] = (1, 2)) -> jax.Array:
    words = tuple(jnp.int32(s) for s in seed)
    return rules.stochastic(x, jnp.arange(x.size, dtype=jnp.int32), words)


def test_stochastic_rounding_goes_to_a_neighbour(rng):
    x = jnp.asarray(rng.standard_normal(4000) * 10.0 ** rng.integers(-30, 30, 4000), jnp.float32)
    found = np.asarray(rounded(x))
    low = np.asarray(x).view(np.int32) & -0x10000
    down, up = low.view(np.float32), (low + 0x10000).view(np.float32)
    assert ((found == down) | (found == up)).all()
    np.testing.assert_array_equal(found, jnp.asarray(found).astype(jnp.bfloat16).astype(float))


def test_what_needs_no_rounding_is_not_rounded():
    x = jnp.array([0.0, -0.0, 1.0, -2.5, 3e38, jnp.inf, -jnp.inf, jnp.nan], jnp.bfloat16)
    np.testing.assert_array_equal(rounded(x.astype(jnp.float32)), x.astype(jnp.float32))


@pytest.mark.parametrize("part", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("seed", [(0, 0), (1, 2), (-5, 7)])
def test_stochastic_rounding_is_right_on_average(part, seed):
    """Up as often as the number is near its upper neighbour: within five standard deviations."""
    size = 2**16
    gap = 2.0**-7  # between numbers in bfloat16 from 1 to 2
    up = np.asarray(rounded(jnp.full(size, 1 + part * gap, jnp.float32), seed)) > 1
    deviation = 5 * np.sqrt(part * (1 - part) / size)
    assert abs(up.mean() - part) < deviation + 2.0**-16
    # Nor does it know what it did a place before.
    both = (up[1:] & up[:-1]).mean()
    assert abs(both - part**2) < 5 * np.sqrt(part**2 * (1 - part**2) / size) + 4 * deviation * part


def test_seeds_differ():
    x = jnp.full(4000, 1 + 2.0**-8, jnp.float32)
    a, b, c = (np.asarray(rounded(x, s)) > 1 for s in ((1, 2), (1, 3), (2, 2)))
    for other in (b, c):
        assert abs((a == other).mean() - 0.5) < 5 * 0.5 / np.sqrt(4000)


@pytest.mark.parametrize("variant", LOW)
def test_steps_too_small_for_bfloat16_are_not_lost(variant):
    """A hundred steps of a thousandth of a last place: nearest rounding would not move at all."""
    params = jnp.ones((2, 500), jnp.bfloat16)
    grads = jnp.full(params.shape, -1.0, jnp.bfloat16)
    rate = 2.0**-7 / 1000
    nearest = op.population_apply(rules.Sgd(rate), params, grads, ())
    np.testing.assert_array_equal(nearest.params, params)

    def step(state, words):
        params, master = state
        seed = words if variant == "stochastic" else None
        out = op.population_apply(rules.Sgd(rate), params, grads, (), master=master, seed=seed)
        return (out.params, out.master), None

    master = params.astype(jnp.float32) if variant == "master" else None
    words = jax.random.bits(jax.random.key(0), (100, 2, 2), jnp.uint32)
    (params, master), _ = jax.lax.scan(step, (params, master), words)
    if variant == "master":
        assert master is not None
        np.testing.assert_allclose(master, 1 + 100 * rate, rtol=1e-5)
    else:
        moved = np.asarray(params, np.float64) - 1
        # 100 chances in a thousand each to go up by one place.
        deviation = 2.0**-7 * np.sqrt(0.1 * 0.9 / moved.size)
        assert abs(moved.mean() - 100 * rate) < 5 * deviation


def test_all_variants_are_here():
    assert set(LOW) < set(VARIANTS)
