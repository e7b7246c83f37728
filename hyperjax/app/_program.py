"""The outer loop: Python over compiled chunks of updates, all studies and members at once."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._forecast import Forecast, read_forecast
from .._layout import Layout
from .._space import Space
from .._tuner import Metrics
from .._types import Split
from ..exchange import Events
from ..tasks import Task
from ._methods import Method
from ._settings import Settings

Array = jax.Array | np.ndarray


@dataclass(frozen=True)
class History:
    """What every member did at every update; arrays lead with [T, S, P]."""

    value: Array  # validation score reached
    values: Array  # [T, S, P, D] constrained hyperparameters in force
    grad_norm: Array
    finite: Array
    parents: Array  # int32: the slot whose state each slot holds afterwards
    diverged: Array
    residual: Array  # of the adjoint solve; NaN where nothing is solved
    curvature: Array

    @property
    def steps(self) -> int:
        return len(self.value)

    def join(self, other: "History") -> "History":
        pairs = zip(self.arrays(), other.arrays(), strict=True)
        return History(*[np.concatenate(pair) for pair in pairs])

    def arrays(self) -> list[Array]:
        return [getattr(self, name) for name in self.__dataclass_fields__]


def empty_history(settings: Settings, names: int, steps: int = 0) -> History:
    """The history of `steps` updates with nothing in it: shapes and types for a checkpoint."""
    lead = (steps, settings.seeds, settings.members)
    real = np.zeros(lead, np.float32)
    flag = np.zeros(lead, bool)
    values = np.zeros((*lead, names), np.float32)
    return History(real, values, real, flag, np.zeros(lead, np.int32), flag, real, real)


class Program(NamedTuple):
    """A chunk of updates, compiled. The state is donated."""

    advance: Callable[[Any, int], tuple[Any, History]]
    start: Callable[[], Any]  # the state before the first update
    compile_seconds: float
    forecast: Forecast | None  # bytes on each device; not every backend has one
    layout: Layout  # of the members of one study


def study_keys(settings: Settings) -> jax.Array:
    """One key per study, [S]: everything random about a study follows from its seed."""
    return jax.vmap(jax.random.key)(jnp.arange(settings.seed, settings.seed + settings.seeds))


def compile_program(task: Task, method: Method, settings: Settings, mesh: Mesh | None) -> Program:
    """Lower and compile one chunk for all studies, and say how long that took."""
    keys = study_keys(settings)

    def update(state, key, t):
        # Data depends on the study and the step alone, so that nothing random is in a checkpoint.
        train = method.draw(jax.random.fold_in(key, t + 1), settings.every)
        return method.tuner.step(state, Split(train, task.valid))

    def chunk(state, first):
        def body(state, t):
            return jax.vmap(update, (0, 0, None))(state, keys, t)

        state, metrics = jax.lax.scan(body, state, first + jnp.arange(settings.updates_per_call))
        history = _history(task.space, metrics.members, metrics.events)
        return state, (history.arrays(), metrics.layout)

    def begin():
        return jax.vmap(lambda key: method.start(jax.random.fold_in(key, 0)))(keys)

    began = time.perf_counter()
    shardings = _shardings(jax.eval_shape(begin), mesh)
    start = jax.jit(begin, out_shardings=shardings)
    # The history goes to every device, so that every process can read it.
    logs = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    program = jax.jit(
        chunk, donate_argnums=0, in_shardings=(shardings, None), out_shardings=(shardings, logs)
    )
    lowered = program.lower(jax.eval_shape(start), np.int32(0))
    compiled, layout = lowered.compile(), lowered.out_info[1][1]
    seconds = time.perf_counter() - began

    def advance(state, first: int) -> tuple[Any, History]:
        state, (arrays, _) = compiled(state, np.int32(first))
        return state, History(*[np.asarray(x) for x in arrays])

    forecast = None if compiled.memory_analysis() is None else read_forecast(compiled)
    return Program(advance, start, seconds, forecast, layout)


def _history(space: Space, members: Metrics, events: Events) -> History:
    solve = getattr(members.info, "solve", None)
    missing = jnp.full_like(members.value, jnp.nan)
    return History(
        value=members.value,
        values=space.ravel(space.constrain(members.hparams)),
        grad_norm=members.grad_norm,
        finite=members.finite,
        parents=events.parents,
        diverged=events.diverged,
        residual=missing if solve is None else solve.residual,
        curvature=missing if solve is None else solve.curvature,
    )


def _shardings(state, mesh: Mesh | None):
    """Members over the mesh, the rest on every device; None without a mesh."""
    if mesh is None:
        return None
    same = NamedSharding(mesh, PartitionSpec())
    spread = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names[0]))  # leaves [S, P, ...]
    everywhere = jax.tree.map(lambda _: same, state)
    return everywhere._replace(members=jax.tree.map(lambda _: spread, state.members))


class Progress(NamedTuple):
    """One chunk done."""

    state: Any
    history: History  # of this chunk
    first: int  # its first update
    seconds: float


def chunks(program: Program, settings: Settings, state: Any, first: int) -> Iterator[Progress]:
    """Advance to the last update."""
    while first < settings.updates:
        began = time.perf_counter()
        state, history = program.advance(state, first)
        yield Progress(state, history, first, time.perf_counter() - began)
        first += settings.updates_per_call
