"""The page beside other tuners says what the committed benchmark measured."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "versus.json"


def load():
    path = ROOT / "benchmarks" / "_versus_show.py"
    spec = importlib.util.spec_from_file_location("_versus_show", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


show = load()


def found(**methods) -> dict:
    """Runs as {label: (ours, rows of each seed)}, of steps, gradients, seconds, valid, test."""
    made = {k: {"ours": o, "runs": runs, "compile_s": 0.5} for k, (o, runs) in methods.items()}
    return {"title": "t", "methods": made, "seeds": [0, 1], "steps_of_a_training": 10}


def rows(*points, scale=1.0) -> list:
    return [[s, 3 * s, scale * s / 100, v, v] for s, v in points]


def test_curves_are_means_of_steps_from_where_all_seeds_have_a_model():
    runs = [rows((10, 4.0), (30, 1.0), (50, 1.0)), rows((20, 2.0), (50, 2.0))]
    x, mean, error = show.mean_curve(runs, show.STEPS)
    assert x.tolist() == [20, 30, 50] and mean.tolist() == [3.0, 1.5, 1.5]
    # of two values the standard error is half their distance
    assert error.tolist() == [1.0, 0.5, 0.5]
    assert show.reached(runs, show.STEPS, 1.5) == 30
    assert show.reached(runs, show.GRADIENTS, 1.5) == 90
    assert show.reached(runs, show.STEPS, 1.49) is None


def test_ours_are_compared_with_the_best_of_the_others():
    peers = {
        "bad": (False, [rows((10, 9.0), (90, 5.0)), rows((10, 9.0), (90, 5.0))]),
        "good": (False, [rows((10, 9.0), (60, v), (90, v)) for v in (2.0, 4.0)]),
    }
    ours = lambda last: (True, [rows((5, 8.0), (30, last), scale=4.0)] * 2)
    facts = show.compared(found(a=ours(3.0), b=ours(3.01), **peers))
    assert facts["best"] == "good" and facts["target"] == 3.0
    a, b = facts["ours"]["a"], facts["ours"]["b"]
    assert a["share_steps"] == a["share_gradients"] == pytest.approx(1 / 3)
    assert a["share_seconds"] == pytest.approx(4 / 3)
    assert a["share_compiled"] == pytest.approx((1.2 + 0.5) / (0.9 + 0.5))
    yes = {"steps": True, "gradients": True, "seconds": False, "compiled": False}
    assert a["held"] == yes
    # per seed 3 - 2 and 3 - 4: of two values the standard error is half their distance
    assert a["above"] == (0.0, 1.0)
    assert b["steps"] is None and not any(b["held"].values()) and b["final"] == pytest.approx(3.01)
    later = show.compared(found(a=(True, [rows((5, 8.0), (31, 3.0))] * 2), **peers))
    assert not later["ours"]["a"]["held"]["steps"]


def test_the_tables_are_those_of_the_committed_result():
    page = (ROOT / "docs" / "versus.md").read_text()
    result = json.loads(RESULT.read_text())
    assert show.with_tables(page, result) == page
    assert len(re.findall(r"^\| .* \| \*\*(?:reached|not)\*\* \|$", page, re.M)) == len(
        result["tasks"]
    )


def test_the_record_is_of_one_commit_and_five_seeds():
    result = json.loads(RESULT.read_text())
    assert list(result["tasks"]) == list(show.ORDER)
    assert len({task["commit"] for task in result["tasks"].values()}) == 1
    for task in result["tasks"].values():
        assert task["seeds"] == [0, 1, 2, 3, 4]
        assert re.fullmatch(r"[0-9a-f]{40}", task["commit"])
        for method in task["methods"].values():
            table = [np.asarray(run) for run in method["runs"]]
            assert len(table) == 5
            # what is paid only grows, and the validation loss of the incumbent only falls
            for run in table:
                assert (np.diff(run[:, :3], axis=0) >= 0).all()
                assert (np.diff(run[:, 3]) <= 0).all()


def test_on_three_problems_of_five_ours_need_a_third_of_the_steps_of_the_best_other():
    tasks = json.loads(RESULT.read_text())["tasks"]
    first = [next(iter(show.compared(task)["ours"].values())) for task in tasks.values()]
    assert len(first) == 5 and sum(ours["held"]["steps"] for ours in first) >= 3
