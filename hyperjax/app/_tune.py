"""The tuning phase of a run: chunks, logs, checkpoints, and the choice of the best member."""

import io
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..tasks import Task
from . import _hosts
from ._checkpoint import Checkpoints
from ._folder import Folder
from ._grid import quantity
from ._memory import check_fits, device_memory
from ._methods import Method, make_method
from ._output import Output
from ._program import History, Program, Progress, chunks, compile_program, empty_history
from ._progress import reporting
from ._results import write_result
from ._settings import Settings
from ._signals import Stop


def tune(
    folder: Folder, settings: Settings, task: Task, mesh: Mesh | None, out: Output, stop: Stop
) -> None:
    """The tuning phase, from its last checkpoint if there is one.

    Ends with `schedule.npz`, `best.json`, `best_params.npz` and the tuned row of the table. Raises
    Interrupted when asked to stop, after the checkpoint.
    """
    if _hosts.agreed(folder.read_json("results/tuned.json") is not None):
        return
    method = make_method(task, settings, mesh)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        done = checkpoints.latest or 0
        out.line(_headline(settings, task, mesh))
        memory = device_memory(mesh)  # asks all hosts, while they are at the same place
        program = compile_program(task, method, settings, mesh)
        check_fits(program, memory, task, settings, mesh)
        need = program.forecast
        takes = f"; takes {quantity(need.total_bytes)} on each device" if need else ""
        out.line(f"compiled in {program.compile_seconds:.1f} s{takes}")
        out.line(f"in each study {program.layout}")
        state, history, seconds = _restore(checkpoints, program, settings, len(task.space.names))
        folder.rewind("metrics.jsonl", done)  # what came after will be computed, and logged, again
        folder.rewind("events.jsonl", done)
        folder.event("resume" if done else "start", done)
        with reporting(out, settings, done) as reporter:
            for part in chunks(program, settings, state, done):
                state, seconds = part.state, seconds + part.seconds
                history = history.join(part.history)
                _hosts.on_primary(partial(_log_chunk, folder, settings, task, part))
                last = part.first + part.history.steps == settings.updates
                reporter.chunk(part.history, part.first, part.seconds)
                checkpoints.save(history.steps, _saved(state, history, seconds))
                if not last:
                    stop.check()
    _finish(folder, settings, task, method, state, history, (program.compile_seconds, seconds))


def _headline(settings: Settings, task: Task, mesh: Mesh | None) -> str:
    devices = 1 if mesh is None else mesh.size
    where = f" of {jax.process_count()} processes" if _hosts.several() else ""
    return (
        f"tuning {len(task.space.names)} hyperparameters of {task.name} by {settings.method}: "
        f"{settings.seeds} studies x {settings.members} members x {settings.inner_steps} steps "
        f"on {devices} {jax.devices()[0].platform} device{'s' * (devices > 1)}{where}"
    )


def _saved(state, history: History, seconds: float) -> dict[str, Any]:
    return {"state": state, "history": history.arrays(), "seconds": np.array([seconds], np.float32)}


def _restore(checkpoints: Checkpoints, program: Program, settings: Settings, names: int):
    """State, history and seconds spent, from the newest checkpoint or from the beginning."""
    state = program.start()
    done = checkpoints.latest
    if not done:
        return state, empty_history(settings, names), 0.0
    like = _saved(state, empty_history(settings, names, done), 0.0)
    saved = checkpoints.restore(done, like)
    history = History(*[np.asarray(x) for x in saved["history"]])
    return saved["state"], history, float(saved["seconds"][0])


def _log_chunk(folder: Folder, settings: Settings, task: Task, part: Progress) -> None:
    history, names = part.history, task.space.names
    rows, events = [], []
    for t in range(history.steps):
        step = part.first + t
        for s in range(settings.seeds):
            for m in range(settings.members):
                rows.append(_row(history, names, settings, t, s, m, step))
                parent = int(history.parents[t, s, m])
                where = {"step": step, "seed": settings.seed + s, "member": m, "parent": parent}
                if history.diverged[t, s, m]:
                    events.append({"event": "quarantine", **where, "reason": "non-finite"})
                elif parent != m:
                    events.append({"event": "exchange", **where})
    folder.append("metrics.jsonl", rows)
    folder.append("events.jsonl", events)


def _row(history: History, names, settings: Settings, t, s, m, step) -> dict:
    solved = not np.isnan(history.curvature[t, s, m])
    info = (
        {"residual": history.residual[t, s, m], "curvature": history.curvature[t, s, m]}
        if solved
        else {}
    )
    return {
        "step": step,
        "inner_step": (step + 1) * settings.every,
        "seed": settings.seed + s,
        "member": m,
        "valid": history.value[t, s, m],
        "grad_norm": history.grad_norm[t, s, m],
        "finite": history.finite[t, s, m],
        "hparams": dict(zip(names, history.values[t, s, m], strict=True)),
        "info": info,
    }


def _finish(folder, settings, task, method: Method, state, history: History, timing) -> None:
    """Choose the best member of each study by validation, and look at its test loss once."""
    final = np.where(history.finite[-1], history.value[-1], np.inf)
    best, studies = final.argmin(axis=1), np.arange(settings.seeds)
    choose = lambda members: jax.tree.map(lambda x: x[studies, best], members)
    params = _hosts.whole(lambda x: jax.vmap(method.params)(choose(x)), state.members)
    write = partial(_write_best, folder, settings, task, history, final, best, params, timing)
    _hosts.on_primary(write)


def _write_best(folder, settings, task, history, final, best, params, timing) -> None:
    valid = jax.vmap(task.evaluate, (0, None))(params, task.valid)
    names = task.space.names
    inner = np.full(settings.updates, settings.every)
    _write_npz(folder, "schedule.npz", names=np.array(names), values=history.values,
               parents=history.parents, inner_steps=inner)  # fmt: skip
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    _write_npz(folder, "best_params.npz", **{jax.tree_util.keystr(k): x for k, x in flat})
    rows = [
        {"seed": settings.seed + s, "member": int(m), "valid": final[s, m],
         "hparams": dict(zip(names, history.values[-1, s, m], strict=True))}
        for s, m in enumerate(best)
    ]  # fmt: skip
    folder.write_json("best.json", {"seeds": rows})
    steps = settings.inner_steps_per_seed
    write_result(folder, "tuned", settings, task, params, valid, steps, timing)


def _write_npz(folder: Folder, name: str, **arrays: Any) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    folder.write_bytes(name, buffer.getvalue())
