"""The run folder: the only thing that outlives a process. Every file is whole or absent, except
the two JSONL logs, which grow, and which `rewind` cuts back to the last checkpoint."""

import json
import math
import os
import platform
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from . import _hosts
from ._errors import AppError
from ._settings import Settings, dump, load


class Folder:
    """Paths and writes of one run. Any OSError becomes an AppError that names the path.

    Of several processes only the first writes.
    """

    def __init__(self, path: Path):
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write(self, name: str, text: str) -> None:
        """Replace a file atomically: a reader or a crash sees the old text or the new one."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        if not _hosts.primary():
            return
        target = self.path / name
        part = target.with_name(target.name + ".part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except OSError as error:
            raise disk_error(target, error) from error

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(clean(value), indent=1) + "\n")

    def read_json(self, name: str) -> Any:
        """The content of a JSON file, or None if there is no such file."""
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            raise AppError(f"{self.path / name} is damaged: it is not JSON.") from None

    def append(self, name: str, rows: Iterable[dict]) -> None:
        """Add lines to a log."""
        if not _hosts.primary():
            return
        text = "".join(json.dumps(clean(row)) + "\n" for row in rows)
        try:
            with (self.path / name).open("a") as file:
                file.write(text)
                file.flush()
        except OSError as error:
            raise disk_error(self.path / name, error) from error

    def event(self, name: str, step: int, **details: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        self.append("events.jsonl", [{"event": name, "step": step, "time": now, **details}])

    def event_once(self, name: str, step: int, **details: Any) -> None:
        """The same, unless the log has it: a process may die after it, before its next write."""
        if not _hosts.primary():
            return
        path = self.path / "events.jsonl"
        logged = map(json.loads, path.read_text().splitlines() if path.exists() else ())
        if not any({"event": name, **details}.items() <= row.items() for row in logged):
            self.event(name, step, **details)

    def mend(self) -> None:
        """Drop the last lines that a killed process, or a full disk, left half-written."""
        for name in ("metrics.jsonl", "events.jsonl"):
            self.rewind(name, math.inf)

    def rewind(self, name: str, step: float) -> None:
        """Drop the lines of a log from `step` on, and a last line that was cut off."""
        path = self.path / name
        if not _hosts.primary() or not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break  # only the last line of an interrupted write can be cut
            if row.get("step", -1) < step:
                kept.append(line + "\n")
        self.write(name, "".join(kept))


def create(path: Path, settings: Settings, command: str) -> Folder:
    """A new run folder; raises AppError if there is something at that path already."""
    folder = Folder(path)
    try:
        if (path / "config.yaml").exists():
            raise AppError(
                f"{path} exists already; continue it with `hyperjax resume {path}`, or choose "
                "another folder with --out."
            )
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise AppError(
                f"{path} exists already and is not a run; choose another folder with --out."
            )
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error
    folder.write_json("env.json", environment(command))
    folder.write("config.yaml", dump(settings))  # last: a folder with a config is complete
    return folder


def open_run(path: Path) -> tuple[Folder, Settings]:
    """A run folder that is there; raises AppError if it is missing, foreign, damaged or newer."""
    if not path.is_dir():
        raise AppError(f"{path} is not a folder; pass one that `hyperjax tune` made.")
    return Folder(path), load(path / "config.yaml")


def environment(command: str) -> dict:
    """What a reader needs to judge or repeat the numbers."""
    from .. import __version__

    devices = jax.devices()
    return {
        "command": command,
        "hyperjax": __version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "backend": devices[0].platform,
        "devices": [str(d) for d in devices],
        "processes": jax.process_count(),
        "x64": jax.numpy.zeros(()).dtype == np.float64,
        "argv": sys.argv[1:],
    }


def changes(folder: Folder) -> str:
    """What is not as it was when the run began and moves the last bits; raises AppError if its
    precision is another one."""
    then, now = folder.read_json("env.json") or {}, environment("resume")
    if then.get("x64", now["x64"]) != now["x64"]:
        flag = int(not now["x64"])
        raise AppError(f"{folder.path} began in another precision; set JAX_ENABLE_X64={flag}.")
    # How many devices, and not their names, which follow from the processes that they belong to.
    count = lambda value: len(value) if isinstance(value, list) else value
    keys = ("jax", "backend", "devices")
    keys = [k for k in keys if count(then.get(k, now[k])) != count(now[k])]
    return ", ".join(f"{k} {count(then[k])} then, {count(now[k])} now" for k in keys)


def disk_error(path: Path, error: OSError) -> AppError:
    reason = error.strerror or str(error)
    return AppError(
        f"cannot write {path}: {reason}. Free some space or choose another folder with --out; "
        "what was written before is kept."
    )


def clean(value: Any) -> Any:
    """`value` as JSON can hold it: NumPy scalars as numbers, non-finite numbers as null."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    if isinstance(value, np.ndarray):
        return clean(value.tolist())
    if isinstance(value, np.generic):
        return clean(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
