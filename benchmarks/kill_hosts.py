"""Kill one process of two ten times at random moments; resumed, the run ends with the same numbers.

Run: python benchmarks/kill_hosts.py
Time: about 10 minutes on 2 cores.
Expect: "10 of 10 equal", and no survivor that lasts longer than --patience after the kill.

Two processes with two CPU devices each run as one over the loopback, joined by Gloo. One of them,
drawn each time, gets SIGKILL. The survivor must end by itself, with exit code 3 (it noticed and
said so) or -6 (JAX ended it). Then the run is resumed: on two processes, or on one process with
four devices, in turn. What is compared, and with what a run that nothing disturbed, on one process
with four devices, found: see kill_resume.py. Equal means bit for bit.

Moments are uniform over the time from config.yaml to the end of an undisturbed run of two
processes, drawn with --seed; one that comes after the end does not count. Writes --out (default
benchmarks/results/kill_hosts.json).
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from kill_resume import HYPERJAX, ROOT, SETTINGS, begun, differences, outcome, where

DEVICES = 4


def start(*arguments: str, log: Path, processes: int) -> list[subprocess.Popen]:
    """The command on so many processes, which share the devices."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(DEVICES // processes)}
    # XLA has as many threads as cores, or devices if these are more, and cuts sums by threads.
    environment["NPROC"] = str(max(DEVICES, os.cpu_count() or 1))
    started = []
    for process in range(processes):
        told = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes)]
        told = [*told, "--process", str(process)] if processes > 1 else []
        with log.open("a") as file:
            line = [*HYPERJAX, *arguments, *told]
            started.append(subprocess.Popen(line, stdout=file, stderr=file, env=environment))
    return started


def finish(started: list[subprocess.Popen], log: Path) -> None:
    if any([process.wait() for process in started]):
        raise SystemExit(f"a run failed:\n{log.read_text()}")


def killed(run: Path, victim: int, after: float, log: Path, patience: float) -> dict | None:
    """What became of a run whose process `victim` was killed so long after its config.yaml; None
    if it had ended by then."""
    started = start(*SETTINGS, "--out", str(run), log=log, processes=2)
    rest = begun(started[0], run) + after - time.perf_counter()
    try:
        started[victim].wait(max(rest, 0))
    except subprocess.TimeoutExpired:
        started[victim].kill()
    if started[victim].wait() != -signal.SIGKILL:
        finish(started, log)
        return None
    began = time.perf_counter()
    code = started[1 - victim].wait(patience)
    lasted = time.perf_counter() - began
    if code not in (3, -signal.SIGABRT):
        raise SystemExit(f"the survivor ended with {code}:\n{log.read_text()}")
    row = {"after_s": round(after, 2), "victim": victim, "where": where(run)}
    return row | {"survivor_code": code, "survivor_lasted_s": round(lasted, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--patience", type=float, default=150, help="seconds for a survivor")
    out = ROOT / "benchmarks" / "results" / "kill_hosts.json"
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.check_output(git, text=True).strip()

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(base / "xla"))
        log = base / "log.txt"
        finish(start(*SETTINGS, "--out", str(base / "whole"), log=log, processes=1), log)
        whole = outcome(base / "whole")
        for name in ("filled", "timed"):  # the first fills the cache of compiled programs
            started = start(*SETTINGS, "--out", str(base / name), log=log, processes=2)
            began = begun(started[0], base / name)
            finish(started, log)
            seconds = time.perf_counter() - began
        two = differences(whole, outcome(base / "timed"))
        print(f"two processes: {seconds:.1f} s, differs from one in {two or 'nothing'}")
        env = json.loads((base / "timed" / "env.json").read_text())

        kills = []
        while len(kills) < args.kills:
            run, victim, after = base / "run", draw.randrange(2), draw.uniform(0, seconds)
            row = killed(run, victim, after, log, args.patience)
            if row is not None:
                processes = 2 - len(kills) % 2
                finish(start("resume", str(run), log=log, processes=processes), log)
                differs = differences(whole, outcome(run))
                kills.append(row | {"resumed_on": processes, "differs": differs})
                print(kills[-1])
            shutil.rmtree(run)

    equal = sum(not kill["differs"] for kill in kills)
    print(f"{equal} of {len(kills)} equal")
    result = {
        "benchmark": "kill_hosts",
        "command": " ".join(SETTINGS),
        "seed": args.seed,
        "equal": equal,
        "undisturbed_s": round(seconds, 1),
        "two_processes_differ_from_one_in": two,
        "longest_survivor_s": max(kill["survivor_lasted_s"] for kill in kills),
        "kills": kills,
        "commit": commit,
        "env": {k: v for k, v in env.items() if k not in ("argv", "command")},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(equal != len(kills) or bool(two))


if __name__ == "__main__":
    main()
