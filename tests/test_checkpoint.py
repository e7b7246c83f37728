"""A checkpoint of a whole population comes back on other devices than it was written from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import hyperjax as hj
from hyperjax.app._checkpoint import Checkpoints

SIZE = 8


def member() -> hj.Tuner:
    """Params decay at a rate of their own, which moves too; the score is what is left of them."""

    def step(state, split):
        rate = state.hparams
        state = hj.TunerState(rate * 0.9 + 0.05, (), state.carry * rate)
        score = jnp.sum(state.carry**2)
        return state, hj.Metrics(score, rate, jnp.zeros(()), jnp.isfinite(score), ())

    return hj.Tuner(lambda params, hparams: hj.TunerState(hparams, (), params), step)


def over(count: int) -> Mesh | None:
    if count == 1:
        return None
    axes = (AxisType.Auto,)
    return jax.make_mesh((count,), ("member",), axis_types=axes, devices=jax.devices()[:count])


def population(count: int) -> hj.Tuner:
    rule = hj.exchange.truncation(0.25, lambda key, h: h, every=2)
    return hj.population(member(), rule, mesh=over(count))


def start(count: int):
    """Placed where the population of so many devices has it."""
    rng = np.random.default_rng(0)
    weights, rates = rng.normal(size=(SIZE, 3)), rng.uniform(0.2, 0.9, SIZE)
    state = population(count).init(jax.random.key(1), jnp.asarray(weights), jnp.asarray(rates))
    mesh = over(count)
    if mesh is None:
        return state
    place = lambda tree, *axes: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))
    return place(state)._replace(members=place(state.members, "member"))


def bits(tree) -> list[bytes]:
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(plain(x)).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(("before", "after"), [(8, 2), (1, 4), (4, 1)])
def test_on_other_devices(tmp_path, before, after):
    # Each member is computed alone, on whichever device, so that even the last bits are the same.
    advance = lambda count, state: jax.jit(population(count).step)(state, None)[0]
    state = start(before)
    for _ in range(3):  # the exchange takes place at the second and the fourth
        state = advance(before, state)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest == 3
        restored = checkpoints.restore(3, start(after))
    assert bits(restored) == bits(state)
    for leaf in jax.tree.leaves(restored.members):
        assert len({str(shard.index) for shard in leaf.addressable_shards}) == after
    assert bits(advance(after, restored)) == bits(advance(before, state))


def test_the_last_two_are_kept(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest is None
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.full(2, float(step))})
        assert checkpoints.latest == 3
        like = {"x": jnp.zeros(2)}
        assert checkpoints.restore(2, like)["x"].tolist() == [2.0, 2.0]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
