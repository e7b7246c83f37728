"""Populations: many members at once, each with its own hyperparameters."""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh

from . import _checks, _layout, _tree
from ._layout import Batching, Chunk, Layout, Place
from ._types import Exchange, HParams, Key, Params, PyTree, Scalar, Split, State, Tuner


class Limit(NamedTuple):
    """How long each member goes on, and where it stood last."""

    left: jax.Array  # int32 [P]: steps that it may still take
    value: jax.Array  # [P]: its last score, NaN if that or its hypergradient was not finite


class PopulationState(NamedTuple):
    """All members, and what their exchange remembers."""

    members: State  # leaves [P, ...]
    exchange: PyTree
    key: Key
    limit: Limit | None = None  # None: all go on for ever


class PopulationMetrics(NamedTuple):
    """One outer step of a population, for the eye."""

    value: Scalar  # the best score among the members, so that a population can be a member too
    finite: jax.Array  # whether any member's score was
    members: PyTree  # metrics of every member, [P, ...]
    events: PyTree  # what the exchange did
    layout: Layout  # where the members were and how many were stepped at once; static, no leaves


def population(
    tuner: Tuner,
    exchange: Exchange,
    *,
    chunk: Chunk = "auto",
    mesh: Place = None,
    batches: Batching = "shared",
    axis_name: Hashable | None = None,
) -> Tuner:
    """A tuner of P members, each stepped by `tuner`, that then exchange.

    `init(key, params, hparams, steps=None) -> PopulationState` with leaves [P, ...] in both trees.
    A population is itself a tuner, and vmaps. `PopulationMetrics.layout` says what "auto" chose,
    and why.

    With `steps`, integers [P], member i takes its first `steps[i]` steps only. From then on its
    state keeps every bit, whatever the exchange would do to it, and its last score counts, so that
    others may still copy from it. Its other metrics are those of a step that was thrown away: a
    finished member costs as much as one that goes on.

    The state holds no array twice and none of the caller's, so that it may be donated:
    `jax.jit(population.step, donate_argnums=0)`.

    Args:
      chunk: members stepped at once on a device; the others wait. "auto" on a CPU is as many as
        have their state in a core's cache, often one; an accelerator gets all of them. The number
        need not divide the members. See `fastest_chunk` and `largest_fit` to measure instead.
      mesh: where members are shared out, equally, along its first axis; further axes are the
        compiler's, for data inside a member. Its axes are of type Auto. Only the exchange
        communicates. None: where the arrays are, as everywhere in JAX. "auto": as many devices of
        this process as share the members equally, or none where a mesh is in force already; then
        no other argument of a program may be committed to other devices, nor a second population
        in it take another number of them.
        A CPU is one device unless told, before the first use of JAX, to be one per core:
        `jax.config.update("jax_num_cpu_devices", os.cpu_count())`, and then best
        `jax.config.update("jax_cpu_enable_async_dispatch", False)`, as two programs at a time can
        wait for each other's threads. Members are stepped inside `jax.shard_map`, where a scan or
        loop of the caller's must start from a carry that varies as its result does.
      batches: "shared" gives all members the same split, so that their scores differ by their own
        doing and not by the luck of the draw (common random numbers); "own" takes splits whose
        leaves have one more axis in front, [P, ...].
      axis_name: a name for the axis of all members, wherever they are, for collectives in the
        caller's functions such as `lax.pmean(gradient, axis_name)`. There are no chunks then.

    Raises ValueError for an empty population, leaves that disagree on P, a P that the devices do
    not divide, a chunk beside an `axis_name`, or `steps` that are not P integers >= 1.
    """
    _check_arguments(tuner, exchange, chunk, mesh, batches, axis_name)

    def init(
        key: Key, params: Params, hparams: HParams, steps: jax.Array | None = None
    ) -> PopulationState:
        size = _count_members((params, hparams), mesh)
        devices = _layout.resolve_mesh(mesh, size)
        members = jax.vmap(tuner.init, axis_name=axis_name)(params, hparams)
        limit = None if steps is None else _start_limit(steps, size)
        state = PopulationState(members, _tree.strong(exchange.init(members)), key, limit)
        return _place(jax.tree.map(jnp.copy, state), devices)

    def step(state: PopulationState, split: Split) -> tuple[PopulationState, PopulationMetrics]:
        size = jnp.shape(jax.tree.leaves(state.members)[0])[0]
        if batches == "own":
            _check_batches(split, size)
        devices = _layout.resolve_mesh(mesh, size)
        layout = _layout.make_layout(state.members, chunk, devices, axis_name)
        advance = _layout.step_members(tuner.step, layout, devices, axis_name, batches)
        members, metrics = advance(state.members, split)
        members, metrics, limit = _hold(state, members, metrics)
        key, now = jax.random.split(state.key)
        score = jnp.where(metrics.finite, metrics.value, jnp.nan)
        exchanged, xstate, events = exchange.apply(now, state.exchange, members, score)
        members, events = _keep(limit, members, exchanged, events)
        sound = jnp.isfinite(score)
        best = jnp.where(sound.any(), jnp.where(sound, score, jnp.inf).min(), jnp.nan)
        after = _place(PopulationState(members, xstate, key, limit), devices)
        return after, PopulationMetrics(best, sound.any(), metrics, events, layout)

    return Tuner(init, step)


def _place(state: PopulationState, mesh: Mesh | None) -> PopulationState:
    """The same places before and after a step, or a compiled step would not fit its own result."""
    rest = _layout.everywhere(state._replace(members=()), mesh)
    return rest._replace(members=_layout.spread(state.members, mesh))


# ----------------------------------------------------------------- members that have finished


def _start_limit(steps, size: int) -> Limit:
    known = _checks.entries(steps)
    whole = jnp.issubdtype(jnp.result_type(steps), jnp.integer)
    if not whole or jnp.shape(steps) != (size,) or (known is not None and (known < 1).any()):
        raise ValueError(
            f"population: `steps` must be {size} integers >= 1, one per member; got "
            f"{_checks.describe(steps) if known is None else known}. "
            f"For the same for all: `jnp.full({size}, n)`."
        )
    return Limit(jnp.asarray(steps, jnp.int32), jnp.full(size, jnp.nan, float))


def _hold(state: PopulationState, members: State, metrics: PyTree):
    """Members that have no steps left as they were, with the score they had."""
    limit = state.limit
    if limit is None:
        return members, metrics, None
    active = limit.left > 0
    now = jnp.where(metrics.finite, metrics.value, jnp.nan).astype(limit.value.dtype)
    value = jnp.where(active, now, limit.value)
    last = limit.value.astype(metrics.value.dtype)
    metrics = metrics._replace(
        value=jnp.where(active, metrics.value, last),
        finite=jnp.where(active, metrics.finite, jnp.isfinite(last)),
    )
    left = jnp.maximum(limit.left - 1, 0)
    return _tree.where(active, members, state.members), metrics, Limit(left, value)


def _keep(limit: Limit | None, members: State, exchanged: State, events: PyTree):
    """What was exchanged, but for members that have taken their last step."""
    if limit is None:
        return exchanged, events
    active = limit.left > 0
    if hasattr(events, "parents"):
        own = jnp.arange(active.shape[0], dtype=events.parents.dtype)
        events = events._replace(parents=jnp.where(active, events.parents, own))
    return _tree.where(active, exchanged, members), events


# ------------------------------------------------------------------------------------- checks


def _check_arguments(tuner, exchange, chunk, mesh, batches, axis_name) -> None:
    _checks.has_functions("population", "tuner", tuner, ("init", "step"))
    _checks.has_functions("population", "exchange", exchange, ("init", "apply"))
    _checks.one_of("population", "batches", batches, ("shared", "own"))
    if chunk != "auto":
        _checks.positive_int("population", "chunk", chunk)
        if axis_name is not None:
            raise ValueError(
                f"population: `chunk` must be 'auto' with `axis_name`, as members that share an "
                f"axis are stepped together; got {chunk}. Leave it out."
            )
    if isinstance(mesh, str):
        _checks.one_of("population", "mesh", mesh, ("auto",))
    elif mesh is not None and any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"population: the axes of `mesh` must be of type Auto; got {mesh.axis_types}. Make it "
            f"with `jax.make_mesh({mesh.axis_sizes}, {mesh.axis_names}, "
            f"(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)})`."
        )


def _check_batches(split: Split, size: int) -> None:
    faults = [
        f"{_checks.path(k)}: {_checks.describe(x)}"
        for k, x in jax.tree_util.tree_leaves_with_path(split)
        if jnp.shape(x)[:1] != (size,)
    ]
    if faults:
        raise ValueError(
            f"population: with batches='own' every leaf of `split` needs a leading axis of {size} "
            f"members; got {', '.join(faults)}. Without `batches` all members share a split."
        )


def _count_members(trees: PyTree, mesh: Place) -> int:
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
    devices = 1 if mesh == "auto" else _layout.device_count(mesh)
    if size % devices:
        below = size - size % devices
        either = f"{below} or {below + devices}" if below else f"{devices}"
        raise ValueError(
            f"population: {size} members cannot be shared equally by {devices} devices; take "
            f"{either} members."
        )
    return size
