"""A run from first step to report: tune, then compare at equal training steps, then draw.

Each phase leaves its result in the run folder before the next begins, so that a killed run goes
on where it was and ends with the same numbers.
"""

import importlib.util
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from ..tasks import Task, get
from . import _baselines, _hosts
from ._errors import AppError
from ._folder import Folder, disk_error
from ._output import Output
from ._plots import draw_plots
from ._record import load_record
from ._report import write_report
from ._results import NAMES, load_schedules, schedule_of, write_result
from ._settings import Settings
from ._signals import Stop
from ._tables import plain_table, rich_table
from ._tune import tune


def run_study(folder: Folder, settings: Settings, out: Output, stop: Stop) -> None:
    """Bring the run in `folder` to its end, from wherever it is.

    Raises AppError for what the user can mend and Interrupted when asked to stop; both leave a
    folder that `hyperjax resume` continues.
    """
    task = load_task(settings)
    mesh = members_mesh(settings)
    _hosts.rehearse(mesh)
    _hosts.on_primary(lambda: _prepare(folder, task))
    tune(folder, settings, task, mesh, out, stop)
    for name in settings.baselines:
        stop.check()
        _baseline(name, folder, settings, task, mesh, out)
    _hosts.on_primary(lambda: _conclude(folder, settings, out))


def _prepare(folder: Folder, task: Task) -> None:
    folder.mend()
    folder.write_json("space.json", _describe_space(task))


def _conclude(folder: Folder, settings: Settings, out: Output) -> None:
    folder.event_once("done", settings.updates)
    table = _write_table(folder, settings)
    report(folder, out)
    out.result({"run": str(folder.path), **table}, rich_table(table), plain_table(table))


def report(folder: Folder, out: Output) -> None:
    """Draw the plots and write report.html; without matplotlib say so and leave them out."""
    record = load_record(folder.path)
    try:
        plots = draw_plots(record, folder.path)
    except ImportError as error:
        out.warn(str(error))
        plots = []
    except OSError as error:
        raise disk_error(folder / "plots", error) from error
    try:
        written = write_report(record, plots, folder.path)
    except OSError as error:
        raise disk_error(folder / "report.html", error) from error
    out.line(f"report: {written}")


def load_task(settings: Settings) -> Task:
    """The task of a run; raises AppError if it is unknown or its data is missing."""
    try:
        return get(settings.task, data_dir=settings.data_dir or None)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise AppError(str(error)) from error


def for_devices_here(settings: Settings) -> Settings:
    """The same, but for a number of devices that cannot be had here: then all that fit."""
    devices = settings.devices
    if devices > len(jax.devices()) or devices % jax.process_count():
        return replace(settings, devices=0)
    return settings


def members_mesh(settings: Settings) -> Mesh | None:
    """A mesh over the devices that share the members equally; None for one device.

    Every process gives as many of its devices as every other, in the order of the processes.
    """
    available, processes = len(jax.devices()), jax.process_count()
    fits = [n for n in range(processes, available + 1, processes) if settings.members % n == 0]
    count = settings.devices or max(fits, default=processes)
    if count > available:
        raise AppError(f"devices: {count} asked for, {available} there.")
    if count % processes:
        raise AppError(f"devices ({count}) must be divisible by processes ({processes}).")
    if settings.members % count:
        raise AppError(
            f"members ({settings.members}) must be divisible by devices ({count}); "
            f"try --members {settings.members - settings.members % count + count}."
        )
    if count == 1:
        return None
    taken, per_process = [], count // processes
    for process in range(processes):
        own = [d for d in jax.devices() if d.process_index == process]
        if len(own) < per_process:
            raise AppError(f"process {process} has {len(own)} devices, not {per_process}.")
        taken += own[:per_process]
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), ("member",), axis_types=auto, devices=taken)


def _baseline(name, folder: Folder, settings: Settings, task, mesh, out: Output) -> None:
    """One row of the table, unless it is there already."""
    if _hosts.agreed(folder.read_json(f"results/{name}.json") is not None):
        folder.event_once("baseline", settings.updates, baseline=name)
        return
    if name == "optuna" and importlib.util.find_spec("optuna") is None:
        out.line('Optuna is not installed; pip install "hyperjax[optuna]" adds its row')
        return
    out.line(f"comparing with {NAMES[name]}")
    steps = settings.inner_steps_per_seed
    if name == "replay":
        trained, *timing = _baselines.replay_schedules(task, settings, mesh, _schedules(folder))
        params, valid, _ = _baselines.pick(trained)
        steps = settings.inner_steps
    else:
        search = _baselines.random_search if name == "random" else _baselines.optuna_tpe
        params, valid, _, *timing = search(task, settings, mesh)

    def write() -> None:
        write_result(folder, name, settings, task, params, valid, steps, timing)
        folder.event_once("baseline", settings.updates, baseline=name)

    _hosts.on_primary(write)


def _schedules(folder: Folder) -> np.ndarray:
    """What the best member of each study went through: [S, 1, T, D]."""
    values, parents = load_schedules(folder.path)
    best = folder.read_json("best.json")["seeds"]
    walks = [schedule_of(values, parents, s, row["member"]) for s, row in enumerate(best)]
    return np.stack(walks)[:, None]


def _write_table(folder: Folder, settings: Settings) -> dict:
    rows = [folder.read_json(f"results/{k}.json") for k in ("tuned", *settings.baselines)]
    notes = [
        "Inner steps are training steps per seed; a tuned step also pays for its hypergradient, "
        "which the seconds show. Replay trains once more under the schedule that tuning found.",
        "Models are chosen by validation loss; the test part was read once, at the end.",
    ]
    table = {
        "inner_steps_per_seed": settings.inner_steps_per_seed,
        "rows": [row for row in rows if row],
        "notes": notes,
    }
    folder.write_json("table.json", table)
    return table


def _describe_space(task: Task) -> dict:
    return {
        name: {"low": float(r.low), "high": float(r.high), "scale": r.scale}
        for name, r in task.space.scalars()
    }
