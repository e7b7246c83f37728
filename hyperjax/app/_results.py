"""Rows of the closing table, and schedules: what the phases of a run hand to one another."""

import zipfile
from pathlib import Path

import jax
import numpy as np

from ..exchange import lineage
from ..tasks import Task
from ._errors import AppError
from ._folder import Folder
from ._settings import Settings

NAMES = {
    "tuned": "tuned ({method})",
    "replay": "its schedule, replayed",
    "random": "random search",
    "optuna": "Optuna TPE",
}


def write_result(
    folder: Folder, key: str, settings: Settings, task: Task, params, valid, steps: int, timing
) -> None:
    """One row: metrics of the chosen models [S, ...] on validation and, once, on test data.

    `timing` is (compile seconds, run seconds).
    """
    # The test set is read here and nowhere else, once per row, after everything is chosen.
    test = jax.vmap(task.evaluate, (0, None))(params, task.test)
    parts = {"valid": valid, "test": test}
    metrics = {f"{p}_{k}": np.asarray(v).tolist() for p, m in parts.items() for k, v in m.items()}
    name = NAMES[key].format(method=settings.method)
    compile_s, run_s = (round(float(t), 3) for t in timing)
    folder.write_json(
        f"results/{key}.json",
        {"key": key, "name": name, **metrics, "inner_steps": steps, "compile_s": compile_s,
         "run_s": run_s},
    )  # fmt: skip


def load_schedules(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(values [T, S, P, D], parents [T, S, P]) of a run whose tuning has finished."""
    try:
        # Opened here, because np.load leaves a file that is no archive open.
        with (path / "schedule.npz").open("rb") as file, np.load(file, allow_pickle=False) as data:
            return data["values"], data["parents"]
    except FileNotFoundError:
        raise AppError(
            f"{path} has no schedule yet: tuning has not finished. Run `hyperjax resume {path}`."
        ) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise AppError(f"{path / 'schedule.npz'} is damaged: {error}.") from None


def schedule_of(values: np.ndarray, parents: np.ndarray, study: int, member: int) -> np.ndarray:
    """The hyperparameters that the final member went through, copies included: [T, D]."""
    walk = np.asarray(lineage(parents[:, study], member))
    return values[np.arange(len(walk)), study, walk]
