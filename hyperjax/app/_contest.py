"""`compare_estimators`: bias, variance, seconds and bytes of every estimator on one task."""

import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from .. import _checks
from .._types import HParams
from ..tasks import Task, check_task, get
from ._check_problem import hparam_names, number
from ._contest_case import Contestant
from ._contest_measure import Entry, Stage, enter, make_stage, measure, pick_reference
from ._contest_rule import Cost, Recommendation, Row, accuracy, draws_needed, price, recommend
from ._contestants import CONTESTANTS
from ._errors import AppError


class Reference(NamedTuple):
    """The mean over draws of an exact hypergradient, which biases are measured against."""

    name: str
    norm: float
    error: float  # standard error of the mean, in units of the norm; inf with one draw
    finite: int  # draws on which it is finite; the others count nowhere


class Comparison(NamedTuple):
    """What `compare_estimators` found."""

    task: str
    steps: int
    warmup: int
    draws: int
    hparams: int
    params: int
    precision: str
    tolerance: float
    budget: int | None
    reference: Reference
    rows: tuple[Row, ...]
    recommendation: Recommendation

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON; None where a number is not finite."""
        plain = _plain(self)
        for row, as_dict in zip(self.rows, plain["rows"], strict=True):
            as_dict["draws_needed"] = draws_needed(row, self.tolerance)
            as_dict["seconds_needed"] = price(row, self.tolerance)
        return plain


def compare_estimators(
    task: Task | str,
    *,
    steps: int = 60,
    draws: int = 8,
    warmup: int = 0,
    seed: int = 0,
    tolerance: float = 0.1,
    budget: int | None = None,
    precision: Literal["task", "float64"] = "task",
    contestants: Sequence[Contestant] = CONTESTANTS,
    data_dir: str | Path | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> Comparison:
    """Every estimator on your own problem: how wrong, how noisy, how slow and how large.

    All of them estimate one thing: the gradient, in raw hyperparameters at the task's initial
    setting, of the score after `steps` training steps from fresh parameters, in the mean over
    draws of parameters, minibatches and noise. The reference is the mean of the first exact
    contestant that compiles and fits, over the same draws as all others, so that the noise of
    draws cancels in a bias. Implicit differentiation and best responses differentiate something
    else than these steps; how far that is off here is what their bias says.

    Args:
      task: a task, "digits", or "package.module:task".
      draws: K. Standard errors fall with its root. Evolution strategies, whose own noise does not
        cancel, may need many for their bias to show.
      warmup: steps of training before, not differentiated, at the same hyperparameters: the
        window that a tuner sees which trains on instead of from the beginning.
      tolerance: in (0, 1), the relative error that the recommendation allows. 0.1 is an angle of
        at most 6 degrees, 0.3 one of 17.
      budget: bytes of temporary memory, as the compiler plans it. What is above is not run.
      precision: "task" is float32 unless the process has float64 switched on; "float64" switches
        it on here, for a task that lets it.
      contestants: `CONTESTANTS`, a part of it, or your own beside it.
      tell: called with a line about what is being done.

    Seconds are medians of at least five calls, by turns, one member alone on the default device.

    Raises AppError for arguments out of range, an unusable task, or if no exact contestant
    compiles and fits the budget.
    """
    _check(steps, draws, warmup, tolerance, budget, precision, contestants)
    double = contextlib.nullcontext() if precision == "task" else jax.enable_x64(True)
    with double:
        task = _task(task, data_dir)
        stage = make_stage(task, steps, warmup, seed, precision == "float64", budget)
        entries = [enter(stage, c, tell) for c in contestants]
        exact = pick_reference(entries)
        tell(f"measuring on {draws} draws")
        measure(stage, entries, draws)
    if exact.refused:
        raise AppError(f"the reference, {exact.contestant.name}, {exact.refused}.")
    rows, reference = _judge(stage, entries, exact)
    return Comparison(
        task=task.name,
        steps=steps,
        warmup=warmup,
        draws=draws,
        hparams=stage.facts.hparams,
        params=stage.facts.params,
        precision=str(exact.grads[0].dtype),
        tolerance=tolerance,
        budget=budget,
        reference=reference,
        rows=rows,
        recommendation=recommend(rows, tolerance),
    )


def _check(steps, draws, warmup, tolerance, budget, precision, contestants) -> None:
    where = "compare_estimators"
    try:
        for name, value, least in (("steps", steps, 1), ("draws", draws, 1), ("warmup", warmup, 0)):
            _checks.positive_int(where, name, value, least=least)
        _checks.one_of(where, "precision", precision, ("task", "float64"))
        _checks.number(where, "tolerance", tolerance, positive=True)
        if budget is not None:
            _checks.positive_int(where, "budget", budget)
    except ValueError as error:
        raise AppError(str(error)) from error
    if tolerance >= 1:
        raise AppError(f"{where}: `tolerance` must be below 1, which 0 reaches; got {tolerance}.")
    names = [c.name for c in contestants]
    if len(set(names)) < len(names):
        raise AppError(f"{where}: `contestants` must have different names; got {names}.")


def _task(task: Task | str, data_dir: str | Path | None) -> Task:
    try:
        return get(task, data_dir=data_dir) if isinstance(task, str) else check_task(task)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise AppError(str(error)) from error


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return number(value)
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _judge(stage: Stage, entries: list[Entry], exact: Entry) -> tuple[tuple[Row, ...], Reference]:
    reference = np.stack(exact.grads).astype(np.float64)
    kept = np.asarray(np.isfinite(reference).all(1))
    count, name, leaves = int(kept.sum()), exact.contestant.name, _leaves(stage.raw)
    rows = tuple(_row(entry, reference, kept, leaves) for entry in entries)
    if not count:
        return rows, Reference(name, float("nan"), float("nan"), 0)
    own = accuracy(reference[kept], reference[kept], leaves, 0)
    norm = float(np.linalg.norm(reference[kept].mean(0)))
    return rows, Reference(name, norm, own.deviation / math.sqrt(count), count)


def _row(entry: Entry, reference: np.ndarray, kept: np.ndarray, leaves: dict[str, slice]) -> Row:
    row = Row(entry.contestant.name, entry.contestant.call, entry.contestant.note, entry.refused)
    if entry.compile_seconds is not None:
        seconds = statistics.median(entry.seconds) if entry.seconds else None
        row = row._replace(cost=Cost(seconds, entry.compile_seconds, entry.bytes))
    if entry.refused:
        return row
    info = {name: _mean([each[name] for each in entry.infos]) for name in entry.infos[0]}
    if not kept.any():
        return row._replace(refused="the reference is not finite on any draw", info=info)
    eps = float(np.finfo(entry.grads[0].dtype).eps)
    estimates = np.stack(entry.grads).astype(np.float64)
    found = accuracy(estimates[kept], reference[kept], leaves, eps)
    return row._replace(accuracy=found, info=info)


def _mean(values: list) -> float | str:
    return values[0] if isinstance(values[0], str) else float(np.mean(values))


def _leaves(raw: HParams) -> dict[str, slice]:
    """Name -> where its entries lie in the flat vector."""
    ends = np.cumsum([x.size for x in jax.tree.leaves(raw)]).tolist()
    return {
        name: slice(start, end)
        for name, start, end in zip(hparam_names(raw), [0, *ends[:-1]], ends, strict=True)
    }
