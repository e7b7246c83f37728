"""The closing table says what numpy says, and claims a winner only where there is one."""

import io
import re

import numpy as np
import pytest
from rich.console import Console
from run_folders import make_table

from hyperjax.app._tables import headline, plain_table, rich_table, show, spread, summarise


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
    assert show(spread([0.25, 0.25])) == "0.25 ± 0"
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
        # Two seeds have one degree of freedom: the quantile is that of Cauchy, tan(0.475 pi).
        ({"tuned": [0.10, 0.13]}, f"(95% interval {-0.095 - 0.005 * np.tan(0.475 * np.pi):+.2g}"),
        ({"tuned": [0.30, 0.32]}, "in favour of random search"),
        ({"tuned": [0.30, 0.30]}, "no clear winner"),  # nine errors away, of two seeds
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
