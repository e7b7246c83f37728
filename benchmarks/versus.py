"""Tuning the same hyperparameters of the same models: hyperjax, Optuna, random search, evosax.

    python benchmarks/versus.py --data-dir DIR

DIR holds the folders a9a, ett, mnist and tinyshakespeare (see `hyperjax data list`); without it
HYPERJAX_DATA names the folder. Needs the packages optuna, torch (for Optuna's Gaussian processes),
cmaes and evosax. One core is enough, and what the page is about: `taskset -c 0`. `--only TASK` runs
one of the five, and its record replaces the one there is.

Five problems (`_versus_tasks.py`): logistic regression with 123 penalties, a ridge forecaster with
13, a perceptron and a convolutional net with 9 hyperparameters each, a transformer with 14. All
methods tune the validation loss from the same start within the same bounds; what is shown is the
test loss of the model with the best validation loss so far, against inner training steps, against
gradient evaluations (`_versus_ours.py` says what counts as how many) and against seconds, which are
those of the processor, compilation apart: the wall's, where it has nothing else to do.

The settings of our methods were chosen on seeds 100 to 107; those of the others are their defaults.
Target: on three problems of five hyperjax reaches the final test loss of the best of the others in
a third of its inner steps or less, in the mean over 5 seeds.
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
from _measure import RESULTS, commit, record
from _versus_ours import METHODS, tuned
from _versus_peers import (
    Found,
    evosax_search,
    evosax_size,
    optuna_search,
    program,
    samplers,
)
from _versus_show import PAGE, compared, draw, with_tables
from _versus_tasks import TASKS, Problem

RECORD = RESULTS / "versus.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="hyperjax beside Optuna, random search, evosax.")
    parser.add_argument("--data-dir", help="folder with the data; HYPERJAX_DATA without it")
    parser.add_argument("--only", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    recorded = (options.seeds, options.first) == (5, 0)
    for name in [options.only] if options.only else TASKS:
        seeds = list(range(options.first, options.first + options.seeds))
        found = contest(name, TASKS[name](options.data_dir), seeds)
        show(found)
        if recorded:
            keep(name, found)


def contest(name: str, problem: Problem, seeds: list[int]) -> dict[str, Any]:
    """All methods on one problem."""
    start = time.perf_counter(), time.process_time()
    drawn = [problem.data(seed) for seed in seeds]
    data = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *drawn)
    methods: dict[str, dict] = {}

    def enter(label: str, ours: bool, outcome: tuple[list[Found], dict], **more: float) -> None:
        runs, facts = outcome
        rows = [run.rows for run in runs]
        methods[label] = {"ours": ours, **more, **facts, "runs": rows}
        print(name, label, [round(run.rows[-1][-1], 4) for run in runs], flush=True)

    for method in METHODS[name]:
        enter(method.label, True, tuned(problem, method, data, seeds))
    run = program(problem, data, seeds, 1)
    for label, sampler in samplers(problem).items():
        for hyperband in (False, True):
            outcome = optuna_search(problem, run, seeds, sampler, hyperband)
            enter(label + ", Hyperband" * hyperband, False, outcome, compile_s=run.compile_s)
    run = program(problem, data, seeds, evosax_size(problem))
    outcome = evosax_search(problem, run, seeds)
    enter("CMA-ES of evosax", False, outcome, compile_s=run.compile_s)
    return {
        "title": problem.title,
        "unit": problem.unit,
        "hyperparameters": len(problem.space.names),
        "steps_of_a_training": problem.steps,
        "budget": problem.trainings * problem.steps,
        "settings_of_ours": {m.label: m._asdict() for m in METHODS[name]},
        "commit": commit(),
        "seeds": seeds,
        "wall_s": time.perf_counter() - start[0],
        "processor_s": time.process_time() - start[1],
        "columns": ["steps", "gradients", "seconds", "valid", "test"],
        "methods": methods,
    }


def show(found: dict[str, Any]) -> None:
    for label, facts in compared(found)["ours"].items():
        print(found["title"], label, facts)


def keep(name: str, found: dict[str, Any]) -> None:
    """This problem's record beside those of the others, its picture, and the page's tables."""
    old = json.loads(RECORD.read_text())["tasks"] if RECORD.exists() else {}
    entries = {key: found if key == name else old.get(key) for key in TASKS}
    record("versus", {"tasks": {key: entry for key, entry in entries.items() if entry}})
    result = json.loads(RECORD.read_text())
    draw(name, result["tasks"][name])
    PAGE.write_text(with_tables(PAGE.read_text(), result))


if __name__ == "__main__":
    main()
