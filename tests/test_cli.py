"""The `hyperjax` command: every method end to end, what it prints, and errors of one line."""

import errno
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cli_runs import TINY, Result, Shell, environment, outcome, read_json, read_lines, write_tasks

import hyperjax
from hyperjax.app import _cli, main
from hyperjax.app._baselines import Trained, pick
from hyperjax.app._errors import AppError
from hyperjax.app._folder import Folder
from hyperjax.app._settings import METHODS, Settings, dump

RIDGE = "own.tasks:ridge"
BRIEF = (*TINY, "--set", "baselines=random")
ESC = "\x1b"


# ---- whole runs, in processes of their own ------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def shell(base) -> Iterator[Shell]:
    with Shell(base) as process:
        yield process


@pytest.fixture(scope="module")
def tuned(shell, tmp_path_factory) -> tuple[Path, Result]:
    """A finished run by unroll with everything in it, and what was printed."""
    run = tmp_path_factory.mktemp("cli") / "run"
    return run, shell("tune", RIDGE, *TINY, "--out", run, plots=True)


def test_a_run_leaves_a_complete_folder(tuned):
    run, result = tuned
    assert (result.code, result.err) == (0, "")
    assert [row["key"] for row in read_json(run / "table.json")["rows"]] == [
        "tuned",
        "replay",
        "random",
        "optuna",
    ]
    for row in read_json(run / "table.json")["rows"]:
        assert np.shape(row["valid_loss"]) == np.shape(row["test_loss"]) == (2,)
        assert np.isfinite([row["valid_loss"], row["test_loss"]]).all()
        assert row["inner_steps"] == (40 if row["key"] == "replay" else 4 * 40)
    best = read_json(run / "best.json")["seeds"]
    assert [row["seed"] for row in best] == [0, 1]
    assert all(set(row["hparams"]) == {"lr", "l2"} for row in best)
    assert len(list((run / "plots").glob("*.png"))) >= 5
    page = (run / "report.html").read_text()
    assert len(page) < 1_000_000 and "data:image/png" in page
    assert len(read_lines(run / "metrics.jsonl")) == 4 * 2 * 4  # updates, seeds, members
    assert list(run.rglob("*.part")) == []


def test_what_is_chosen_is_the_best_by_validation(tuned):
    run, _ = tuned
    last = [row for row in read_lines(run / "metrics.jsonl") if row["step"] == 3]
    for row in read_json(run / "best.json")["seeds"]:
        mine = {r["member"]: r["valid"] for r in last if r["seed"] == row["seed"]}
        assert row["member"] == min(mine, key=lambda m: mine[m])
        assert row["valid"] == min(mine.values())


def test_piped_output_is_plain(tuned):
    run, result = tuned
    lines = result.out.splitlines()
    assert lines[0] == f"run folder: {run}"
    assert "2 studies x 4 members x 40 steps on 2 cpu devices" in result.out
    assert sum(line.startswith("step ") and "best" in line for line in lines) == 4
    assert any(line.startswith("random search ") for line in lines)
    assert ESC not in result.out and not set("│┃━─") & set(result.out)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_tunes_a_task_of_ones_own(shell, tmp_path, method):
    run = tmp_path / "run"
    result = shell("tune", RIDGE, *BRIEF, "--method", method, "--out", run, "--json")
    assert result.code == 0
    table = read_json(run / "table.json")
    assert json.loads(result.out) == {"run": str(run), **table}
    assert [row["key"] for row in table["rows"]] == ["tuned", "random"]
    assert method in table["rows"][0]["name"]

    rows = read_lines(run / "metrics.jsonl")
    loss = np.array([np.inf if r["valid"] is None else r["valid"] for r in rows]).reshape(4, -1)
    assert np.median(loss[-1]) < np.median(loss[0])
    assert np.max(table["rows"][0]["valid_loss"]) < np.median(loss[0])
    assert ({r["grad_norm"] for r in rows} == {0.0}) == (method in ("population", "random"))
    assert {bool(r["info"]) for r in rows} == {method == "implicit"}  # what its solves did
    copies = [e for e in read_lines(run / "events.jsonl") if e["event"] == "exchange"]
    assert bool(copies) == (method != "random")
    assert (run / "report.html").stat().st_size < 1_000_000


def test_devices_move_the_last_bits_only(shell, tmp_path):
    """Members are independent within an update, so a mesh may only change how sums are rounded."""
    for count in (1, 2):
        run = tmp_path / str(count)
        result = shell("tune", RIDGE, *BRIEF, "--set", f"devices={count}", "--out", run)
        assert result.code == 0 and f"on {count} cpu device" in result.out
    one, two = (outcome(tmp_path / name) for name in ("1", "2"))
    assert one["events"] == two["events"]  # the same exchanges
    rows = [[json.loads(line) for line in x["metrics"].splitlines()] for x in (one, two)]
    for a, b in zip(*rows, strict=True):
        assert (a["step"], a["seed"], a["member"]) == (b["step"], b["seed"], b["member"])
        numbers = [[r["valid"], r["grad_norm"], *r["hparams"].values()] for r in (a, b)]
        np.testing.assert_allclose(*numbers, rtol=1e-5)
    for a, b in zip(one["table"], two["table"], strict=True):
        np.testing.assert_allclose(a["test_loss"], b["test_loss"], rtol=1e-5)


def test_replay(shell, tuned):
    run, _ = tuned
    best = read_json(run / "best.json")["seeds"][0]["member"]
    default = shell("replay", run, "--json")
    assert default.code == 0 and default.out.count("\n") == 1
    found = json.loads(default.out)
    assert (found["seed"], found["member"]) == (0, best)
    assert read_json(run / f"replay-0-{best}.json") == found
    # The closing table replays the schedule of each seed under that seed.
    row = read_json(run / "table.json")["rows"][1]
    np.testing.assert_allclose(found["loss"][0], row["valid_loss"][0], rtol=1e-5)

    other = (best + 1) % 4
    explicit = shell("replay", run, "--member", other, "--seed", 1)
    assert explicit.code == 0
    assert explicit.out.startswith(f"member {other} of seed 1, 2 runs: loss ")
    assert read_json(run / f"replay-1-{other}.json")["loss"] != found["loss"]


def test_replay_of_what_is_not_there(tuned, complain):
    run, _ = tuned
    assert "--member must be in 0..3; got 4" in complain("replay", run, "--member", 4)
    assert "--member must be in 0..3; got -1" in complain("replay", run, "--member", -1)
    assert "--seed must be in 0..1; got 2" in complain("replay", run, "--seed", 2)


def test_report_again(shell, tuned):
    run, _ = tuned
    (run / "report.html").unlink()
    result = shell("report", run, plots=True)
    assert (result.code, result.out, result.err) == (0, f"report: {run / 'report.html'}\n", "")
    assert "data:image/png" in (run / "report.html").read_text()


def command(base: Path, *argv: str) -> subprocess.CompletedProcess:
    """The command in a real process with real pipes."""
    program = "from hyperjax.app import main; raise SystemExit(main())"
    line = [sys.executable, "-c", program, *argv]
    return subprocess.run(line, env=environment(base), cwd=base, capture_output=True, text=True)


def test_a_reader_that_goes_away_stops_the_run(base, tmp_path):
    """As in `hyperjax tune ... | head`."""
    program = "from hyperjax.app import main; raise SystemExit(main())"
    line = [sys.executable, "-c", program, "tune", RIDGE, *BRIEF, "--out", str(tmp_path / "run")]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, env=environment(base), cwd=base, stdout=pipe, stderr=pipe) as run:
        assert run.stdout and run.stderr
        run.stdout.close()
        message = run.stderr.read().decode()
    assert message == f"output closed; continue with `hyperjax resume {tmp_path / 'run'}`\n"
    assert run.returncode == 3


def test_version_help_and_exit_codes(base):
    version = command(base, "--version")
    assert (version.returncode, version.stdout) == (0, f"hyperjax {hyperjax.__version__}\n")
    usage = command(base, "tune", "--help")
    assert usage.returncode == 0 and "--members" in usage.stdout and ESC not in usage.stdout
    wrong = command(base, "tune", "digits", "--members", "many")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    debug = command(base, "resume", "nowhere", "--debug")
    assert debug.returncode != 0 and "Traceback" in debug.stderr


def test_the_baselines_keep_the_best_model():
    loss = np.array([[3.0, 1.0, 2.0], [np.nan, 5.0, np.inf]])
    params, valid, best = pick(Trained({"w": 10 * loss}, {"loss": loss, "acc": -loss}))
    assert best.tolist() == [1, 1]
    assert params["w"].tolist() == [10.0, 50.0]
    assert (valid["loss"].tolist(), valid["acc"].tolist()) == ([1.0, 5.0], [-1.0, -5.0])


# ---- bad input, in this process -----------------------------------------------------------------


@pytest.fixture
def complain(monkeypatch, capsys, tmp_path) -> Callable[..., str]:
    """Runs a command that must fail with code 2 and one line, and returns the line."""
    monkeypatch.setattr(_cli, "_prepare_jax", lambda args: None)  # JAX has long started here
    monkeypatch.setattr(sys, "path", [str(write_tasks(tmp_path / "modules")), *sys.path])
    monkeypatch.delenv("HYPERJAX_DATA", raising=False)

    def run(*argv: object) -> str:
        try:
            code = main([str(a) for a in argv])
        except SystemExit as stop:  # from argparse
            code = stop.code
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("hyperjax") and "Traceback" not in err
        return err

    return run


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "the following arguments are required: COMMAND"),
        (["tune"], "the following arguments are required: TASK"),
        (["fly"], "invalid choice: 'fly'"),
        (["tune", "digits", "--fast"], "unrecognized arguments: --fast"),
        (["tune", "nothing"], "unknown task 'nothing'; known are digits"),
        (["tune", "digits", "--method", "magic"], "unknown method 'magic'; choose from unroll"),
        (["tune", "digits", "--exchange", "no"], "unknown exchange 'no'"),
        (["tune", "digits", "--set", "evry=10"], "no such setting"),
        (["tune", "digits", "--set", "every=often"], "expected int"),
        (["tune", "digits", "--members", "0"], "members must be at least 1"),
        (["tune", "digits", "--members", "many"], "invalid int value: 'many'"),
        (["tune", "digits", "--set", "inner_steps=45"], "try --set inner_steps=40"),
        (
            ["tune", RIDGE, "--members", "3", "--set", "devices=2"],
            "members (3) must be divisible by devices (2); try --members 4",
        ),
        (["tune", RIDGE, "--set", "devices=99"], "devices: 99 asked for, 8 there"),
        (["tune", "mnist"], "pass `--data-dir DIR`"),
        (["tune", "mnist", "--data-dir", "nowhere"], "does not exist"),
        (["tune", "a/b.py:task"], "is not of the form `package.module:task`"),
        (["tune", "no_such_module:task"], "there is no module 'no_such_module'"),
        (["tune", "own.tasks:other"], "has no attribute 'other'; its tasks are ridge, failing"),
        (["tune", "own.tasks:number"], "must be a hyperjax.tasks.Task; got int"),
        (["tune", "own.tasks:failing"], "raised RuntimeError: no loss today"),
        (["tune", "own.broken:task"], "importing 'own.broken' failed with ZeroDivisionError"),
        (["export", "run", "--to", "excel"], "invalid choice: 'excel'"),
    ],
)
def test_bad_commands(complain, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "modules" / "own" / "broken.py").write_text("1 / 0\n")
    assert message in complain(*argv)
    assert not (tmp_path / "runs").exists()  # no folder is made for a run that cannot begin


def test_debug_shows_where_an_error_comes_from(complain):
    with pytest.raises(AppError, match="unknown task"):
        complain("tune", "nothing", "--debug")


def test_wrong_data_file(complain, tmp_path):
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(b"not these"))
    assert str(path) in complain("tune", "mnist", "--data-dir", tmp_path)


def test_the_folder_of_a_run_is_new(complain, tmp_path):
    config(tmp_path / "run")
    assert f"continue it with `hyperjax resume {tmp_path / 'run'}`" in complain(
        "tune", RIDGE, "--out", tmp_path / "run"
    )
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    assert "is not a run" in complain("tune", RIDGE, "--out", tmp_path / "notes")
    (tmp_path / "file").touch()
    assert "is not a run" in complain("tune", RIDGE, "--out", tmp_path / "file")
    assert "Not a directory" in complain("tune", RIDGE, "--out", tmp_path / "file" / "run")
    assert "File name too long" in complain("tune", RIDGE, "--out", tmp_path / ("x" * 300))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing(complain, monkeypatch, tmp_path, code):
    def refuse(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    line = complain("tune", RIDGE, "--out", tmp_path / "run")
    assert f"cannot write {tmp_path / 'run' / 'env.json'}: {os.strerror(code)}." in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is full")
def test_logs_on_a_full_disk(tmp_path):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(AppError, match=r"events\.jsonl: No space left on device"):
        Folder(tmp_path).event("start", 0)


def config(run: Path, text: str = "") -> Path:
    """A folder with nothing but its settings."""
    run.mkdir()
    (run / "config.yaml").write_text(text or dump(Settings(task=RIDGE)))
    return run


READERS = {
    "resume": ["resume"],
    "report": ["report"],
    "replay": ["replay"],
    "export": ["export", "--to", "csv"],
    "compare": ["compare"],
}


@pytest.mark.parametrize("verb", READERS)
def test_folders_that_are_no_runs(complain, tmp_path, verb):
    read = lambda path: complain(*READERS[verb], path)
    assert str(tmp_path / "missing") in read(tmp_path / "missing")
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in read(tmp_path / "file")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "env.json").write_text("{}\n")  # killed before config.yaml
    assert "config.yaml" in read(tmp_path / "half")
    assert "YAML" in read(config(tmp_path / "damaged", "{"))
    assert "format" in read(config(tmp_path / "foreign", "name: something else\n"))
    newer = dump(Settings()).replace("format: 1", "format: 2")
    assert "format" in read(config(tmp_path / "newer", newer))
    (tmp_path / "odd" / "config.yaml").mkdir(parents=True)
    assert "config.yaml" in read(tmp_path / "odd")


def test_edited_settings(complain, tmp_path):
    text = dump(Settings(task=RIDGE))
    many = config(tmp_path / "many", text.replace("members: 32", "members: many"))
    assert "`members` must be int; got 'many'" in complain("resume", many)
    extra = config(tmp_path / "extra", text + "color: red\n")
    assert "has an unknown key 'color'" in complain("resume", extra)


def test_a_run_that_has_not_tuned_yet(complain, tmp_path):
    run = config(tmp_path / "run")
    assert f"Run `hyperjax resume {run}`" in complain("replay", run)
    (run / "schedule.npz").write_bytes(b"PK\x03\x04 and no more")
    assert "schedule.npz" in complain("replay", run)
    assert "schedule.npz" in complain("report", run)
