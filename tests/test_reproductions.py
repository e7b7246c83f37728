"""The table of reproductions is the one of the committed records, and its verdicts are computed."""

import importlib
import json
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("reproductions")


def test_the_tables_are_those_of_the_records(table):
    for page in (table.PAGE, table.README):
        assert table.with_tables(page) == page.read_text(), "run python benchmarks/reproductions.py"


def test_every_record_has_a_row_or_is_a_measurement_of_our_own(table):
    assert table.unaccounted() == []
    assert not set(table.OWN) & {row.record.partition("/")[2] for row in table.ROWS}


def test_commands_name_programs_that_exist(table):
    for row in table.ROWS:
        program = table.command(row).split()[1]
        assert (ROOT / program).is_file(), row.record


def test_records_of_notebooks_have_a_verdict(table):
    for path in table.FOLDERS["notebooks"].glob("*.json"):
        data = json.loads(path.read_text())
        assert data["verdict"] in ("reproduced", "partly", "not"), path.stem
        assert data["paper"] and data["seeds"], path.stem


def test_every_number_of_a_row_is_used(table):
    for row in table.ROWS:
        for name in row.numbers:
            assert any(name in text for text in (row.shown, *row.holds.values())), (
                row.record,
                name,
            )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b", 1.0),
        ("spread", 2.0),  # a spread over seeds is its mean
        ("list/1/b", 4),
        ("list/name=x/b", 3),
        ("list/*/b", [3, 4]),
        ("list/-1/b", 4),
    ],
)
def test_paths(table, path, expected):
    data = {
        "a": {"b": 1.0},
        "spread": {"mean": 2.0, "std": 1.0},
        "list": [{"name": "x", "b": 3}, {"name": "y", "b": 4}],
    }
    assert table.at(data, path) == expected


def test_what_was_not_finite_holds_nowhere(table):
    found = {"a": table.at({"a": None}, "a")}
    assert math.isnan(found["a"])
    assert not table.compute("a < 1", found) and not table.compute("a > 1", found)


@pytest.mark.parametrize(
    ("holds", "word", "missed"),
    [
        ({"small": "a < 2", "large": "a > 0"}, "reproduced", []),
        ({"small": "a < 2", "large": "a > 1"}, "partly", ["large"]),
        ({"small": "a < 1", "large": "a > 1"}, "not", ["small", "large"]),
    ],
)
def test_the_rule(table, holds, word, missed):
    row = table.ROWS[0]._replace(holds=holds)
    assert table.verdict(row, {"a": 1}) == (word, missed)


def test_negative_results_stay(table):
    """The rows that a reader would miss least are the ones that were missed."""
    found = {row.record: table.verdict(row, table.numbers(row))[0] for row in table.ROWS}
    assert found["benchmarks/breadcrumbs"] == "not"
    assert {"partly", "not", "reproduced"} == set(found.values())
