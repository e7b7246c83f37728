"""The README's table says what the committed benchmark measured."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_benchmark():
    spec = importlib.util.spec_from_file_location("tune_digits", ROOT / "benchmarks/tune_digits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_the_one_of_the_committed_result():
    benchmark = load_benchmark()
    readme = (ROOT / "README.md").read_text()
    result = json.loads(benchmark.RESULT.read_text())
    assert benchmark.with_table(readme, result) == readme
    assert "| tuned (unroll) |" in readme


def test_tuning_beats_random_search_by_more_than_its_error():
    rows = {r["key"]: r for r in json.loads(load_benchmark().RESULT.read_text())["rows"]}
    less = [a - b for a, b in zip(rows["random"]["test_loss"], rows["tuned"]["test_loss"])]
    mean = sum(less) / len(less)
    error = (sum((x - mean) ** 2 for x in less) / (len(less) - 1) / len(less)) ** 0.5
    assert mean > 2 * error
    assert rows["random"]["inner_steps"] == rows["tuned"]["inner_steps"]
