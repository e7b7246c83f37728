"""The small verbs: export gives back what was logged, compare and doctor and data tell."""

import csv
import importlib.metadata
import io
import json
import sys
from collections.abc import Callable

import jax
import numpy as np
import pytest
from rich.console import Console
from run_folders import make_table, write_run

from hyperjax.app import _doctor
from hyperjax.app._compare import compare
from hyperjax.app._datasets import data_path, list_data
from hyperjax.app._doctor import doctor, within
from hyperjax.app._errors import AppError
from hyperjax.app._export import export
from hyperjax.app._grid import quantity
from hyperjax.app._output import Output
from hyperjax.app._record import load_record

Verb = Callable[[Output], object]


def quiet() -> Output:
    return Output(console=Console(file=io.StringIO()), notes=Console(file=io.StringIO()))


def as_json(capsys, verb: Verb) -> tuple[object, dict]:
    """The exit code of a verb, and the one JSON object that it writes."""
    code = verb(Output(as_json=True, notes=Console(file=io.StringIO())))
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and not err
    return code, json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def as_text(verb: Verb) -> str:
    """What a verb writes into a pipe."""
    file = io.StringIO()
    verb(Output(console=Console(file=file), notes=Console(file=file)))
    return file.getvalue()


def line_of(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- doctor -----------------------------------------------------------------------------------


def test_doctor_reports_this_machine(capsys, monkeypatch, tmp_path):
    (tmp_path / "program").write_bytes(bytes(2048))
    monkeypatch.setenv("HYPERJAX_DATA", str(tmp_path))
    before = getattr(jax.config, "jax_compilation_cache_dir", None)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        code, report = as_json(capsys, doctor)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert code == 0 and report["ok"]
    versions = {p["name"]: p["version"] for p in report["packages"]}
    assert versions["jax"] == jax.__version__ and versions["python"] == sys.version.split()[0]
    assert report["devices"]["count"] == jax.device_count()
    assert report["self_test"]["error"] < report["self_test"]["allowed"] < 1e-6
    assert report["data"] == str(tmp_path)
    assert report["cache"]["bytes"] >= 2048


def test_doctor_says_how_to_add_what_is_missing(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "optuna":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(_doctor, "self_test", lambda: {"ok": True, "text": "skipped"})
    assert 'pip install "hyperjax[optuna]"' in as_text(doctor)
    assert doctor(quiet()) == 0
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    assert "99.0, outside the tested" in as_text(doctor)
    assert doctor(quiet()) == 1


@pytest.mark.parametrize(
    ("version", "bounds", "inside"),
    [
        ("0.10.2", ">=0.10.2,<0.13", True),
        ("0.12.0.1", "<0.13,>=0.10.2", True),
        ("0.13.0", ">=0.10.2,<0.13", False),
        ("0.9.9", ">=0.10.2", False),
        ("1.0", "", True),
    ],
)
def test_version_ranges(version, bounds, inside):
    assert within(version, bounds) == inside


# ---- export -----------------------------------------------------------------------------------


def test_export_csv_gives_back_every_line(capsys, tmp_path):
    run = write_run(tmp_path / "run", seeds=2, members=4, steps=6, hparams=4, diverge=True)
    code, report = as_json(capsys, lambda out: export(run, "csv", out))
    assert code == 0 and report["rows"] == 2 * 4 * 6
    with (run / "export.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    record, logged = load_record(run), (run / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == len(logged)
    for row, line in zip(rows, map(json.loads, logged), strict=True):
        assert {k: int(row[k]) for k in ("step", "inner_step", "seed", "member")} == {
            k: line[k] for k in ("step", "inner_step", "seed", "member")
        }
        assert row["valid"] == ("" if line["valid"] is None else repr(line["valid"]))
        assert row["finite"] == str(line["finite"]).lower()
        for name in record.hparams:
            assert np.float32(row[name]) == np.float32(line["hparams"][name])
    assert sorted(p.name for p in run.glob("*.part")) == []


def test_export_optuna_holds_the_final_members(capsys, tmp_path):
    import optuna

    run = write_run(tmp_path / "run", seeds=2, members=4, steps=6, hparams=5, diverge=True)
    code, report = as_json(capsys, lambda out: export(run, "optuna", out))
    assert code == 0 and report == {
        "to": "optuna",
        "file": str(run / "optuna.db"),
        "trials": 8,
        "study": "run",
    }
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{run / 'optuna.db'}")
    record = load_record(run)
    assert study.direction.name == "MINIMIZE" and len(study.trials) == 8
    for trial in study.trials:
        s, m = trial.user_attrs["seed"], trial.user_attrs["member"]
        assert (trial.user_attrs["step"], trial.user_attrs["inner_step"]) == (6, 120)
        loss = record.valid[-1, s, m]
        assert trial.value == (pytest.approx(loss) if np.isfinite(loss) else None)
        assert trial.state.name == ("COMPLETE" if np.isfinite(loss) else "FAIL")
        for name, value in trial.params.items():
            assert value == pytest.approx(record.hparams[name][-1, s, m], rel=1e-6)
    ranges = study.trials[0].distributions
    assert ranges["lr"] == optuna.distributions.FloatDistribution(1e-4, 1.0, log=True)
    open_ended, seen = ranges["offset"], record.hparams["offset"]
    assert isinstance(open_ended, optuna.distributions.FloatDistribution) and not open_ended.log
    assert open_ended.low < seen.min() and seen.max() < open_ended.high
    assert any(t.state.name == "FAIL" for t in study.trials)


@pytest.mark.parametrize("to", ["csv", "optuna"])
def test_export_does_not_overwrite(to, tmp_path):
    run = write_run(tmp_path / "run", seeds=1, members=2, steps=3)
    target = tmp_path / "there"
    target.write_text("mine")
    with pytest.raises(AppError, match="--target") as error:
        export(run, to, Output(), target=target)
    assert str(target) in line_of(error) and target.read_text() == "mine"
    assert export(run, to, quiet(), target=tmp_path / "b") == 0


def test_export_without_optuna_says_how_to_add_it(monkeypatch, tmp_path):
    run = write_run(tmp_path / "run", seeds=1, members=2, steps=3)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(AppError) as error:
        export(run, "optuna", Output())
    expected = 'export --to optuna needs optuna: pip install "hyperjax[optuna]"'
    assert line_of(error) == expected
    assert not (run / "optuna.db").exists()


def test_export_that_fails_leaves_nothing(monkeypatch, tmp_path):
    run = write_run(tmp_path / "run", seeds=1, members=2, steps=3)
    before = sorted(run.iterdir())

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(AppError, match="No space left on device; name another file") as error:
        export(run, "csv", Output())
    line_of(error)
    assert sorted(run.iterdir()) == before


def test_export_refuses_in_one_line(tmp_path):
    run = write_run(tmp_path / "run", seeds=1, members=2, steps=3)
    refused = [
        (run, "parquet", None, "csv, optuna"),
        (tmp_path / "none", "csv", None, "not a run folder"),
        (run, "csv", tmp_path / "no" / "file.csv", "not a folder"),
    ]
    for folder, to, target, reason in refused:
        with pytest.raises(AppError, match=reason) as error:
            export(folder, to, Output(), target=target)
        line_of(error)
    (run / "metrics.jsonl").write_text("")
    (run / "schedule.npz").unlink()
    with pytest.raises(AppError, match="no step yet"):
        export(run, "csv", Output())


# ---- compare ----------------------------------------------------------------------------------


def test_compare_means_over_seeds(capsys, tmp_path):
    first = write_run(tmp_path / "first", seeds=3, members=4, steps=6)
    second = write_run(tmp_path / "second", seeds=2, members=2, steps=4)
    code, report = as_json(capsys, lambda out: compare([first, second], out))
    assert code == 0
    a, b = report["runs"]
    assert (a["run"], a["task"], a["method"], a["members"]) == ("first", "digits", "unroll", 4)
    assert (a["seeds"], a["inner_steps"], b["seeds"], b["inner_steps"]) == (3, 120, 2, 80)
    table = json.loads((first / "table.json").read_text())["rows"]
    losses = np.array(table[0]["test_loss"])
    assert a["tuned_test_loss"]["mean"] == pytest.approx(losses.mean())
    assert a["tuned_test_loss"]["error"] == pytest.approx(losses.std(ddof=1) / np.sqrt(3))
    random = next(row for row in table if row["key"] == "random")
    assert a["random_test_loss"]["mean"] == pytest.approx(np.mean(random["test_loss"]))
    best = [s["valid"] for s in json.loads((first / "best.json").read_text())["seeds"]]
    assert a["valid_loss"]["mean"] == pytest.approx(np.mean(best))
    assert a["run_s"] == 30.2 and a["finished"]
    assert len(report["notes"]) == 1 and "members x inner steps" in report["notes"][0]


def test_compare_marks_what_does_not_compare(tmp_path):
    done = write_run(tmp_path / "a" / "run", seeds=2, members=4, steps=6)
    cut = write_run(tmp_path / "b" / "run", seeds=2, members=4, steps=6, finished=False)
    config = cut / "config.yaml"
    config.write_text(config.read_text().replace("digits", "mnist"))
    text = as_text(lambda out: compare([done, cut], out))
    assert f"{cut} (unfinished)" in text and f"{done} (unfinished)" not in text
    assert "different tasks (digits, mnist)" in text
    losses = load_record(cut).valid[-1].min(-1)
    assert f"{losses.mean():.3f}" in next(x for x in text.splitlines() if "unfinished)" in x)


def test_compare_survives_runs_without_any_result(capsys, tmp_path):
    run = write_run(tmp_path / "run", seeds=2, members=4, steps=6, finished=False)
    (run / "metrics.jsonl").write_text("")
    code, report = as_json(capsys, lambda out: compare([run], out))
    assert code == 0 and report["runs"][0]["valid_loss"]["mean"] is None
    with pytest.raises(AppError) as error:
        compare([], Output())
    assert "run folder" in line_of(error)
    with pytest.raises(AppError, match="not a run folder"):
        compare([tmp_path], Output())


# ---- data -------------------------------------------------------------------------------------


def test_data_list_and_path(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("HYPERJAX_DATA", raising=False)
    (tmp_path / "a9a").mkdir()
    (tmp_path / "a9a" / "a9a.npz").write_bytes(b"not the file")
    code, report = as_json(capsys, lambda out: list_data(tmp_path, out))
    assert code == 0 and report["folder"] == str(tmp_path)
    states = {file["name"]: file["state"] for file in report["files"]}
    assert states["digits"] == "embedded" and states["a9a"] == "damaged"
    assert states["mnist-train-images"] == "missing"
    text = as_text(lambda out: list_data(None, out))
    assert "CC BY-SA 3.0" in text and "set HYPERJAX_DATA" in text

    monkeypatch.setenv("HYPERJAX_DATA", str(tmp_path))
    assert as_text(lambda out: data_path(None, out)) == f"{tmp_path}\n"
    assert as_json(capsys, lambda out: data_path(None, out)) == (0, {"folder": str(tmp_path)})
    assert "does not exist" in as_text(lambda out: data_path(tmp_path / "no", out))
    monkeypatch.delenv("HYPERJAX_DATA")
    with pytest.raises(AppError) as error:
        data_path(None, Output())
    assert "HYPERJAX_DATA" in line_of(error) and "--data-dir" in line_of(error)


def test_quantities():
    sizes = (1010, 2048, 45_394, 3 * 2**30)
    assert [quantity(n) for n in sizes] == ["1010 B", "2.0 KiB", "44.3 KiB", "3.0 GiB"]


def test_closing_table_has_the_rows_that_compare_reads():
    assert {"tuned", "random"} <= {row["key"] for row in make_table(2, 10)["rows"]}
