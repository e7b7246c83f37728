"""`hyperjax compare`: one table over several runs."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ._errors import AppError
from ._grid import grid
from ._output import Output
from ._plots_data import final_losses
from ._record import Record, load_record
from ._tables import REFERENCE, Spread, show, spread, summarise

_TUNED = "tuned"
_ABSENT = "-"


def compare(runs: Sequence[Path], out: Output) -> int:
    """One line a run: what it was, and what it reached; returns 0.

    Losses are means over seeds with standard errors. "best valid" is the smallest validation loss
    of each seed at the end, or in the last step so far of a run that has not finished.

    As JSON, one object with the keys "runs" and "notes".

    Raises AppError without a run, or for a folder that is none.
    """
    if not runs:
        raise AppError("compare needs at least one run folder, as `hyperjax tune` makes them.")
    records = [load_record(Path(run)) for run in runs]
    rows = [
        _row(name, record)
        for name, record in zip(_names([r.folder for r in records]), records, strict=True)
    ]
    notes = _notes(rows)
    header = ("run", "task", "method", "members", "seeds", "inner steps", "best valid loss",
              "tuned test loss", "random test loss", "run s")  # fmt: skip
    table, plain = grid(header, [_cells(row) for row in rows])
    out.result({"runs": [dataclasses.asdict(row) for row in rows], "notes": notes}, table, plain)
    if not out.as_json:
        for note in notes:
            out.line(note)
    return 0


@dataclasses.dataclass(frozen=True)
class _Row:
    run: str
    task: str
    method: str
    members: int
    seeds: int
    inner_steps: int  # taken so far by each member
    finished: bool
    valid_loss: Spread
    tuned_test_loss: Spread | None
    random_test_loss: Spread | None
    run_s: float | None


def _row(name: str, record: Record) -> _Row:
    closing = {row.key: row for row in summarise(record.table or {})}
    tuned, random = closing.get(_TUNED), closing.get(REFERENCE)
    return _Row(
        run=name,
        task=str(record.config.get("task", "?")),
        method=str(record.config.get("method", "?")),
        members=record.members,
        seeds=len(record.seeds) or int(record.config.get("seeds") or 0),
        inner_steps=int(record.inner_steps.max(initial=0)),
        finished=record.table is not None,
        valid_loss=spread(_valid(record)),
        tuned_test_loss=tuned.metrics.get("test_loss") if tuned else None,
        random_test_loss=random.metrics.get("test_loss") if random else None,
        run_s=tuned.run_s if tuned else None,
    )


def _valid(record: Record) -> np.ndarray:
    """[S] validation loss of each seed's best member; NaN where all have diverged."""
    listed = {s["seed"]: s.get("valid") for s in (record.best or {}).get("seeds", [])}
    if listed:
        return np.array(list(listed.values()), float)
    if not len(record.steps):
        return np.zeros(0)
    return np.fmin.reduce(final_losses(record), axis=1)


def _cells(row: _Row) -> tuple[str, ...]:
    return (
        row.run if row.finished else f"{row.run} (unfinished)",
        row.task,
        row.method,
        f"{row.members:,}",
        f"{row.seeds:,}",
        f"{row.inner_steps:,}",
        show(row.valid_loss),
        show(row.tuned_test_loss),
        show(row.random_test_loss),
        _ABSENT if row.run_s is None else f"{row.run_s:.1f}",
    )


def _notes(rows: list[_Row]) -> list[str]:
    notes = []
    tasks = sorted({row.task for row in rows})
    if len(tasks) > 1:
        notes.append(f"the runs are of different tasks ({', '.join(tasks)}): losses do not compare")
    budgets = {row.members * row.inner_steps for row in rows}
    if len(tasks) == 1 and len(budgets) > 1:
        notes.append("the runs differ in members x inner steps, so in what they may have cost")
    unfinished = [row.run for row in rows if not row.finished]
    if unfinished:
        notes.append(f"unfinished: {', '.join(unfinished)}; `hyperjax resume RUN` goes on")
    return notes


def _names(folders: list[Path]) -> list[str]:
    """Folder names, or whole paths where two are called alike."""
    names = [folder.resolve().name for folder in folders]
    count = Counter(names)
    return [n if count[n] == 1 else str(f) for n, f in zip(names, folders, strict=True)]
