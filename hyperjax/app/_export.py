"""`hyperjax export`: a run as a table, or as a study of optuna."""

import csv
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._errors import AppError
from ._output import Output
from ._plots_data import last_logged
from ._record import Record, load_record

if TYPE_CHECKING:
    from optuna.distributions import FloatDistribution
    from optuna.trial import FrozenTrial

_COLUMNS = ("step", "inner_step", "seed", "member", "valid", "finite")
_MARGIN = 0.1  # of the observed span, added where a range has no bound of its own


def export(run: Path, to: str, out: Output, *, target: Path | None = None) -> int:
    """Writes a run for another program, to `target` or into the run folder; returns 0.

    csv: `export.csv`, one line per step, seed and member, with a column per hyperparameter: the
    values in force during that step and the validation loss after it, empty if not finite.

    optuna: `optuna.db`, an SQLite storage with one study named like the run folder and one trial
    per seed and member: the hyperparameters of the last step and the loss they ended with. A
    member whose loss is not finite is a failed trial. The trials have the user attributes seed,
    member, step and inner_step.

    As JSON, one object with the keys "to", "file" and "rows" (csv), or "trials" and "study".

    Raises AppError if `to` is another word, the run has logged nothing, or the file is there.
    """
    if to not in _WRITERS:
        raise AppError(f"cannot export to {to!r}; known are {', '.join(_WRITERS)}.")
    run = Path(run)
    record = load_record(run)
    if not len(record.steps):
        raise AppError(f"{run} has logged no step yet, so there is nothing to export.")
    name, write = _WRITERS[to]
    target = run / name if target is None else Path(target)
    if target.exists():
        raise AppError(f"{target} exists already; remove it, or name another file by --target.")
    if not target.parent.is_dir():
        raise AppError(f"{target.parent} is not a folder; name a file in one that exists.")
    part = target.with_name(target.name + ".part")
    try:
        part.unlink(missing_ok=True)  # left by an export that was killed
        facts = write(record, part)
        os.replace(part, target)  # a reader sees the whole file or none
    except OSError as error:
        reason = error.strerror or error
        message = f"cannot write {target}: {reason}; name another file by --target."
        raise AppError(message) from error
    finally:
        part.unlink(missing_ok=True)
    plain = f"{target}: {', '.join(f'{v:,} {k}' for k, v in facts.items() if k != 'study')}"
    out.result({"to": to, "file": str(target), **facts}, plain=plain)
    return 0


# ---- csv --------------------------------------------------------------------------------------


def _write_csv(record: Record, path: Path) -> dict[str, Any]:
    metrics = record.metrics
    cell = (
        np.searchsorted(record.steps, metrics["step"]),
        np.searchsorted(record.seeds, metrics["seed"]),
        metrics["member"],
    )
    columns = [metrics[name] for name in _COLUMNS]
    columns += [values[cell] for values in record.hparams.values()]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, *record.hparams])
    writer.writerows(zip(*[[_plain(x) for x in column] for column in columns], strict=True))
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    return {"rows": len(metrics["step"])}


def _plain(value: np.generic) -> str:
    """A number in the fewest digits that give it back; nothing for NaN; true or false."""
    if isinstance(value, np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, np.floating) and not np.isfinite(value):
        return ""
    return str(value)


# ---- optuna -----------------------------------------------------------------------------------


def _write_optuna(record: Record, path: Path) -> dict[str, Any]:
    try:
        import optuna
    except ImportError:
        message = 'export --to optuna needs optuna: pip install "hyperjax[optuna]"'
        raise AppError(message) from None

    name = record.folder.resolve().name
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # no line for every study
    try:
        study = optuna.create_study(storage=storage, study_name=name, direction="minimize")
        trials = _trials(record)
        study.add_trials(trials)
    finally:
        optuna.logging.set_verbosity(level)
        storage.remove_session()
        storage.engine.dispose()  # otherwise the file stays open while it is renamed
    return {"trials": len(trials), "study": name}


def _trials(record: Record) -> list["FrozenTrial"]:
    """One trial per seed and slot, by the last step that was logged.

    By slot and before the exchange that ends the step: hyperparameters are then next to the loss
    that they led to, and no copy appears twice.
    """
    from optuna.trial import TrialState, create_trial

    ranges, trials = _distributions(record), []
    for s, t in enumerate(last_logged(record)):
        for m in range(record.members):
            loss = float(record.valid[t, s, m])
            found = {name: float(values[t, s, m]) for name, values in record.hparams.items()}
            if not np.isfinite(list(found.values())).all():
                continue  # this slot has no line in the log of a run that was killed
            inside = {n: min(max(v, ranges[n].low), ranges[n].high) for n, v in found.items()}
            where = {"seed": int(record.seeds[s]), "member": m}
            when = {"step": int(record.steps[t]), "inner_step": int(record.inner_steps[t])}
            finite = bool(np.isfinite(loss))
            trials.append(
                create_trial(
                    state=TrialState.COMPLETE if finite else TrialState.FAIL,
                    value=loss if finite else None,
                    params=inside,
                    distributions=dict(ranges),
                    user_attrs=where | when,
                )
            )
    return trials


def _distributions(record: Record) -> dict[str, "FloatDistribution"]:
    """The ranges of `space.json`; optuna wants both ends, so an open one is put beyond the data."""
    from optuna.distributions import FloatDistribution

    found = {}
    for name, values in record.hparams.items():
        bound = record.space.get(name, {})
        seen = values[np.isfinite(values)]
        least, most = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 0.0)
        margin = _MARGIN * (most - least) or 1.0
        low, high = bound.get("low"), bound.get("high")
        low = least - margin if low is None else float(low)
        high = most + margin if high is None else float(high)
        log = bound.get("scale") == "log" and low > 0
        found[name] = FloatDistribution(low, high, log=log)
    return found


_WRITERS = {"csv": ("export.csv", _write_csv), "optuna": ("optuna.db", _write_optuna)}
