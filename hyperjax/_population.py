"""Populations: many members at once, each with its own hyperparameters."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from . import _checks, _tree
from ._types import Exchange, HParams, Key, Params, PyTree, Scalar, Split, State, Tuner


class PopulationState(NamedTuple):
    members: State  # leaves [P, ...]
    exchange: PyTree
    key: Key


class PopulationMetrics(NamedTuple):
    value: Scalar  # the best score among the members, so that a population can be a member too
    finite: jax.Array  # whether any member's score was
    members: PyTree  # metrics of every member, [P, ...]
    events: PyTree  # what the exchange did


def population(
    tuner: Tuner,
    exchange: Exchange,
    *,
    chunk: int | Literal["auto"] = "auto",
    mesh: Mesh | None = None,
) -> Tuner:
    """A tuner of P members, each stepped by `tuner`, that then exchange.

    `init(key, params, hparams) -> PopulationState` with leaves [P, ...] in both trees. `step`
    gives all members the same split, so that their scores differ by their own doing and not by
    the luck of the draw (common random numbers). A population is itself a tuner, and vmaps.

    Args:
      chunk: members stepped at once; the others wait. On a CPU small models run fastest one by
        one, because the weights of one member stay in the cache; an accelerator wants all of them.
        "auto" is 1 on CPU and all elsewhere.
      mesh: a mesh with one axis over which members are split, an equal share per device. Only the
        exchange communicates.

    Raises ValueError for an empty population, leaves that disagree on P, or a P that the devices
    do not divide.
    """
    _checks.has_functions("population", "tuner", tuner, ("init", "step"))
    _checks.has_functions("population", "exchange", exchange, ("init", "apply"))
    if chunk != "auto":
        _checks.positive_int("population", "chunk", chunk)
    if mesh is not None and len(mesh.axis_names) != 1:
        raise ValueError(
            f"population: `mesh` must have one axis, for members; got {mesh.axis_names}."
        )

    def init(key: Key, params: Params, hparams: HParams) -> PopulationState:
        _count_members((params, hparams), mesh)
        members = jax.vmap(tuner.init)(params, hparams)
        return PopulationState(members, _tree.strong(exchange.init(members)), key)

    def step(state: PopulationState, split: Split) -> tuple[PopulationState, PopulationMetrics]:
        members, metrics = _step_members(tuner.step, chunk, mesh)(state.members, split)
        key, now = jax.random.split(state.key)
        score = jnp.where(metrics.finite, metrics.value, jnp.nan)
        members, xstate, events = exchange.apply(now, state.exchange, members, score)
        sound = jnp.isfinite(score)
        best = jnp.where(sound.any(), jnp.where(sound, score, jnp.inf).min(), jnp.nan)
        metrics = PopulationMetrics(best, sound.any(), metrics, events)
        return PopulationState(members, xstate, key), metrics

    return Tuner(init, step)


def _step_members(step, chunk, mesh):
    """`step` over the leading axis of the members, in chunks, on every device of the mesh."""

    def local(members, split):
        size = jax.tree.leaves(members)[0].shape[0]
        at_once = chunk
        if chunk == "auto":
            at_once = 1 if jax.default_backend() == "cpu" else size
        if at_once >= size:
            return jax.vmap(step, in_axes=(0, None))(members, split)
        one = lambda member: step(member, split)
        return lax.map(one, members, batch_size=None if at_once == 1 else at_once)

    if mesh is None:
        return local
    spread, same = PartitionSpec(mesh.axis_names[0]), PartitionSpec()
    return jax.shard_map(local, mesh=mesh, in_specs=(spread, same), out_specs=spread)


def _count_members(trees: PyTree, mesh: Mesh | None) -> int:
    named = jax.tree_util.tree_leaves_with_path(trees)
    sizes = {jnp.shape(x)[:1] for _, x in named}
    if len(sizes) != 1 or () in sizes:
        listing = ", ".join(f"{_checks.path(k[1:])}: {_checks.describe(x)}" for k, x in named)
        raise ValueError(
            f"population: every leaf of `params` and `hparams` needs the same leading axis, one "
            f"entry per member; got {listing}. Make members with `jax.vmap(init)(keys)`."
        )
    ((size,),) = sizes
    if size == 0:
        raise ValueError("population: no members (leading axis 0); pass at least one.")
    devices = 1 if mesh is None else mesh.size
    if size % devices:
        below = size - size % devices
        either = f"{below} or {below + devices}" if below else f"{devices}"
        raise ValueError(
            f"population: {size} members cannot be shared equally by {devices} devices; take "
            f"{either} members."
        )
    return size
