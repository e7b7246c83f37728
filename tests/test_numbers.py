"""Numbers in the text of README and docs are those of the committed records.

Tables are written by scripts, which other tests compare. Here are sentences: a fragment as an
f-string of numbers from a record must stand on the page, word for word.
"""

import importlib
import json
from pathlib import Path

import pytest
from number_sentences import BENCHMARKS, BILEVEL, SENTENCES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("reproductions")


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda s: f"{s.page}: {s.record}")
def test_the_sentence_has_the_numbers_of_the_record(table, sentence):
    page = " ".join((ROOT / sentence.page).read_text().split())
    assert told(table, sentence) in page


def told(table, sentence):
    data = table.record(f"benchmarks/{sentence.record}")
    found = {name: table.at(data, path) for name, path in sentence.numbers.items()}
    return table.compute(f"f{sentence.text!r}", found)


def test_every_bullet_of_the_benchmarks_is_one_of_the_sentences(table):
    bullets = (ROOT / BENCHMARKS).read_text().split("\n- ")[1:]
    texts = [told(table, sentence) for sentence in SENTENCES if sentence.page == BENCHMARKS]
    assert [" ".join(bullet.split()) for bullet in bullets] == texts


def test_what_the_bilevel_page_says_of_its_table(table):
    """SABA first on a9a, most within 0.003 of it; F2SA and BO-REP first on cleaning."""
    found = table.record("benchmarks/bilevel_curves")["problems"]
    median = table.WORDS["median"]
    a9a = {
        name: median(row["final"]["F, inner problem solved"])
        for name, row in found["a9a"]["algorithms"].items()
    }
    assert min(a9a, key=a9a.__getitem__) == "saba"
    assert sum(value <= a9a["saba"] + 0.003 for value in a9a.values()) > len(a9a) / 2
    cleaning = {
        name: median(row["final"]["validation loss"])
        for name, row in found["cleaning"]["algorithms"].items()
    }
    assert set(sorted(cleaning, key=cleaning.__getitem__)[:2]) == {"bo_rep", "f2sa"}


def test_the_table_of_the_bilevel_page_is_that_of_the_record(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    plot = importlib.import_module("_curves_plot")
    results = json.loads((ROOT / "benchmarks/results/bilevel_curves.json").read_text())
    assert plot.table(results["problems"]) in (ROOT / BILEVEL).read_text()
