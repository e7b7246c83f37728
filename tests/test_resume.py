"""A run that was killed, stopped or short of disk goes on and ends with the same numbers."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runs import TINY, Shell, outcome, read_json, read_lines

TUNE = ("tune", "own.tasks:ridge", *TINY, "--out")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def hyperjax(base) -> Iterator[Shell]:
    with Shell(base) as shell:
        yield shell


@pytest.fixture(scope="module")
def whole(hyperjax, tmp_path_factory) -> Path:
    """The run that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert hyperjax(*TUNE, run).code == 0
    return run


@pytest.fixture(scope="module")
def stopped(hyperjax, whole, tmp_path_factory) -> Path:
    """A run that stopped after its second checkpoint. Tests work on copies."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    assert hyperjax(*TUNE, run, at=("checkpoints/2.", 1), signal="SIGTERM").code == 3
    return run


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def cut(path: Path, count: int) -> None:
    """Take the last bytes of a file away, as a crash in the middle of a write does."""
    path.write_bytes(path.read_bytes()[:-count])


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(read_json(path) | changes))


def test_same_numbers_after_kills(base, whole, tmp_path):
    """SIGKILL while tuning, between the phases, and in a baseline; a new process each time."""
    run = tmp_path / "run"

    def killed(*command: object, at: tuple[str, int]) -> None:
        with Shell(base) as shell:
            assert shell(*command, at=at, signal="SIGKILL").code == -9

    # The metrics of the third update are logged, and its checkpoint is not there.
    killed(*TUNE, run, at=("checkpoints/3.", 1))
    assert checkpoints(run) == [1, 2]
    assert len(read_lines(run / "metrics.jsonl")) == 3 * 2 * 4

    # Tuning is done, and nothing of it is written but the schedule.
    killed("resume", run, at=("best_params.npz", 1))
    assert checkpoints(run) == [3, 4] and (run / "schedule.npz").exists()
    assert not (run / "best_params.npz").exists()

    # A baseline has run: its result is written beside its place.
    killed("resume", run, at=("results/random.json", 3))
    results = {path.name for path in (run / "results").iterdir()}
    assert results == {"tuned.json", "replay.json", "random.json.part"}

    # All is logged, and the table is not written. The last line of the log may be cut as well.
    killed("resume", run, at=("table.json", 1))
    assert read_lines(run / "events.jsonl")[-1]["event"] == "done"
    cut(run / "events.jsonl", 20)

    with Shell(base) as shell:
        assert shell("resume", run).code == 0
    assert outcome(run) == outcome(whole)


@pytest.mark.parametrize(
    "signal, moment", [("SIGINT", ("checkpoints/2.", 1)), ("SIGTERM", ("results/replay.json", 1))]
)
def test_signals_stop_and_keep_all(hyperjax, whole, tmp_path, signal, moment):
    run = tmp_path / "run"
    result = hyperjax(*TUNE, run, at=moment, signal=signal)
    assert result.code == 3
    assert result.err == f"stopped; continue with `hyperjax resume {run}`\n"
    assert not (run / "table.json").exists()
    assert read_lines(run / "events.jsonl")[-1]["event"] == "interrupt"
    assert hyperjax("resume", run).code == 0
    assert outcome(run) == outcome(whole)


@pytest.mark.parametrize(
    "limit, culprit", [(6000, "metrics.jsonl: File too large"), (3000, "a checkpoint in")]
)
def test_run_that_cannot_grow_its_files(hyperjax, whole, tmp_path, limit, culprit):
    """A limit on the size of files fails writes half-way, like a disk that fills up."""
    run = tmp_path / "run"
    result = hyperjax(*TUNE, run, limit=limit)
    assert result.code == 2
    assert result.err.startswith("hyperjax: cannot write ") and culprit in result.err
    assert result.err.count("\n") == 1
    assert hyperjax("resume", run).code == 0
    assert outcome(run) == outcome(whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is full")
def test_full_disk(hyperjax, whole, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "best.json.part").symlink_to("/dev/full")
    result = hyperjax("resume", run)
    assert result.code == 2
    assert result.err == (
        f"hyperjax: cannot write {run / 'best.json'}: No space left on device. Free some space or "
        "choose another folder with --out; what was written before is kept.\n"
    )
    (run / "best.json.part").unlink()
    assert hyperjax("resume", run).code == 0
    assert outcome(run) == outcome(whole)


def test_damaged_checkpoint(hyperjax, whole, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    newest = run / "checkpoints" / "2"
    for path in newest.rglob("*"):
        if path.is_file():
            cut(path, 20)
    result = hyperjax("resume", run)
    assert result.code == 2
    assert result.err.startswith(f"hyperjax: the checkpoint {newest} is damaged")
    assert result.err.count("\n") == 1
    shutil.rmtree(newest)  # as the message says
    assert hyperjax("resume", run).code == 0
    assert outcome(run) == outcome(whole)


def test_empty_checkpoints_and_cut_logs(hyperjax, whole, stopped, tmp_path):
    """Without a checkpoint a run begins anew; what is logged twice counts once."""
    run = shutil.copytree(stopped, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    for name in ("metrics.jsonl", "events.jsonl"):
        cut(run / name, 9)
    assert hyperjax("resume", run).code == 0
    assert outcome(run) == outcome(whole)


def test_interrupted_run_has_a_report(hyperjax, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    cut(run / "metrics.jsonl", 9)
    result = hyperjax("report", run)
    assert (result.code, result.out) == (0, f"report: {run / 'report.html'}\n")
    assert "ridge" in (run / "report.html").read_text()


def test_resuming_a_finished_run_changes_nothing(hyperjax, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.suffix != ".html"}
    result = hyperjax("resume", run, "--json")
    assert result.code == 0
    assert '"key": "tuned"' in result.out and "tuning" not in result.err  # nothing is trained
    assert {p: p.read_bytes() for p in before} == before


def test_another_precision_is_refused(hyperjax, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    edit_json(run / "env.json", x64=True)
    result = hyperjax("resume", run)
    assert result.code == 2
    assert result.err == f"hyperjax: {run} began in another precision; set JAX_ENABLE_X64=1.\n"


def test_another_machine_is_announced(hyperjax, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    edit_json(run / "env.json", devices=["one", "two", "three"], jax="0.0")
    result = hyperjax("resume", run)
    assert result.code == 0
    assert "jax 0.0 then" in result.err and "devices 3 then, 2 now" in result.err
