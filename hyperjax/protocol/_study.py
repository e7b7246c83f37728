"""A protocol for tuning that cannot be bent (Eimer, Lindauer and Raileanu 2023, "Hyperparameters
in reinforcement learning and how to tune them", arXiv 2306.01324): seeds to tune on and seeds to
report on are declared first and have nothing in common."""

import operator
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _checks
from .._space import Space
from .._types import HParams, Key, Scalar
from ..search import Search

Train = Callable[[HParams, Key], Scalar]


class Declared(NamedTuple):
    """What is fixed before anything runs; see `declare`."""

    space: Space
    budget: int  # configurations to try
    tuning: tuple[int, ...]  # seeds
    test: tuple[int, ...]


class Trials(NamedTuple):
    """What tuning saw, in the order in which it was tried."""

    hparams: HParams  # raw, leaves [N, ...]
    each: np.ndarray  # [N, tuning seeds]
    mean: np.ndarray  # [N], the tuning score; not finite if a seed failed


class Study(NamedTuple):
    """A tuned configuration beside the default one, both on seeds that tuning has not seen.

    Scores are those of `train`, smaller is better; `interval` and `compare` say how certain.
    """

    incumbent: HParams  # raw values of the best tuning score
    scores: np.ndarray  # [test seeds], of the incumbent: what to report
    default: HParams
    default_scores: np.ndarray  # [test seeds]
    tuning_score: float  # of the incumbent: better than the truth, as it was chosen for it
    trials: Trials
    runs: int  # trainings in all: budget * tuning seeds + 2 * test seeds


def declare(space: Space, *, budget: int, tuning: Iterable[int], test: Iterable[int]) -> Declared:
    """The terms of a study: search space, number of configurations, and two sets of seeds.

    Raises ValueError for seeds that are in both sets or twice in one or outside [0, 2**32), where
    others have the same key; for an empty set, and for a budget below 1.
    """
    _checks.positive_int("declare", "budget", budget)
    tuning, test = _seeds("tuning", tuning), _seeds("test", test)
    common = sorted(set(tuning) & set(test))
    if common:
        raise ValueError(
            f"declare: `tuning` and `test` must have no seed in common; both hold {common}. "
            f"Take `test=range({max(tuning) + 1}, {max(tuning) + 1 + len(test)})`."
        )
    return Declared(space, budget, tuning, test)


def study(
    declared: Declared,
    train: Train,
    search: Search,
    key: Key,
    *,
    default: HParams | None = None,
    chunk: int | None = None,
) -> Study:
    """Search by the mean over all tuning seeds, then one look at the test seeds.

    Args:
      train: (raw hparams, key) -> score of one training, smaller is better; a pure function, which
        is vmapped over configurations and seeds. The key is `jax.random.key(seed)`.
      search: asked and told until the budget is spent; the number it proposes at a time must
        divide the budget.
      key: for the search.
      default: raw values to report beside the incumbent; `space.init()` if not given.
      chunk: trainings at a time, all of a batch by default.

    A configuration with a failed seed (a score that is not finite) has failed. Host function: the
    search may live outside JAX. Raises ValueError if every configuration failed, or for a batch
    that does not divide the budget.
    """
    _checks.is_callable("study", "train", train)
    _checks.has_functions("study", "search", search, ("init", "ask", "tell"))
    if chunk is not None:
        _checks.positive_int("study", "chunk", chunk)
    evaluate = _evaluator(train, chunk)
    space = declared.space
    default = space.init() if default is None else default
    _checks.same_tree("study", "default", default, "the space's raw values", space.init())
    state = search.init(key)
    asked, told = [], []
    while sum(len(x) for x in told) < declared.budget:
        points, state = search.ask(state)
        if declared.budget % len(points):
            raise ValueError(
                f"study: the budget of {declared.budget} configurations is no multiple of the "
                f"{len(points)} that `search` proposes at a time; declare "
                f"{-(-declared.budget // len(points)) * len(points)}."
            )
        hparams = space.from_unit(jnp.asarray(points))
        scores = evaluate(hparams, declared.tuning)
        state = search.tell(state, points, jnp.asarray(scores.mean(axis=1)))
        asked.append(hparams)
        told.append(scores)
    hparams = jax.tree.map(lambda *x: jnp.concatenate(x), *asked)
    each = np.concatenate(told)
    trials = Trials(hparams, each, each.mean(axis=1))
    return _report(declared, evaluate, trials, default)


def _report(declared: Declared, evaluate, trials: Trials, default: HParams) -> Study:
    sound = np.isfinite(trials.mean)
    if not sound.any():
        raise ValueError(
            f"study: each of {len(sound)} configurations failed on a tuning seed at least; narrow "
            "the space, or make `train` return a finite score for a run that is merely bad."
        )
    best = int(np.argmin(np.where(sound, trials.mean, np.inf)))
    incumbent = jax.tree.map(lambda x: x[best], trials.hparams)
    pair = jax.tree.map(lambda *x: jnp.stack(x), incumbent, default)
    tuned, plain = evaluate(pair, declared.test)
    runs = trials.each.size + tuned.size + plain.size
    score = float(trials.mean[best])
    return Study(incumbent, tuned, default, plain, score, trials, runs)


def _evaluator(train: Train, chunk: int | None):
    """(hparams [N, ...], seeds) -> scores [N, seeds]."""

    def one(job):
        score = train(*job)
        if jnp.shape(score) != ():
            raise TypeError(
                f"study: `train` must return a scalar; got {_checks.describe(score)}. Score one "
                "training of one configuration; vmap is ours."
            )
        return score

    @jax.jit
    def every(hparams, keys):
        size, seeds = jax.tree.leaves(hparams)[0].shape[0], keys.shape[0]
        rows = jax.tree.map(lambda x: jnp.repeat(x, seeds, axis=0), hparams)
        jobs = rows, jnp.tile(keys, size)
        scores = jax.vmap(one)(jobs) if chunk is None else lax.map(one, jobs, batch_size=chunk)
        return scores.reshape(size, seeds)

    def evaluate(hparams, seeds):
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        return np.asarray(every(hparams, keys), np.float64)

    return evaluate


def _seeds(name: str, values: Iterable[int]) -> tuple[int, ...]:
    seeds = tuple(operator.index(value) for value in values)
    if seeds and not 0 <= min(seeds) <= max(seeds) < 2**32:
        raise ValueError(
            f"declare: `{name}` must hold seeds from 0 to 2**32 - 1, as two seeds may have one key "
            f"beyond; got {min(seeds)} to {max(seeds)}."
        )
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"declare: `{name}` must hold seeds, each once; got {list(seeds)}.")
    return seeds
