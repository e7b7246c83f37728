"""Spaces: bijectors, distributions and the bookkeeping of scalars."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import error, jit

import hyperjax as hj

RANGES = {
    "loguniform": hj.loguniform(1e-5, 10.0),
    "uniform": hj.uniform(-2.0, 3.0),
    "positive": hj.positive(scale=0.5, low=0.1),
    "real": hj.real(loc=-1.0, scale=2.0),
}


def mixed() -> hj.Space:
    """Vectors, nesting and every kind of range."""
    return hj.space(
        {
            "lr": hj.loguniform(1e-4, 1.0, init=0.1),
            "l2": hj.positive(init=np.asarray([0.5, 1.5, 2.5]), shape=(3,)),
            "aug": {"angle": hj.real(), "mix": hj.uniform(0.0, 1.0, shape=(2, 2))},
        }
    )


# --------------------------------------------------------------------------- bijectors


@pytest.mark.parametrize("name", RANGES)
def test_round_trip_from_raw(name):
    s = hj.space(RANGES[name])
    raw = jnp.linspace(-8, 8, 41)
    # softplus^-1 of a raw value of -8 loses the digits that log(1 - exp(-y)) loses at y = 3e-4.
    assert error(s.unconstrain(s.constrain(raw)), raw) < 1e-11


@pytest.mark.parametrize("name", RANGES)
def test_values_are_strictly_inside(name):
    r = RANGES[name]
    values = hj.space(r).constrain(jnp.linspace(-30, 30, 61))
    assert jnp.all(jnp.isfinite(values))
    assert jnp.all(values > r.low) and jnp.all(values < r.high)
    assert jnp.all(jnp.diff(values) > 0)


def test_far_raw_values_stay_within_the_closed_range():
    # Where the sigmoid saturates the bound itself is reached, never passed.
    for r in RANGES.values():
        values = hj.space(r).constrain(jnp.asarray([-1e3, 1e3]))
        assert jnp.all(jnp.isfinite(values))
        # exp(log bound) is not the bound to the last bit
        slack = 1e-14 if r.scale == "log" else 0.0
        assert jnp.all(values >= r.low * (1 - slack)) and jnp.all(values <= r.high * (1 + slack))


def test_a_large_positive_value_does_not_overflow():
    s = hj.space(hj.positive())
    assert error(s.unconstrain(jnp.asarray(1e6)), 1e6) < 1e-14
    assert error(s.constrain(jnp.asarray(1e6)), 1e6) < 1e-14


@pytest.mark.parametrize("name", RANGES)
def test_constrain_has_a_derivative(name):
    f = hj.space(RANGES[name]).constrain
    for x in (-3.0, 0.0, 2.0):
        # Central differences at 1e-5 of maps with derivatives of order one: 1e-10 in each error.
        difference = (f(jnp.asarray(x + 1e-5)) - f(jnp.asarray(x - 1e-5))) / 2e-5
        slope = jax.grad(f)(jnp.asarray(x))
        assert slope > 0
        assert error(slope, difference) < 1e-6


def test_a_lifted_function_sees_constrained_values():
    space = mixed()
    raw = space.sample(jax.random.key(3))
    seen = space.lift(lambda params, values, batch: params * space.ravel(values) + batch)
    expected = 2.0 * space.ravel(space.constrain(raw)) + 1.0
    assert jnp.array_equal(seen(2.0, raw, 1.0), expected)


def test_init_is_what_was_asked_for():
    s = mixed()
    values = s.constrain(s.init())
    assert error(values["lr"], 0.1) < 1e-14
    assert error(values["l2"], np.asarray([0.5, 1.5, 2.5])) < 1e-14
    assert values["aug"]["mix"].shape == (2, 2)


def test_default_inits_are_the_medians():
    assert error(hj.loguniform(1e-4, 1.0).init, 1e-2) < 1e-14
    assert hj.uniform(-1.0, 3.0).init == 1.0
    assert hj.real(loc=4.0).init == 4.0
    for r in RANGES.values():
        assert abs(hj.space(r).init()) < 1e-14  # raw 0


def test_init_is_strongly_typed_in_the_default_precision():
    for x in jax.tree.leaves(mixed().init()):
        assert x.dtype == jnp.float64 and not x.weak_type
    with jax.enable_x64(False):
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(mixed().init()))


# ------------------------------------------------------------------------- sampling


def distance_to_uniform(u) -> float:
    """Kolmogorov and Smirnov: the largest gap between the empirical distribution and uniform."""
    u = np.sort(np.asarray(u))
    steps = np.arange(len(u) + 1) / len(u)
    return float(max(np.max(steps[1:] - u), np.max(u - steps[:-1])))


DISTRIBUTIONS = {
    "loguniform": lambda v: np.log(v / 1e-5) / np.log(1e6),
    "uniform": lambda v: (v + 2) / 5,
    # raw is standard normal: Phi(softplus^-1((v - low) / scale)), Phi((v - loc) / scale)
    "positive": lambda v: normal(np.log(np.expm1((v - 0.1) / 0.5))),
    "real": lambda v: normal((v + 1) / 2),
}


def normal(x):
    return 0.5 * (1 + np.vectorize(math.erf)(np.asarray(x) / math.sqrt(2)))


@pytest.mark.parametrize("name", RANGES)
def test_samples_have_their_distribution(name):
    s, count = hj.space(RANGES[name]), 4000
    keys = jax.random.split(jax.random.key(0), count)
    values = s.constrain(jax.vmap(s.sample)(keys))
    # sqrt(n) D exceeds 1.95 in one of a thousand samples; the seed is fixed.
    assert distance_to_uniform(DISTRIBUTIONS[name](np.asarray(values))) < 1.95 / math.sqrt(count)


def test_scalars_are_sampled_independently():
    s = mixed()
    keys = jax.random.split(jax.random.key(0), 4000)
    table = np.asarray(s.ravel(jax.vmap(s.sample)(keys)))
    correlations = np.corrcoef(table.T) - np.eye(len(s.names))
    # A correlation of n independent pairs is about N(0, 1/n): 4.5 deviations, 36 pairs.
    assert np.abs(correlations).max() < 4.5 / math.sqrt(4000)


def test_samples_are_reproducible_and_differ_by_key():
    s = mixed()
    one, again, other = (s.ravel(s.sample(jax.random.key(k))) for k in (0, 0, 1))
    assert jnp.all(one == again) and jnp.all(one != other)


def test_grid_is_the_factorial_of_the_midpoints():
    s = hj.space({"a": hj.uniform(0.0, 1.0), "b": hj.loguniform(1.0, 100.0)})
    grid = s.constrain(s.grid(3))
    a, b = np.asarray([1, 3, 5]) / 6, 100 ** (np.asarray([1, 3, 5]) / 6)
    assert error(grid["a"], np.repeat(a, 3)) < 1e-14
    assert error(grid["b"], np.tile(b, 3)) < 1e-14


def test_grid_covers_every_scalar():
    s = hj.space({"v": hj.real(shape=(2,)), "u": hj.uniform(0.0, 1.0)})
    grid = s.grid(4)
    assert grid["v"].shape == (64, 2) and grid["u"].shape == (64,)
    assert len(np.unique(np.asarray(s.ravel(grid)), axis=0)) == 64


# -------------------------------------------------------------------------- fan_out


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_fan_out_is_symmetric(size):
    s = mixed()
    raw = s.init()
    offsets = np.asarray(s.ravel(s.fan_out(jax.random.key(0), raw, size, 0.3)) - s.ravel(raw)[None])
    assert offsets.shape == (size, len(s.names))
    assert np.abs(offsets.mean(0)).max() < 1e-14
    expected = np.linspace(-0.3, 0.3, size) if size > 1 else np.zeros(1)
    for column in np.sort(offsets, axis=0).T:
        np.testing.assert_allclose(column, expected, atol=1e-14)


def test_fan_out_permutes_every_scalar_on_its_own():
    s = mixed()
    raw, size, draws = s.init(), 8, 500
    fan = jax.vmap(lambda k: s.ravel(s.fan_out(k, raw, size, 1.0)))
    offsets = fan(jax.random.split(jax.random.key(0), draws)) - s.ravel(raw)[None, None]
    assert len({tuple(c) for c in np.argsort(np.asarray(offsets[0]), axis=0).T}) == len(s.names)
    # Two independent permutations of n values have a correlation of variance 1 / (n - 1).
    centered = np.asarray(offsets)
    scatter = np.einsum("dpi,dpj->ij", centered, centered) / draws
    correlations = scatter / scatter[0, 0] - np.eye(len(s.names))
    assert np.abs(correlations).max() < 4.5 / math.sqrt(draws * (size - 1))


# ---------------------------------------------------------------- names, ravel, axes


def test_names_are_in_the_order_of_ravel():
    s = mixed()
    names = ("aug.angle", *(f"aug.mix[{i},{j}]" for i in (0, 1) for j in (0, 1)))
    names += ("l2[0]", "l2[1]", "l2[2]", "lr")
    assert s.names == names
    tree = s.unravel(jnp.arange(9.0))
    assert tree["aug"]["angle"] == 0 and tree["lr"] == 8
    assert jnp.all(tree["aug"]["mix"] == jnp.asarray([[1.0, 2.0], [3.0, 4.0]]))
    assert [r.scale for _, r in s.scalars()] == ["linear"] * 8 + ["log"]


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_ravel_and_unravel_are_inverse_with_leading_axes(batch):
    s = mixed()
    vector = jnp.asarray(np.random.default_rng(0).normal(size=(*batch, 9)))
    tree = s.unravel(vector)
    assert tree["aug"]["mix"].shape == (*batch, 2, 2)
    assert jnp.all(s.ravel(tree) == vector)
    assert error(s.unravel(s.ravel(s.constrain(tree))), s.constrain(tree)) == 0


def test_a_space_of_one_range_is_a_space():
    s = hj.space(hj.uniform(0.0, 1.0))
    assert s.names == ("value",)
    assert s.ravel(jnp.zeros(())).shape == (1,)
    assert s.constrain(jnp.zeros(5)).shape == (5,)


def test_everything_vmaps():
    s = mixed()
    raw = jax.vmap(s.sample)(jax.random.split(jax.random.key(0), 6))
    batched = jit(lambda r: s.unconstrain(s.constrain(r)))(raw)
    single = jit(jax.vmap(lambda r: s.unconstrain(s.constrain(r))))(raw)
    assert error(batched, single) < 1e-14
    assert error(batched, raw) < 1e-11
    vectors = jax.vmap(s.ravel)(raw)
    assert jnp.all(vectors == s.ravel(raw))


# --------------------------------------------------------------------------- whole numbers, choices


def test_integers_are_whole_and_reach_both_ends():
    s = hj.space(hj.integers(2, 6))
    values = s.constrain(jnp.linspace(-50, 50, 2001))
    assert sorted(set(values.tolist())) == [2.0, 3.0, 4.0, 5.0, 6.0]
    assert values.dtype == jnp.float64 and s.constrain(jnp.float32(50)).dtype == jnp.float32
    assert s.constrain(s.init()) == 4


def test_integers_come_back_from_their_raw_values():
    s = hj.space(hj.integers(-1, 3, init=0))
    whole = jnp.arange(-1.0, 4.0)
    assert jnp.array_equal(s.constrain(s.unconstrain(whole)), whole)
    assert s.constrain(s.unconstrain(jnp.asarray(1.2))) == 1
    assert s.constrain(s.init()) == 0


def test_integers_and_choices_are_as_likely_when_sampled(key):
    s = hj.space({"n": hj.integers(0, 3), "kind": hj.choice(3)})
    draws = s.constrain(jax.vmap(s.sample)(jax.random.split(key, 4000)))
    counts = jnp.bincount(draws["n"].astype(int), length=4)
    # Four standard deviations of a binomial count.
    assert jnp.all(jnp.abs(counts - 1000) < 4 * math.sqrt(4000 * 3 / 16))
    assert jnp.all(jnp.abs(draws["kind"].sum(0) - 4000 / 3) < 4 * math.sqrt(4000 * 2 / 9))
    assert jnp.all(draws["kind"].sum(1) == 1)


def test_choice_is_one_hot_and_begins_where_it_is_told():
    s = hj.space(hj.choice(4, init=2))
    assert jnp.array_equal(s.constrain(s.init()), jnp.eye(4)[2])
    rows = jnp.asarray([[0.0, 3.0, 1.0, 2.0], [5.0, 3.0, 1.0, 2.0]])
    assert jnp.array_equal(s.constrain(rows), jnp.eye(4)[jnp.asarray([1, 0])])
    assert jnp.array_equal(s.constrain(s.unconstrain(jnp.eye(4)[3])), jnp.eye(4)[3])


def test_integers_of_numpy_and_an_init_for_each():
    s = hj.space(hj.integers(np.int64(2), np.int32(6), init=np.asarray([2, 5]), shape=(2,)))
    assert jnp.array_equal(s.constrain(s.init()), jnp.asarray([2.0, 5.0]))


def test_the_largest_range_of_integers_comes_back_in_single_precision():
    s = hj.space(hj.integers(-(2**20), 2**20))
    whole = jnp.arange(-(2**20), 2**20 + 1, 37, dtype=jnp.float32)
    assert jnp.array_equal(s.constrain(s.unconstrain(whole)), whole)


@pytest.mark.parametrize("value", [[0.0, 0.0, 0.0], [0.4, 0.4, 0.2], [1.0, 1.0, 0.0]])
def test_a_choice_that_is_not_one_hot_is_refused(value):
    s = hj.space({"kind": hj.choice(3)})
    with pytest.raises(ValueError, match=r"unconstrain: kind is .* not one-hot"):
        s.unconstrain({"kind": jnp.asarray(value)})
    # What is traced has no number yet.
    assert jit(s.unconstrain)({"kind": jnp.asarray(value)})["kind"].shape == (3,)
    rows = jnp.eye(3)[jnp.asarray([2, 0])]
    assert jnp.array_equal(s.unconstrain({"kind": rows})["kind"], rows)


def test_a_raw_nan_is_no_choice():
    rows = jnp.asarray([[0.0, jnp.nan, 1.0], [0.0, 2.0, 1.0]])
    got = hj.space(hj.choice(3)).constrain(rows)
    assert jnp.isnan(got[0]).all() and jnp.array_equal(got[1], jnp.eye(3)[1])


def test_a_grid_has_every_choice_and_no_number_twice():
    ranges = {"kind": hj.choice(3), "n": hj.integers(0, 1), "u": hj.uniform(0.0, 1.0, shape=(2,))}
    s = hj.space(ranges)
    grid = s.constrain(s.grid(4))
    assert len(np.unique(np.asarray(s.ravel(grid)), axis=0)) == 3 * 2 * 16 == len(grid["n"])
    assert grid["kind"].sum(0).tolist() == [32, 32, 32] and grid["n"].sum() == 48
    few = hj.space(hj.integers(0, 9))
    assert few.constrain(few.grid(5)).tolist() == [1, 3, 5, 7, 9]
    assert s.init()["kind"].dtype == s.grid(2)["kind"].dtype


def test_integers_and_choices_have_no_derivative():
    s = hj.space({"n": hj.integers(0, 3), "kind": hj.choice(3)})
    total = lambda raw: s.constrain(raw)["n"] + s.constrain(raw)["kind"] @ jnp.arange(3.0)
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(jax.grad(total)(s.init())))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: hj.integers(3, 3), "low < high"),
        (lambda: hj.integers(0, 3, init=4), "init=4"),
        (lambda: hj.integers(0.0, 3), "integers"),  # pyright: ignore[reportArgumentType]
        (lambda: hj.integers(0, 2**31), r"within \+-2\*\*20"),
        (lambda: hj.integers(False, True), "integers"),
        (lambda: hj.integers(0, 3, init=np.asarray([1, 4]), shape=(2,)), r"init=\[1, 4\]"),
        (lambda: hj.integers(0, 3, init=np.asarray([1, 2, 3]), shape=(2,)), "shape"),
        (lambda: hj.choice(1), "`count`"),
        (lambda: hj.choice(3, init=3), "`init` must be an integer in"),
    ],
)
def test_integers_and_choices_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --------------------------------------------------------------------------- the unit cube


def test_points_of_the_unit_cube_are_quantiles():
    space = mixed()
    u = jnp.linspace(0.05, 0.95, len(space.names))
    raw = space.from_unit(u)
    values = space.ravel(space.constrain(raw))
    # Of a log-uniform and of a uniform range the quantile has a closed form.
    at = {name: i for i, name in enumerate(space.names)}
    rate = jnp.exp(jnp.log(1e-4) * (1 - u[at["lr"]]))
    assert error(values[at["lr"]], rate) < 1e-12
    for name in ("aug.mix[0,0]", "aug.mix[1,0]"):
        assert error(values[at[name]], u[at[name]]) < 1e-12
    # `real` and `positive` are standard normal, whose distribution function is another routine.
    normal = jax.scipy.special.ndtr(space.ravel(raw)[at["aug.angle"]])
    assert error(normal, u[at["aug.angle"]]) < 1e-12


def test_points_of_the_unit_cube_in_batches_and_at_its_corners():
    space = mixed()
    dim = len(space.names)
    corners = jnp.stack([jnp.zeros(dim), jnp.ones(dim)])
    raw = jit(space.from_unit)(corners[None])
    assert raw["l2"].shape == (1, 2, 3) and raw["aug"]["mix"].shape == (1, 2, 2, 2)
    assert jnp.all(jnp.isfinite(space.ravel(raw)))
    assert error(raw["l2"][0, 1], space.from_unit(corners[1])["l2"]) < 1e-15
    assert jnp.all(jnp.isnan(space.ravel(space.from_unit(jnp.full(dim, jnp.nan)))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_raw_values_go_back_to_the_points_they_came_from(dtype):
    space = mixed()
    points = jax.random.uniform(jax.random.key(0), (4, 2, len(space.names)), dtype, 1e-3, 1 - 1e-3)
    found = space.to_unit(space.from_unit(points))
    assert found.dtype == dtype
    # the quantile at 0.999 loses the digits of 1 - 0.999
    np.testing.assert_allclose(found, points, atol=8 * float(jnp.finfo(dtype).eps))
    with pytest.raises(ValueError, match="to_unit: hyperparameters must have the structure"):
        space.to_unit({"lr": jnp.zeros(())})


def test_a_grid_is_the_middles_of_the_unit_cube():
    space = hj.space({"a": hj.loguniform(0.1, 1.0), "n": hj.integers(1, 12)})
    middles = (jnp.stack(jnp.meshgrid(*[jnp.arange(3)] * 2, indexing="ij"), -1) + 0.5) / 3
    assert (
        error(space.ravel(space.grid(3)), space.ravel(space.from_unit(middles.reshape(9, 2))))
        < 1e-15
    )


def test_points_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"from_unit: expected `points` \[\.\.\., 9\]"):
        mixed().from_unit(jnp.zeros((4, 3)))
