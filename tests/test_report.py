"""Run folders are read back exactly, and become tables, plots and a report that stands alone."""

import base64
import io
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from hyperjax.app import _plots_data as data
from hyperjax.app._plots import PLOTS, draw_plots
from hyperjax.app._record import RunFolderError, lineage, load_record
from hyperjax.app._report import write_report
from hyperjax.app._tables import headline, plain_table, rich_table, show, spread, summarise

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


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of the size that the command line makes by default, and then some."""
    folder = tmp_path_factory.mktemp("runs") / "large"
    return write_run(folder, seeds=5, members=32, steps=60, hparams=10)


@pytest.fixture(scope="module")
def page(run) -> str:
    record = load_record(run)
    return write_report(record, draw_plots(record, run), run).read_text(encoding="utf-8")


# --- record


def test_record_holds_what_was_logged(run):
    _, values, valid, parents = simulate(5, 32, 60, 10)
    record = load_record(run)
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


def test_lineage_is_the_history_that_a_state_carries_forward():
    rng = np.random.default_rng(0)
    steps, seeds, members = 9, 3, 6
    parents = rng.integers(0, members, (steps, seeds, members))
    for s in range(seeds):
        # Forward: each state remembers the slots in which it trained; copies copy the memory.
        memory: list[list[int]] = [[] for _ in range(members)]
        for t in range(steps):
            trained = [[*memory[m], m] for m in range(members)]
            memory = [trained[parents[t, s, m]] for m in range(members)]
        for m in range(members):
            np.testing.assert_array_equal(lineage(parents, s, m), memory[m])
        np.testing.assert_array_equal(lineage(parents, s, np.arange(members)).T, memory)


# --- statistics


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


# --- tables


def test_summarise_against_numpy():
    table = make_table(5, 1000)
    rows = {row.key: row for row in summarise(table)}
    raw = {row["key"]: row for row in table["rows"]}
    for key, row in rows.items():
        for metric in ("valid_loss", "valid_accuracy", "test_loss", "test_accuracy"):
            x = np.array(raw[key][metric])
            assert row.metrics[metric].mean == pytest.approx(x.mean(), rel=1e-12)
            assert row.metrics[metric].error == pytest.approx(x.std(ddof=1) / np.sqrt(5), rel=1e-12)
            if key != "random":
                gap = x - np.array(raw["random"][metric])
                paired = row.difference[metric]
                assert paired.mean == pytest.approx(gap.mean(), rel=1e-12)
                assert paired.error == pytest.approx(gap.std(ddof=1) / np.sqrt(5), rel=1e-12)
    assert rows["random"].difference == {}


def test_one_seed_has_no_error_and_a_lost_one_shows():
    assert spread([0.25]).error is None
    assert show(spread([0.25])) == "0.25"
    lost = spread([0.1, None, 0.3])
    assert (lost.count, lost.total) == (2, 3)
    assert show(lost) == "0.20 ± 0.10 (2/3)"
    assert "(n/m)" in plain_table({"rows": [{"name": "a", "test_loss": [0.1, None, 0.3]}]})
    assert "(n/m)" not in plain_table(make_table(3, 10))
    assert show(spread([None])) == "not finite"
    assert show(None) == "-"


def test_plain_table_is_aligned_and_rich_table_says_the_same():
    table = make_table(5, 19200)
    lines = plain_table(table).splitlines()
    assert len({line.rindex("30.2") for line in lines[2:6]}) == 1
    assert "19,200" in lines[2] and lines[-1] == "A note with <tags>."
    drawn = rich_table(table)
    assert drawn.row_count == 4
    titles = [str(c.header).replace("\n", " ") for c in drawn.columns]
    assert titles == re.split(r"  +", lines[0])
    name = next(iter(drawn.columns[0].cells))
    assert str(name) == "tuned population"


def test_rich_table_fits_a_terminal_of_eighty_columns():
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(rich_table(make_table(5, 19200)))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for word in ("population", "0.1284", "0.0029", "19,200", "30.2"):
        assert word in text


def test_table_without_accuracy_has_no_such_column():
    table = make_table(2, 10)
    for row in table["rows"]:
        del row["valid_accuracy"], row["test_accuracy"]
    assert "acc" not in plain_table(table)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "in favour of tuning"),
        ({"tuned": [0.30, 0.30]}, "in favour of random search"),
        ({"tuned": [0.10, 0.30]}, "no clear winner"),
        ({"tuned": [None, None]}, "cannot be compared"),
    ],
)
def test_headline_says_who_won_only_when_it_is_clear(change, expected):
    table = {
        "rows": [
            {"key": "tuned", "name": "tuned", "test_loss": [0.10, 0.11], "inner_steps": 70},
            {"key": "random", "name": "random", "test_loss": [0.20, 0.22], "inner_steps": 70},
        ]
    }
    for row in table["rows"]:
        row["test_loss"] = change.get(row["key"], row["test_loss"])
    sentence = headline(table)
    assert expected in sentence
    assert "at the same 70 inner steps per seed" in sentence
    table["rows"][1]["inner_steps"] = 71
    assert "the same" not in headline(table) and "70 and 71" in headline(table)


# --- plots


def test_all_plots_are_drawn(run, page):
    from PIL import Image

    assert sorted(p.stem for p in (run / "plots").iterdir()) == sorted(PLOTS)
    for path in (run / "plots").iterdir():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape == (700, 1200, 3)
        # Axes and text are grey, data has colour: half a percent is more than a stray line.
        coloured = np.ptp(pixels.astype(int), axis=-1) > 30
        assert coloured.mean() > 0.005, path.name


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # One member has nobody to compare with or to copy from.
        ({"seeds": 1, "members": 1, "diverge": True}, {"history", "hparams", "table"}),
        ({"seeds": 3, "diverge": True}, set(PLOTS)),
        ({"seeds": 1, "steps": 1, "hparams": 13}, {*PLOTS} - {"lineage"}),
        ({"finished": False}, {*PLOTS} - {"table"}),
    ],
)
def test_awkward_runs_get_the_plots_they_have_data_for(tmp_path, shape, expected):
    folder = write_run(tmp_path / "run", **shape)
    record = load_record(folder)
    plots = draw_plots(record, folder)
    assert {p.stem for p in plots} == expected
    assert write_report(record, plots, folder).exists()


def test_a_run_that_has_only_started_has_a_report(tmp_path):
    (tmp_path / "config.yaml").write_text("{format: 1, task: digits}")
    stale = tmp_path / "plots" / "history.png"
    stale.parent.mkdir()
    stale.write_bytes(b"")
    record = load_record(tmp_path)
    assert draw_plots(record, tmp_path) == []
    assert not stale.exists()
    text = write_report(record, [], tmp_path).read_text(encoding="utf-8")
    assert "metrics.jsonl" in text and "no results yet" in text


def test_settings_of_the_user_survive_and_pyplot_stays_out(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    folder = write_run(tmp_path / "run", seeds=1, members=1, steps=2, hparams=3, finished=False)
    draw_plots(load_record(folder), folder)
    assert dict(matplotlib.rcParams) == before
    # A process of its own, because other tests may have imported these.
    code = (
        "import sys, hyperjax.app._plots, hyperjax.app._report as report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from pathlib import Path; from hyperjax.app._record import load_record\n"
        f"hyperjax.app._plots.draw_plots(load_record(Path({str(folder)!r})), {str(folder)!r})\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_without_matplotlib_the_error_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ImportError, match=r'^plots need matplotlib: pip install "hyperjax\[demo\]"$'
    ):
        draw_plots(load_record(run), run)


# --- report


def test_report_is_small_and_loads_nothing(page):
    assert len(page.encode()) < 1_000_000
    assert page.count("<img ") == len(PLOTS)
    loads = re.findall(r"""(?:src|href|data|srcset|action)\s*=\s*["']?([^"'>\s]{,40})""", page)
    assert len(loads) == len(PLOTS)
    assert all(target.startswith("data:image/png;base64,") for target in loads)
    text = re.sub(r"base64,[A-Za-z0-9+/=]*", "", page)
    for loader in ("http", "//", "url(", "@import", "<script", "<link", "<iframe"):
        assert loader not in text


def test_report_is_well_formed_and_escaped(page):
    from html.parser import HTMLParser

    class Checker(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open: list[str] = []
            self.headings: list[str] = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                self.open.append(tag)
            if tag == "img":
                assert len(dict(attrs)["alt"] or "") > 30
            if re.fullmatch("h[1-6]", tag):
                self.headings.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert checker.open == [] and checker.headings.count("h1") == 1
    for text in ("&lt;b&gt;&amp;amp; $x$", "A note with &lt;tags&gt;.", "&lt;non-finite&gt;"):
        assert text in page
    for text in ("<b>", "<tags>", "<non-finite>"):
        assert text not in page


def test_report_tells_the_result_and_how_to_go_on(page, run):
    table = json.loads((run / "table.json").read_text())
    tuned, random = (np.array(table["rows"][i]["test_loss"]) for i in (0, 2))
    gap = tuned - random
    told = re.search(r"Paired difference: ([+-][0-9.]+) ± ([0-9.]+) over 5 seeds", page)
    assert told is not None
    assert float(told[1]) == pytest.approx(gap.mean(), abs=5e-5)
    assert float(told[2]) == pytest.approx(gap.std(ddof=1) / np.sqrt(5), abs=5e-5)
    assert "hyperjax replay large --member" in page and "hyperjax resume large" in page
    for seed in json.loads((run / "best.json").read_text())["seeds"]:
        assert f"{seed['hparams']['lr']:.4g}" in page
    assert str(run.parent) not in page


def test_pictures_that_do_not_compress_are_cut_down(tmp_path):
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (700, 1200, 3), np.uint8)
    folder = write_run(tmp_path / "run", steps=2)
    plots = [tmp_path / f"{name}.png" for name in ("history", "parallel", "other")]
    for path in plots:
        Image.fromarray(noise).save(path)
    path = write_report(load_record(folder), plots, folder)
    text = path.read_text()
    assert path.stat().st_size < 1_000_000
    assert text.count("<img ") + text.count("Too large to embed") == 3
    for code in re.findall(r"base64,([A-Za-z0-9+/=]*)", text):
        width, height = struct.unpack(">II", base64.b64decode(code)[16:24])
        assert width / height == pytest.approx(12 / 7, rel=0.01)
