"""Influence balancing: where truncated gradients have the wrong sign, and PES and NRES do not.

    python benchmarks/influence_balancing.py

Half a minute on two cores. Expected: truncated backpropagation and truncated ES leave towards large
theta and loss; PES and NRES, with the same one step per update, end below a mean loss of 0.15, as
does full ES with 500 steps per update. The problem is that of Vicol et al. 2021 (arXiv 2112.13835,
section 4.1, after Tallec and Ollivier 2017, arXiv 1702.05043), at the settings of the authors'
code: s <- A s + theta v from s = 1, A with 1/2 on and above the diagonal, v = +1 (10 entries), then
-1 (13), score (s_0 - 1)^2 / 2 after each step, theta from 0.5 with descent at 1e-4.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import _measure
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hyperjax as hj

SIZE, POSITIVE, TIME, START = 23, 10, 500, 0.5
UPDATES, RATE, SEEDS = 3000, 1e-4, 5
PAIRS, SIGMA = 500, 0.1
FULL_PAIRS = 10  # a pair of full ES costs 500 times as much per update
EPISODES = 40  # for the gradient at START


class Chain(NamedTuple):
    params: jax.Array
    total: jax.Array  # of the scores so far


def loss(params, theta, batch):
    del theta, batch
    return (params[0] - 1) ** 2 / 2


def step(state: Chain, theta, batch) -> Chain:
    push = jnp.where(jnp.arange(SIZE) < POSITIVE, 1.0, -1.0)
    s = state.params
    s = (s + jnp.append(s[1:], 0.0)) / 2 + theta * push
    return Chain(s, state.total + loss(s, theta, batch))


def init(params, theta) -> Chain:
    del theta
    return Chain(params, jnp.zeros(()))


def whole(theta, carry, batches):
    """The mean score of all steps, as if it were what was trained."""
    _, end = hj.unroll(step)(theta, carry, batches)
    return end.total / TIME, end


def methods() -> dict[str, tuple[Callable, int]]:
    """Estimators of a key, and the inner steps of one run per update."""
    one, es = hj.unroll(step), hj.evolution
    noisy = {"pairs": PAIRS, "sigma": SIGMA}
    mean = lambda value, theta, batch: value
    full = functools.partial(es.antithetic, whole, mean, init, pairs=FULL_PAIRS, sigma=SIGMA)
    pieces = functools.partial(es.persistent, one, loss, init, **noisy)
    reuse = functools.partial(es.noise_reuse, one, loss, init, horizon=TIME, **noisy)
    short = functools.partial(es.antithetic, one, loss, init, **noisy)
    return {
        "truncated backpropagation": (lambda key: hj.hypergradient(one, loss, init), 1),
        "truncated ES": (lambda key: short(key=key), 1),
        "PES": (lambda key: pieces(key=key, horizon=TIME), 1),
        "PES, staggered": (lambda key: pieces(key=key, horizon=TIME, stagger=True), 1),
        "PES, one endless episode": (lambda key: pieces(key=key, horizon=None), 1),
        "NRES": (lambda key: reuse(key=key), 1),
        "NRES, staggered": (lambda key: reuse(key=key, stagger=True), 1),
        "full ES": (lambda key: hj.restart(full(key=key)), TIME),
        "full backpropagation": (
            lambda key: hj.restart(hj.hypergradient(whole, mean, init)),
            TIME,
        ),
    }


def train(make: Callable, steps: int, key: jax.Array) -> jax.Array:
    """theta after UPDATES."""
    tuner = hj.tune(make(key), optax.sgd(RATE))
    state = tuner.init(jnp.ones(SIZE), jnp.asarray(START))
    split = hj.Split(jnp.zeros(steps), jnp.zeros(()))
    advance = lambda state, _: (tuner.step(state, split)[0], None)
    return jax.lax.scan(advance, state, None, length=UPDATES)[0].hparams


def gradient(make: Callable, steps: int, staggered: bool, key: jax.Array) -> jax.Array:
    """The mean over an episode of the gradients at START, each for the score of its step.

    The second one where pairs are staggered, since their first ones are cut short.
    """
    estimator, theta = make(key), jnp.asarray(START)
    split = hj.Split(jnp.zeros(steps), jnp.zeros(()))
    body = lambda carry, _: estimator.estimate(theta, carry, split)[::-1]
    carry, first = jax.lax.scan(
        body, estimator.init(jnp.ones(SIZE), theta), None, length=TIME // steps
    )
    if not staggered:
        return first.grad.mean()
    return jax.lax.scan(body, carry, None, length=TIME // steps)[1].grad.mean()


def closed_form() -> tuple[Callable, np.ndarray, np.ndarray]:
    """s_0 after each step is rest + slope * theta."""
    a = (np.eye(SIZE) + np.eye(SIZE, k=1)) / 2
    push = np.where(np.arange(SIZE) < POSITIVE, 1.0, -1.0)
    rest, slope = [np.ones(SIZE)], [np.zeros(SIZE)]
    for _ in range(TIME):
        rest.append(a @ rest[-1])
        slope.append(a @ slope[-1] + push)
    r, b = np.asarray(rest)[1:, 0], np.asarray(slope)[1:, 0]
    return lambda theta: (r + b * theta - 1) ** 2 / 2, r, b


def row(name: str, make: Callable, steps: int) -> dict:
    keys = jax.random.split(jax.random.key(0), SEEDS)
    program = jax.jit(jax.vmap(functools.partial(train, make, steps)))
    began = time.perf_counter()
    compiled = program.lower(keys).compile()
    middle = time.perf_counter()
    thetas = np.asarray(compiled(keys), np.float64)
    ended = time.perf_counter()
    losses = closed_form()[0]
    several = jax.random.split(jax.random.key(1), EPISODES)
    of_key = functools.partial(gradient, make, steps, "staggered" in name)
    slopes = np.asarray(jax.jit(jax.vmap(of_key))(several))
    return {
        "name": name,
        "theta": thetas.tolist(),
        "mean_loss": [float(losses(t).mean()) for t in thetas],
        "last_loss": [float(losses(t)[-1]) for t in thetas],
        "gradient_at_start": float(slopes.mean()),
        "gradient_standard_error": float(slopes.std(ddof=1) / np.sqrt(EPISODES)),
        "inner_steps_per_run": steps,
        "compile_s": middle - began,
        "run_s": ended - middle,
    }


def main() -> None:
    losses, r, b = closed_form()
    best = float(np.sum(b * (1 - r)) / np.sum(b**2))
    exact = float(np.mean((r + b * START - 1) * b))
    rows = [row(name, *method) for name, method in methods().items()]
    print(f"{'':28}{'gradient at start':>24}{'theta':>20}{'mean loss':>12}{'run':>8}")
    for x in rows:
        spread = np.std(x["theta"], ddof=1) / SEEDS**0.5
        slope = f"{x['gradient_at_start']:.2f} ± {x['gradient_standard_error']:.2f}"
        theta = f"{np.mean(x['theta']):.4f} ± {spread:.4f}"
        print(
            f"{x['name']:28}{slope:>24}{theta:>20}{np.mean(x['mean_loss']):12.4f}{x['run_s']:7.1f}s"
        )
    print(f"{'exact':28}{exact:>24.2f}{best:>20.4f}{losses(best).mean():12.4f}")
    data = {
        "settings": {
            "pairs": PAIRS,
            "full_pairs": FULL_PAIRS,
            "sigma": SIGMA,
            "updates": UPDATES,
            "rate": RATE,
            "horizon": TIME,
            "seeds": SEEDS,
        },
        "exact": {
            "gradient_at_start": exact,
            "theta": best,
            "mean_loss": float(losses(best).mean()),
            "mean_loss_at_start": float(losses(START).mean()),
        },
        "rows": rows,
    }
    _measure.record("influence_balancing", data)


if __name__ == "__main__":
    main()
