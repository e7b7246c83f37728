"""`hyperjax estimators`: the comparison as a table, as JSON, and in a folder."""

import json
import math
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from ..tasks import Task
from ._contest import Comparison, compare_estimators
from ._contest_plot import draw_comparison
from ._contest_rule import Row, draws_needed, duration, price
from ._errors import AppError
from ._folder import disk_error
from ._grid import grid, quantity
from ._output import Output
from ._plots_style import number, plural

_HEADER = ("estimator", "bias", "cosine", "deviation", "time", "compile s", "memory", "enough")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SHOWN = (
    "chosen",
    "residual",
    "curvature",
    "stationarity",
    "bound",
    "standard_error",
    "diverged",
    "decay",
)


def estimators(
    task: Task,
    out: Output,
    *,
    steps: int,
    draws: int,
    warmup: int,
    seed: int,
    tolerance: float,
    budget: str | None,
    precision: str,
    folder: Path | None,
) -> int:
    """Compare, print, and leave `estimators.json` and `estimators.png` in a folder; returns 0."""
    tell = lambda line: out.notes.print(line, markup=False) if out.interactive else None
    found = compare_estimators(
        task,
        steps=steps,
        draws=draws,
        warmup=warmup,
        seed=seed,
        tolerance=tolerance,
        budget=None if budget is None else parse_bytes(budget),
        precision="float64" if precision == "float64" else "task",
        tell=tell,
    )
    report = found.as_json()
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = folder or Path("runs") / f"{task.name}-estimators-{stamp}"
    files = write(found, folder, out)
    if out.as_json:
        out.result({**report, "files": [str(path) for path in files]})
    else:
        show(found, out)
        for path in files:
            out.line(f"written: {path}")
    return 0


def write(found: Comparison, folder: Path, out: Output) -> list[Path]:
    """The files of a comparison; without matplotlib a warning in place of the picture."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "estimators.json"
        path.write_text(json.dumps(found.as_json(), indent=1) + "\n")
        try:
            return [path, draw_comparison(found, folder / "estimators.png")]
        except ImportError as error:
            out.warn(str(error))
            return [path]
    except OSError as error:
        raise disk_error(folder, error) from error


def show(found: Comparison, out: Output) -> None:
    """What was measured, what was not and why, and what to take."""
    warm = f", after {plural(found.warmup, 'step')} of warm-up" if found.warmup else ""
    out.line(
        f"{found.task}: gradient of the score after {plural(found.steps, 'step')}{warm}, "
        f"{plural(found.draws, 'draw')}, {plural(found.hparams, 'hyperparameter')}, "
        f"{plural(found.params, 'parameter')}, {found.precision}"
    )
    measured = [row for row in found.rows if row.accuracy is not None]
    if measured:
        table, plain = grid(_HEADER, [_cells(row, found) for row in measured])
        out.result({}, table, plain)
    for line in footnotes(found):
        out.line(line)


def footnotes(found: Comparison) -> list[str]:
    """Everything that is not in the table."""
    reference = found.reference
    lines = []
    if reference.finite:
        lines.append(
            f"bias, deviation: in units of the reference, the mean of {reference.name}, whose norm "
            f"is {number(reference.norm)} and whose standard error is {number(reference.error)} of "
            f"that; enough: estimates, and their time, "
            f"until the error is {found.tolerance:g}"
        )
    if reference.finite < found.draws:
        missing = found.draws - reference.finite
        lines.append(
            f"NOT FINITE: {reference.name} on {missing} of {plural(found.draws, 'draw')}, which "
            "count nowhere; `hyperjax check` names the cause"
        )
    lines += _grouped("", ((_note(row), row.name) for row in found.rows if not row.refused))
    lines += [f"{row.name} reports: {text}" for row in found.rows if (text := _info(row))]
    lines += _grouped("not compared: ", ((row.refused, row.name) for row in found.rows))
    unsure = [
        row.name for row in found.rows
        if row.accuracy is not None and row.accuracy.bias_error > found.tolerance / 2
    ]  # fmt: skip
    if unsure:
        lines.append(f"take more draws to see the bias of: {' / '.join(unsure)}")
    if not reference.error <= found.tolerance and reference.finite:
        lines.append("the reference is uncertain itself: take more draws")
    best = found.recommendation
    calls = {row.name: row.call for row in found.rows}
    choice = "none" if best.name is None else f"{best.name}, `{calls[best.name]}`"
    return [*lines, f"rule: {best.rule}", f"recommended: {choice}: {best.reason}"]


def _grouped(prefix: str, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """`prefix name / name: text` for every text that is not empty, in order."""
    groups: dict[str, list[str]] = {}
    for text, name in pairs:
        if text:
            groups.setdefault(text, []).append(name)
    return [f"{prefix}{' / '.join(names)}: {text}" for text, names in groups.items()]


def _note(row: Row) -> str:
    found = row.accuracy
    assert found is not None
    parts = [row.note] if row.note else []
    if found.blind:
        rest = f", a bias of {number(found.seen)} in the rest" if math.isfinite(found.seen) else ""
        parts.append(f"blind to {', '.join(found.blind)}{rest}")
    if not math.isfinite(found.bias):
        parts.insert(0, f"NOT FINITE, except on {plural(found.finite, 'draw')}")
    return "; ".join(parts)


def _info(row: Row) -> str:
    parts = []
    for name in _SHOWN:
        value = (row.info or {}).get(name, math.nan)
        if isinstance(value, str):
            parts.append(value)
        elif math.isfinite(value):
            parts.append(f"{name.replace('_', ' ')} {number(value)}")
    return ", ".join(parts)


def _cells(row: Row, found: Comparison) -> tuple[str, ...]:
    accuracy, cost = row.accuracy, row.cost
    assert accuracy is not None and cost is not None
    needed, total = draws_needed(row, found.tolerance), price(row, found.tolerance)
    best = " *" if row.name == found.recommendation.name else ""
    finite = math.isfinite(accuracy.bias)
    return (
        row.name + best,
        f"{number(accuracy.bias)} ± {accuracy.bias_error:.1g}" if finite else "not finite",
        f"{accuracy.cosine:.3f}" if finite else "-",
        number(accuracy.deviation) if finite else "-",
        "-" if cost.seconds is None else duration(cost.seconds),
        f"{cost.compile_seconds:.1f}",
        "-" if cost.bytes is None else quantity(cost.bytes),
        "-" if needed is None or total is None else f"{needed:,}: {duration(total)}",
    )


def parse_bytes(text: str) -> int:
    """`512MiB`, `2G` or a number of bytes; units are powers of 1024."""
    body = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = _UNITS.get(body[-1:], 1)
    try:
        value = float(body[:-1] if unit > 1 else body) * unit
        if not 1 <= value < math.inf:
            raise ValueError
    except ValueError:
        raise AppError(
            f"--budget must be a number of bytes, or one with a unit as in 512MiB; got {text!r}."
        ) from None
    return int(value)
