"""CMA-ES with an advisor that may overrule every third proposal, good advice and bad.

    OMP_NUM_THREADS=1 python benchmarks/advisor.py

A minute of one core; needs the package cmaes.

The quadratics sum_i 1000^(i/13) y_i^2 of 14 variables on [0, 1]^14, y = x - optimum, 10 seeds with
an optimum each, uniform in [0.2, 0.8]^14; also with y rotated. Advisors: a uniform point
(useless), one coordinate of the incumbent moved by N(0, 0.05) (local), the optimum (oracle). After
Centaur (arXiv 2603.24647), whose advisor is a language model, whose task is a day of training on a
GPU, and whose numbers therefore have no counterpart here.

Expected of the geometric mean of the best values: the useless advisor costs at most a factor 1.5
after 150 trials; the local one is ahead of pure CMA-ES after 600. A prototype had, after 150 / 600
/ 2,000, 6.7 / .56 / 5.7e-4 (pure), 8.6 / 1.7 / .39 (useless) and 7.6 / .20 / 5e-5 (local). Telling
only what lies within a few Mahalanobis units of the mean should mend the useless one's long runs.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import cmaes
import jax
import numpy as np
from _measure import by_default, record

import hyperjax as hj

DIM, CONDITION = 14, 1000.0
MARKS = (150, 600, 2000)
REACH = DIM**0.5 + 2  # CMA's own points lie near sqrt(DIM)


def main() -> None:
    parser = argparse.ArgumentParser(description="Advice to CMA-ES.")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    start = time.perf_counter()
    tables = {}
    for rotated in (False, True):
        table = {}
        for name, (advise, reach) in ADVISORS.items():
            runs = [run(advise, reach, seed, rotated) for seed in range(options.seeds)]
            best = np.asarray([values for values, _ in runs])
            table[name] = {
                "geometric_mean": dict(zip(map(str, MARKS), geometric(best), strict=True)),
                "each": best.tolist(),
                "withheld": [count for _, count in runs],
            }
            print("rotated" if rotated else "separable", name, geometric(best), flush=True)
        tables["rotated" if rotated else "separable"] = table
    facts = {"reach": REACH, "marks": MARKS, "seeds": options.seeds}
    verdicts = {name: verdict(table) for name, table in tables.items()}
    print(verdicts)
    if by_default(parser, options):
        seconds = time.perf_counter() - start
        record("advisor", {"seconds": seconds, **facts, "verdicts": verdicts, "tables": tables})


def problem(seed: int, rotated: bool) -> tuple[Callable, np.ndarray]:
    rng = np.random.default_rng(10_000 + seed)
    optimum = rng.uniform(0.2, 0.8, DIM)
    turn = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0] if rotated else np.eye(DIM)
    weights = CONDITION ** (np.arange(DIM) / (DIM - 1))
    return lambda x: float(weights @ (turn @ (x - optimum)) ** 2), optimum


def useless(rng, optimum, facts):
    return rng.uniform(size=DIM)


def local(rng, optimum, facts):
    point, _ = facts["best"][0]
    point[rng.integers(DIM)] += rng.normal(0, 0.05)
    return np.clip(point, 0, 1)


def oracle(rng, optimum, facts):
    return optimum


ADVISORS: dict[str, tuple[Any, float | None]] = {
    "pure": (None, None),
    "useless": (useless, None),
    "useless, near ones told": (useless, REACH),
    "local": (local, None),
    "local, near ones told": (local, REACH),
    "oracle": (oracle, None),
}


def run(advise, reach: float | None, seed: int, rotated: bool) -> tuple[list[float], int]:
    """The best values at the marks, and how many overrides the search was not told."""
    score, optimum = problem(seed, rotated)
    rng = np.random.default_rng(20_000 + seed)
    make = lambda s: cmaes.CMA(np.full(DIM, 0.5), 0.25, seed=s)
    search = hj.search.from_cmaes(make, batch=1)
    advisor = (lambda facts: None) if advise is None else lambda f: advise(rng, optimum, f)
    search = hj.search.advised(search, advisor, reach=reach)
    state = search.init(jax.random.key(seed))
    best, marks = np.inf, []
    for trial in range(max(MARKS)):
        points, state = search.ask(state)
        value = score(points[0])
        state = search.tell(state, points, np.asarray([value]))
        best = min(best, value)
        if trial + 1 in MARKS:
            marks.append(best)
    return marks, state.withheld


def geometric(best: np.ndarray) -> list[float]:
    with np.errstate(divide="ignore"):  # the oracle's zero
        return np.exp(np.log(best).mean(0)).tolist()


def verdict(table: dict) -> dict[str, Any]:
    at = lambda name, trials: table[name]["geometric_mean"][str(trials)]
    cost = at("useless", 150) / at("pure", 150)
    gain = at("local", 600) / at("pure", 600)
    return {
        "useless / pure at 150": cost,
        "local / pure at 600": gain,
        "held": cost <= 1.5 and gain < 1,
    }


if __name__ == "__main__":
    main()
