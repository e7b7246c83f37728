"""Members over devices, data over the devices of a member, and both: the same numbers.

Devices only change the order in which sums over data are taken, so results differ in last bits:
1e-12 in float64, carried through four updates, as another number of members at once is too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from problems import error, jit

import hyperjax as hj

SIZE, STEPS = 8, 4


@functools.cache
def problem() -> problems.Problem:
    return problems.net(steps=3)


def explore(key, hparams):
    return jax.tree.map(lambda h: h * jax.random.uniform(key, minval=0.8, maxval=1.2), hparams)


def member(p: problems.Problem) -> hj.Tuner:
    estimator = hj.hypergradient(hj.unroll(p.inner.step), p.score, p.inner.init)
    return hj.tune(estimator, optax.adam(0.01))


def make(mesh: Mesh | None) -> hj.Tuner:
    rule = hj.exchange.truncation(0.25, explore, every=2)
    return hj.population(member(problem()), rule, chunk=SIZE, mesh=mesh)


def start(tuner: hj.Tuner):
    p, rng = problem(), np.random.default_rng(0)
    vary = lambda x: jnp.stack([x * rng.uniform(0.5, 1.5) for _ in range(SIZE)])
    return tuner.init(jax.random.key(0), *jax.tree.map(vary, (p.params, p.hparams)))


def grid(members: int, data: int) -> Mesh:
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((members, data), ("member", "data"), axis_types=axes)


def spread(split: hj.Split, mesh: Mesh) -> hj.Split:
    """A split repeated for every update, the rows of its batches over the data axis."""
    specs = problems.shard(split, "data")
    shift = lambda x, spec: jax.device_put(
        jnp.broadcast_to(x, (STEPS, *jnp.shape(x))),
        NamedSharding(mesh, PartitionSpec(None, *spec)),
    )
    return jax.tree.map(shift, split, specs)


def numbers(result):
    state, metrics = result
    return jax.tree.map(np.asarray, (state.members, metrics.members.value, metrics.events))


@functools.cache
def alone():
    """On one device."""
    tuner = make(None)
    splits = problems.repeat(problem().split, STEPS)
    return numbers(jit(lambda s, x: hj.run(tuner, s, x))(start(tuner), splits))


def check(result) -> None:
    members, values, events = numbers(result)
    np.testing.assert_array_equal(events.parents, alone()[2].parents)
    assert error(members, alone()[0]) < 1e-12
    assert error(values, alone()[1]) < 1e-12


def test_the_exchange_takes_place():
    """Else the tests below would say nothing about it."""
    assert (alone()[2].parents != np.arange(SIZE)).any()


@pytest.mark.parametrize(("members", "data"), [(1, 8), (4, 2)])
def test_members_and_data_over_devices(members, data):
    """`mesh=` spreads members along its first axis; the compiler spreads the rest.

    One axis alone, members over eight devices, is in test_population.py.
    """
    mesh = grid(members, data)
    tuner = make(mesh)
    result = jit(lambda s, x: hj.run(tuner, s, x))(start(tuner), spread(problem().split, mesh))
    check(result)
    for leaf in jax.tree.leaves(result[0].members):
        parts = {(s.index[0].start or 0, s.index[0].stop) for s in leaf.addressable_shards}
        assert len(parts) == members  # each device has its own members, and those only


def test_members_and_data_by_jit_alone():
    """Without `mesh=`: arrays that lie on a mesh, and the compiler follows them."""
    mesh, tuner = grid(4, 2), make(None)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("member")))
    state = start(tuner)
    state = state._replace(members=jax.tree.map(place, state.members))
    splits = spread(problem().split, mesh)
    check(jit(lambda s, x: hj.run(tuner, s, x))(state, splits))


def test_data_over_devices_by_hand():
    """`shard_map` over both axes; the loss is a `pmean`, so that every device has the gradient."""
    p, mesh = problems.net("data", steps=3), grid(4, 2)
    step, plain = member(p).step, member(problem()).step
    members = start(make(None)).members
    mapped = jax.shard_map(
        jax.vmap(step, in_axes=(0, None)),
        mesh=mesh,
        in_specs=(PartitionSpec("member"), problems.shard(p.split, "data")),
        out_specs=PartitionSpec("member"),
    )
    state, metrics = jit(mapped)(members, p.split)
    expected, same = jit(jax.vmap(plain, in_axes=(0, None)))(members, problem().split)
    assert error(state, expected) < 1e-12
    assert error((metrics.value, metrics.grad_norm), (same.value, same.grad_norm)) < 1e-12
