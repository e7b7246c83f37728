"""Run folders are read back exactly; rank statistics match their definitions."""

import json
import re

import numpy as np
import pytest
from run_folders import OUTER_EVERY, simulate, write_run

from hyperjax.app import _plots_data as data
from hyperjax.app._plots import draw_plots
from hyperjax.app._record import RunFolderError, load_record


def test_record_holds_what_was_logged(tmp_path):
    _, values, valid, parents = simulate(5, 32, 60, 10)
    record = load_record(write_run(tmp_path / "run", seeds=5, members=32, steps=60, hparams=10))
    np.testing.assert_array_equal(record.valid, valid)
    np.testing.assert_array_equal(record.parents, parents)
    assert record.schedule is not None
    for d, name in enumerate(record.schedule.names):
        np.testing.assert_array_equal(record.hparams[name], values[..., d])
    assert record.metrics["step"].shape == (60 * 5 * 32,)
    np.testing.assert_array_equal(record.inner_steps, np.arange(1, 61) * OUTER_EVERY)
    assert record.missing == ()


def test_a_run_without_schedule_is_read_from_its_lines(tmp_path):
    done = load_record(write_run(tmp_path / "done"))
    partial = load_record(write_run(tmp_path / "partial", finished=False))
    assert partial.missing == ("schedule.npz", "best.json", "table.json")
    expected = done.parents.copy()
    expected[4, 0, 1] = 0  # the quarantine that the events know of
    np.testing.assert_array_equal(partial.parents, expected)
    for name, grid in done.hparams.items():
        np.testing.assert_allclose(partial.hparams[name], grid, rtol=1e-6)


def test_half_written_last_line_is_dropped(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    whole = load_record(folder)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    cut = load_record(folder)
    assert len(cut.metrics["step"]) == len(whole.metrics["step"]) - 1
    assert np.isnan(cut.valid[-1, -1, -1]) and np.isfinite(whole.valid[-1, -1, -1])
    # The seed whose last step is not complete is judged by the step before.
    np.testing.assert_array_equal(data.last_logged(cut), [11, 10])
    assert draw_plots(cut, folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_malformed_middle_line_is_an_error_that_names_it(tmp_path, name):
    path = write_run(tmp_path / "run", finished=False) / name
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2][:15] + "\n", *lines[3:]]))
    with pytest.raises(RunFolderError, match=rf"{re.escape(name)}: line 3: [^\n]*$"):
        load_record(path.parent)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"member": "three"}, "line 2: a value is not a number"),
        ({"step": None}, "line 2: a value is not a number"),
        ({"hparams": {"lr": 0.1}}, "line 2: no 'momentum'"),
    ],
)
def test_a_line_with_wrong_content_is_an_error(tmp_path, damage, message):
    path = write_run(tmp_path / "run", finished=False) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | damage)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunFolderError, match=re.escape(message)):
        load_record(path.parent)


def test_a_step_logged_again_after_resume_counts_once(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    before = load_record(folder)
    path = folder / "metrics.jsonl"
    again = json.loads(path.read_text().splitlines()[-1]) | {"valid": 0.5}
    path.write_text(path.read_text() + json.dumps(again) + "\n")
    after = load_record(folder)
    assert len(after.metrics["valid"]) == len(before.metrics["valid"])
    assert after.valid[-1, -1, -1] == 0.5 != before.valid[-1, -1, -1]


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, "not a run folder"), ("format: 2", "format 2"), ("a: [", "not valid YAML")],
)
def test_a_folder_of_another_kind_is_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(RunFolderError, match=message):
        load_record(tmp_path)


def test_spearman_with_ties_by_hand():
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 4, 3 about their mean of 2.5:
    # (-1.5)(-1.5) + 0 + 0 + (1.5)(0.5) = 3; the squares sum to 4.5 and 5.
    x, y = np.array([1.0, 7.0, 7.0, 9.0]), np.array([0.1, 0.2, 0.9, 0.3])
    np.testing.assert_array_equal(data.ranks(x), [1, 2.5, 2.5, 4])
    assert data.spearman(x, y) == pytest.approx(3 / np.sqrt(4.5 * 5), rel=1e-12)
    assert np.isnan(data.spearman(np.ones(4), y))


def test_importance_finds_what_decides_the_loss(tmp_path):
    record = load_record(write_run(tmp_path / "run", seeds=3, members=20, steps=2, hparams=4))
    grid = record.hparams["momentum"]
    record.valid[...] = np.arange(3)[None, :, None] * 100 - grid  # a seed shifts, a slope decides
    first = data.importances(record, 10)[0]
    assert first.name == "momentum"
    assert first.correlation == pytest.approx(-1)
    assert first.error == pytest.approx(0, abs=1e-12)
    assert all(i.error > 0.02 for i in data.importances(record, 10)[1:])


def test_best_so_far_ignores_what_is_not_finite():
    valid = np.array([[[3.0, np.nan]], [[np.nan, np.nan]], [[5.0, 2.0]]])
    np.testing.assert_array_equal(data.best_so_far(valid)[:, 0], [3, 3, 2])


def test_best_member_is_named_by_the_slot_it_ended_in(tmp_path):
    record = load_record(write_run(tmp_path / "run", finished=False))
    record.parents[-1] = np.roll(np.arange(8), 3)  # everybody moves after the last loss
    winners = record.valid[-1].argmin(-1)
    assert data.best_members(record) == dict(enumerate(((winners + 3) % 8).tolist()))
    assert data.ancestry(record, 0, int(winners[0] + 3) % 8)[-1] == winners[0]


def test_best_member_is_the_one_on_file(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "best.json").write_text(json.dumps({"seeds": [{"seed": 1, "member": 6}]}))
    assert data.best_members(load_record(folder))[1] == 6
