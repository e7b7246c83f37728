"""The README's table says what the committed benchmark measured."""

import importlib.util
import json
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent


def load_benchmark():
    spec = importlib.util.spec_from_file_location("tune_digits", ROOT / "benchmarks/tune_digits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_twelve_lines_run_and_give_the_numbers_beside_them():
    text = (ROOT / "README.md").read_text()
    block = text.split("```python\n", 1)[1].split("```", 1)[0]
    assert len([line for line in block.splitlines() if line.strip()]) == 12
    names: dict = {}
    with jax.enable_x64(False):  # as a reader has it: random numbers depend on the precision
        exec(block, names)
    first, last = names["metrics"].value[0], names["metrics"].value[-1]
    assert f"`metrics.value` falls from {first:.2f} to {last:.2f}" in text


def test_the_table_is_the_one_of_the_committed_result():
    benchmark = load_benchmark()
    readme = (ROOT / "README.md").read_text()
    result = json.loads(benchmark.RESULT.read_text())
    assert benchmark.with_table(readme, result) == readme
    assert "| tuned (unroll) |" in readme


def test_tuning_beats_random_search_by_more_than_its_error():
    rows = {r["key"]: r for r in json.loads(load_benchmark().RESULT.read_text())["rows"]}
    pairs = zip(rows["random"]["test_loss"], rows["tuned"]["test_loss"], strict=True)
    less = [a - b for a, b in pairs]
    mean = sum(less) / len(less)
    error = (sum((x - mean) ** 2 for x in less) / (len(less) - 1) / len(less)) ** 0.5
    assert mean > 2 * error
    assert rows["random"]["inner_steps"] == rows["tuned"]["inner_steps"]
