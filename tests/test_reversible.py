"""Reversible training: back to the start bit for bit, and the gradient of ordinary autodiff."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import PartitionSpec
from problems import error
from problems import fused_jit as jit

import hyperjax as hj
from hyperjax import _integers as inside

# ----------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("momentum", [0.5, 0.75 + 2.0**-16, 0.9, 0.999, 1.0])
def test_products_with_momentum_are_undone(dtype, momentum):
    grid = inside.make_grid(jnp.dtype(dtype), None)
    rng, limit = np.random.default_rng(0), inside.limit(grid)
    corners = np.asarray([-limit + 1, -1, 0, 1, limit - 1])
    u, b = (np.concatenate([corners, rng.integers(-limit + 1, limit, 3000)]) for _ in range(2))
    u, b = jnp.asarray(u, grid.signed), jnp.asarray(rng.permutation(b), grid.signed)
    n = inside.numerator(grid, jnp.asarray(momentum, dtype))
    u2, b2 = inside.multiply(grid, u, b, n)
    back = inside.divide(grid, u2, b2, n)
    assert jnp.all(back[0] == u) and jnp.all(back[1] == b)
    # In exact integers: |u2 - m u| < 2 and the bound on the growth of b, of the docstring.
    m, one = int(n), 2**grid.half
    for a, c, a2, c2 in zip(*(np.asarray(x).tolist() for x in (u, b, u2, b2)), strict=True):
        assert abs(a2 * one - a * m) < 2 * one
        assert abs(c2) * m <= (abs(c) + 1) * one + m


def test_what_is_kept_fits_its_word_for_the_steps_promised():
    # The worst case that is met: random u, the least momentum, as many steps as one word takes.
    grid = inside.make_grid(jnp.dtype("float32"), None)
    n = inside.numerator(grid, jnp.float32(0.9))
    steps = inside.steps_per_word(grid, 0.9)

    def body(b, key):
        u = jax.random.randint(key, b.shape, -(2**29), 2**29, jnp.int32)
        return inside.multiply(grid, u, b, n)[1], None

    b, _ = jax.lax.scan(
        body, jnp.zeros(1000, jnp.int32), jax.random.split(jax.random.key(0), steps)
    )
    largest = int(jnp.max(jnp.abs(b)))
    # b grows by 1 / 0.9 a step: within the word, and with at most six bits of it unused.
    assert inside.limit(grid) / 64 < largest < inside.limit(grid)


# ------------------------------------------------------------------------ training


def net(sizes, dtype, steps, rows=16):
    """A tanh net on random data, one matrix per layer: params, loss, score, split."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    params = [draw(a, b) / np.asarray(a**0.5, dtype) for a, b in itertools.pairwise(sizes)]
    split = hj.Split(
        (draw(steps, rows, sizes[0]), draw(steps, rows, sizes[-1])),
        (draw(rows, sizes[0]), draw(rows, sizes[-1])),
    )

    def score(p, h, batch):
        x, y = batch
        for layer in p[:-1]:
            x = jnp.tanh(x @ layer)
        return jnp.mean((x @ p[-1] - y) ** 2)

    loss = lambda p, h, batch: score(p, h, batch) + h["l2"] * optax.tree.norm(p, squared=True)
    return params, loss, score, split


RATE, MOMENTUM = (lambda h, t: h["rate"]), (lambda h, t: h["momentum"])


def values(dtype, **kwargs):
    """Momenta on the grid of 2^-16, so that rounding them changes nothing."""
    given = {"rate": 0.03, "momentum": 0.90625, "l2": 1e-3} | kwargs
    given["momentum"] = np.round(np.asarray(given["momentum"]) * 2**16) / 2**16
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), given)


def reversed_run(problem, h, **options):
    params, loss, score, split = problem
    train = hj.reversible(loss, RATE, MOMENTUM, **options)
    estimator = hj.hypergradient(train.response, score, train.init)
    return estimator.estimate(h, estimator.init(params, h), split)


def plain(problem, h):
    """By autodiff through the same training in floating point, by optax."""
    params, loss, score, split = problem
    inner = hj.inner(loss, lambda h: optax.sgd(h["rate"], h["momentum"]))
    estimator = hj.hypergradient(hj.unroll(inner.step), score, inner.init)
    return estimator.estimate(h, inner.init(params, h), split)


@functools.cache
def compared(dtype, steps):
    """Both, compiled once for all momenta from 0.89."""
    problem = net((3, 5, 2), dtype, steps)
    ours = lambda h: reversed_run(problem, h, least_momentum=0.89)
    return jit(ours), jit(lambda h: plain(problem, h))


@pytest.mark.parametrize("momentum", [0.9, 0.98])
@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_training_is_undone_bit_for_bit_and_the_gradient_is_that_of_unroll(dtype, steps, momentum):
    ours, theirs = compared(dtype, steps)
    h = values(dtype, momentum=momentum, rate=0.2 * (1 - momentum))
    result, carry = ours(h)
    assert result.info.fits and result.info.recovered  # params and velocity, compared as integers
    expected, trained = theirs(h)
    # Float32 agrees with float32 as well as can be hoped for after 1000 steps of rounding.
    tolerance = 1e-8 if dtype == jnp.float64 else 2e-3
    assert error(result.grad, expected.grad) < tolerance
    assert error(carry.params, trained.params) < tolerance
    assert all(x.dtype == dtype for x in jax.tree.leaves((result.value, result.grad, carry.params)))
    assert carry.steps == steps


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_net_of_the_paper_is_undone_bit_for_bit(dtype):
    problem = net((784, 50, 50, 10), dtype, 100, rows=16)
    h = values(dtype, momentum=0.98)
    result, _ = jit(lambda h: reversed_run(problem, h, least_momentum=0.97))(h)
    assert result.info.fits and result.info.recovered
    if dtype == jnp.float64:
        assert error(result.grad, jit(lambda h: plain(problem, h))(h)[0].grad) < 1e-10


def schedules(problem, reversible):
    """The score by steps with schedules that differ from leaf to leaf, in everything."""
    _, loss, score, split = problem
    leafwise = lambda s: [s[0], s[1]]
    rate = lambda h, t: leafwise(h["rate"][t])
    momentum = lambda h, t: leafwise(h["momentum"][t])

    def step(state, h, batch):
        p, u, t = state.params
        decay = lambda u, m, g: m * u + g
        u = jax.tree.map(decay, u, momentum(h, t), jax.grad(loss)(p, h, batch))
        p = jax.tree.map(lambda w, r, u: w - r * u, p, rate(h, t), u)
        return state._replace(params=(p, u, t + 1))

    def value(h, start, velocity, batches):
        if reversible:
            train = hj.reversible(loss, rate, momentum, least_momentum=0.6).response
            carry = hj.ReversibleState(start, velocity, jnp.zeros((), jnp.int32))
            p, end = train(h, carry, batches)
        else:
            state = hj.InnerState((start, velocity, 0), ())
            (p, u, _), _ = hj.unroll(step)(h, state, batches)
            end = hj.ReversibleState(p, u, jnp.zeros(()))
        # What comes out beside the params has a derivative too.
        return score(p, h, split.valid) + optax.tree.sum(jax.tree.map(jnp.sin, end.velocity))

    return value


@functools.cache
def scheduled(steps=150):
    """More steps than a word takes at 0.6: two words."""
    assert steps > inside.steps_per_word(inside.make_grid(jnp.dtype("float64"), None), 0.6)
    problem = net((3, 4, 2), jnp.float64, steps)
    rng = np.random.default_rng(1)
    h = values(
        jnp.float64,
        rate=rng.uniform(0.01, 0.03, (steps, 2)),
        momentum=rng.uniform(0.61, 0.9, (steps, 2)),
    )
    velocity = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), problem[0])
    inputs = h, problem[0], velocity, problem[3].train
    answers = [
        jit(jax.value_and_grad(schedules(problem, r), argnums=(0, 1, 2, 3)))(*inputs)
        for r in (True, False)
    ]
    return problem, inputs, answers


def test_gradients_in_schedules_start_and_data_over_two_words():
    _, _, (got, expected) = scheduled()
    assert error(got[0], expected[0]) < 1e-12
    for ours, theirs in zip(got[1], expected[1], strict=True):
        assert error(ours, theirs) < 1e-8
    assert all(jnp.any(x != 0) for x in jax.tree.leaves(got[1]))


def test_gradient_is_that_of_the_fixed_point_training_too():
    # Differences of the training itself, with a step far above its resolution of 2^-52 and its
    # roundings: 1e-11 / 1e-4 of noise, 1e-8 of curvature.
    problem, inputs, (got, _) = scheduled()
    h, *rest = inputs
    along = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(2).normal(size=x.shape)), h)
    along["momentum"] = jnp.zeros_like(along["momentum"])  # rounded: a staircase
    along["rate"] = 0.01 * along["rate"]
    f = jit(lambda h: schedules(problem, True)(h, *rest))
    slope = problems.central_difference(f, h, along, step=1e-4)
    expected = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, got[1][0], along)))
    assert abs(slope - expected) < 1e-6 * abs(expected)


def test_closures_have_gradients():
    problem = net((3, 4, 2), jnp.float64, 20)
    params, loss, score, split = problem

    def value(l2, rate, reversible):
        # With a key in the batch, and what is not hparams in closures.
        noisy = lambda batch: (batch[0] + 0.1 * jax.random.normal(batch[2], (16, 3)), batch[1])
        closed = lambda p, h, batch: loss(p, {"l2": l2}, noisy(batch))
        if reversible:
            init, respond = hj.reversible(closed, lambda h, t: rate, lambda h, t: 0.90625)
        else:
            init, step = hj.inner(closed, lambda h: optax.sgd(rate, 0.90625))
            respond = hj.unroll(step)
        h = jnp.asarray(0.0)
        batches = (*split.train, jax.random.split(jax.random.key(0), 20))
        return score(respond(h, init(params, h), batches)[0], h, split.valid)

    got, expected = (
        jit(jax.grad(value, argnums=(0, 1)), static_argnums=2)(1e-3, 0.03, r) for r in (True, False)
    )
    assert error(got, expected) < 1e-10


# --------------------------------------------------------------------- transformations


def test_vmap_is_separate_runs():
    problem = net((3, 4, 2), jnp.float64, 30)
    params, loss, score, split = problem
    train = hj.reversible(loss, RATE, MOMENTUM, least_momentum=0.8)
    estimator = hj.hypergradient(train.response, score, train.init)
    one = lambda h: estimator.estimate(h, estimator.init(params, h), split)[0]
    h = values(jnp.float64, rate=0.01, momentum=np.array([0.85, 0.9, 0.95]))
    h = {**h, "rate": h["momentum"] / 50, "l2": jnp.asarray([0, 1e-3, 1e-2])}
    together = jit(jax.vmap(one))(h)
    assert jnp.all(together.info.recovered)
    apart = jit(functools.partial(jax.lax.map, one))(h)
    assert error(together.grad, apart.grad) < 1e-12
    assert jnp.all(together.value[:2] != together.value[2])


def test_tuning_in_a_scan_goes_on_from_the_carry():
    problem = net((3, 4, 2), jnp.float32, 10)
    params, loss, score, split = problem
    h = values(jnp.float32, rate=np.linspace(0.01, 0.03, 40), momentum=np.full(40, 0.9))
    train = hj.reversible(
        loss, lambda h, t: h["rate"][t], lambda h, t: h["momentum"][t], least_momentum=0.8
    )
    tuner = hj.tune(hj.hypergradient(train.response, score, train.init), optax.sgd(1e-3))
    state = tuner.init(params, h)
    shapes = jax.eval_shape(tuner.step, state, split)[0]
    same = lambda a, b: a.dtype == b.dtype and a.shape == b.shape and a.weak_type == b.weak_type
    assert jax.tree.all(jax.tree.map(lambda x, y: same(jax.typeof(x), y), state, shapes))
    state, metrics = jit(functools.partial(hj.run, tuner))(state, problems.repeat(split, 3))
    assert jnp.all(metrics.finite) and jnp.all(metrics.info.recovered)
    assert state.carry.steps == 30
    # Each estimate saw its own part of the schedule.
    moved = state.hparams["rate"] != h["rate"]
    assert jnp.all(moved[:30]) and not jnp.any(moved[30:])


def test_two_runs_are_one_long_run():
    # In float64 the numbers below 2 go out and in again without rounding, but b starts anew.
    problem = net((3, 4, 2), jnp.float64, 20)
    params, loss, _, split = problem
    h = values(jnp.float64)
    train = hj.reversible(loss, RATE, MOMENTUM, least_momentum=0.8)
    respond = jit(train.response)
    long, _ = respond(h, train.init(params, h), split.train)
    half = lambda part: jax.tree.map(lambda x: x[part], split.train)
    _, carry = respond(h, train.init(params, h), half(slice(10)))
    short, _ = respond(h, carry, half(slice(10, 20)))
    assert error(short, long) < 1e-13


def test_memory_does_not_grow_with_the_number_of_steps():
    params, loss, score, split = net((30, 40, 2), jnp.float32, 1)
    h = values(jnp.float32, momentum=0.999)
    # Batches made of their index: they would otherwise be the larger part.
    indexed = lambda p, h, k: loss(p, h, jax.tree.map(lambda x: x[0] + k, split.train))
    train = hj.reversible(indexed, RATE, MOMENTUM, least_momentum=0.999)
    estimator = hj.hypergradient(train.response, score, train.init)

    def temp(steps):
        batches = hj.Split(jnp.zeros(steps, jnp.float32), split.valid)
        lowered = jit(estimator.estimate).lower(h, estimator.init(params, h), batches)
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    few, many = temp(100), temp(10_000)
    assert many - few <= 8 * 9_900  # a number or two per step, no states
    assert many < 30 * 4 * sum(x.size for x in params)


@pytest.mark.parametrize("what", ["data", "hparams"])
def test_shard_map_is_one_device(what):
    # Data in eight parts with a pmean in the loss, or a learning rate per device.
    params, loss, score, split = net((3, 2), jnp.float64, 6)
    axis, rates = "i", jnp.linspace(0.01, 0.03, 8)

    def grad(reduce):
        mean = lambda f: lambda p, h, b: reduce(f(p, h, b))
        train = hj.reversible(mean(loss), RATE, MOMENTUM)
        estimator = hj.hypergradient(train.response, mean(score), train.init)

        def one(rate, split):
            h = values(jnp.float64) | {"rate": rate}
            result, _ = estimator.estimate(h, estimator.init(params, h), split)
            return result.grad["rate"], result.info.recovered

        return one

    run = functools.partial(jax.shard_map, mesh=problems.mesh(axis))
    if what == "data":
        # The gradient of a squared error is a mean over rows: equal parts have equal weight.
        spec = hj.Split(PartitionSpec(None, axis), PartitionSpec(axis))
        sharded = run(
            grad(lambda x: jax.lax.pmean(x, axis)),
            in_specs=(PartitionSpec(), spec),
            out_specs=(PartitionSpec(), PartitionSpec()),
        )
        got, recovered = jit(sharded)(rates[0], split)
        expected, _ = jit(grad(lambda x: x))(rates[0], split)
    else:
        each = lambda r, s: jax.tree.map(lambda x: x[None], grad(lambda x: x)(r[0], s))
        spec = PartitionSpec(axis)
        sharded = run(each, in_specs=(spec, PartitionSpec()), out_specs=(spec, spec))
        got, recovered = jit(sharded)(rates, split)
        expected, _ = jit(jax.vmap(grad(lambda x: x), in_axes=(0, None)))(rates, split)
    assert jnp.all(recovered)
    assert error(got, expected) < 1e-10


# --------------------------------------------------------------------------- refusals


def not_finite(result) -> bool:
    return all(jnp.all(jnp.isnan(x)) for x in jax.tree.leaves(result.grad))


FAULTS = {
    "momentum too small": {"momentum": 0.88},
    "momentum far too small": {"momentum": 0.3},
    "momentum above one": {"momentum": 1.001},
    "momentum not a number": {"momentum": np.nan},
    "rate infinite": {"rate": np.inf},
    "diverged": {"rate": 30.0},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_nan_and_reported(fault):
    ours, _ = compared(jnp.float32, 100)
    result, carry = ours(values(jnp.float32, **FAULTS[fault]))
    assert not result.info.fits
    assert jnp.isnan(result.value) and not_finite(result)
    assert all(jnp.all(jnp.isnan(x)) for x in carry.params)
    assert ours(values(jnp.float32))[0].info.fits  # and without the fault it does


@pytest.mark.parametrize(("start", "fits"), [(31.0, True), (32.0, False), (np.nan, False)])
def test_params_out_of_range_are_nan(start, fits):
    params, loss, _, split = net((3, 1), jnp.float32, 1)
    train = hj.reversible(lambda p, h, b: 1e-3 * loss(p, h, b), RATE, MOMENTUM)
    h = values(jnp.float32)
    carry = train.init([params[0].at[0].set(start)], h)
    params, _ = jit(train.response)(h, carry, split.train)
    assert jnp.all(jnp.isfinite(params[0])) if fits else jnp.all(jnp.isnan(params[0]))


@functools.cache
def sloped():
    """Training under the slopes l2 and 1 of two scalars, for three steps."""
    train = hj.reversible(lambda p, h, b: h["l2"] * p[0] + p[1], RATE, MOMENTUM)
    estimator = hj.hypergradient(train.response, lambda p, h, b: p[0] + p[1], train.init)
    split = hj.Split(jnp.zeros(3), jnp.zeros(()))
    return train.init, jit(lambda h, carry: estimator.estimate(h, carry, split)[0])


@pytest.mark.parametrize(
    ("dtype", "start", "fits"),
    [
        (jnp.float32, -31.0, True),
        (jnp.float32, -32.0, False),
        (jnp.float32, -64.0, False),  # the least integer, which is its own absolute value
        (jnp.float32, -100.0, False),
        (jnp.float32, -np.inf, False),
        (jnp.float64, -1023.0, True),
        (jnp.float64, -2048.0, False),
    ],
)
@pytest.mark.parametrize("what", ["params", "velocity"])
def test_entries_out_of_range_that_do_not_move_are_nan(dtype, start, fits, what):
    init, run = sloped()
    h = values(dtype, rate=0.0, l2=0.0)
    carry = init([jnp.zeros((), dtype)] * 2, h)
    result = run(h, carry._replace(**{what: [jnp.asarray(start, dtype), jnp.zeros((), dtype)]}))
    assert result.info.fits == fits
    # What goes in comes out, or nothing does.
    assert result.value == (start if what == "params" else 0) if fits else jnp.isnan(result.value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_rounding_is_reported(dtype):
    unit = 2.0**-25 if dtype == jnp.float32 else 2.0**-52
    init, run = sloped()

    def rounding(slope, rate):
        h = values(dtype, rate=rate, l2=slope)
        info = run(h, init([jnp.zeros((), dtype)] * 2, h)).info
        assert info.fits and info.recovered and info.rounding.dtype == dtype
        return info.rounding

    # Exact in binary: tolerances are for the sum and the division in float32.
    assert rounding(0.25, 0.5) < 1e-6  # far above a unit
    assert rounding(0.25 * unit, 0.5) == 1  # every gradient of a leaf is rounded to zero
    assert abs(rounding(2.25 * unit, 1.0) - 1 / 9) < 1e-6
    assert rounding(0.25, 0.125 * unit) == 1  # every move is
    assert rounding(0.0, 0.5) < 1e-6  # no share of nothing


def test_ordinary_training_is_hardly_rounded():
    ours, _ = compared(jnp.float32, 100)
    info = ours(values(jnp.float32))[0].info
    # Gradients of 0.1 and moves of 0.01, to 2^-26 at most and half of that on average.
    assert 0 < info.rounding < 1e-5


def test_a_backward_run_that_goes_astray_is_nan_and_reported(monkeypatch):
    # As if a gradient came out differently the second time, in its last bit.
    unpush = inside.unpush
    wrong = lambda word, grid, entry, grad, m: unpush(word, grid, entry, grad * (1 + 1e-15), m)
    monkeypatch.setattr(inside, "unpush", wrong)
    problem = net((3, 4, 2), jnp.float64, 50)
    result, _ = jit(lambda h: reversed_run(problem, h))(values(jnp.float64, rate=0.01))
    assert result.info.fits and not result.info.recovered
    assert jnp.isfinite(result.value) and not_finite(result)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_are_refused(outer):
    problem = net((3, 4, 2), jnp.float64, 3)
    grad = lambda rate: reversed_run(problem, values(jnp.float64) | {"rate": rate})[0].grad["rate"]
    with pytest.raises(TypeError, match="no second derivatives through integers"):
        jax.eval_shape(outer(grad), jnp.asarray(0.01))


def test_forward_mode_is_refused():
    params, loss, score, split = net((3, 4, 2), jnp.float64, 3)
    train = hj.reversible(loss, RATE, MOMENTUM)
    estimator = hj.hypergradient(train.response, score, train.init, mode="forward")
    h = values(jnp.float64)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.eval_shape(estimator.estimate, h, estimator.init(params, h), split)


@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, 30), (jnp.float64, 62)])
def test_fractions_that_leave_no_room_are_refused(dtype, most):
    params, loss, _, split = net((3, 1), dtype, 1)
    h = values(dtype)

    def trained(fraction):
        train = hj.reversible(loss, RATE, MOMENTUM, fraction=fraction)
        return jax.eval_shape(train.response, h, train.init(params, h), split.train)

    trained(most)
    with pytest.raises(ValueError, match=rf"`fraction` must be at most {most} .* got {most + 1}"):
        trained(most + 1)


@pytest.mark.parametrize("least", [0.49, 1.0, "0.9", True])
def test_bounds_that_make_no_sense_are_refused(least):
    with pytest.raises(ValueError, match=r"`least_momentum` must be in \[0.5, 1\); got"):
        hj.reversible(lambda p, h, b: jnp.zeros(()), RATE, MOMENTUM, least_momentum=least)


def test_types_and_shapes_are_refused():
    params, loss, _, split = net((3, 4, 2), jnp.float16, 3)
    train = hj.reversible(loss, RATE, MOMENTUM)
    h = values(jnp.float16)
    with pytest.raises(TypeError, match="must be float32 or float64; got float16"):
        train.response(h, train.init(params, h), split.train)
    params, loss, _, split = net((3, 4, 2), jnp.float64, 3)
    train = hj.reversible(loss, lambda h, t: jnp.ones(3), MOMENTUM)
    with pytest.raises(ValueError, match=r"`rate` must return a scalar, .* got float64\[3\]"):
        train.response(h, train.init(params, h), split.train)
