"""`hyperjax data`: which data files are known, where they lie, and whether they are intact."""

import os
from pathlib import Path

from ..tasks import catalogue
from ..tasks._data import VARIABLE
from ._errors import AppError
from ._grid import grid
from ._output import Output


def list_data(data_dir: str | Path | None, out: Output) -> int:
    """Every data file that a task reads, and its state; returns 0.

    As JSON, one object with the keys "folder" and "files".
    """
    statuses = catalogue(data_dir)
    files = [
        {
            "name": s.file.name,
            "file": s.file.path,
            "bytes": s.file.size,
            "sha256": s.file.sha256,
            "licence": s.file.licence,
            "origin": s.file.origin,
            "state": s.state,
            "where": s.where,
        }
        for s in statuses
    ]
    header = ("name", "file", "bytes", "licence", "state")
    rows = [
        (s.file.name, s.file.path, f"{s.file.size:,}", s.file.licence, s.state) for s in statuses
    ]
    table, plain = grid(header, rows)
    folder = _folder(data_dir)
    out.result({"folder": folder, "files": files}, table, plain)
    wanting = sum(s.state in ("missing", "damaged") for s in statuses)
    if wanting:
        where = f"in {folder}" if folder else f"since no folder is known: {_HOW}"
        out.warn(f"{wanting} of {len(statuses)} files are missing or damaged {where}")
    return 0


def data_path(data_dir: str | Path | None, out: Output) -> int:
    """Prints the data folder in force, alone on its line for scripts; returns 0.

    Raises AppError if none is known, so that `$(hyperjax data path)` cannot be a sentence.
    """
    folder = _folder(data_dir)
    if folder is None:
        raise AppError(f"no data folder is known: {_HOW}")
    if not Path(folder).is_dir():
        out.warn(f"{folder} does not exist")
    out.result({"folder": folder}, plain=folder)
    return 0


_HOW = f"pass --data-dir DIR or set {VARIABLE}"


def _folder(data_dir: str | Path | None) -> str | None:
    chosen = data_dir or os.environ.get(VARIABLE)
    return str(Path(chosen).expanduser()) if chosen else None
