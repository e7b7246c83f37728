"""Where the members of a population lie and how many are stepped at once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from . import _checks
from ._types import PyTree, Split, State

Chunk: TypeAlias = int | Literal["auto"]
Place: TypeAlias = Mesh | Literal["auto"] | None
Batching: TypeAlias = Literal["shared", "own"]

# State of the members at once for which a core of the machine in benchmarks/population_speed.py
# (1 MiB of second-level cache) was fastest: less leaves it to dispatch, more to memory.
_CACHE_BYTES = 384 * 1024
_MOST_ON_CPU = 64

_ONE_DEVICE = (
    'one CPU device; `jax.config.update("jax_num_cpu_devices", os.cpu_count())` before the first '
    'use of JAX, and mesh="auto", use every core'
)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Layout:
    """How a population is stepped, and why. A pytree without leaves."""

    members: int
    devices: int
    chunk: int  # members at once on a device
    member_bytes: int  # state of one member
    why: str

    def __str__(self) -> str:
        plural = "s" * (self.devices > 1)
        return (
            f"{self.members} members on {self.devices} device{plural}, {self.chunk} at once on "
            f"each: {self.why}"
        )


def make_layout(members: State, chunk: Chunk, mesh: Mesh | None, axis_name: Any) -> Layout:
    """From shapes and the backend alone; leaves [P, ...]."""
    leaves = jax.tree.leaves(members)
    size = jnp.shape(leaves[0])[0]
    devices = device_count(mesh)
    here = size // devices
    member_bytes = sum(_bytes(x) for x in leaves) // size
    if axis_name is not None:
        at_once, why = here, f"all of them share the axis {axis_name!r}"
    elif chunk != "auto":
        at_once, why = min(chunk, here), "as asked for"
    elif _platform(mesh) != "cpu":
        at_once, why = here, "an accelerator wants all of them"
    else:
        at_once = _cached(here, member_bytes)
        where = "in" if at_once * member_bytes <= _CACHE_BYTES else "larger than"
        why = f"a state of {member_bytes:,} bytes, {where} the cache of a core"
    there = jax.local_device_count()
    if devices == 1 and _sharing(size, there) > 1:
        why += f"; {there} devices are there, which mesh='auto' shares the members among"
    elif devices == 1 and there == 1 and size > 1 and jax.default_backend() == "cpu":
        why += f"; {_ONE_DEVICE}"
    return Layout(size, devices, at_once, member_bytes, why)


def _platform(mesh: Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _cached(size: int, member_bytes: int) -> int:
    """The largest chunk within the cache; rather one that leaves no rest, if it is not far off."""
    most = max(1, min(size, _MOST_ON_CPU, _CACHE_BYTES // max(member_bytes, 1)))
    even = max(n for n in range(1, most + 1) if size % n == 0)
    return even if 2 * even >= most else most


def _bytes(x) -> int:
    return jnp.size(x) * jnp.result_type(x).itemsize


def resolve_mesh(mesh: Place, size: int) -> Mesh | None:
    """The mesh that was passed; "auto" is as many local devices as share `size` members equally.

    It stays out of the way of whoever has a mesh in force already, and of several processes.
    """
    if mesh != "auto":
        return mesh
    if jax.process_count() > 1 or not jax.sharding.get_abstract_mesh().empty:
        return None
    devices = jax.local_devices()
    count = _sharing(size, len(devices))
    if count == 1:
        return None
    return jax.make_mesh((count,), ("member",), (AxisType.Auto,), devices=devices[:count])


def _sharing(size: int, devices: int) -> int:
    """The most of these devices that share `size` members equally."""
    return max(n for n in range(1, devices + 1) if size % n == 0)


def device_count(mesh: Mesh | None) -> int:
    """Devices along the axis of the members, the first one."""
    return 1 if mesh is None else mesh.shape[mesh.axis_names[0]]


def spread(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Leaves [P, ...], a share of them on each device."""
    return _constrain(tree, mesh, lambda mesh: PartitionSpec(mesh.axis_names[0]))


def everywhere(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Leaves that every device has."""
    return _constrain(tree, mesh, lambda mesh: PartitionSpec())


def _constrain(tree, mesh, spec):
    if mesh is None:
        return tree
    place = NamedSharding(mesh, spec(mesh))
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, place), tree)


def step_members(
    step: Callable, layout: Layout, mesh: Mesh | None, axis_name: Any, batches: Batching
) -> Callable[[State, Split], tuple[State, PyTree]]:
    """`step` over the leading axis of the members, in chunks, on every device of the mesh."""
    own = batches == "own"
    axes = (0, 0 if own else None)

    def local(members, split):
        # One by one without a vmap, which would turn every product into a batched one.
        size = None if layout.chunk == 1 else layout.chunk
        if size and layout.chunk * layout.devices >= layout.members:
            return jax.vmap(step, in_axes=axes)(members, split)
        if own:
            return lax.map(lambda pair: step(*pair), (members, split), batch_size=size)
        return lax.map(lambda member: step(member, split), members, batch_size=size)

    if axis_name is not None:
        # One vmap over the members of all devices, so that they share one axis whatever the
        # devices; the compiler shares it out.
        together = jax.vmap(step, in_axes=axes, axis_name=axis_name)
        return lambda members, split: together(spread(members, mesh), split)
    if mesh is None:
        return local
    lane = PartitionSpec(mesh.axis_names[0])
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(lane, lane if own else PartitionSpec()),
        out_specs=lane,
        axis_names={mesh.axis_names[0]},  # others are the compiler's, for data inside a member
    )


class FastestChunk(NamedTuple):
    """What was measured."""

    chunk: int
    seconds: Mapping[int, float]  # of one call, by chunk


def fastest_chunk(
    make: Callable[[int], Callable[[], PyTree]],
    candidates: Iterable[int],
    *,
    timer: Callable[[], float],
    repeats: int = 5,
) -> FastestChunk:
    """The chunk whose compiled program takes least time on this machine.

    `make(chunk)` returns a call without arguments, compiled: for example

        def make(chunk):
            pop = hj.population(tuner, exchange, chunk=chunk)
            program = jax.jit(pop.step).lower(state, split).compile()
            return lambda: program(state, split)

        best = hj.fastest_chunk(make, (1, 4, 16, 64), timer=time.perf_counter)

    Every candidate runs once to warm up and `repeats` times in turn with the others, so that what
    else the machine does meets all of them; the shortest time counts. For the host: not inside
    `jit`. Raises ValueError without candidates.
    """
    _checks.is_callable("fastest_chunk", "make", make)
    _checks.is_callable("fastest_chunk", "timer", timer)
    _checks.positive_int("fastest_chunk", "repeats", repeats)
    calls = {chunk: make(chunk) for chunk in candidates}
    if not calls:
        raise ValueError("fastest_chunk: `candidates` is empty; pass for example (1, 4, 16, 64).")
    seconds = dict.fromkeys(calls, float("inf"))
    for turn in range(repeats + 1):
        for chunk, call in calls.items():
            began = timer()
            jax.block_until_ready(call())
            if turn:
                seconds[chunk] = min(seconds[chunk], timer() - began)
    return FastestChunk(min(seconds, key=lambda chunk: seconds[chunk]), seconds)
