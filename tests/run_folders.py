"""Run folders to read back, written the way the run loop writes them, with known content."""

import json
from pathlib import Path

import numpy as np
import yaml

OUTER_EVERY = 20


def _space(count: int) -> dict:
    """Hyperparameters as a tuning run has them: rates, penalties per layer, probabilities."""
    space = {
        "lr": {"low": 1e-4, "high": 1.0, "scale": "log"},
        "momentum": {"low": 0.0, "high": 0.99, "scale": "linear"},
        "offset": {"low": None, "high": None, "scale": "linear"},
    }
    for i in range(count - 3):
        if i % 2:
            space[f"dropout[{i // 2}]"] = {"low": 0.0, "high": 0.9, "scale": "linear"}
        else:
            space[f"l2[{i // 2}]"] = {"low": 1e-7, "high": 0.1, "scale": "log"}
    return space


def _initial(space: dict, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """[S, M, D] positions in which every hyperparameter moves on a scale of its own."""
    columns = []
    for bound in space.values():
        if bound["low"] is None:
            columns.append(rng.normal(size=shape))
        else:
            low, high = bound["low"], bound["high"]
            if bound["scale"] == "log":
                low, high = np.log10(low), np.log10(high)
            columns.append(rng.uniform(low, high, shape))
    return np.stack(columns, -1)


def _constrained(space: dict, position: np.ndarray) -> np.ndarray:
    columns = []
    for d, bound in enumerate(space.values()):
        value = 10 ** position[..., d] if bound["scale"] == "log" else position[..., d]
        columns.append(
            np.clip(value, bound["low"], bound["high"]) if bound["low"] is not None else value
        )
    return np.stack(columns, -1).astype(np.float32)


def simulate(seeds: int, members: int, steps: int, hparams: int, every: int = 5):
    """A population that descends on a known loss and copies its best quarter over its worst."""
    rng, space = np.random.default_rng(7), _space(hparams)
    position = _initial(space, (seeds, members), rng)
    target = _initial(space, (1, 1), rng) * 0.5 + position.mean((0, 1)) * 0.5
    weight, width = 0.6 ** np.arange(hparams), position.std((0, 1)) + 1e-3
    values = np.empty((steps, seeds, members, hparams), np.float32)
    valid = np.empty((steps, seeds, members))
    parents = np.broadcast_to(np.arange(members), valid.shape).astype(np.int32)
    for t in range(steps):
        values[t] = _constrained(space, position)
        far = (weight * ((position - target) / width) ** 2).sum(-1) / weight.sum()
        trained = 2.0 * np.exp(-4 * (t + 1) / steps)
        valid[t] = 0.08 + trained + 0.25 * far + 0.01 * rng.random((seeds, members))
        position += 0.06 * (target - position) + 0.02 * width * rng.normal(size=position.shape)
        if (t + 1) % every == 0 and members >= 4:
            order = valid[t].argsort(-1)
            for s in range(seeds):
                quarter = members // 4
                parents[t, s, order[s, -quarter:]] = order[s, :quarter]
                position[s] = position[s, parents[t, s]]
    return space, values, valid, parents


def write_run(
    folder: Path,
    seeds: int = 2,
    members: int = 8,
    steps: int = 12,
    hparams: int = 5,
    *,
    finished: bool = True,
    diverge: bool = False,
) -> Path:
    """Writes a run folder of format 1, the way the run loop does."""
    space, values, valid, parents = simulate(seeds, members, steps, hparams)
    if diverge:
        valid[steps // 3 :, :, members // 2] = np.nan
        valid[1:3, :, 0] *= 1e6
    folder.mkdir(parents=True)
    config = {"format": 1, "hyperjax": "0.1.0", "task": "digits", "method": "unroll"}
    config |= {"members": members, "seeds": seeds, "seed": 0, "outer_every": OUTER_EVERY}
    config |= {"inner_steps": steps * OUTER_EVERY, "note": "<b>&amp; $x$"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    env = {"python": "3.11.9", "jax": "0.10.2", "devices": [{"kind": "cpu", "count": 2}]}
    (folder / "env.json").write_text(json.dumps(env))
    (folder / "space.json").write_text(json.dumps(space))
    _write_lines(folder, list(space), values, valid, parents, finished)
    if finished:
        np.savez(
            folder / "schedule.npz",
            names=np.array(list(space)),
            values=values,
            parents=parents,
            inner_steps=np.full(steps, OUTER_EVERY),
        )
        _write_results(folder, seeds, members, steps, list(space), values, valid, parents)
    return folder


def _write_lines(folder, names, values, valid, parents, finished):
    steps, seeds, members = valid.shape
    lines, events = [], [{"event": "start", "step": 0, "time": "2026-11-21T10:00:00Z"}]
    for t in range(steps):
        for s in range(seeds):
            for m in range(members):
                loss = float(valid[t, s, m])
                row = {"step": t + 1, "inner_step": (t + 1) * OUTER_EVERY, "seed": s, "member": m}
                row |= {"valid": loss if np.isfinite(loss) else None, "grad_norm": 0.02}
                row |= {"finite": bool(np.isfinite(loss)), "info": {}}
                row["hparams"] = dict(zip(names, values[t, s, m].tolist(), strict=True))
                lines.append(row)
                if parents[t, s, m] != m:
                    event = {"event": "exchange", "step": t + 1, "seed": s, "member": m}
                    events.append(event | {"parent": int(parents[t, s, m])})
    if finished:
        events.append({"event": "done", "step": steps, "time": "2026-11-21T10:01:00Z"})
    lost = {"event": "quarantine", "step": 5, "seed": 0, "member": 1, "parent": 0}
    if members > 1:
        events.append(lost | {"reason": "<non-finite>"})
    for name, rows in (("metrics", lines), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def _write_results(folder, seeds, members, steps, names, values, valid, parents):
    best = []
    for s in range(seeds):
        ended = np.where(np.isfinite(valid[-1, s]), valid[-1, s], np.inf)[parents[-1, s]]
        member = int(ended.argmin())
        final = values[-1, s, parents[-1, s, member]].tolist()
        best.append({"seed": s, "member": member, "valid": float(ended[member])})
        best[-1]["hparams"] = dict(zip(names, final, strict=True))
    (folder / "best.json").write_text(json.dumps({"seeds": best}))
    (folder / "table.json").write_text(json.dumps(make_table(seeds, members * steps * OUTER_EVERY)))


def make_table(seeds: int, inner_steps: int) -> dict:
    """A closing table with known gaps between its rows."""
    rng, rows = np.random.default_rng(3), []
    names = {"tuned": "tuned population", "replay": "schedule replayed", "random": "random search"}
    names["optuna"] = "optuna (TPE)"
    luck = 0.02 * rng.random(seeds)
    for i, (key, name) in enumerate(names.items()):
        loss = 0.12 + 0.02 * i + luck + 0.003 * rng.random(seeds)
        row = {"name": name, "key": key, "inner_steps": inner_steps}
        for part in ("valid", "test"):
            row[f"{part}_loss"] = loss.tolist()
            row[f"{part}_accuracy"] = (1 - loss / 4).tolist()
        rows.append(row | {"compile_s": 8.1 / (i + 1), "run_s": 30.2})
    return {"inner_steps_per_seed": inner_steps, "rows": rows, "notes": ["A note with <tags>."]}
