"""Kill a run ten times at random moments with SIGKILL; resumed, it ends with the same numbers.

Run: python benchmarks/kill_resume.py
Time: about 5 minutes on 2 cores.
Expect: "10 of 10 equal". The tuned run, the baselines and the closing table of every run that was
killed and resumed equal those of a run that nothing disturbed, bit for bit.

What is compared: every line of metrics.jsonl, the events without their times, all arrays of
schedule.npz and best_params.npz, best.json, and table.json without its seconds.

The moments are uniform over the time from config.yaml to the end of a run with compiled programs in
the cache, drawn with --seed. A run that ended before its moment does not count, and another moment
is drawn. Writes --out (default benchmarks/results/kill_resume.json).
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
HYPERJAX = [sys.executable, "-c", "from hyperjax.app import main; raise SystemExit(main())"]
SETTINGS = ["tune", "digits", "--members", "8", "--seeds", "3", "--set", "inner_steps=400"]
SETTINGS += ["--set", "updates_per_chunk=1"]  # a checkpoint at every update


def start(*arguments: str, log: Path) -> subprocess.Popen:
    with log.open("a") as file:
        return subprocess.Popen([*HYPERJAX, *arguments], stdout=file, stderr=file)


def finish(process: subprocess.Popen, log: Path) -> None:
    if process.wait() != 0:
        raise SystemExit(f"a run failed:\n{log.read_text()}")


def begun(process: subprocess.Popen, run: Path) -> float:
    """The time at which config.yaml is there."""
    while not (run / "config.yaml").exists():
        if process.poll() is not None:
            raise SystemExit(f"no run in {run}")
        time.sleep(0.005)
    return time.perf_counter()


def whole_run(run: Path, log: Path) -> float:
    """A run from beginning to end, and the seconds from its config.yaml on."""
    process = start(*SETTINGS, "--out", str(run), log=log)
    began = begun(process, run)
    finish(process, log)
    return time.perf_counter() - began


def killed_run(run: Path, after: float, log: Path) -> bool:
    """A run killed so many seconds after its config.yaml; false if it had ended."""
    process = start(*SETTINGS, "--out", str(run), log=log)
    rest = begun(process, run) + after - time.perf_counter()
    try:
        process.wait(max(rest, 0))
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait() == -signal.SIGKILL


def where(run: Path) -> str:
    """How far a run came."""
    saved = [int(p.name) for p in run.glob("checkpoints/*") if p.name.isdigit()]
    results = [p.stem for p in run.glob("results/*.json")]
    if (run / "table.json").exists():
        return "after the table"
    if results:
        order = ("tuned", "replay", "random", "optuna")
        return f"after {max(results, key=order.index)}"
    return f"tuning, {max(saved)} updates saved" if saved else "before the first checkpoint"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def bits(path: Path) -> dict:
    with np.load(path) as file:
        return {k: (str(v.dtype), v.shape, v.tobytes()) for k, v in file.items()}


def outcome(run: Path) -> dict:
    """Everything a run found, apart from clocks and from the traces of interruptions."""
    events = [e for e in lines(run / "events.jsonl") if e["event"] not in ("start", "resume")]
    rows = json.loads((run / "table.json").read_text())["rows"]
    return {
        "metrics": (run / "metrics.jsonl").read_text(),
        "events": [{k: v for k, v in e.items() if k != "time"} for e in events],
        "schedule": bits(run / "schedule.npz"),
        "best_params": bits(run / "best_params.npz"),
        "best": (run / "best.json").read_text(),
        "table": [{k: v for k, v in r.items() if k not in ("compile_s", "run_s")} for r in rows],
    }


def differences(one: dict, other: dict) -> list[str]:
    return [name for name in one if one[name] != other[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    out = ROOT / "benchmarks" / "results" / "kill_resume.json"
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.check_output(git, text=True).strip()

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(base / "xla"))
        log = base / "log.txt"
        whole_run(base / "whole", log)  # fills the cache
        seconds = whole_run(base / "again", log)
        whole = outcome(base / "whole")
        repeats = differences(whole, outcome(base / "again"))
        print(f"undisturbed: {seconds:.1f} s, a second time differs in {repeats or 'nothing'}")
        env = json.loads((base / "whole" / "env.json").read_text())

        kills = []
        while len(kills) < args.kills:
            after, run = moments.uniform(0, seconds), base / "run"
            if killed_run(run, after, log):
                place = where(run)
                finish(start("resume", str(run), log=log), log)
                differs = differences(whole, outcome(run))
                kills.append({"after_s": round(after, 2), "where": place, "differs": differs})
                print(f"killed after {after:.1f} s, {place}: differs in {differs or 'nothing'}")
            shutil.rmtree(run)

    equal = sum(not kill["differs"] for kill in kills)
    print(f"{equal} of {len(kills)} equal")
    result = {
        "benchmark": "kill_resume",
        "command": " ".join(SETTINGS),
        "seed": args.seed,
        "equal": equal,
        "undisturbed_s": round(seconds, 1),
        "undisturbed_differs": repeats,
        "kills": kills,
        "commit": commit,
        "env": {k: v for k, v in env.items() if k not in ("argv", "command")},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(equal != len(kills) or bool(repeats))


if __name__ == "__main__":
    main()
