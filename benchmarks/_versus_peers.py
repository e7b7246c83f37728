"""What people use today, on the problems of `_versus_tasks.py`: Optuna, random search, evosax.

Every training is cut into nine parts, after each of which its validation loss is known: that is
what Hyperband prunes by, and the best model of all parts of all trainings is what a search has
found (so early stopping comes free). One compiled program advances one training of every seed by
one part; the studies of the seeds do not know of one another. Optuna's samplers propose one after
another, which serves them better than batches do; evosax proposes a population at a time.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _versus_tasks import Problem

import hyperjax as hj

PARTS, FACTOR = 9, 3  # of a training; of Hyperband
BAD = 1e6  # to evosax, the loss of a training that was never finite


class Found(NamedTuple):
    """What one method found on one seed: rows [steps, gradients, seconds, valid, test].

    A row for every new best validation loss, and the last for where the method ended.
    """

    rows: list[list[float]]


class Program(NamedTuple):
    """`n` trainings at a time, of which number i belongs to seed `of[i]`."""

    advance: Callable  # (state, raw [n, D], fresh [n], part [n]) -> (state, valid [n])
    test: Callable  # params [n, ...] -> [n]
    state: Any
    compile_s: float


def program(problem: Problem, data: Any, seeds: list[int], each: int) -> Program:
    """`each` trainings of every seed, side by side."""
    of = jnp.repeat(jnp.arange(len(seeds)), each)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    length = problem.steps // PARTS
    together = problem.together

    def one(state, raw, fresh, part, row):
        mine = jax.tree.map(lambda x: x[row], data)
        first, draws = jax.random.split(keys[row])
        training = hj.inner(
            problem.space.lift(lambda p, h, b: problem.loss(p, h, b, mine)),
            lambda r: problem.optimizer(problem.space.constrain(r)),
        )
        raw = problem.space.unravel(raw)
        begin = training.init(problem.init(first), raw)
        state = jax.tree.map(lambda x, y: jnp.where(fresh, x, y), begin, state)

        def step(i, state):
            key = jax.random.fold_in(draws, part * length + i)
            return training.step(state, raw, problem.batch(mine, key))

        state = jax.lax.fori_loop(0, length, step, state)
        return state, problem.valid(state.params, mine)

    def begin(row):
        first, _ = jax.random.split(keys[row])
        training = hj.inner(lambda p, r, b: 0.0, lambda r: problem.optimizer(r))
        start = problem.space.constrain(problem.space.init())
        return training.init(problem.init(first), start)

    def score(row):
        params, row = row
        return problem.test(params, jax.tree.map(lambda x: x[row], data))

    chunk = lambda f, xs: jax.lax.map(f, xs, batch_size=together if together > 1 else None)
    state = jax.vmap(begin)(of)
    size, dim = len(of), len(problem.space.names)
    shapes = (state, jnp.zeros((size, dim)), jnp.ones(size, bool), jnp.zeros(size, int))
    start = time.process_time()
    advance = jax.jit(lambda *a: chunk(lambda row: one(*row), (*a, of))).lower(*shapes).compile()
    seconds = time.process_time() - start
    test = jax.jit(lambda params: chunk(score, (params, of)))
    return Program(advance, test, state, seconds)


class Ledger:
    """Of one seed: what has been paid, and the best model so far."""

    def __init__(self, problem: Problem) -> None:
        batch, valid = problem.rows
        self.length = problem.steps // PARTS
        # A loss without its gradient is a third of both, in rows of a training batch.
        self.cost = self.length + valid / (3 * batch)
        self.parts, self.best, self.rows = 0, np.inf, []

    def enter(self, seconds: float, valid: np.ndarray, test: np.ndarray) -> None:
        self.parts += len(valid)
        valid = np.where(np.isfinite(valid), valid, np.inf)
        i = int(np.argmin(valid))
        if valid[i] < self.best:
            self.best = float(valid[i])
            self.rows.append([*self.paid(seconds), self.best, float(test[i])])

    def paid(self, seconds: float) -> list[float]:
        return [self.parts * self.length, self.parts * self.cost, seconds]

    def found(self, seconds: float) -> Found:
        return Found([*self.rows, [*self.paid(seconds), *self.rows[-1][3:]]])


# ------------------------------------------------------------------------------------- Optuna


def samplers(problem: Problem) -> dict[str, Callable[[int], Any]]:
    """Of Optuna, by default settings; TPE multivariate, as hyperparameters act together.

    The one by Gaussian processes needs PyTorch.
    """
    import optuna

    start = dict(zip(problem.space.names, _start(problem).tolist(), strict=True))
    s = optuna.samplers
    return {
        "random search": lambda seed: s.RandomSampler(seed=seed),
        "TPE": lambda seed: s.TPESampler(seed=seed, multivariate=True),
        "Gaussian process": lambda seed: s.GPSampler(seed=seed),
        "CMA-ES": lambda seed: s.CmaEsSampler(seed=seed, x0=start),
    }


def optuna_search(
    problem: Problem, program: Program, seeds: list[int], sampler: Callable, hyperband: bool
) -> tuple[list[Found], dict[str, float]]:
    """Studies of all seeds in lockstep. The first trial of each is the start of the space."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = problem.space.names
    pruner = lambda: (
        optuna.pruners.HyperbandPruner(1, PARTS, FACTOR)
        if hyperband
        else optuna.pruners.NopPruner()
    )
    # Hyperband chooses brackets by the name of the study, which would be drawn anew every time.
    studies = [
        optuna.create_study(sampler=sampler(seed), pruner=pruner(), study_name=f"seed {seed}")
        for seed in seeds
    ]
    for study in studies:
        study.enqueue_trial(dict(zip(names, _start(problem).tolist(), strict=True)))
    count = len(seeds)
    trials: list[Any] = [None] * count
    raw, part = np.zeros((count, len(names)), np.float32), np.zeros(count, np.int32)
    least, diverged = np.full(count, np.inf), 0  # the best part of the trial that runs
    ledgers, state = [Ledger(problem) for _ in seeds], program.state
    clock = Clock()
    for _ in range(problem.trainings * PARTS):
        fresh = np.array([trial is None for trial in trials])
        for i in np.flatnonzero(fresh):
            trials[i], part[i], least[i] = studies[i].ask(), 0, np.inf
            point = [trials[i].suggest_float(name, 1e-6, 1 - 1e-6) for name in names]
            raw[i] = np.log(point) - np.log1p(-np.asarray(point))  # the quantile of every range
        state, valid = program.advance(state, raw, fresh, part)
        valid = np.asarray(valid)
        part += 1
        least = np.fmin(least, valid)
        diverged += int(np.sum(~np.isfinite(valid)))
        for i, trial in enumerate(trials):
            if _over(studies[i], trial, float(valid[i]), int(part[i]), float(least[i])):
                trials[i] = None
        clock.stop()
        test = np.asarray(program.test(state.params))
        for i, ledger in enumerate(ledgers):
            ledger.enter(clock.seconds / count, valid[i : i + 1], test[i : i + 1])
        clock.start()
    clock.stop()
    facts = {
        "wall_s": clock.wall / count,
        "settings": float(np.mean([len(study.trials) for study in studies])),
        "diverged": diverged / count,
    }
    return [ledger.found(clock.seconds / count) for ledger in ledgers], facts


def _over(study, trial, valid: float, part: int, least: float) -> bool:
    """Reports one part of a training; whether that was its last.

    A training counts as the best of its parts, also if it diverged in the end: as infinite if it
    never was finite, which Optuna's samplers take. What becomes of a pruned one is up to them.
    """
    import optuna

    if not np.isfinite(valid):
        study.tell(trial, least)
        return True
    trial.report(valid, part)
    if part == PARTS:
        study.tell(trial, least)
        return True
    if trial.should_prune():
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return True
    return False


# ------------------------------------------------------------------------------------- evosax


def evosax_size(problem: Problem) -> int:
    """The usual population of CMA-ES, 4 + 3 log D."""
    return 4 + int(3 * np.log(len(problem.space.names)))


def evosax_search(
    problem: Problem, program: Program, seeds: list[int]
) -> tuple[list[Found], dict[str, float]]:
    """CMA-ES of evosax from the start of the space, in raw coordinates (logits of quantiles)."""
    from evosax.algorithms import CMA_ES

    size, dim, count = evosax_size(problem), len(problem.space.names), len(seeds)
    algorithm = CMA_ES(population_size=size, solution=jnp.zeros(dim))
    params = algorithm.default_params
    start = problem.space.ravel(problem.space.init())
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    key = lambda turn: jax.vmap(lambda k: jax.random.fold_in(k, turn))(keys)
    ask = jax.jit(jax.vmap(lambda k, s: algorithm.ask(k, s, params)))
    tell = jax.jit(jax.vmap(lambda k, x, f, s: algorithm.tell(k, x, f, s, params)[0]))
    inner = jax.vmap(lambda k: algorithm.init(k, start, params))(key(0))
    ledgers, state, turn, whole = [Ledger(problem) for _ in seeds], program.state, 0, count * size
    diverged = 0
    jax.block_until_ready(tell(key(0), *_nothing(ask, key(0), inner, size), inner))  # compiles
    clock = Clock()
    for turn in range(1, 1 + -(-problem.trainings // size)):
        raw, inner = ask(key(2 * turn), inner)
        best = np.full((count, size), np.inf)
        for part in range(PARTS):
            fresh, at = np.full(whole, part == 0), np.full(whole, part, np.int32)
            state, valid = program.advance(state, raw.reshape(whole, dim), fresh, at)
            valid = np.asarray(valid).reshape(count, size)
            best = np.fmin(best, valid)
            clock.stop()
            test = np.asarray(program.test(state.params)).reshape(count, size)
            for i, ledger in enumerate(ledgers):
                ledger.enter(clock.seconds / count, valid[i], test[i])
            clock.start()
        diverged += int(np.sum(~np.isfinite(valid)))
        scores = jnp.asarray(np.where(best < BAD, best, BAD))
        inner = jax.block_until_ready(tell(key(2 * turn + 1), raw, scores, inner))
    clock.stop()
    facts = {"wall_s": clock.wall / count, "settings": float(turn * size)}
    facts["diverged"] = diverged / count
    return [ledger.found(clock.seconds / count) for ledger in ledgers], facts


def _nothing(ask, key, inner, size: int):
    raw, _ = ask(key, inner)
    return raw, jnp.arange(size, dtype=float) + jnp.zeros(raw.shape[:2])


class Clock:
    """Processor and wall seconds of this process, without those between `stop` and `start`."""

    def __init__(self) -> None:
        self.seconds = self.wall = 0.0
        self.start()

    def start(self) -> None:
        self.since = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.process_time() - self.since[0]
        self.wall += time.perf_counter() - self.since[1]


def _start(problem: Problem) -> np.ndarray:
    """Of the space, as quantiles [D]."""
    return np.asarray(problem.space.to_unit(problem.space.init()), np.float64)
