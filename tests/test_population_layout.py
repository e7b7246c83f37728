"""Populations: where members lie, how many step at once, how long each goes on, what is donated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import jit

import hyperjax as hj
from hyperjax import _layout

ALONE = hj.exchange.isolation()


def descent(rate: float = 0.1) -> hj.Tuner:
    """Members with weights that go half the way to the data, and scores |weights - h|^2 + valid."""

    def estimate(h, weights, split):
        for i in range(2):
            weights = 0.5 * (weights + jax.tree.map(lambda x, i=i: x[i], split.train))
        value, grad = jax.value_and_grad(lambda h: jnp.sum((weights - h) ** 2))(h)
        return hj.Estimate(value + split.valid, grad, ()), weights

    estimator = hj.Estimator(lambda params, h: params, estimate)
    return hj.tune(estimator, optax.sgd(rate, momentum=0.5))


def starts(size: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(size, 3))), jnp.asarray(rng.normal(size=size))


def split(*lead: int, seed: int = 1) -> hj.Split:
    draw = lambda stream, *shape: np.random.default_rng([seed, stream]).normal(size=shape)
    return hj.Split(jnp.asarray(draw(0, *lead, 2, 3)), jnp.asarray(draw(1, *lead)))


def outcome(pop: hj.Tuner, size: int, steps: int = 4, each=None):
    state = pop.init(jax.random.key(0), *starts(size), each)
    data = split(steps)
    return jit(lambda s, x: hj.run(pop, s, x))(state, data)


def same(a, b) -> None:
    """Up to last bits: chunks and devices sum three numbers in the same order, fused or not."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-13, atol=1e-13)


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


@pytest.mark.parametrize(("size", "chunk"), [(1, 1), (3, 1), (1, "auto"), (2, 2)])
def test_a_member_alone_has_products_of_its_own(size, chunk):
    """A vmap of one would make of every product one in batches, which is slower."""
    value = lambda h, weights: jnp.sum((weights @ weights - h) ** 2)
    estimate = lambda h, weights, split: (hj.Estimate(value(h, weights), h, ()), weights)
    tuner = hj.tune(hj.Estimator(lambda params, h: params, estimate), optax.sgd(0.1))
    pop = hj.population(tuner, ALONE, chunk=chunk)
    state = pop.init(jax.random.key(0), jnp.ones((size, 3, 3)), jnp.ones(size))
    text = jit(pop.step).lower(state, hj.Split((), ())).as_text()
    assert "dot_general" in text
    assert ("batching_dims" in text) == (chunk == 2)


# ------------------------------------------------------------------------------ devices


@pytest.mark.parametrize(("size", "devices"), [(16, 8), (12, 6), (7, 7), (11, 1), (1, 1)])
def test_auto_takes_as_many_devices_as_share_the_members(size, devices):
    state, metrics = outcome(hj.population(descent(), ALONE, mesh="auto"), size)
    expected, _ = outcome(hj.population(descent(), ALONE, chunk=size), size)
    same(state.members, expected.members)
    assert metrics.layout.devices == devices
    assert metrics.layout.members == size
    assert len(state.members.hparams.sharding.device_set) == devices


def test_auto_leaves_a_mesh_in_force_alone():
    pop = hj.population(descent(), ALONE, mesh="auto")
    state = hj.population(descent(), ALONE).init(jax.random.key(0), *starts(16))
    expected, _ = jit(pop.step)(state, split())

    def local(members, data):
        found, metrics = pop.step(hj.PopulationState(members, (), jax.random.key(0)), data)
        assert metrics.layout.devices == 1 and metrics.layout.members == 2
        return found.members

    alone = hj.Exchange(lambda members: (), lambda key, state, members, score: (members, (), ()))
    pop = hj.population(descent(), alone, mesh="auto")
    lane = PartitionSpec("lane")
    spread = jax.shard_map(
        local, mesh=problems.mesh("lane"), in_specs=(lane, PartitionSpec()), out_specs=lane
    )
    same(jit(spread)(state.members, split()), expected.members)


def test_further_axes_of_a_mesh_are_for_data():
    mesh = jax.make_mesh((4, 2), ("member", "data"), axis_types=(AxisType.Auto,) * 2)

    def estimate(h, carry, data):
        value, grad = jax.value_and_grad(lambda h: jnp.mean((data.valid - h) ** 2))(h)
        return hj.Estimate(value, grad, ()), carry

    tuner = hj.tune(hj.Estimator(lambda params, h: params, estimate), optax.sgd(0.1))
    valid = jnp.arange(10.0)
    place = NamedSharding(mesh, PartitionSpec("data"))
    data = hj.Split(None, jax.device_put(valid, place))
    for chunk in (1, 2):
        pop = hj.population(tuner, ALONE, chunk=chunk, mesh=mesh)
        state = pop.init(jax.random.key(0), *starts(8))
        program = jit(pop.step).lower(state, data).compile()
        assert "all-reduce" in str(program.as_text())  # means over the data of two devices
        found, metrics = program(state, data)
        _, h = starts(8)
        # The closed form of one step, h - 0.1 * 2 mean(h - x).
        np.testing.assert_allclose(found.members.hparams, h - 0.2 * (h - 4.5), rtol=1e-13)
        assert metrics.layout.devices == 4


@pytest.mark.parametrize("mesh", [None, "auto"])
def test_a_step_compiles_once_and_donates(mesh, caplog):
    # Neither the places nor the types of its own result are new to a step, nor are other
    # hyperparameters, members and data.
    traces = [0]
    tuner = descent()

    def counted(state, data):
        traces[0] += 1
        return tuner.step(state, data)

    pop = hj.population(hj.Tuner(tuner.init, counted), hj.exchange.tournament(explore), mesh=mesh)
    step = jax.jit(pop.step, donate_argnums=0)
    for seed in range(2):
        params, hparams = starts(16, seed)
        state = first = pop.init(jax.random.key(seed), params, hparams)
        for i in range(3):
            with jax.log_compiles():
                state, _ = step(state, split(seed=i))
        assert all(x.is_deleted() for x in jax.tree.leaves(first.members))
        np.testing.assert_array_equal(params + 0, starts(16, seed)[0])  # the caller's live on
    compiled = [x for x in caplog.messages if "Finished XLA compilation of jit(step)" in x]
    assert len(compiled) == 1
    assert traces[0] == 1


def explore(key, h):
    return jax.tree.map(lambda x: x + jax.random.normal(key, x.shape, x.dtype), h)


def test_states_hold_no_array_twice():
    # Params, hparams and optimizer state that are one array of the caller's.
    shared = jnp.arange(8.0)
    estimate = lambda h, carry, data: (hj.Estimate(h**2, 2 * h, ()), carry)
    init = lambda params, h: {"params": params, "anchor": params, "h": h}
    tuner = hj.tune(hj.Estimator(init, estimate), optax.sgd(0.1))
    remember = hj.Exchange(
        lambda members: members.hparams, lambda key, state, members, score: (members, state, ())
    )
    pop = hj.population(tuner, remember)
    state = pop.init(jax.random.key(0), shared, shared)
    pointers = [
        x.unsafe_buffer_pointer() for x in jax.tree.leaves((state._replace(key=()), shared))
    ]
    assert len(set(pointers)) == len(pointers)
    state, _ = jax.jit(pop.step, donate_argnums=0)(state, None)
    np.testing.assert_allclose(state.members.hparams, 0.8 * shared, rtol=1e-15)


# ------------------------------------------------------------------------------- chunks


def test_chunks_have_their_state_in_the_cache():
    for size in (1, 2, 7, 64, 256, 257, 10_000):
        for each in (1, 1000, 16_000, 100_000, 10**8):
            chunk = _layout._cached(size, each)
            assert 1 <= chunk <= min(size, _layout._MOST_ON_CPU)
            assert chunk == 1 or chunk * each <= _layout._CACHE_BYTES
            # A rest, which is a second program, only where no near chunk would do without.
            most = max(1, min(size, _layout._MOST_ON_CPU, _layout._CACHE_BYTES // each))
            near = [n for n in range(-(-most // 2), most + 1) if size % n == 0]
            assert chunk == (max(near) if near else most)


def test_layouts_say_what_and_why():
    _, metrics = outcome(hj.population(descent(), ALONE), 12)
    layout = metrics.layout
    assert layout.member_bytes == 5 * 8  # weights, h, momentum
    assert (layout.members, layout.devices, layout.chunk) == (12, 1, 12)
    assert "12 members on 1 device, 12 at once on each" in str(layout)
    assert "40 bytes" in layout.why and "mesh='auto'" in layout.why
    assert jax.tree.leaves(layout) == []
    members = jnp.zeros((4, 10**5), jnp.float32)
    assert "larger than the cache" in _layout.make_layout(members, "auto", None, None).why
    _, metrics = outcome(hj.population(descent(), ALONE, chunk=5, mesh="auto"), 12)
    assert (metrics.layout.chunk, metrics.layout.devices) == (2, 6)
    assert "as asked for" in metrics.layout.why


def test_temporary_memory_is_that_of_a_chunk():
    # A step makes a product of 64 x 64 numbers, 32 kB, beside a state of half a kilobyte.
    def estimate(h, w, data):
        product = jnp.sin(w[:, None] * w[None])
        return hj.Estimate(jnp.sum(product) + h, h, ()), w + jnp.sin(product) @ w

    tuner = hj.tune(hj.Estimator(lambda params, h: params, estimate), optax.sgd(0.1))

    def need(size: int, chunk: int) -> int:
        pop = hj.population(tuner, ALONE, chunk=chunk)
        arrays = [jax.ShapeDtypeStruct(shape, float) for shape in ((size, 64), (size,))]
        state = jax.eval_shape(pop.init, jax.random.key(0), *arrays)
        return hj.forecast(pop.step, (state, None), donate=(0,)).temporary_bytes

    product, state = 64 * 64 * 8, 65 * 8
    assert need(512, 512) >= 512 * product  # all at once
    few, many = need(64, 8), need(512, 8)
    assert 8 * product <= few <= 4 * 8 * product
    # The states after a step lie beside those before it, and scores; nothing else grows.
    assert many - few <= (512 - 64) * 2 * state


def test_the_fastest_chunk_is_the_one_that_takes_least_time():
    now, calls = [0.0], []
    costs = {1: [9.0, 3.0, 3.0, 2.5], 4: [9.0, 2.0, 4.0, 4.0], 16: [9.0, 3.0, 3.0, 3.0]}

    def make(chunk):
        left = iter(costs[chunk])

        def call():
            calls.append(chunk)
            now[0] += next(left)
            return jnp.zeros(())

        return call

    best = hj.fastest_chunk(make, (1, 4, 16), timer=lambda: now[0], repeats=3)
    assert best.chunk == 4
    assert best.seconds == {1: 2.5, 4: 2.0, 16: 3.0}  # without the warm-up
    assert calls == [1, 4, 16] * 4  # in turn
    with pytest.raises(ValueError, match="`candidates` is empty"):
        hj.fastest_chunk(make, (), timer=lambda: 0.0)


# ------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(("chunk", "mesh"), [("auto", None), (1, None), (3, None), (1, "auto")])
def test_members_with_their_own_batches_are_single_runs(chunk, mesh):
    pop = hj.population(descent(), ALONE, chunk=chunk, mesh=mesh, batches="own")
    state = pop.init(jax.random.key(0), *starts(8))
    data = split(8)
    found, metrics = jit(pop.step)(state, data)
    tuner = descent()
    for i in (0, 3, 7):
        expected, one = tuner.step(tuner.init(*row(starts(8), i)), row(data, i))
        same(row(found.members, i), expected)
        same(metrics.members.value[i], one.value)


def test_own_batches_need_a_row_per_member():
    pop = hj.population(descent(), ALONE, batches="own")
    state = pop.init(jax.random.key(0), *starts(8))
    with pytest.raises(ValueError, match=r"leading axis of 8 members; got .*float64\[2, 3\]"):
        pop.step(state, split())


# ---------------------------------------------------------------------------- named axis


@pytest.mark.parametrize("mesh", [None, "auto"])
def test_members_may_share_a_named_axis(mesh):
    # All follow the mean gradient; h has the closed form h - 0.1 * 2 mean(h - target).
    def estimate(h, carry, data):
        value, grad = jax.value_and_grad(lambda h: (h - data) ** 2)(h)
        return hj.Estimate(value, lax.pmean(grad, "all"), ()), carry

    tuner = hj.tune(hj.Estimator(lambda params, h: params, estimate), optax.sgd(0.1))
    pop = hj.population(tuner, ALONE, mesh=mesh, axis_name="all")
    params, h = starts(16)
    state = pop.init(jax.random.key(0), params, h)
    state, metrics = jit(lambda s, x: hj.run(pop, s, x))(state, jnp.asarray([3.0, 4.0]))
    expected = h
    for target in (3.0, 4.0):
        expected = expected - 0.2 * jnp.mean(expected - target)
    np.testing.assert_allclose(state.members.hparams, expected, rtol=1e-13)
    assert metrics.layout.devices == (8 if mesh else 1)
    assert metrics.layout.chunk == (2 if mesh else 16)
    with pytest.raises(ValueError, match=r"`chunk` must be 'auto' with `axis_name`.*got 4"):
        hj.population(tuner, ALONE, chunk=4, axis_name="all")


# ---------------------------------------------------------------------------- step limits

LIMITS = np.array([1, 4, 2, 6, 3, 9, 2, 1])


@functools.cache
def limited(chunk=3, mesh=None):
    return outcome(hj.population(descent(), ALONE, chunk=chunk, mesh=mesh), 8, 6, LIMITS)


@pytest.mark.parametrize("mesh", [None, "auto"])
def test_members_stop_after_their_own_number_of_steps(mesh):
    state, metrics = limited(1 if mesh else 3, mesh)
    single = hj.population(descent(), ALONE, chunk=8)
    for steps in (1, 2, 3, 4, 6):
        expected, record = outcome(single, 8, steps)
        for i in np.flatnonzero(np.minimum(LIMITS, 6) == steps):
            same(row(state.members, i), row(expected.members, i))
            # The last score counts from then on.
            np.testing.assert_allclose(
                metrics.members.value[steps - 1 :, i], record.members.value[-1, i], rtol=1e-13
            )
    np.testing.assert_array_equal(state.limit.left, np.maximum(LIMITS - 6, 0))
    assert metrics.members.finite.all()


def test_finished_members_keep_every_bit():
    pop = hj.population(descent(), hj.exchange.tournament(explore), chunk=3)
    state = pop.init(jax.random.key(0), *starts(8), LIMITS)
    step = jit(pop.step)
    copied = 0
    for i in range(8):
        after, metrics = step(state, split(seed=i))
        parents = metrics.events.parents
        for j in np.flatnonzero(i >= LIMITS):
            for x, y in zip(
                *map(jax.tree.leaves, row((after.members, state.members), j)), strict=True
            ):
                np.testing.assert_array_equal(x, y)
            assert parents[j] == j
        copied += np.sum((parents != np.arange(8)) & (LIMITS[parents] <= i))
        state = after
    assert copied > 0  # by others, who may still learn from them


def test_a_member_that_ended_diverged_stays_so():
    grow = lambda h, carry, data: (hj.Estimate(jnp.where(h > 2, jnp.nan, h), 0 * h, ()), carry)
    tuner = hj.tune(hj.Estimator(lambda params, h: params, grow), optax.sgd(0.1))
    pop = hj.population(tuner, ALONE)
    state = pop.init(jax.random.key(0), jnp.zeros(4), jnp.arange(4.0), jnp.asarray([1, 3, 3, 1]))
    for _ in range(3):
        state, metrics = jit(pop.step)(state, None)
        np.testing.assert_array_equal(metrics.events.diverged, [False, False, False, True])
        assert metrics.value == 0.0 and not metrics.members.finite[3]
    np.testing.assert_array_equal(state.limit.value, [0, 1, 2, np.nan])


@pytest.mark.parametrize(
    "steps", [np.array([1, 2]), np.ones(8), np.array([0] * 8), np.array([3] * 7 + [-1])]
)
def test_step_limits_are_one_positive_integer_per_member(steps):
    pop = hj.population(descent(), ALONE)
    with pytest.raises(ValueError, match="`steps` must be 8 integers >= 1"):
        pop.init(jax.random.key(0), *starts(8), steps)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("options", [{}, {"mesh": "auto"}, {"axis_name": "all"}])
def test_types_stay(dtype, options):
    pop = hj.population(descent(), ALONE, **options)
    begin = jax.tree.map(lambda x: x.astype(dtype), (starts(8), split()))
    state = jax.eval_shape(pop.init, jax.random.key(0), *begin[0], jnp.asarray(LIMITS))
    after, _ = jax.eval_shape(pop.step, state, begin[1])
    kind = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    assert kind(after) == kind(state)
    assert not any(weak for *_, weak in kind(state))
    assert after.members.hparams.dtype == dtype


def test_limits_vmap_over_seeds():
    pop = hj.population(descent(), hj.exchange.tournament(explore), chunk=3)
    go = lambda key: hj.run(pop, pop.init(key, *starts(8), jnp.asarray(LIMITS)), split(3))
    keys = jax.random.split(jax.random.key(2), 3)
    many = jit(jax.vmap(lambda k: go(k)[0].members))(keys)
    for i in range(3):
        same(row(many, i), jit(lambda k: go(k)[0].members)(keys[i]))


def test_meshes_by_another_name_are_refused():
    with pytest.raises(ValueError, match="`mesh` must be one of 'auto'; got 'all'"):
        hj.population(descent(), ALONE, mesh="all")  # pyright: ignore[reportArgumentType]
    explicit = jax.make_mesh((4, 2), ("member", "data"))  # what JAX makes unless told
    with pytest.raises(ValueError, match=r"must be of type Auto; got .*AxisType\.Auto,\) \* 2"):
        hj.population(descent(), ALONE, mesh=explicit)
    with pytest.raises(ValueError, match="`batches` must be one of 'shared', 'own'; got 'mine'"):
        hj.population(descent(), ALONE, batches="mine")  # pyright: ignore[reportArgumentType]
