"""Any sampler of Optuna (Akiba et al. 2019, arXiv 1907.10902), on the host, in batches."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from .._types import Key
from ._cma import seed_of
from ._types import Search


class OptunaState(NamedTuple):
    """State of `from_optuna`."""

    study: Any  # changes as it is asked and told
    trials: tuple[Any, ...]  # asked, not yet told


def from_optuna(make: Callable[[int], Any], names: Sequence[str], batch: int) -> Search:
    """The search of an Optuna study, `batch` points at a time.

        sampler = lambda seed: TPESampler(seed=seed, multivariate=True, constant_liar=True)
        study = lambda seed: optuna.create_study(sampler=sampler(seed))
        from_optuna(study, space.names, batch=8)

    All of a batch is asked before any is told; a sampler that knows of running trials
    (`constant_liar`) spreads them. Optuna sees a float in [0, 1] per name.

    Args:
      make: seed to a study that minimizes.
      names: of the coordinates, in the order of `Space.names`.

    A failed evaluation is told as an infinite score, which samplers take for the worst. A point
    that was not asked for becomes a trial of its own, and the one it replaces failed. For the host:
    the state holds the study, which changes in place.

    Raises ValueError for a study that maximizes or has several objectives, and for a point outside
    the unit cube.
    """
    _checks.is_callable("from_optuna", "make", make)
    _checks.positive_int("from_optuna", "batch", batch)
    names = tuple(names)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"from_optuna: `names` must be distinct, and at least one; got {names}.")

    def init(key: Key) -> OptunaState:
        study = make(seed_of(key))
        directions = [d.name for d in study.directions]
        if directions != ["MINIMIZE"]:
            raise ValueError(f"from_optuna: the study must minimize one value; got {directions}.")
        return OptunaState(study, ())

    def suggest(trial) -> list[float]:
        return [trial.suggest_float(name, 0.0, 1.0) for name in names]

    def ask(state: OptunaState) -> tuple[Any, OptunaState]:
        trials = tuple(state.study.ask() for _ in range(batch))
        points = np.asarray([suggest(trial) for trial in trials])
        return points, OptunaState(state.study, trials)

    def tell(state: OptunaState, points, scores) -> OptunaState:
        study, left = state.study, list(state.trials)
        for point, score in zip(np.asarray(points), np.asarray(scores), strict=True):
            match = next((t for t in left if _same(t, names, point)), None)
            if match is None:
                match = _ask_for(study, names, point, suggest)
            else:
                left.remove(match)
            study.tell(match, float(score) if math.isfinite(score) else math.inf)
        for trial in left:
            _fail(study, trial)
        return OptunaState(study, ())

    return Search(init, ask, tell)


def _ask_for(study: Any, names: tuple[str, ...], point: np.ndarray, suggest: Callable) -> Any:
    """A new trial at `point`. Those that the caller has enqueued wait on, behind it."""
    study.enqueue_trial(dict(zip(names, map(float, point), strict=True)))
    for _ in range(sum(t.state.name == "WAITING" for t in study.trials)):
        trial = study.ask()
        suggest(trial)
        if _same(trial, names, point):
            return trial
        _fail(study, trial)
        study.enqueue_trial(trial.params)
    raise ValueError(f"from_optuna: points must be in the unit cube; got {point}.")


def _fail(study: Any, trial: Any) -> None:
    study.tell(trial, state=type(study.trials[trial.number].state).FAIL)


def _same(trial, names: tuple[str, ...], point: np.ndarray) -> bool:
    # Equal up to the rounding of a float32 on its way through an evaluation.
    return np.allclose([trial.params[name] for name in names], point, rtol=0, atol=1e-6)
