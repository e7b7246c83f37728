"""The closing table of a run: means, standard errors and paired differences over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from scipy.special import stdtrit

METRICS = {
    "valid_loss": "valid loss",
    "valid_accuracy": "valid acc",
    "test_loss": "test loss",
    "test_accuracy": "test acc",
}
REFERENCE = "random"
_ABSENT = "-"
_WHOLE = ("inner steps", "compile s", "run s")


@dataclass(frozen=True)
class Spread:
    """Mean and standard error over the seeds whose value is finite.

    ``error`` is None with fewer than two of them; ``mean`` is None with none. ``total`` counts
    all seeds, so that a diverged one shows.
    """

    mean: float | None
    error: float | None
    count: int
    total: int


@dataclass(frozen=True)
class Row:
    """One row of the table; ``difference`` is this row minus the random row, paired by seed."""

    key: str
    name: str
    metrics: dict[str, Spread]
    difference: dict[str, Spread]  # empty for the random row itself, or without one
    inner_steps: int | None
    compile_s: float | None
    run_s: float | None


def summarise(table: dict[str, Any]) -> list[Row]:
    """Means and standard errors (ddof=1) over seeds of a ``table.json``, row by row.

    Args:
        table: the object in ``table.json``.
    """
    rows = table.get("rows", [])
    reference = next((row for row in rows if row.get("key") == REFERENCE), None)
    return [_summarise(row, reference) for row in rows]


def spread(values: Sequence[float | None] | np.ndarray) -> Spread:
    """Mean and standard error of the finite values; None and NaN count as diverged."""
    numbers = np.asarray(values, float)
    finite = numbers[np.isfinite(numbers)]
    mean = float(finite.mean()) if finite.size else None
    error = float(finite.std(ddof=1) / math.sqrt(finite.size)) if finite.size > 1 else None
    return Spread(mean, error, finite.size, numbers.size)


def show(value: Spread | None, *, sign: bool = False) -> str:
    """``0.0812 ± 0.0021``: the mean to the digits that its standard error leaves it.

    Diverged seeds show as ``(4/5)``.
    """
    if value is None or value.total == 0:
        return _ABSENT
    if value.mean is None:
        return "not finite"
    text = _number(value.mean, value.error, "+" if sign else "")
    return text if value.count == value.total else f"{text} ({value.count}/{value.total})"


def header_and_cells(table: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column titles and cell texts; a metric that no row has takes no column."""
    rows = summarise(table)
    shown = [k for k in METRICS if any(k in row.metrics for row in rows)]
    header = ["", *(METRICS[k] for k in shown), *_WHOLE]
    return header, [
        [
            row.name,
            *(show(row.metrics.get(k)) for k in shown),
            _ABSENT if row.inner_steps is None else f"{row.inner_steps:,}",
            _seconds(row.compile_s),
            _seconds(row.run_s),
        ]
        for row in rows
    ]


def rich_table(table: dict[str, Any]) -> Table:
    """The table for a terminal, with the notes below it."""
    header, cells = header_and_cells(table)
    notes = "\n".join(footnotes(table))
    drawn = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
        caption=Text(notes),
        caption_justify="left",
    )
    for title in header:
        # Eighty columns are enough if only names and means with errors wrap.
        whole = title in _WHOLE
        heading = title.replace(" ", "\n") if whole else title
        drawn.add_column(heading, justify="right" if title else "left", no_wrap=whole)
    words = [word for cell in cells for word in cell[0].split()]
    drawn.columns[0].min_width = max(map(len, words), default=0)
    for row in cells:
        # Text, because names are data and square brackets would be read as markup.
        drawn.add_row(*map(Text, row))
    return drawn


def plain_table(table: dict[str, Any]) -> str:
    """The table in columns of fixed width, for pipes and log files."""
    header, cells = header_and_cells(table)
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *cells)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *footnotes(table)])


def footnotes(table: dict[str, Any]) -> list[str]:
    """What the ± stands for, and the notes of the run."""
    spreads = [s for row in summarise(table) for s in row.metrics.values()]
    seeds = max((s.total for s in spreads), default=0)
    about = f"± standard error over {seeds} seeds" if seeds > 1 else "one seed: no standard errors"
    notes = [about if seeds else "no results"]
    if any(0 < s.count < s.total for s in spreads):
        notes.append("(n/m): only n of m seeds are finite, and the mean is theirs")
    return [*notes, *map(str, table.get("notes", []))]


def headline(table: dict[str, Any] | None) -> str:
    """One sentence: the tuned population against random search, paired by seed.

    Args:
        table: the object in ``table.json``, or None.
    """
    if table is None:
        return "This run has no results yet: it has not reached its final evaluation."
    rows = {row.key: row for row in summarise(table)}
    tuned, random = rows.get("tuned"), rows.get(REFERENCE)
    if tuned is None or "test_loss" not in tuned.metrics:
        return "This run has no test loss of the tuned population."
    name = tuned.name[:1].upper() + tuned.name[1:]
    reached = f"{name}: test loss {show(tuned.metrics['test_loss'])}"
    if random is None or "test_loss" not in tuned.difference:
        return f"{reached}. Random search was not run, so there is nothing to compare with."
    reached += f", against {show(random.metrics['test_loss'])} for {random.name}"
    if tuned.inner_steps == random.inner_steps and tuned.inner_steps is not None:
        reached += f" at the same {tuned.inner_steps:,} inner steps per seed."
    else:
        steps = f"{_count(tuned.inner_steps)} and {_count(random.inner_steps)}"
        reached += f" (at {steps} inner steps)."
    return f"{reached} {_verdict(tuned.difference['test_loss'])}"


def _verdict(difference: Spread) -> str:
    if difference.mean is None:
        return "No seed is finite in both, so they cannot be compared."
    gap = f"Paired difference: {show(difference, sign=True)}"
    if difference.error is None:
        return f"{gap}, from one seed: no standard error can be given."
    # Student's quantile, because with three seeds two standard errors are no evidence.
    reach = float(stdtrit(difference.count - 1, 0.975)) * difference.error
    low, high = difference.mean - reach, difference.mean + reach
    gap += f" over {difference.count} seeds (95% interval {low:+.2g} to {high:+.2g})"
    if low <= 0 <= high:
        return f"{gap}, which leaves no clear winner."
    return f"{gap}, in favour of {'tuning' if high < 0 else 'random search'}."


def _summarise(row: dict[str, Any], reference: dict[str, Any] | None) -> Row:
    present = {k: np.asarray(row[k], float) for k in METRICS if row.get(k)}
    difference = {}
    if reference is not None and row is not reference:
        for k, values in present.items():
            other = np.asarray(reference.get(k) or [], float)
            if other.shape == values.shape:  # otherwise the seeds cannot be paired
                difference[k] = spread(values - other)
    return Row(
        key=str(row.get("key", "")),
        name=str(row.get("name", row.get("key", ""))),
        metrics={k: spread(values) for k, values in present.items()},
        difference=difference,
        inner_steps=row.get("inner_steps"),
        compile_s=row.get("compile_s"),
        run_s=row.get("run_s"),
    )


def _number(mean: float, error: float | None, sign: str) -> str:
    if not error:  # one seed has none; several that agree to the last digit have zero
        return f"{mean:{sign}.4g}" + ("" if error is None else " ± 0")
    exponent = math.floor(math.log10(error))
    # Two digits of an error that starts low, one of an error that starts high.
    decimals = (1 if error < 3.55 * 10**exponent else 0) - exponent
    if decimals > 6 or error >= 1e5:
        return f"{mean:{sign}.4g} ± {error:.2g}"
    decimals = max(decimals, 0)
    return f"{mean:{sign}.{decimals}f} ± {error:.{decimals}f}"


def _seconds(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.1f}"


def _count(value: int | None) -> str:
    return "an unknown number of" if value is None else f"{value:,}"
