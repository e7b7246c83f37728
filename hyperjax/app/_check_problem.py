"""What the parts of `hyperjax check` look at: a task as functions of raw hyperparameters."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._inner import Inner, InnerState, inner
from .._space import Space
from .._types import Batch, HParams, Loss, Params, PyTree, Split
from ..tasks import Task


class Problem(NamedTuple):
    """A task's functions, with raw instead of constrained hyperparameters."""

    space: Space
    loss: Loss
    score: Loss
    optimizer: Callable[[HParams], optax.GradientTransformation]
    training: Inner


class Point(NamedTuple):
    """Where the functions are looked at."""

    params: Params
    raw: HParams
    split: Split  # as many minibatches as steps are looked at
    whole: Batch

    @property
    def steps(self) -> int:
        return jax.tree.leaves(self.split.train)[0].shape[0]


def make_problem(task: Task) -> Problem:
    """The functions of a task."""
    optimizer = lambda raw: task.optimizer(task.space.constrain(raw))
    loss, score = task.space.lift(task.loss), task.space.lift(task.score)
    return Problem(task.space, loss, score, optimizer, inner(loss, optimizer))


def make_point(task: Task, steps: int, seed: int) -> Point:
    """The initial setting, with `steps` minibatches."""
    init, batches, whole = jax.random.split(jax.random.key(seed), 3)
    split = Split(task.batches(batches, steps), task.valid)
    return Point(task.init(init), task.space.init(), split, task.whole(whole))


def cast(tree: PyTree, dtype) -> PyTree:
    """`tree` with its floating-point leaves in `dtype`."""

    def one(x):
        x = jnp.asarray(x)
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


def leaves(prefix: str, tree: PyTree) -> list[tuple[str, jax.Array]]:
    """(path, leaf) of every floating-point leaf, with the path as one writes it in Python."""
    return [
        (prefix + jax.tree_util.keystr(keys), x)
        for keys, x in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]


def hparam_names(tree: HParams) -> list[str]:
    """The names of the leaves of hyperparameters, without those of their entries."""
    return [
        jax.tree_util.keystr(keys, simple=True, separator=".") or "value"
        for keys, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def setting(space: Space, raw: HParams) -> str:
    """`lr=0.02, momentum=0.5, ...`: constrained values, as many as fit in a line."""
    values = np.asarray(space.ravel(space.constrain(raw)))
    pairs = [f"{name}={value:.3g}" for name, value in zip(space.names, values, strict=True)]
    return ", ".join(pairs[:6]) + (", ..." if len(pairs) > 6 else "")


def number(value) -> float | None:
    """A float for JSON, which knows neither NaN nor infinity."""
    value = float(value)
    return value if math.isfinite(value) else None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_steps(problem: Problem, point: Point, raw: HParams, count: jax.Array) -> InnerState:
    """The state after the first `count` steps; `count` may be traced.

    The later steps are left out by `cond`, since the derivative of a masked step would still be
    computed and a NaN in it would not be masked by a product with zero.
    """

    def body(state, now):
        t, batch = now
        run = lambda s: problem.training.step(s, raw, batch)
        return jax.lax.cond(t < count, run, lambda s: s, state), None

    start = problem.training.init(point.params, raw)
    steps = (jnp.arange(point.steps), point.split.train)
    return jax.lax.scan(body, start, steps)[0]
