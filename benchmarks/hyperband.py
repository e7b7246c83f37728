"""Budgets that grow for the best: Hyperband, DEHB, and a population that is cut to its survivors.

    python benchmarks/hyperband.py

About two minutes on one core of a machine with other work.

1. Stochastic counting ones (Falkner et al. 2018, the BOHB paper, and Awad et al. 2021, arXiv
   2105.09821): 4 binary and 4 continuous coordinates, a continuous one seen through b draws with
   that probability, b the budget, 9 to 729. The true regret, divided by 8, of the incumbent after
   the cost of 10, 50, 150 and 400 evaluations at b = 729; every evaluation pays its budget in
   full, for Hyperband too. The incumbent is the best seen at the highest budget tried so far.
   Expected: DEHB at 150 below Hyperband at 400, and both below random search everywhere. A
   prototype of the same setting (16 seeds) had the numbers in PROTOTYPE.
2. Successive halving on the digits: 27 perceptrons 64-128-128-10 with nine hyperparameters drawn
   from the task's space, cut to 9, 3 and 1, of which the last trains for 27 x 20 steps; beside
   training all of them to the end, by turns in one process. Expected: 9 times less to compute, a
   wall time that shows most of it, and a final validation loss near the best of all.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import by_default, median_times, record, spread

import hyperjax as hj
from hyperjax import tasks
from hyperjax.search import FidelitySearch, dehb, hyperband, rungs, successive_halving

BINARY, CONTINUOUS = 4, 4
LEAST, MOST = 9, 729
COSTS = (10, 50, 150, 400)  # in evaluations at the highest budget
PROTOTYPE = {
    "random": (0.289, 0.204, 0.145, 0.123),
    "hyperband": (0.161, 0.118, 0.095, 0.074),
    "dehb": (0.161, 0.122, 0.049, 0.016),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Hyperband, DEHB and successive halving.")
    parser.add_argument("--seeds", type=int, default=64, help="of counting ones")
    parser.add_argument("--trainings", type=int, default=8, help="seeds of the digits")
    parser.add_argument("--first", type=int, default=0, help="first seed of either")
    options = parser.parse_args()
    start = time.perf_counter()
    data = {
        "counting_ones": counting_ones(options.first, options.seeds),
        "halving": halving(range(options.first, options.first + options.trainings)),
    }
    if by_default(parser, options):
        record("hyperband", {"seconds": time.perf_counter() - start, **data})


# --------------------------------------------------------------------------- counting ones


def true_regret(points: np.ndarray) -> np.ndarray:
    ones = (points[..., :BINARY] >= 0.5).sum(-1) + points[..., BINARY:].sum(-1)
    return 1 - ones / (BINARY + CONTINUOUS)


def observe(rng: np.random.Generator, points: np.ndarray, budget: int) -> np.ndarray:
    """Minus the ones counted, the continuous part from `budget` draws."""
    chance = np.clip(np.asarray(points[..., BINARY:], np.float64), 0, 1)
    seen = rng.binomial(budget, chance) / budget
    return -((points[..., :BINARY] >= 0.5).sum(-1) + seen.sum(-1))


def searched(search: FidelitySearch, seeds: range) -> np.ndarray:
    """True regret of the incumbent at the costs asked for, [seeds, costs]: all seeds at once."""
    ask = jax.jit(jax.vmap(search.ask, (None, 0)), static_argnums=0)
    tell = jax.jit(jax.vmap(search.tell, (None, 0, 0, 0)), static_argnums=0)
    rng = np.random.default_rng([seeds.start, len(seeds)])
    state = jax.vmap(lambda seed: search.init(jax.random.key(seed)))(jnp.asarray(seeds))
    spent, rows = 0, {}
    while spent <= COSTS[-1] * MOST:
        for turn, now in enumerate(search.rounds):
            asked, state = ask(turn, state)
            seen = observe(rng, np.asarray(asked.points), now.budget)
            state = tell(turn, state, asked.points, jnp.asarray(seen))
            spent += now.members * now.budget
            regret = true_regret(np.asarray(jax.vmap(search.best)(state).point))
            # The last round that is paid for in full is the one that stays.
            rows.update({c: regret for c in COSTS if spent <= c * MOST})
    return np.stack([rows[c] for c in COSTS], 1)


def at_random(seeds: range) -> np.ndarray:
    rng = np.random.default_rng([seeds.start, len(seeds)])
    points = rng.uniform(size=(len(seeds), COSTS[-1], BINARY + CONTINUOUS))
    seen, regret = observe(rng, points, MOST), true_regret(points)
    rows = np.arange(len(seeds))
    return np.stack([regret[rows, seen[:, :c].argmin(1)] for c in COSTS], 1)


def counting_ones(first: int, seeds: int) -> dict:
    chosen = range(first, first + seeds)
    size = BINARY + CONTINUOUS
    tables = {
        "random": at_random(chosen),
        "hyperband": searched(hyperband(size, MOST, least=LEAST), chosen),
        "dehb": searched(dehb(size, MOST, least=LEAST), chosen),
    }
    rows = {}
    for name, table in tables.items():
        error = table.std(0, ddof=1) / len(table) ** 0.5
        rows[name] = {
            "regret_mean": table.mean(0).tolist(),
            "standard_error": error.tolist(),
            "regret_median": np.median(table, 0).tolist(),
            "prototype": PROTOTYPE[name],
        }
        print(name, table.mean(0).round(3), "+-", error.round(3), PROTOTYPE[name], flush=True)
    means = {name: np.asarray(row["regret_mean"]) for name, row in rows.items()}
    counts = {
        "dehb at 150 below hyperband at 400": bool(means["dehb"][2] < means["hyperband"][3]),
        "both below random everywhere": bool(
            all((means[m] < means["random"]).all() for m in ("hyperband", "dehb"))
        ),
    }
    print(counts)
    setting = f"{BINARY} binary, {CONTINUOUS} continuous, budgets {LEAST} to {MOST}, eta 3"
    return {"setting": setting, "seeds": seeds, "costs": COSTS, "rows": rows, "counts": counts}


# --------------------------------------------------------------------------- digits

STAGES = rungs(27, 27)
STEPS = 20  # of training between two looks at the score


def halving(seeds: range) -> dict:
    task = tasks.digits(0)
    training = hj.inner(
        task.space.lift(task.loss), lambda raw: task.optimizer(task.space.constrain(raw))
    )
    score = task.space.lift(task.score)
    estimator = hj.score_only(hj.unroll(training.step), score, training.init)
    tuner = hj.tune(estimator, optax.set_to_zero())
    group = hj.population(tuner, hj.exchange.isolation())
    cut = successive_halving(tuner, STAGES)
    size, budget = STAGES[0].members, STAGES[-1].budget

    def start(key):
        weights, ranges, batches = jax.random.split(key, 3)
        params = jax.vmap(task.init)(jax.random.split(weights, size))
        raw = jax.vmap(task.space.sample)(jax.random.split(ranges, size))
        fold = lambda x: x.reshape(budget, STEPS, *x.shape[1:])
        train = jax.tree.map(fold, task.batches(batches, budget * STEPS))
        valid = jax.tree.map(lambda x: jnp.broadcast_to(x, (budget, *jnp.shape(x))), task.valid)
        return group.init(key, params, raw), hj.Split(train, valid)

    everybody = jax.jit(lambda s, x: hj.run(group, s, x)[1].members.value[-1])

    @jax.jit
    def survivors(state, splits):
        found = cut(state.members, splits)
        return found.slots[0], found.rungs[-1].score[0]

    prepare, rows = jax.jit(start), []
    for seed in seeds:
        state, splits = prepare(jax.random.key(seed))
        scores = np.asarray(everybody(state, splits))
        slot, reached = survivors(state, splits)
        order = np.argsort(np.where(np.isfinite(scores), scores, np.inf))
        row = {
            "best_of_all": float(np.nanmin(scores)),
            "halving": float(reached),
            "rank_among_all": int(np.flatnonzero(order == int(slot))[0]) + 1,
        }
        rows.append(row)
        print(seed, row, flush=True)
    state, splits = prepare(jax.random.key(seeds[0]))
    calls = {"all": lambda: everybody(state, splits), "halving": lambda: survivors(state, splits)}
    times = median_times(calls, 3)
    before = [0, *(stage.budget for stage in STAGES[:-1])]
    work = sum(s.members * (s.budget - b) for s, b in zip(STAGES, before, strict=True))
    found = {
        "setting": f"27 members, rungs {[tuple(s) for s in STAGES]}, {STEPS} steps each",
        "member_steps": {"all": size * budget * STEPS, "halving": work * STEPS},
        "compute_ratio": size * budget / work,
        "wall_ratio": times["all"]["wall_s"] / times["halving"]["wall_s"],
        "cpu_ratio": times["all"]["cpu_s"] / times["halving"]["cpu_s"],
        "times": times,
        "loss": {n: spread([row[n] for row in rows]) for n in ("best_of_all", "halving")},
        "loss_lost": spread([row["halving"] - row["best_of_all"] for row in rows]),
        "rank_among_all": [row["rank_among_all"] for row in rows],
    }
    print({n: found[n] for n in ("compute_ratio", "wall_ratio", "cpu_ratio", "loss_lost")})
    return found


if __name__ == "__main__":
    main()
