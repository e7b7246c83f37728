"""Commands in processes of their own: in float32, on two devices, with faults where one likes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

# A run of four updates, a chunk and a checkpoint each.
SIZE = ("--members", "4", "--seeds", "2", "--set", "inner_steps=40", "--set", "every=10")
TINY = (*SIZE, "--set", "updates_per_chunk=1")

TASK = '''
"""A user's own tasks."""
import jax
import jax.numpy as jnp
import optax
from hyperjax import loguniform, space
from hyperjax.tasks import Task

def part(seed):
    x = jax.random.normal(jax.random.key(seed), (40, 5))
    return x, x @ jnp.arange(5.0) + jax.random.normal(jax.random.key(seed + 3), (40,))

def error(w, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)

def batches(key, steps):
    rows = jax.random.randint(key, (steps, 8), 0, 40)
    return jax.tree.map(lambda x: x[rows], part(0))

ridge = Task(
    name="ridge",
    init=lambda key: jax.random.normal(key, (5,)),
    loss=lambda w, h, batch: error(w, batch) + h["l2"] * w @ w,
    score=lambda w, h, batch: error(w, batch),
    space=space({"lr": loguniform(1e-3, 0.1), "l2": loguniform(1e-4, 1.0)}),
    optimizer=lambda h: optax.sgd(h["lr"]),
    batches=batches,
    whole=lambda key: part(0),
    valid=part(1),
    test=part(2),
    evaluate=lambda w, batch: {"loss": error(w, batch)},
)

def fails(w, h, batch):
    raise RuntimeError("no loss today\\nand no second line")

failing = ridge._replace(loss=fails)
number = 3
'''


class Result(NamedTuple):
    code: int
    out: str
    err: str


def write_tasks(folder: Path) -> Path:
    """Put the package `own` with the module `own.tasks` into a folder."""
    (folder / "own").mkdir(parents=True, exist_ok=True)
    (folder / "own" / "__init__.py").touch()
    (folder / "own" / "tasks.py").write_text(TASK)
    return folder


def environment(base: Path) -> dict[str, str]:
    """What a process inherits: nothing of JAX, and one cache of compiled programs for all."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTHON"))}
    for name in ("FORCE_COLOR", "HYPERJAX_DATA"):
        clean.pop(name, None)
    return clean | {
        "PYTHONPATH": str(write_tasks(base / "modules")),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": str(base / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles in two thirds of the time
        "TERM": "xterm-256color",
    }


class Shell:
    """One process that runs commands; as a context manager it ends with the block.

    Calling it runs `hyperjax ARGV`. With `at=(part, n)` the process sends itself `signal` when it
    touches a path with `part` in it for the n-th time; after SIGKILL the shell is of no more use.
    """

    def __init__(self, base: Path):
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", str(Path(__file__).with_name("cli_child.py"))],
            cwd=base,
            env=environment(base),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *argv: object, plots: bool = False, **fault: object) -> Result:
        assert self._process.stdin and self._process.stdout
        command = {"argv": [str(a) for a in argv], "plots": plots, **fault}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        return Result(*json.loads(answer)) if answer else Result(self._process.wait(60), "", "")

    def __enter__(self) -> "Shell":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcome(run: Path) -> dict:
    """All that a run found, apart from clocks and from the traces of interruptions."""
    pauses = ("start", "resume", "interrupt")
    events = [e for e in read_lines(run / "events.jsonl") if e["event"] not in pauses]
    rows = read_json(run / "table.json")["rows"]
    return {
        "metrics": (run / "metrics.jsonl").read_text(),
        "events": [{k: v for k, v in event.items() if k != "time"} for event in events],
        "table": [{k: v for k, v in r.items() if k not in ("compile_s", "run_s")} for r in rows],
        "best": read_json(run / "best.json"),
        "schedule": read_arrays(run / "schedule.npz"),
        "best_params": read_arrays(run / "best_params.npz"),
    }


def read_arrays(path: Path) -> dict:
    """Name to type, shape and bytes: equal only if every bit is."""
    with np.load(path) as arrays:
        return {k: (str(v.dtype), v.shape, v.tobytes()) for k, v in arrays.items()}
