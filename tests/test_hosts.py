"""One run on several processes: the numbers of one process, whoever dies or is told to stop."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cli_runs import TINY, Result, environment, outcome, read_json, read_lines

from hyperjax.app import _cli, _hosts, main
from hyperjax.app._errors import AppError

TUNE = ("tune", "own.tasks:ridge", *TINY, "--set", "baselines=replay,random")
TUNE += ("--set", "devices=4", "--out")  # fewer will do to resume
PATIENCE = 900  # seconds: far more than any of these takes, even on a machine at its limit
ABORTED = -signal.SIGABRT


class Hosts:
    """Runs commands as one on several processes; as a context manager it ends with the block."""

    def __init__(self, base: Path, outputs: Path):
        tests = Path(__file__).parent
        env = environment(base)
        self._server = subprocess.Popen(
            [sys.executable, str(tests / "host_child.py"), str(outputs), str(PATIENCE)],
            cwd=base,
            env=env | {"PYTHONPATH": os.pathsep.join([env["PYTHONPATH"], str(tests)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, commands: list[dict]) -> list[Result]:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(commands) + "\n")
        self._server.stdin.flush()
        return [Result(*answer) for answer in json.loads(self._server.stdout.readline())]

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.communicate()

    def one(self, *argv: object, devices: int) -> Result:
        return self.run([command(argv, devices)])[0]

    def two(self, *argv: object, faults: tuple[dict, dict] = ({}, {})) -> tuple[Result, Result]:
        """Two processes of two devices each, told about each other by options."""
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        told = ("--coordinator", f"127.0.0.1:{port}", "--processes", 2, "--process")
        first, second = self.run(
            [command((*argv, *told, k), 2, fault) for k, fault in enumerate(faults)]
        )
        return first, second

    def slurm(self, *argv: object) -> tuple[Result, Result]:
        """The same as tasks of a SLURM step, whose variables JAX reads."""
        step = {
            "SLURM_JOB_ID": str(free_job()),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_NODES": "1",
        }
        tasks = [step | {"SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)} for k in range(2)]
        auto = (*argv, "--coordinator", "auto")
        first, second = self.run([command(auto, 2, env=task) for task in tasks])
        return first, second


def command(argv: Sequence[object], devices: int, fault: Any = (), env: Any = ()) -> dict:
    texts = [str(word) for word in argv]
    return {"argv": texts, "devices": devices, "fault": dict(fault), "env": dict(env)}


def free_job() -> int:
    """The number of a job whose port, which JAX takes from it, is free."""
    for job in range(os.getpid() % 2000, 4096):
        with socket.socket() as server:
            if server.connect_ex(("127.0.0.1", 61440 + job)):  # nobody answers
                return job
    raise RuntimeError("no free port")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("outputs")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def whole(hosts, tmp_path_factory) -> Path:
    """The run of one process with four devices, which nothing disturbed."""
    run = tmp_path_factory.mktemp("hosts") / "whole"
    assert hosts.one(*TUNE, run, devices=4).code == 0
    return run


def close(a: dict, b: dict) -> None:
    """Same exchanges; numbers equal to 1e-5, as another number of devices rounds sums otherwise."""
    assert a["events"] == b["events"]
    rows = [[json.loads(line) for line in x["metrics"].splitlines()] for x in (a, b)]
    for left, right in zip(*rows, strict=True):
        assert [left[k] for k in ("step", "seed", "member")] == [
            right[k] for k in ("step", "seed", "member")
        ]
        numbers = [[r["valid"], r["grad_norm"], *r["hparams"].values()] for r in (left, right)]
        np.testing.assert_allclose(*numbers, rtol=1e-5)


def test_two_slurm_tasks_are_one_run(hosts, whole, tmp_path):
    """Bit for bit what one process with as many devices finds; process 0 speaks for both."""
    run = tmp_path / "run"
    first, second = hosts.slurm(*TUNE, run, "--json")
    assert (first.code, second.code) == (0, 0), (first.err, second.err)
    assert outcome(run) == outcome(whole)
    assert read_json(run / "env.json")["processes"] == 2
    assert "on 4 cpu devices of 2 processes" in first.err
    assert json.loads(first.out)["run"] == str(run)  # and nothing that Gloo says
    assert second.out == ""
    starts = [e for e in read_lines(run / "events.jsonl") if e["event"] == "start"]
    assert len(starts) == 1


def test_a_process_dies(hosts, whole, tmp_path):
    """Killed while tuning, then process 0 in a baseline; on as two, as one with fewer devices, and
    as one with as many."""
    run = tmp_path / "run"
    kill = lambda part, n: {"at": [part, n], "signal": "SIGKILL"}
    survivor, dead = hosts.two(*TUNE, run, faults=({}, kill("checkpoints/3", 1)))
    assert dead.code == -signal.SIGKILL
    assert survivor.code == 3, survivor.err
    assert "hyperjax: process 0 of 2 lost another one" in survivor.err
    assert "`hyperjax resume RUN`" in survivor.err and "Traceback" not in survivor.err
    assert len(read_lines(run / "metrics.jsonl")) >= 2 * 2 * 4
    assert not (run / "best.json").exists()

    fewer = shutil.copytree(run, tmp_path / "fewer")
    result = hosts.one("resume", fewer, devices=1)
    assert result.code == 0
    assert "devices 4 then, 1 now" in result.err
    close(outcome(fewer), outcome(whole))

    dead, survivor = hosts.two("resume", run, faults=(kill("results/random.json", 1), {}))
    assert dead.code == -signal.SIGKILL
    assert survivor.code in (3, ABORTED), survivor.err  # JAX may be the first to notice
    assert (run / "best.json").exists()

    result = hosts.one("resume", run, devices=4)
    assert result.code == 0
    assert outcome(run) == outcome(whole)


def test_stop_on_one_stops_all(hosts, whole, tmp_path):
    """SIGTERM to process 1 alone: both save at the same update and exit with 3."""
    run = tmp_path / "run"
    stop = {"at": ["checkpoints/2", 1], "signal": "SIGTERM"}
    first, second = hosts.two(*TUNE, run, faults=({}, stop))
    assert (first.code, second.code) == (3, 3), (first.err, second.err)
    assert f"stopped; continue with `hyperjax resume {run}`" in first.err
    saved = sorted(int(p.name) for p in (run / "checkpoints").iterdir())
    assert len(read_lines(run / "metrics.jsonl")) == saved[-1] * 2 * 4 < 4 * 2 * 4
    assert read_lines(run / "events.jsonl")[-1]["event"] == "interrupt"
    assert [r.code for r in hosts.two("resume", run)] == [0, 0]
    assert outcome(run) == outcome(whole)


# ---- bad input, in this process -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "2"], "--processes and --process need --coordinator HOST:PORT"),
        (["--coordinator", "host:1"], "--coordinator takes HOST:PORT of process 0, with"),
        (["--coordinator", "host", "--processes", "2", "--process", "0"], "Got 'host', 2 and 0"),
        (["--coordinator", "h:0", "--processes", "2", "--process", "0"], "takes HOST:PORT"),
        (["--coordinator", "h:1", "--processes", "2", "--process", "2"], "must be in 0..1; got 2"),
        (["--coordinator", "auto", "--process", "0"], "leave them out"),
    ],
)
def test_bad_options(monkeypatch, capsys, options, message):
    monkeypatch.setattr(_cli, "_prepare_jax", lambda args: None)  # JAX has long started here
    never = lambda **options: pytest.fail("processes were joined")
    monkeypatch.setattr(jax.distributed, "initialize", never)
    assert main(["tune", "digits", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_no_cluster_for_auto(monkeypatch, capsys):
    monkeypatch.setattr(_cli, "_prepare_jax", lambda args: None)

    def initialize(**options):
        assert "coordinator_address" not in options
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    assert main(["resume", "nowhere", "--coordinator", "auto"]) == 2
    assert "pass --coordinator HOST:PORT --processes N --process K" in capsys.readouterr().err


def test_processes_that_differ(monkeypatch, tmp_path):
    """As process 1 sees it: process 0 says something else, and another one sees no folder."""
    monkeypatch.setattr(_hosts, "agreed", lambda value: value + 1)
    with pytest.raises(AppError, match="the processes differ in their settings"):
        _hosts.check_same("settings", "members: 4")
    with pytest.raises(AppError, match="processes need a file system they share"):
        _hosts.check_shared(tmp_path / "config.yaml")


def test_the_least_of_all_processes_counts(monkeypatch):
    assert _hosts.least(2**40 + 1) == 2**40 + 1
    monkeypatch.setattr(_hosts, "several", lambda: True)
    gather = lambda value: np.asarray([value, 3000], np.int32)
    monkeypatch.setattr(_hosts.multihost_utils, "process_allgather", gather)
    assert _hosts.least(2**50) == 3000 * 2**20
    assert _hosts.least(2**30) == 2**30


def test_only_process_0_fails(monkeypatch):
    """Its own error there, and on the others one that says so; nobody waits for ever."""

    def fail():
        raise AppError("no space")

    with pytest.raises(AppError, match="no space"):
        _hosts.on_primary(fail)
    monkeypatch.setattr(_hosts, "primary", lambda: False)
    monkeypatch.setattr(_hosts, "any_of", lambda flag: True)
    with pytest.raises(AppError, match="process 0 could not go on"):
        _hosts.on_primary(fail)
