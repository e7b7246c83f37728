"""Runs become plots with something on them, and a page that stands alone."""

import base64
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_folders import write_run

from hyperjax.app._plots import PLOTS, draw_plots
from hyperjax.app._record import load_record
from hyperjax.app._report import write_report


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of the size that the command line makes by default, and then some."""
    folder = tmp_path_factory.mktemp("runs") / "large"
    return write_run(folder, seeds=5, members=32, steps=60, hparams=10)


@pytest.fixture(scope="module")
def page(run) -> str:
    record = load_record(run)
    return write_report(record, draw_plots(record, run), run).read_text(encoding="utf-8")


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
