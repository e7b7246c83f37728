"""A process that has imported everything and forks one more for every command that it reads.

`test_hosts.Hosts` starts it. A line of standard input is a JSON list of commands to run side by
side, each with `argv`, `devices`, `fault` (as in cli_child.py, or {}) and `env`. The answer is a
line with a list of [exit code, standard output, standard error]. Arguments: a folder for what they
write, and the seconds after which all that still run are killed.
"""

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
from cli_child import FAULT, watch

import hyperjax.app._study as _study
from hyperjax.app import main

assert _study  # imported by `main` when it needs it; here before anything is forked
FOLDER, PATIENCE = sys.argv[1], float(sys.argv[2])


def fork(command: dict) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns; it has no threads before its first use
        pid = os.fork()
    if pid:
        return pid
    mine = f"{FOLDER}/{os.getpid()}"
    for number, path in ((0, os.devnull), (1, f"{mine}.out"), (2, f"{mine}.err")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.environ.update(command["env"])
    jax.config.update("jax_num_cpu_devices", command["devices"])
    FAULT.update(command["fault"])
    sys.exit(main(command["argv"]))


def wait(pids: list[int]) -> list[int]:
    """Their exit codes, negative for signals."""
    codes: dict[int, int] = {}
    end = time.monotonic() + PATIENCE
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return [codes[pid] for pid in pids]


def run(commands: list[dict]) -> list[tuple[int, str, str]]:
    pids = [fork(command) for command in commands]
    read = lambda pid, kind: Path(f"{FOLDER}/{pid}.{kind}").read_text()
    return [
        (code, read(pid, "out"), read(pid, "err"))
        for pid, code in zip(pids, wait(pids), strict=True)
    ]


if __name__ == "__main__":
    absent: Any = None
    sys.modules["matplotlib"] = absent  # as if it were not installed, which is faster
    sys.addaudithook(watch)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
