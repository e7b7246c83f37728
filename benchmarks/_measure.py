"""What the benchmarks share: an environment with the peers, timing by turns, and the record."""

import argparse
import atexit
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def environment(packages: Iterable[str]) -> Path:
    """The Python of a new virtual environment with this checkout of hyperjax and `packages`.

    It is removed when the calling program ends.
    """
    folder = Path(tempfile.mkdtemp(prefix="hyperjax-benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, "-e", str(ROOT), *packages], check=True)
    return python


def compiled(function: Callable, *arguments: Any) -> tuple[Callable[[], Any], dict[str, float]]:
    """A call of the compiled `function` without arguments, and what compiling it showed.

    `temp_bytes` is the memory of the program beside its inputs and outputs, as XLA plans it.
    """
    import jax

    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    facts = {"compile_s": seconds, "temp_bytes": memory.temp_size_in_bytes}
    return lambda: program(*arguments), facts


def median_times(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict]:
    """Wall and CPU seconds per call, medians of `repeats` rounds in which each has its turn.

    By turns, so that what else the machine does meets all of them; one round before to warm up.
    """
    import jax

    walls: dict[str, list[float]] = {name: [] for name in calls}
    cpus: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        # To and fro, since each finds the memory as the one before it has left it.
        for name, call in list(calls.items())[:: 1 if turn % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            if turn:
                walls[name].append(time.perf_counter() - wall)
                cpus[name].append(time.process_time() - cpu)
    return {
        name: {
            "wall_s": statistics.median(walls[name]),
            "wall_min_s": min(walls[name]),
            "cpu_s": statistics.median(cpus[name]),
            "repeats": repeats,
        }
        for name in calls
    }


def spread(values: Any) -> dict[str, Any]:
    """Mean and standard deviation over seeds, None where there is none, and each of them."""
    import numpy as np

    values = np.asarray(values, np.float64)
    known = len(values) > 1 and np.isfinite(values).all()
    std = float(values.std(ddof=1)) if known else None
    return {"mean": float(values.mean()), "std": std, "each": values.tolist()}


def by_default(parser: argparse.ArgumentParser, options: argparse.Namespace) -> bool:
    """Whether a run is the one to record: no option but where the data lies was given."""
    given = {name: value for name, value in vars(options).items() if name != "data_dir"}
    return all(value == parser.get_default(name) for name, value in given.items())


def record(name: str, data: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write <folder>/<name>.json: the data, and the machine, versions and commit it came from.

    A number that is not finite becomes null.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    data = {"commit": commit(), "env": machine(), **data}
    path.write_text(json.dumps(_plain(data), indent=1, allow_nan=False) + "\n")
    return path


def _plain(data: Any) -> Any:
    """What JSON can hold: no number, in place of one that is not finite."""
    if isinstance(data, Mapping):
        return {k: _plain(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def commit() -> str:
    """HEAD, marked if the library, a benchmark or a notebook differs from it."""
    git = ["git", "-C", str(ROOT)]
    run = lambda *args: subprocess.run([*git, *args], capture_output=True, text=True, check=True)
    code = ("hyperjax", "kernels", "benchmarks/*.py", "notebooks/*.py")
    changed = run("status", "--porcelain", "--", *code).stdout
    return run("rev-parse", "HEAD").stdout.strip() + (" and changes" if changed else "")


def machine() -> dict[str, Any]:
    import jax

    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "versions": dict(sorted(installed.items())),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
