"""Replicas x steps per second: a population beside what else one would write, in one run.

    python benchmarks/population_speed.py            # torch from PyPI in an environment of its own
    python benchmarks/population_speed.py --here     # this environment; torch rows if it is there

Some forty minutes on two idle cores, of which a third is compilation. AdamW, float32, one batch per
step for all replicas, wall time, medians of five turns, compilation apart.

- mlp: 64-128-128-10, batches of 64, at 1, 4, 16, 64 and 256 replicas
- cnn: 3 x 3 convolutions to 16 and 32 channels on 28 x 28, batches of 32, at 8 and 32; by
  `hj.layers.conv` in the population, native convolutions in every other row
- transformer, gru: width 64, two layers, sequences of 64, batches of 8 (tokens are random), at 8
  and 32

Rows: (a) Python loop of jitted steps, (b) jitted scan, replica after replica, (c) vmap inside a
scan, (d) torch eager, (e) torch.func.vmap; and `population` with what "auto" chooses on one device
per core, without and with an exchange (truncation at every outer step) that copies states about.
An outer step of a population is `--steps` inner ones and one score, which no other row has.

To reach on two cores, as ratios of rates: mlp 1.8 of (b) and 1.9 of (c) at 16, 64 and 256 (2.2 of
(c) at 256), ahead of every row, 0.97 of the best at 1; cnn 2.5 of (a) and 8 of (c); transformer
and gru 1.7 of (b). On an accelerator the same command measures, with --replicas as wished, and the
fractions of the measured matrix product and copy tell how full it is; to reach on an H200: 64 mlp
replicas at 40 times the rate of (b) at 1. Writes results/population_speed.json.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import _measure
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _replicas import RATE, Model, models, training
from jax import lax

import hyperjax as hj

OURS, EXCHANGED = "population", "population, exchanging"
LOOP, SCAN, NAIVE = "(a) python loop", "(b) sequential scan", "(c) vmap in scan"
REPLICAS = {"mlp": (1, 4, 16, 64, 256), "cnn": (8, 32), "transformer": (8, 32), "gru": (8, 32)}
STEPS = {"mlp": 50, "cnn": 10, "transformer": 10, "gru": 10}
TARGETS = [
    *[("mlp", r, SCAN, 1.8) for r in (16, 64, 256)],
    *[("mlp", r, NAIVE, 2.2 if r == 256 else 1.9) for r in (16, 64, 256)],
    *[("cnn", r, row, bar) for r in (8, 32) for row, bar in ((LOOP, 2.5), (NAIVE, 8.0))],
    *[(name, r, SCAN, 1.7) for name in ("transformer", "gru") for r in (8, 32)],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--here", action="store_true", help="in this environment")
    parser.add_argument("--models", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--replicas", nargs="+", type=int, help="instead of those above")
    parser.add_argument("--steps", type=int, help="inner steps per call, instead of 50 and 10")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.here:
        return measure(parser, options)
    try:
        python = _measure.environment(["torch"])
    except subprocess.CalledProcessError:
        print("torch cannot be installed here; its rows are left out")
        python = _measure.environment([])
    subprocess.run([str(python), __file__, "--here", *sys.argv[1:]], check=True)


def measure(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if "JAX_NUM_CPU_DEVICES" not in os.environ:  # before JAX starts
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    data: dict[str, Any] = {"devices": jax.device_count(), "peak": peaks(), "rows": []}
    for name in options.models:
        for replicas in options.replicas or REPLICAS[name]:
            steps = options.steps or STEPS[name]
            row = contest(name, models()[name], replicas, steps, options.repeats, data["peak"])
            data["rows"].append(row)
            show(row)
    data["targets"] = targets(data["rows"])
    for row in data["targets"]:
        print("{model} R={replicas}: {ratio:.2f} of {of}, to reach {bar}".format(**row))
    options.here = False  # says where, not what
    if _measure.by_default(parser, options):
        print(_measure.record("population_speed", data))


def contest(name: str, model: Model, replicas: int, steps: int, repeats: int, peak) -> dict:
    calls, facts = {}, {}
    batches = model.batches(steps)
    for label, make in contenders(name).items():
        try:
            call, facts[label] = make(model, replicas, batches)
            jax.block_until_ready(call())  # memory may run out only now
            calls[label] = call
        except (RuntimeError, MemoryError) as error:  # JAX's or torch's: a full device, on purpose
            facts[label] = {"failed": str(error).splitlines()[0][:200]}
    times = _measure.median_times(calls, repeats)
    flops, size = cost(model, batches)
    for label, found in times.items():
        rate = replicas * steps / found["wall_s"]
        facts[label] |= found | {
            "rate": rate,
            "of_product_peak": rate * flops / peak["product_flops"],
            # Parameters, moments and gradients are read and written once a step, at least.
            "of_copy_peak": rate * 7 * size / peak["copy_bytes"],
        }
    return {"model": name, "replicas": replicas, "steps": steps, "flops": flops, "rows": facts}


def contenders(name: str) -> dict[str, Callable]:
    """(model, replicas, batches) -> (a call that trains all replicas through all batches, facts)"""
    rows: dict[str, Callable] = {
        OURS: partial(population, hj.exchange.isolation()),
        EXCHANGED: partial(population, hj.exchange.truncation(0.25, hj.exchange.perturb(0.1))),
        LOOP: python_loop,
        SCAN: sequential_scan,
        NAIVE: naive_vmap,
    }
    if name == "mlp" and find_spec("torch"):
        for label in ("torch eager", "torch.func vmap"):
            rows[label] = partial(torch_rows, label)
    return rows


def starts(model: Model, replicas: int):
    params = jax.jit(jax.vmap(model.init))(jax.random.split(jax.random.key(0), replicas))
    return params, {"lr": jnp.full(replicas, RATE)}


def donating(function: Callable, state, *arguments):
    """`function(state, *arguments) -> state` as a call that goes on from where it was."""
    program, facts = _lowered(function, state, *arguments)
    held = [state]

    def call():
        held[0] = program(held[0], *arguments)
        return held[0]

    return call, facts


def _lowered(function: Callable, *arguments):
    began = time.perf_counter()
    program = jax.jit(function, donate_argnums=0).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    temporary = getattr(program.memory_analysis(), "temp_size_in_bytes", None)
    return program, {"compile_s": seconds, "temp_bytes": temporary}


def population(exchange, model: Model, replicas: int, batches):
    inner = training(model.loss)
    estimator = hj.score_only(hj.unroll(inner.step), model.loss, inner.init)
    tuner = hj.tune(estimator, optax.set_to_zero())
    pop = hj.population(tuner, exchange, mesh="auto")
    state = pop.init(jax.random.key(0), *starts(model, replicas))
    split = hj.Split(batches, jax.tree.map(lambda x: x[0], batches))
    layout = jax.eval_shape(pop.step, state, split)[1].layout
    call, facts = donating(lambda s, x: pop.step(s, x)[0], state, split)
    return call, facts | {"layout": str(layout)}


def python_loop(model: Model, replicas: int, batches):
    inner = training(model.native)
    params, hparams = starts(model, replicas)
    rows = [jax.tree.map(lambda x, i=i: x[i], (params, hparams)) for i in range(replicas)]
    steps = len(jax.tree.leaves(batches)[0])
    each = [jax.tree.map(lambda x, i=i: x[i], batches) for i in range(steps)]
    states = [inner.init(*row) for row in rows]
    program, facts = _lowered(inner.step, jax.tree.map(jnp.copy, states[0]), rows[0][1], each[0])
    states = [jax.tree.map(jnp.copy, state) for state in states]

    def call():
        for i, (_, h) in enumerate(rows):
            for batch in each:
                states[i] = program(states[i], h, batch)
        return states

    return call, facts


def sequential_scan(model: Model, replicas: int, batches):
    inner = training(model.native)
    params, hparams = starts(model, replicas)
    rows = [jax.tree.map(lambda x, i=i: x[i], (params, hparams)) for i in range(replicas)]
    states = [jax.tree.map(jnp.copy, inner.init(*row)) for row in rows]
    train = lambda state, h, batches: lax.scan(
        lambda s, batch: (inner.step(s, h, batch), None), state, batches
    )[0]
    program, facts = _lowered(train, states[0], rows[0][1], batches)

    def call():
        for i, (_, h) in enumerate(rows):
            states[i] = program(states[i], h, batches)
        return states

    return call, facts


def naive_vmap(model: Model, replicas: int, batches):
    inner = training(model.native)
    params, hparams = starts(model, replicas)
    step = jax.vmap(inner.step, (0, 0, None))
    train = lambda state, h, batches: lax.scan(
        lambda s, batch: (step(s, h, batch), None), state, batches
    )[0]
    state = jax.tree.map(jnp.copy, jax.vmap(inner.init)(params, hparams))
    return donating(train, state, hparams, batches)


def torch_rows(label: str, model: Model, replicas: int, batches):
    import _replicas_torch

    sizes = [64, 128, 128, 10]
    return _replicas_torch.calls(sizes, batches, replicas)[label], {}


def cost(model: Model, batches) -> tuple[float, int]:
    """Operations of a step of one replica, by the compiler's count, and bytes of its parameters."""
    inner = training(model.native)
    params, h = jax.tree.map(lambda x: x[0], starts(model, 1))
    batch = jax.tree.map(lambda x: x[0], batches)
    program = jax.jit(inner.step).lower(inner.init(params, h), h, batch).compile()
    analysis = program.cost_analysis() or {}
    return float(analysis.get("flops", np.nan)), sum(x.nbytes for x in jax.tree.leaves(params))


def peaks() -> dict[str, float]:
    """Of this machine, one device: a large matrix product in float32, and a copy."""
    cpu = jax.default_backend() == "cpu"
    n = 1024 if cpu else 8192
    square, flat = jnp.ones((n, n)), jnp.ones((2**24 if cpu else 2**29,))
    product, _ = _measure.compiled(lambda a: a @ a, square)
    copy, _ = _measure.compiled(lambda a: a + 1.0, flat)
    times = _measure.median_times({"product": product, "copy": copy}, 5)
    return {
        "product_flops": 2.0 * n**3 / times["product"]["wall_min_s"],
        "copy_bytes": 2.0 * flat.nbytes / times["copy"]["wall_min_s"],
    }


def targets(rows: list[dict]) -> list[dict]:
    """Ratios of rates; None where a row is missing."""
    rates = {
        (row["model"], row["replicas"], label): found["rate"]
        for row in rows
        for label, found in row["rows"].items()
        if "rate" in found
    }
    wanted = list(TARGETS)
    for (model, replicas, label), _ in rates.items():
        if model == "mlp" and label not in (OURS, EXCHANGED):
            wanted.append((model, replicas, label, 0.97 if replicas == 1 else 1.0))
    if jax.default_backend() != "cpu":
        rates["mlp", 64, "(b) at 1"] = rates.get(("mlp", 1, SCAN), np.nan)
        wanted.append(("mlp", 64, "(b) at 1", 40.0))
    found = []
    for model, replicas, label, bar in wanted:
        pair = rates.get((model, replicas, OURS)), rates.get((model, replicas, label))
        if pair[0] and pair[1]:
            found.append(
                {"model": model, "replicas": replicas, "of": label, "bar": bar}
                | {"ratio": pair[0] / pair[1], "reached": pair[0] >= bar * pair[1]}
            )
    return found


def show(row: dict) -> None:
    print(f"{row['model']}, {row['replicas']} replicas", flush=True)
    for label, found in row["rows"].items():
        if "failed" in found:
            print(f"  {label:24} {found['failed'][:80]}")
            continue
        print(
            f"  {label:24} {found['rate']:10.0f} /s  cpu {found['cpu_s'] / found['wall_s']:4.2f}  "
            f"product {found['of_product_peak']:4.0%}  copy {found['of_copy_peak']:4.0%}  "
            f"compiled in {found.get('compile_s', 0):5.1f} s  {found.get('layout', '')}",
            flush=True,
        )


if __name__ == "__main__":
    main()
