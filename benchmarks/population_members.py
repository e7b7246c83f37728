"""10,000 members of a problem with 1,000 parameters: memory by chunks, and throughput.

    python benchmarks/population_members.py          # some five minutes on two idle cores

A perceptron 20-32-10 (1,002 parameters), batches of 32, AdamW, float32, on one device per core,
20 inner steps and one score per outer step, states donated. For every chunk, from one member at
once to all: bytes that the compiler plans beside arguments and outputs. Expected: what a chunk
takes plus one copy of the states, which does not grow with the number of chunks. Throughput with
the chunk that "auto" takes, medians of five turns, against 256 members: within 10 %.

Last, `hj.fastest_chunk` on 256 members, for how far "auto" is from the best. Writes
results/population_members.json.
"""

import argparse
import os
import time

import _measure
import jax
import jax.numpy as jnp
import optax
from _replicas import RATE, mlp, training

import hyperjax as hj

SIZES, BATCH, STEPS = (20, 32, 10), 32, 20
CHUNKS = (1, 4, 16, 64, 256, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ten thousand members on a CPU.")
    parser.add_argument("--members", type=int, default=10_000)
    parser.add_argument("--few", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if "JAX_NUM_CPU_DEVICES" not in os.environ:  # before JAX starts
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    many, few = options.members, options.few
    memory = [forecast(many, chunk) for chunk in (*CHUNKS, many)]
    memory += [forecast(size, 64) for size in (few, many // 4, many // 2)]
    calls, layouts = {}, {}
    for size in (few, many):
        calls[str(size)], layouts[size] = compiled(size, "auto")
    times = _measure.median_times(calls, options.repeats)
    rates = {size: int(size) * STEPS / found["wall_s"] for size, found in times.items()}
    found = hj.fastest_chunk(
        lambda chunk: compiled(few, chunk)[0], (1, 4, 8, 16, 32, 64), timer=time.perf_counter
    )
    data = {
        "memory": memory,
        "layouts": {size: str(layout) for size, layout in layouts.items()},
        "rates": rates,
        "ratio": rates[str(many)] / rates[str(few)],
        "fastest": {
            "chunk": found.chunk,
            "rates": {chunk: few * STEPS / t for chunk, t in found.seconds.items()},
        },
    }
    for row in memory:
        print(
            f"{row['members']:6} members in chunks of {row['chunk']:6}: states "
            f"{row['argument_bytes'] / 1e6:7.2f} MB, temporary {row['temporary_bytes'] / 1e6:8.2f}"
        )
    for size, rate in rates.items():
        print(f"{size:>6} members: {rate:10.0f} replica-steps/s; {layouts[int(size)]}")
    print(f"ratio {data['ratio']:.3f}, to reach 0.9; {data['fastest']}")
    if _measure.by_default(parser, options):
        print(_measure.record("population_members", data))


def build(chunk, mesh):
    model = mlp(SIZES, BATCH)
    inner = training(model.loss)
    estimator = hj.score_only(hj.unroll(inner.step), model.loss, inner.init)
    tuner = hj.tune(estimator, optax.set_to_zero())
    pop = hj.population(tuner, hj.exchange.isolation(), chunk=chunk, mesh=mesh)

    def start(size: int):
        params = jax.vmap(model.init)(jax.random.split(jax.random.key(0), size))
        return pop.init(jax.random.key(1), params, {"lr": jnp.full(size, RATE)})

    batches = model.batches(STEPS)
    return pop, start, hj.Split(batches, jax.tree.map(lambda x: x[0], batches))


def forecast(size: int, chunk: int) -> dict[str, int]:
    """On one device, from shapes: nothing is allocated."""
    pop, start, split = build(chunk, None)
    state = jax.eval_shape(lambda: start(size))
    found = hj.forecast(pop.step, (state, split), donate=(0,))
    return {"members": size, "chunk": chunk, **found._asdict()}


def compiled(size: int, chunk):
    """A call that goes on training, and the layout."""
    pop, start, split = build(chunk, "auto")
    held = [start(size)]
    layout = jax.eval_shape(pop.step, held[0], split)[1].layout
    program = jax.jit(pop.step, donate_argnums=0).lower(held[0], split).compile()

    def call():
        held[0], metrics = program(held[0], split)
        return metrics.value

    return call, layout


if __name__ == "__main__":
    main()
