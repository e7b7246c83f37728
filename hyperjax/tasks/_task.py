"""A tuning problem as a value, and a check that says what is wrong with one."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._space import Space
from .._types import Batch, Batches, HParams, Key, Loss, Params

_STEPS = 3  # how many minibatches the check asks for

Result = TypeVar("Result")


class Task(NamedTuple):
    """A tuning problem: everything a tuner needs, nothing about how it tunes.

    All functions are pure. `hparams` are constrained values, as `space.constrain` returns them.
    The test batch is for one look at the very end of a study; no tuner reads it.
    """

    name: str
    init: Callable[[Key], Params]  # float leaves only
    loss: Loss  # inner: what training minimizes; its noise comes from keys in the batch
    score: Loss  # outer: what tuning minimizes; deterministic
    space: Space
    optimizer: Callable[[HParams], optax.GradientTransformation]
    batches: Callable[[Key, int], Batches]  # (key, steps) -> minibatches, leaves [steps, ...]
    whole: Callable[[Key], Batch]  # the training set in one batch, for implicit differentiation
    valid: Batch
    test: Batch
    evaluate: Callable[[Params, Batch], dict[str, jax.Array]]  # scalars, "loss" among them


def check_task(task: object) -> Task:
    """`task` itself if it is usable; otherwise an error of one line that names the first fault.

    Functions of parameters are traced with abstract values, and `loss` and `score` are computed
    once, at the initial hyperparameters. The test batch is never computed with, only traced.

    Raises TypeError where a field has the wrong type, ValueError where a function fails or returns
    something of the wrong shape, without a float, or not finite.
    """
    if not isinstance(task, Task):
        raise TypeError(
            f"a task must be a hyperjax.tasks.Task; got {type(task).__name__}. "
            "Build one with `Task(name=..., init=..., loss=..., ...)`."
        )
    where = f"task {task.name!r}"
    _check_fields(where, task)
    key = jax.random.key(0)
    hparams = task.space.constrain(task.space.init())
    params = _attempt(where, "`init(key)`", lambda: task.init(key))
    _check_params(where, params)
    batches = _attempt(where, f"`batches(key, {_STEPS})`", lambda: task.batches(key, _STEPS))
    _check_batches(where, batches)
    first = jax.tree.map(lambda x: x[0], batches)
    whole = _attempt(where, "`whole(key)`", lambda: task.whole(key))
    for name, function, label, batch in (
        ("loss", task.loss, "the first minibatch", first),
        ("loss", task.loss, "whole(key)", whole),
        ("score", task.score, "valid", task.valid),
        ("score", task.score, "test", task.test),
    ):
        _check_scalar(where, name, function, label, (params, hparams, batch))
    _check_optimizer(where, task, params, hparams)
    _check_evaluate(where, task, params)
    _check_finite(where, "loss", task.loss, "the first minibatch", (params, hparams, first))
    _check_finite(where, "score", task.score, "valid", (params, hparams, task.valid))
    return task


def _check_fields(where: str, task: Task) -> None:
    if not isinstance(task.name, str) or not task.name:
        raise TypeError(f"{where}: `name` must be a non-empty string.")
    for name in ("init", "loss", "score", "optimizer", "batches", "whole", "evaluate"):
        _checks.is_callable(where, name, getattr(task, name))
    if not isinstance(task.space, Space):
        raise TypeError(
            f"{where}: `space` must be a hyperjax Space; got {type(task.space).__name__}. "
            "Wrap the ranges: `hyperjax.space({'lr': hyperjax.loguniform(1e-4, 1.0)})`."
        )


def _check_params(where: str, params: Params) -> None:
    if not jax.tree.leaves(params):
        raise ValueError(f"{where}: `init(key)` returned no arrays; return the model parameters.")
    _checks.differentiable(where, "init(key)", params)


def _check_batches(where: str, batches: Batches) -> None:
    steps = _checks.count_steps(where, batches)
    if steps != _STEPS:
        raise ValueError(
            f"{where}: `batches(key, {_STEPS})` must return leaves with leading axis {_STEPS}, "
            f"one entry per step; got {steps}. Stack `steps` minibatches with `jnp.stack`."
        )


def _check_scalar(where: str, name: str, function: Loss, label: str, point: tuple) -> None:
    what = f"`{name}` on {label}"
    value = _attempt(where, what, lambda: jax.eval_shape(function, *point))
    if not _is_float_scalar(value):
        raise ValueError(
            f"{where}: {what} must be one real scalar; got {_describe(value)}. "
            "Take a mean over the batch, and return nothing beside it."
        )


def _check_finite(where: str, name: str, function: Loss, label: str, point: tuple) -> None:
    value = float(_attempt(where, f"`{name}` on {label}", lambda: jax.jit(function)(*point)))
    if not math.isfinite(value):
        raise ValueError(
            f"{where}: `{name}` on {label} is {value} at the initial parameters and "
            "hyperparameters; look for a logarithm or a division by zero in it, or in the data."
        )


def _check_optimizer(where: str, task: Task, params: Params, hparams: HParams) -> None:
    def updates(params, hparams):
        # Traced hyperparameters, because tuning differentiates and vectorizes over them.
        transformation = task.optimizer(hparams)
        return transformation.update(params, transformation.init(params), params)[0]

    got = _attempt(
        where,
        "`optimizer(hparams)` with traced hparams (an optax factory is needed; Python `if` and "
        "`float()` on hyperparameters are not possible)",
        lambda: jax.eval_shape(updates, params, hparams),
    )
    if jax.tree.map(jnp.shape, got) != jax.tree.map(jnp.shape, params):
        raise ValueError(
            f"{where}: the updates of `optimizer(hparams)` must have the structure and shapes of "
            "the parameters; return an optax.GradientTransformation."
        )


def _check_evaluate(where: str, task: Task, params: Params) -> None:
    what = "`evaluate` on valid"
    got = _attempt(where, what, lambda: jax.eval_shape(task.evaluate, params, task.valid))
    if not isinstance(got, dict) or "loss" not in got:
        keys = f"keys {sorted(got)}" if isinstance(got, dict) else type(got).__name__
        raise ValueError(f'{where}: {what} must return a dict with the key "loss"; got {keys}.')
    for name, value in got.items():
        if not _is_float_scalar(value):
            raise ValueError(
                f"{where}: {what} must return real scalars; got {_describe(value)} for {name!r}."
            )


def _attempt(where: str, what: str, call: Callable[[], Result]) -> Result:
    """The result of the user's code, or its error with the name of what was being tried."""
    try:
        return call()
    except Exception as error:
        raise ValueError(f"{where}: {what} raised {summary(error)}") from error


def summary(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def _is_float_scalar(value) -> bool:
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    return is_array and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating)


def _describe(value) -> str:
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    return _checks.describe(value) if is_array else type(value).__name__
