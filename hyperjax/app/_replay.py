"""`hyperjax replay`: one plain training run under the schedule that a member went through."""

from pathlib import Path

import jax
import numpy as np

from ._baselines import replay_schedules
from ._errors import AppError
from ._folder import open_run
from ._output import Output
from ._results import load_schedules, schedule_of
from ._study import load_task


def replay(path: Path, seed: int | None, member: int | None, out: Output) -> int:
    """Train under the schedule of `member` (default: the best) of `seed`, and report validation.

    First weights and data order are new, so a schedule that only fitted its own run shows. The
    test part is left alone; the closing table of the run has it. Writes `replay-SEED-MEMBER.json`.
    """
    folder, settings = open_run(path)
    values, parents = load_schedules(path)
    _, studies, members, _ = values.shape
    seed = settings.seed if seed is None else seed
    study = seed - settings.seed
    if not 0 <= study < studies:
        last = settings.seed + studies - 1
        raise AppError(f"--seed must be in {settings.seed}..{last}; got {seed}.")
    if member is None:
        member = int(folder.read_json("best.json")["seeds"][study]["member"])
    if not 0 <= member < members:
        raise AppError(f"--member must be in 0..{members - 1}; got {member}.")
    schedule = schedule_of(values, parents, study, member)  # [T, D]
    task = load_task(settings)
    schedules = np.broadcast_to(schedule, (settings.seeds, 1, *schedule.shape))
    trained, _, seconds = replay_schedules(task, settings, None, schedules)
    valid = jax.tree.map(lambda x: np.asarray(x)[:, 0].tolist(), trained.valid)
    result = {"seed": seed, "member": member, "seconds": round(seconds, 3), **valid}
    folder.write_json(f"replay-{seed}-{member}.json", result)
    text = ", ".join(
        f"{k} {np.mean(v):.4f} (runs {np.min(v):.4f} to {np.max(v):.4f})" for k, v in valid.items()
    )
    out.result(result, plain=f"member {member} of seed {seed}, {settings.seeds} runs: {text}")
    return 0
