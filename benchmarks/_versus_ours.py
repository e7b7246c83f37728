"""hyperjax on the problems of `_versus_tasks.py`, each by the estimator that is right for it.

Settings were chosen on seeds 100 to 107 (`versus.py --first 100 --seeds 8`), results are on others.
"""

import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _versus_peers import Found
from _versus_tasks import Problem

import hyperjax as hj
from hyperjax import exchange, linsolve


class Method(NamedTuple):
    """A population of tuners, or one."""

    label: str
    estimator: Literal["unroll", "implicit"]
    members: int
    inner: int  # training steps in an outer step
    outer: int  # outer steps in all
    rate: float  # of Adam on raw hyperparameters
    every: int = 3  # outer steps between tournaments
    explore: float = 0.3  # deviation of the noise on what a member copies
    products: int = 10  # most with the Hessian in an outer step
    whole: bool = False  # an outer step is a training from its beginning, else it goes on


METHODS: dict[str, tuple[Method, ...]] = {
    "a9a": (
        Method("implicit", "implicit", 1, 10, 100, 0.1),
        Method("implicit, population of 4", "implicit", 4, 10, 100, 0.1),
    ),
    "ett": (
        Method("implicit", "implicit", 1, 20, 300, 0.2),
        Method("implicit, population of 4", "implicit", 4, 20, 90, 0.2),
    ),
    "digits": (
        Method("unroll, whole trainings", "unroll", 1, 630, 13, 0.5, whole=True),
        Method("unroll, population of 4", "unroll", 4, 42, 50, 0.2),
    ),
    "text": (
        Method("unroll, whole trainings", "unroll", 1, 180, 10, 0.5, whole=True),
        Method("unroll, population of 8", "unroll", 8, 10, 18, 0.1),
    ),
    "mnist": (
        Method("unroll, population of 8", "unroll", 8, 10, 18, 0.1),
        Method("unroll, whole trainings", "unroll", 1, 180, 12, 0.5, whole=True),
    ),
}


def tuned(
    problem: Problem, method: Method, data: Any, seeds: list[int]
) -> tuple[list[Found], dict[str, float]]:
    """The method on every seed, one after another, by one compiled program."""
    pick = lambda i: jax.tree.map(lambda x: x[i], data)
    start = time.process_time()
    run = jax.jit(_run(problem, method)).lower(pick(0), jax.random.key(0)).compile()
    compile_s = time.process_time() - start
    test = jax.jit(lambda params, data: jax.lax.map(lambda p: problem.test(p, data), params))
    found, wall = [], 0.0
    for i, seed in enumerate(seeds):
        mine, key = pick(i), jax.random.key(seed)
        began, start = time.perf_counter(), time.process_time()
        out = jax.block_until_ready(run(mine, key))
        seconds, wall = time.process_time() - start, wall + time.perf_counter() - began
        found.append(_found(problem, method, out, test(out["params"], mine), seconds))
    return found, {
        "wall_s": wall / len(seeds),
        "compile_s": compile_s,
        "settings": float(method.members),
    }


def _run(problem: Problem, method: Method):
    space = problem.space

    def run(data, key):
        first, draws = jax.random.split(key)  # as `_versus_peers.program` does
        loss = space.lift(lambda p, h, b: problem.loss(p, h, b, data))
        score = lambda p, raw, b: problem.valid(p, data)
        training = hj.inner(loss, lambda raw: problem.optimizer(space.constrain(raw)))
        population = hj.population(
            hj.tune(_estimator(method, training, loss, score), optax.adam(method.rate)),
            exchange.tournament(exchange.perturb(method.explore), every=method.every)
            if method.members > 1
            else exchange.isolation(),
        )
        seed, explore = jax.random.split(jax.random.fold_in(key, 1))
        raw = _members(problem, method, seed)
        params = hj.copies(problem.init(first), method.members)

        def one(state, i):
            steps = (0 if method.whole else i * method.inner) + jnp.arange(method.inner)
            keys = jax.vmap(lambda t: jax.random.fold_in(draws, t))(steps)
            batches = jax.vmap(lambda k: problem.batch(data, k))(keys)
            batches = {"key": keys, "batch": batches}  # a leaf even where a batch has none
            state, metrics = population.step(state, hj.Split(batches, None))
            values = jnp.where(metrics.members.finite, metrics.members.value, jnp.inf)
            best = jnp.argmin(values)
            # A tournament leaves the best member as it is.
            params = jax.tree.map(lambda x: x[best], _params(state.members.carry))
            solves = getattr(metrics.members.info, "solve", None)
            products = jnp.zeros(()) if solves is None else jnp.mean(solves.iterations)
            return state, {"valid": values[best], "params": params, "products": products}

        return jax.lax.scan(one, population.init(explore, params, raw), jnp.arange(method.outer))[1]

    return run


def _estimator(method: Method, training: hj.Inner, loss, score) -> hj.Estimator:
    step = lambda state, raw, b: training.step(state, raw, b["batch"])
    response = hj.unroll(step)
    if method.estimator == "unroll":
        estimator = hj.hypergradient(response, score, training.init)
        return hj.restart(estimator) if method.whole else estimator
    optimality = hj.stationary(lambda p, raw, b: loss(p, raw, b["batch"]))
    solve = linsolve.cg(maxiter=method.products, tol=1e-3)
    return hj.warm_start(hj.implicit(response, optimality, solve=solve), score, training.init)


def _params(carry):
    while not hasattr(carry, "params"):  # of `restart` and `warm_start`
        carry = carry.trained if hasattr(carry, "trained") else carry.carry
    return carry.params


def _members(problem: Problem, method: Method, key: jax.Array) -> Any:
    """Raw hyperparameters [members, ...]; the first member begins at the start of the space."""
    start = problem.space.init()
    rest = jax.vmap(problem.space.sample)(jax.random.split(key, method.members - 1))
    return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), start, rest)


def _found(problem: Problem, method: Method, out, test, seconds: float) -> Found:
    valid, test = np.asarray(out["valid"]), np.asarray(test)
    steps = method.members * method.inner * np.arange(1, method.outer + 1)
    spent = np.cumsum(method.members * _gradients(problem, method, np.asarray(out["products"])))
    best, rows = np.inf, []
    for i, loss in enumerate(valid):
        if loss < best or i == method.outer - 1:
            same = not loss < best
            best = best if same else float(loss)
            reached = rows[-1][4] if same else float(test[i])
            clock = seconds * (i + 1) / method.outer
            rows.append([int(steps[i]), float(spent[i]), clock, best, reached])
    return Found(rows)


def _gradients(problem: Problem, method: Method, products: np.ndarray) -> np.ndarray:
    """What an outer step of one member costs, in gradients of the loss on a training batch.

    A step that is differentiated counts as three: itself, and two for the way back. A product with
    the Hessian counts as two, as does the one with the mixed derivative; the loss and its gradient
    on the validation set as one per batch of its rows, the loss alone as a third of that.
    """
    batch, valid = problem.rows
    if method.estimator == "unroll":
        return products + 3 * method.inner + valid / batch
    return method.inner + 2 * (products + 1) + valid / batch
