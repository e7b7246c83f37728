"""Numbers in the text of README and docs are those of the committed records.

Tables are written by scripts, which other tests compare. Here are sentences: a fragment as an
f-string of numbers from a record must stand on the page, word for word.
"""

import importlib
import json
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
WHICH, BILEVEL = "docs/which_method.md", "docs/bilevel.md"
BENCHMARKS = "benchmarks/README.md"


class Sentence(NamedTuple):
    page: str
    record: str
    numbers: dict[str, str]  # paths as in benchmarks/_reproduction_rows.py
    text: str


SENTENCES = (
    Sentence(
        WHICH,
        "unrolled",
        {
            "a": "rate per step/momentum, reversible/wall_s",
            "b": "rate per step/momentum, unroll/wall_s",
        },
        "{a / b:.1f} times `unroll`",
    ),
    Sentence(
        WHICH,
        "stn_overhead",
        {
            "lstm": "results/lstm/gates on outputs, 32/time_ratio",
            "penalized": "results/dense-l2/gates on outputs, 128/time_ratio",
        },
        "{lstm:.1f} to {penalized:.1f} times each training step, twice the parameters",
    ),
    Sentence(
        WHICH,
        "hyperband",
        {"ratio": "halving/compute_ratio"},
        "for 27 candidates a {'ninth' if ratio == 9 else ratio} of their steps",
    ),
    Sentence(
        BILEVEL,
        "bilevel_curves",
        {"saba": "problems/quadratic/algorithms/saba/final/*"},
        "converges to the solution ({median(saba[0]):.0e})",
    ),
    Sentence(
        BILEVEL,
        "bilevel_curves",
        {"passes": "problems/cleaning/passes_budget"},
        "this budget of {passes} passes",
    ),
    Sentence(
        BENCHMARKS,
        "implicit",
        {
            "error": "seeds/4 probes, 15 iterations/median",
            "most": "seeds/4 probes, 15 iterations/max",
        },
        "error {error * 1e6:.0f}e-6 (the median of 20 probe seeds; at most {most * 1e6:.0f}e-6)",
    ),
    Sentence(
        BENCHMARKS,
        "unrolled",
        {
            "ours": "rate per step/unroll binomial/wall_s",
            "theirs": "rate per step/equinox, 10 checkpoints/wall_s",
            "bytes": "rate per step/unroll binomial/temp_bytes",
            "more": "rate per step/equinox, 10 checkpoints/temp_bytes",
        },
        "takes {ours / theirs:.2f} of the time and {bytes / more:.2f} of the bytes of equinox's "
        "checkpointed scan",
    ),
    Sentence(
        BENCHMARKS,
        "maid_least_squares",
        {"certificates": "rows/*/certificates"},
        "at all {sum(certificates):,} certificates of least squares",
    ),
    Sentence(
        BENCHMARKS,
        "fedhyper",
        {"points": "points_at_smallest_rate"},
        "{points:.0f} points more",
    ),
    Sentence(
        BENCHMARKS,
        "stn_text",
        {
            "tuned": "perplexity/self-tuned from 0.05/test",
            "fixed": "perplexity/fixed 0.6/test",
            "replay": "perplexity/replay/test",
            "last": "perplexity/last value fixed/test",
        },
        "test perplexity {tuned:.1f}, the best of four fixed values {fixed:.1f}, the schedule "
        "replayed by an ordinary network {replay:.1f}, its last value fixed {last:.1f}",
    ),
    Sentence(
        BENCHMARKS,
        "stn_text_seven",
        {
            "tuned": "perplexity/self-tuned/test",
            "random": "perplexity/random search/test",
            "tpe": "perplexity/TPE/test",
        },
        "test perplexity self-tuned {tuned:.1f}, random search with three times its processor time "
        "{random:.1f}, TPE with as much {tpe:.1f}",
    ),
    Sentence(
        BENCHMARKS,
        "stn_mnist",
        {
            "stn": "summary/STN/test_loss",
            "delta": "summary/Delta-STN/test_loss",
            "random": "summary/random search/test_loss",
            "tpe": "summary/TPE/test_loss",
        },
        "test loss self-tuned {stn:.3f}, Delta-STN {delta:.3f}, random search {random:.3f}, TPE "
        "{tpe:.3f}",
    ),
    Sentence(
        BENCHMARKS,
        "stn_overhead",
        {
            "dense": "results/dense/gates on outputs, 128/time_ratio",
            "conv": "results/conv/gates on outputs, 128/time_ratio",
            "lstm": "results/lstm/gates on outputs, 32/time_ratio",
        },
        "takes {dense:.1f} times a plain one on a perceptron, {conv:.1f} times with convolutions, "
        "{lstm:.1f} times on an LSTM",
    ),
    Sentence(
        BENCHMARKS,
        "mip",
        {
            "before": "slopes/default/norm_of_weights",
            "after": "slopes/MIP/norm_of_weights",
            "gradient": "slopes/default/norm_of_gradient",
            "mended": "slopes/MIP/norm_of_gradient",
        },
        "is {before:.2f} without and {after:.3f} with it, of log norm(gradient) {gradient:.2f} and "
        "{mended:.2f}",
    ),
    Sentence(
        BENCHMARKS,
        "pbt_toy",
        {"rows": "rows/*/mean"},
        "{rows[0]:.3f}, {rows[1]:.3f}, {rows[2]:.4f}, {rows[3]:.4f} for neither, exploring, "
        "exploiting, both",
    ),
    Sentence(
        BENCHMARKS,
        "pb2",
        {"rows": "rows/*/mean"},
        "{rows[2]:.1f} with 4 members (PBT {rows[1]:.1f}, fixed {rows[0]:.1f}",
    ),
    Sentence(
        BENCHMARKS,
        "hyperband",
        {"regret": "counting_ones/rows/*/regret_mean/-1"},
        "regret after 400 budgets of DEHB {regret[2]:.3f}, Hyperband {regret[1]:.3f}, random "
        "search {regret[0]:.3f}",
    ),
    Sentence(
        BENCHMARKS,
        "srm",
        {"forecast": "r2/curve_and_traits", "seen": "r2/last_seen"},
        "R^2 of the forecast {forecast:.2f}, of the value last seen {seen:.2f}",
    ),
    Sentence(
        BENCHMARKS,
        "breadcrumbs",
        {
            "crumbs": "training/far/percent_of_tuned/breadcrumbs",
            "tasks": "training/far/percent_of_tuned/task arithmetic",
        },
        "({crumbs:.1f} and {tasks:.1f} percent of the tuned models",
    ),
    Sentence(
        BENCHMARKS,
        "autorl_protocol",
        {"bias": "bias", "t": "t_at_1"},
        "{bias[0]:.4f} in accuracy with one tuning seed (t = {t:.0f}), {bias[3]:.4f} with eight",
    ),
    Sentence(
        BENCHMARKS,
        "soups",
        {
            "uniform": "differences/uniform - best single, shifts/difference",
        },
        "uniform {uniform:.1f} points above the best single model under shifts",
    ),
)


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("reproductions")


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda s: f"{s.page}: {s.record}")
def test_the_sentence_has_the_numbers_of_the_record(table, sentence):
    data = table.record(f"benchmarks/{sentence.record}")
    found = {name: table.at(data, path) for name, path in sentence.numbers.items()}
    expected = table.compute(f"f{sentence.text!r}", found)
    page = " ".join((ROOT / sentence.page).read_text().split())
    assert expected in page


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
