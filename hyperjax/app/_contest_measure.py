"""How estimators are measured: compiled one by one, called by turns on the same draws."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from .._inner import InnerState
from .._planned import Plan
from .._tree import size
from .._types import Batch, Batches, HParams, Key, Split
from ..tasks import Task
from ._check_problem import Problem, cast, first_line, make_problem
from ._contest_case import Case, Contestant, Facts, describe, report
from ._errors import AppError
from ._grid import quantity

_TURNS = 5  # least number of timed calls


class Sample(NamedTuple):
    """One draw."""

    start: InnerState
    train: Batches
    whole: Batch
    key: Key


@dataclass
class Entry:
    """A contestant on its way: what is known of it so far."""

    contestant: Contestant
    refused: str = ""
    program: Callable | None = None
    prepare: Callable | None = None
    compile_seconds: float | None = None
    bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    grads: list[np.ndarray] = field(default_factory=list)
    infos: list[dict[str, float | str]] = field(default_factory=list)


class Stage(NamedTuple):
    """A task at its initial setting, and how to draw samples of it."""

    task: Task
    problem: Problem
    raw: HParams
    valid: Batch
    sample: Callable[[int], Sample]
    shapes: Sample  # of any sample
    facts: Facts

    def case(self, raw: HParams, sample: Sample, valid: Batch) -> Case:
        split = Split(sample.train, valid)
        budget = self.facts.budget
        return Case(self.problem, sample.start, raw, split, sample.whole, sample.key, budget)

    def arguments(self, sample: Sample) -> tuple[HParams, Sample, Batch]:
        return self.raw, sample, self.valid


def make_stage(
    task: Task, steps: int, warmup: int, seed: int, double: bool, budget: int | None
) -> Stage:
    convert = (lambda tree: cast(tree, jnp.float64)) if double else (lambda tree: tree)
    problem, raw = make_problem(task), convert(task.space.init())
    step = problem.training.step

    def draw(key: Key) -> Sample:
        init, early, now, whole, own = jax.random.split(key, 5)
        state = problem.training.init(convert(task.init(init)), raw)
        if warmup:
            batches = convert(task.batches(early, warmup))
            state, _ = jax.lax.scan(lambda s, b: (step(s, raw, b), None), state, batches)
        train = convert(task.batches(now, steps))
        return Sample(state, train, convert(task.whole(whole)), own)

    compiled = jax.jit(draw)
    sample = lambda k: compiled(jax.random.fold_in(jax.random.key(seed), k))
    shapes = jax.eval_shape(compiled, jax.random.key(seed))
    plain, values = ravel_pytree(raw)[0], ravel_pytree(task.space.constrain(raw))[0]
    facts = Facts(
        steps, plain.size, size(shapes.start.params), bool(jnp.array_equal(plain, values)), budget
    )
    return Stage(task, problem, raw, convert(task.valid), sample, shapes, facts)


def enter(stage: Stage, contestant: Contestant, tell: Callable[[str], object]) -> Entry:
    """Compile it, unless it does not apply."""
    refused = contestant.refuse(stage.facts)
    if refused:
        return Entry(contestant, refused)
    tell(f"compiling {contestant.name}")

    def run(raw, sample, valid, memory):
        result = contestant.run(stage.case(raw, sample, valid), memory)
        return ravel_pytree(result.grad)[0], report(result.info)

    arguments, prepare, memory = stage.arguments(stage.shapes), None, None
    try:
        if contestant.prepare is not None:
            first = contestant.prepare
            prepare = jax.jit(lambda *args: first(stage.case(*args)))
            memory = jax.eval_shape(prepare, *arguments)
        began = time.perf_counter()
        program = jax.jit(run).lower(*arguments, memory).compile()
        seconds = time.perf_counter() - began
    except Exception as error:  # a task's code may fail in any way under a transformation
        return Entry(contestant, f"{type(error).__name__}: {first_line(error)}")
    budget, stats = stage.facts.budget, program.memory_analysis()
    planned = None if stats is None else int(stats.temp_size_in_bytes)
    if budget is not None and planned is not None and planned > budget:
        refused = f"needs {quantity(planned)}, above the budget of {quantity(budget)}"
    return Entry(contestant, refused, program, prepare, seconds, planned)


def pick_reference(entries: list[Entry]) -> Entry:
    for entry in entries:
        if entry.contestant.exact and not entry.refused:
            return entry
    tried = [f"{e.contestant.name} ({e.refused})" for e in entries if e.contestant.exact]
    raise AppError(
        "no exact hypergradient to compare with: " + "; ".join(tried or ["none was entered"])
        + ". Take fewer steps, or a larger budget."
    )  # fmt: skip


def measure(stage: Stage, entries: list[Entry], draws: int) -> None:
    """Draw after draw, in which each has its turn."""
    for turn in range(max(draws, _TURNS)):
        sample = stage.sample(turn)
        for entry in entries:
            if entry.refused:
                continue
            try:
                _turn(stage, entry, sample, turn < draws)
            except Exception as error:  # memory that runs out has no type of its own
                entry.refused = f"failed on draw {turn + 1}: {first_line(error)}"


def _turn(stage: Stage, entry: Entry, sample: Sample, counts: bool) -> None:
    program = entry.program
    assert program is not None
    arguments = stage.arguments(sample)
    memory = None if entry.prepare is None else entry.prepare(*arguments)
    call = lambda: jax.block_until_ready(program(*arguments, memory))
    if not entry.seconds:
        call()  # the first call of a program is slower
    jax.block_until_ready((arguments, memory))
    began = time.perf_counter()
    grad, info = call()
    entry.seconds.append(time.perf_counter() - began)
    if counts:
        entry.grads.append(np.asarray(grad))
        plain = lambda x: describe(x) if isinstance(x, Plan) else float(x)
        entry.infos.append({name: plain(x) for name, x in info.items()})
