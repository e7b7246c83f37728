"""Reads a run folder back into arrays: the only input of plots, tables and reports."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ._errors import AppError

FORMAT = 1
_INDEX = ("step", "inner_step", "seed", "member")
_SCALARS = (*_INDEX, "valid", "grad_norm", "finite")
# What a finished run holds beyond its configuration; a run may stop before any of them exists.
_PARTS = ("env.json", "space.json", "metrics.jsonl", "events.jsonl")
_RESULTS = ("schedule.npz", "best.json", "table.json")


class RunFolderError(AppError, ValueError):
    """A run folder that cannot be read; the message names the file and the line."""


@dataclass(frozen=True)
class Schedule:
    """What ``schedule.npz`` holds: T outer steps, S seeds, M members, D hyperparameters."""

    names: tuple[str, ...]
    values: np.ndarray  # [T, S, M, D] in force during each outer step
    parents: np.ndarray  # [T, S, M] the slot whose state each slot holds after the exchange
    inner_steps: np.ndarray  # [T] inner steps per outer step


@dataclass(frozen=True)
class Record:
    """One run in memory.

    ``metrics`` holds the lines of ``metrics.jsonl`` as flat columns (``step``, ``inner_step``,
    ``seed``, ``member``, ``valid``, ``grad_norm``, ``finite``), each of length N. The grids below
    have one cell per outer step, seed and member, NaN where nothing was logged.
    """

    folder: Path
    config: dict[str, Any]
    env: dict[str, Any]
    space: dict[str, dict[str, Any]]
    metrics: dict[str, np.ndarray]
    steps: np.ndarray  # [T] outer steps, ascending
    inner_steps: np.ndarray  # [T] inner steps taken by each member up to the end of that step
    seeds: np.ndarray  # [S] seed numbers, ascending
    valid: np.ndarray  # [T, S, M] validation loss, NaN where it was not finite
    hparams: dict[str, np.ndarray]  # name -> [T, S, M], in force during that step
    parents: np.ndarray  # [T, S, M], from the schedule, or from the events without one
    events: tuple[dict[str, Any], ...]
    table: dict[str, Any] | None
    best: dict[str, Any] | None
    schedule: Schedule | None
    missing: tuple[str, ...]  # files of the format that this folder lacks

    @property
    def members(self) -> int:
        """The number of slots per seed."""
        return self.valid.shape[2]


def load_record(folder: Path) -> Record:
    """Reads a run folder, finished or interrupted.

    A half-written last line, which is what a killed process leaves, is dropped. Where a resumed
    run logged a step a second time, the later line counts.

    Raises:
        RunFolderError: the folder is no run of this format, or a file in it is malformed.
    """
    folder = Path(folder)
    config = _read_config(folder)
    space = _read_json(folder / "space.json") or {}
    metrics, logged = _read_metrics(folder / "metrics.jsonl", tuple(space))
    steps, seeds, shape, cell = _axes(metrics, config)
    events = tuple(event for _, event in _read_lines(folder / "events.jsonl"))
    schedule = _read_schedule(folder / "schedule.npz")
    if schedule is not None and schedule.parents.shape == shape:
        hparams = {n: schedule.values[..., d] for d, n in enumerate(schedule.names)}
        parents = schedule.parents
    else:  # the run went on after its last schedule was written, or never came to write one
        hparams = {name: _grid(shape, cell, column) for name, column in logged.items()}
        parents = _parents_from_events(events, steps, seeds, shape)
    inner = np.zeros(len(steps), int)
    inner[cell[0]] = metrics["inner_step"]
    return Record(
        folder=folder,
        config=config,
        env=_read_json(folder / "env.json") or {},
        space=space,
        metrics=metrics,
        steps=steps,
        inner_steps=inner,
        seeds=seeds,
        valid=_grid(shape, cell, metrics["valid"]),
        hparams=hparams,
        parents=parents,
        events=events,
        table=_read_json(folder / "table.json"),
        best=_read_json(folder / "best.json"),
        schedule=schedule,
        missing=tuple(n for n in (*_PARTS, *_RESULTS) if not (folder / n).exists()),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.exists():
        raise RunFolderError(f"{path}: not there, so {folder.name or folder} is not a run folder")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise RunFolderError(f"{path}: {line}not valid YAML") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise RunFolderError(f"{path}: run folder format {found}, and this is for format {FORMAT}")
    return config


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunFolderError(f"{path}: line {error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise RunFolderError(f"{path}: not UTF-8 text") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{path}: line 1: expected an object")
    return value


def _read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSONL file, without a half-written last line."""
    if not path.exists():
        return []
    # Bytes, because a process may die inside a multi-byte character.
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline behind it: the write was cut short
                break
            raise RunFolderError(f"{path}: line {number}: not valid JSON") from error
        if not isinstance(value, dict):
            raise RunFolderError(f"{path}: line {number}: expected an object")
        found.append((number, value))
    return found


def _read_metrics(
    path: Path, space: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Flat columns of the metrics and of the hyperparameters, without superseded lines."""
    lines = _read_lines(path)
    names = tuple(lines[0][1].get("hparams", {})) if lines else space
    rows = []
    for number, line in lines:
        try:
            values = line["hparams"]
            row = [*(line[k] for k in _SCALARS), *(values[n] for n in names)]
            # None is NaN, but an index has to be a number.
            row[:4] = map(int, row[:4])
            rows.append(np.array(row, float))
        except (KeyError, TypeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else "a value is not a number"
            raise RunFolderError(f"{path}: line {number}: {what}") from error
    table = np.array(rows).reshape(len(rows), len(_SCALARS) + len(names))
    # np.unique keeps the first of equal keys, so the reversed table keeps the later line.
    _, first = np.unique(table[::-1, (0, 2, 3)], axis=0, return_index=True)
    table = table[np.sort(len(table) - 1 - first)]
    table[~np.isfinite(table)] = np.nan
    scalars = {str(k): column for k, column in zip(_SCALARS, table.T, strict=False)}
    scalars |= {k: scalars[k].astype(int) for k in _INDEX}
    scalars["finite"] = scalars["finite"] == 1
    return scalars, dict(zip(names, table.T[len(_SCALARS) :], strict=True))


def _axes(metrics: dict[str, np.ndarray], config: dict[str, Any]):
    """Steps [T], seeds [S], the grid shape (T, S, M) and the cell of each line in it."""
    steps, at_step = np.unique(metrics["step"], return_inverse=True)
    seeds, at_seed = np.unique(metrics["seed"], return_inverse=True)
    members = max(int(config.get("members") or 0), int(metrics["member"].max(initial=-1)) + 1)
    return steps, seeds, (len(steps), len(seeds), members), (at_step, at_seed, metrics["member"])


def _grid(shape: tuple[int, ...], cell: tuple[np.ndarray, ...], column: np.ndarray) -> np.ndarray:
    grid = np.full(shape, np.nan)
    grid[cell] = column
    return grid


def _read_schedule(path: Path) -> Schedule | None:
    if not path.exists():
        return None
    try:
        # Opened here, because np.load leaves a file that is no archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            names = tuple(str(n) for n in data["names"])
            schedule = Schedule(names, data["values"], data["parents"], data["inner_steps"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RunFolderError(f"{path}: not a readable schedule") from error
    if schedule.values.shape != (*schedule.parents.shape, len(names)):
        shapes = f"values {schedule.values.shape} and parents {schedule.parents.shape}"
        raise RunFolderError(f"{path}: {shapes} do not belong together")
    return schedule


def _parents_from_events(
    events: tuple[dict[str, Any], ...],
    steps: np.ndarray,
    seeds: np.ndarray,
    shape: tuple[int, int, int],
) -> np.ndarray:
    slots = range(shape[2])
    parents = np.broadcast_to(np.arange(shape[2]), shape).copy()
    step_at = {step: t for t, step in enumerate(steps.tolist())}
    seed_at = {seed: s for s, seed in enumerate(seeds.tolist())}
    for event in events:
        t, s = step_at.get(event.get("step", -1)), seed_at.get(event.get("seed", -1))
        child, parent = event.get("member", -1), event.get("parent", -1)
        if t is not None and s is not None and child in slots and parent in slots:
            parents[t, s, child] = parent
    return parents
