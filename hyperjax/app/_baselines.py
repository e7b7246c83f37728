"""What a tuned run is compared with, at equal numbers of training steps: random search, Optuna's
TPE, and one plain run that replays the schedule that tuning found."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._inner import inner
from .._unroll import unroll
from ..tasks import Task
from . import _hosts
from ._program import study_keys
from ._settings import Settings

_FRESH = 1 << 20  # replay draws its data and first weights where tuning never did
_BATCH = 8  # TPE proposes this many settings before it learns how they did


class Trained(NamedTuple):
    """Models trained under fixed or scheduled hyperparameters; leaves lead with [S, N]."""

    params: Any
    valid: dict[str, np.ndarray]


class Trainer(NamedTuple):
    """`train(vectors [S, N, T, D] of raw hyperparameters, one row per update) -> Trained`."""

    train: Callable[[np.ndarray], Trained]
    compile_seconds: float


def make_trainer(
    task: Task, settings: Settings, mesh: Mesh | None, count: int, *, offset: int = 0
) -> Trainer:
    """Compile the training of `count` models per study; `offset` moves all randomness."""
    space, updates = task.space, settings.updates
    training = inner(space.lift(task.loss), lambda raw: task.optimizer(space.constrain(raw)))
    response = unroll(training.step)

    def begin(key, member, vector):
        weights = jax.random.fold_in(jax.random.fold_in(key, offset), member)
        return training.init(task.init(weights), space.unravel(vector))

    def window(states, vectors, batches):
        one = lambda x: response(space.unravel(x[1]), x[0], batches)[1]
        return jax.lax.map(one, (states, vectors))

    shardings = None
    if mesh is not None and count % mesh.size == 0:
        spread, same = PartitionSpec(mesh.axis_names[0]), PartitionSpec()
        shardings = (NamedSharding(mesh, PartitionSpec(None, *spread)), NamedSharding(mesh, same))
        window = jax.shard_map(window, mesh=mesh, in_specs=(spread, spread, same), out_specs=spread)

    def study(key, members, vectors):
        def body(states, step):
            t, row = step  # row: [N, D]
            # Drawn once for all members, as in a population.
            batches = task.batches(jax.random.fold_in(key, offset + t + 1), settings.every)
            return window(states, row, batches), None

        states = jax.vmap(begin, (None, 0, 0))(key, members, vectors[:, 0])
        steps = (jnp.arange(updates), jnp.swapaxes(vectors, 0, 1))
        states, _ = jax.lax.scan(body, states, steps)
        params = states.params
        return params, jax.lax.map(lambda p: task.evaluate(p, task.valid), params)

    keys = study_keys(settings)

    def studies(vectors):
        return jax.vmap(study, in_axes=(0, None, 0))(keys, jnp.arange(count), vectors)

    program = jax.jit(studies, out_shardings=shardings)
    shape = (settings.seeds, count, updates, len(space.names))
    began = time.perf_counter()
    compiled = program.lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()

    def train(vectors: np.ndarray) -> Trained:
        params, valid = compiled(np.asarray(vectors, np.float32))
        return Trained(params, {k: np.asarray(v) for k, v in valid.items()})

    return Trainer(train, time.perf_counter() - began)


def constant(settings: Settings, raw: np.ndarray) -> np.ndarray:
    """[S, N, D] settings as schedules that never change: [S, N, T, D]."""
    return np.repeat(raw[:, :, None, :], settings.updates, axis=2)


def pick(trained: Trained) -> tuple[Any, dict[str, np.ndarray], np.ndarray]:
    """The best model of each study by validation loss: params [S, ...], metrics [S], index [S]."""
    loss = np.where(np.isfinite(trained.valid["loss"]), trained.valid["loss"], np.inf)
    best = loss.argmin(axis=1)
    studies = np.arange(len(best))
    choose = lambda tree: jax.tree.map(lambda x: x[studies, best], tree)
    return _hosts.whole(choose, trained.params), choose(trained.valid), best


def random_search(task: Task, settings: Settings, mesh: Mesh | None):
    """As many settings as the population has members, drawn from the space."""
    trainer = make_trainer(task, settings, mesh, settings.members)
    draw = lambda key: task.space.ravel(
        jax.vmap(task.space.sample)(jax.random.split(jax.random.fold_in(key, 0), settings.members))
    )
    raw = np.asarray(jax.vmap(draw)(study_keys(settings)))
    began = time.perf_counter()
    params, valid, best = pick(trainer.train(constant(settings, raw)))
    chosen = raw[np.arange(settings.seeds), best]
    return params, valid, chosen, trainer.compile_seconds, time.perf_counter() - began


def replay_schedules(task: Task, settings: Settings, mesh: Mesh | None, values: np.ndarray):
    """One plain training run per study under schedules [S, N, T, D] of constrained values."""
    trainer = make_trainer(task, settings, mesh, values.shape[1], offset=_FRESH)
    raw = _raw_vectors(task, values)
    began = time.perf_counter()
    trained = trainer.train(raw)
    jax.block_until_ready(trained.params)
    return trained, trainer.compile_seconds, time.perf_counter() - began


def _raw_vectors(task: Task, values: np.ndarray) -> np.ndarray:
    space = task.space
    # A bijector may round onto its bound, whose raw value is infinite; stay a rounding inside.
    low, high = (np.array([getattr(r, k) for _, r in space.scalars()]) for k in ("low", "high"))
    inside = np.clip(values, np.nextafter(np.float32(low), np.float32(np.inf)),
                     np.nextafter(np.float32(high), np.float32(-np.inf)))  # fmt: skip
    raw = space.ravel(space.unconstrain(space.unravel(jnp.asarray(inside, jnp.float32))))
    return np.clip(np.asarray(raw), -80, 80)


def optuna_tpe(task: Task, settings: Settings, mesh: Mesh | None):
    """Optuna's TPE with as many trials as the population has members, asked in batches.

    Every scalar is proposed as a quantile in (0, 1) of its range, which is the same prior as for
    random search. A diverged trial is told as failed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    studies = [
        optuna.create_study(sampler=optuna.samplers.TPESampler(seed=settings.seed + i))
        for i in range(settings.seeds)
    ]
    batch = min(_BATCH, settings.members)
    trainer = make_trainer(task, settings, mesh, batch)
    began = time.perf_counter()
    rounds: list[tuple] = []
    for first in range(0, settings.members, batch):
        trials = [[study.ask() for _ in range(batch)] for study in studies]
        raw = np.stack([[_propose(task, trial) for trial in row] for row in trials])
        trained = trainer.train(constant(settings, raw))
        for study, row, losses in zip(studies, trials, trained.valid["loss"], strict=True):
            for trial, value in zip(row, losses, strict=True):
                failed = optuna.trial.TrialState.FAIL
                if np.isfinite(value):
                    study.tell(trial, float(value))
                else:
                    study.tell(trial, state=failed)
        keep = settings.members - first  # of a last, partly surplus batch
        trained = trained._replace(params=_hosts.whole(lambda params: params, trained.params))
        rounds.append(jax.tree.map(lambda x, n=keep: x[:, :n], (trained, raw)))
    trained, raw = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *rounds)
    params, valid, best = pick(trained)
    chosen = raw[np.arange(settings.seeds), best]
    return params, valid, chosen, trainer.compile_seconds, time.perf_counter() - began


def _propose(task: Task, trial) -> np.ndarray:
    quantiles = [(r, trial.suggest_float(name, 1e-6, 1 - 1e-6)) for name, r in task.space.scalars()]
    return np.array([float(r.quantile(jnp.asarray(u))) for r, u in quantiles], np.float32)
