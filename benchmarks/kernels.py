"""What the machine can do, what each op of `hyperjax.kernels` needs, and what it takes.

    python benchmarks/kernels.py            # some minutes on two cores, or on a GPU
    python benchmarks/kernels.py gated_dense vector_update --dtypes float32 --repeats 3

First the ceilings: bandwidth by copying (each byte read once and written once), and the peak of one
square product, in each dtype at JAX's default precision. They are the best of several sizes.

Then the ops. An op's floor is the longer of its bytes at that bandwidth and its operations at that
peak, where each array is read once and each result written once; arrays that stay in a cache can be
faster than it. "xla" is the op's reference under jit, "kernel" the compiled kernel, and the share
is that of the floor in their time. "bar" is what a kernel has to beat or nearly reach: a step by
optax under vmap, one product of twice the width. On CPU there is no kernel: `auto` is XLA, and the
command is the table of what XLA leaves. Shapes that are too large for tests are run as well, on CPU
up to a quarter of a GiB of traffic. On an accelerator every kernel has to agree with the reference,
after the memory that its results may lie in was filled with NaN.

Last, the products of a population with one input, [rows, in] by [members, in, out]: XLA's share of
the peak decides whether they get a kernel, which is below 80 % on an accelerator at 8 to 1,024
members and widths of 32 to 512.

A program is repeated within one loop on the device, so that no launch from Python is measured.
Targets, on an H200: fused optimizer steps at 85 % of the bandwidth of a copy from 2^26 entries on
and faster than XLA everywhere; gated dense at most 1.1 times one product of twice the width.
"""

import argparse
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from _measure import by_default, median_times, record
from jax import lax

from hyperjax import kernels
from hyperjax.kernels._op import Case, Traffic

CPU = jax.default_backend() == "cpu"
# Bytes of a copy and sides of a product: beyond any cache, and large enough for a chip to fill.
COPIES = (2**26, 2**28) if CPU else (2**28, 2**30, 2**32)
SIDES = (1024, 2048) if CPU else (4096, 8192, 16384)
BUSY = 0.01  # seconds of one loop, about
LEAST = 4  # runs in it: results of the first lie in memory that the system has yet to hand out
LARGEST = (2**28, 2**36)  # bytes and operations of one call on CPU: beyond the cache
MEMBERS = (8, 64) if CPU else (8, 64, 256, 1024)
WIDTHS = (32, 128, 512)
ROWS = 128
# From which |kernel - reference| / |reference| is a fault: roundings of the type, and for float32
# the products of tensor cores, which round their factors to 11 bits.
AGREE = {"float32": 5e-3, "bfloat16": 2e-2}
OPTAX = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, 0.9),
    "adam": optax.adam,
    "adamw": lambda rate: optax.adamw(rate, weight_decay=1e-2),
    "adamw clip": lambda rate: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2)
    ),
}
ENOUGH = 0.8  # of the peak: what XLA's batched product has to reach


class Program(NamedTuple):
    function: Callable
    arrays: tuple
    again: Callable[[tuple, Any], tuple] = lambda arrays, results: arrays


def repeated(program: Program, times: int) -> Callable[[], Any]:
    """A compiled call of so many runs of a function, none of which can be left out or merged.

    Each run waits for the results of the one before, by a barrier that nothing is moved across, and
    takes what `again` makes of them: an op in place would be charged a copy of what it overwrites.
    For the same reason a call is given, and gives up, what the last one has left.
    """

    def step(arrays):
        results = program.function(*arrays)
        arrays = program.again(arrays, results)
        taken = {id(x) for x in jax.tree.leaves(arrays)}
        return arrays, [x for x in jax.tree.leaves(results) if id(x) not in taken]

    def loop(carry):
        return lax.fori_loop(0, times, lambda _, c: step(*lax.optimization_barrier(c)[:1]), carry)

    arrays = jax.tree.map(jnp.copy, program.arrays)
    rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, arrays)[1])
    carry = [(arrays, rest)]
    compiled = jax.jit(loop, donate_argnums=0).lower(carry[0]).compile()

    def call():
        carry[0] = compiled(carry[0])
        return carry[0]

    return call


def seconds(programs: dict[str, Program], repeats: int) -> dict[str, float]:
    """Seconds of one run of each, by turns."""
    calls, times = {}, {}
    for name, program in programs.items():
        guess = median_times({name: repeated(program, 1)}, 1)[name]["wall_s"]
        times[name] = max(LEAST, min(1000, round(BUSY / guess)))
        calls[name] = repeated(program, times[name])
    walls = median_times(calls, repeats)
    return {name: wall["wall_s"] / times[name] for name, wall in walls.items()}


def ceilings(dtypes: list[str], repeats: int) -> dict[str, Any]:
    copies, products = {}, {}
    for size in COPIES:
        x = jnp.ones(size // 4, jnp.float32)
        taken = seconds({"copy": Program(jnp.negative, (x,))}, repeats)["copy"]
        copies[size] = 2 * size / taken
    for dtype in dtypes:
        for side in SIDES:
            x = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
            taken = seconds({"product": Program(jnp.matmul, (x, x))}, repeats)
            products[dtype, side] = 2 * side**3 / taken["product"]
    return {
        "bytes_per_s": max(copies.values()),
        "copies": copies,
        "operations_per_s": {d: max(products[d, s] for s in SIDES) for d in dtypes},
        "products": {f"{d} {s}": rate for (d, s), rate in products.items()},
    }


def cases(wanted: list[str]) -> Iterator[tuple[str, str, Case, dict]]:
    """Op, variant, case and shapes of every module in `hyperjax.kernels` that has cases."""
    for found in pkgutil.iter_modules(kernels.__path__):
        op = found.name.removeprefix("_").removesuffix("_cases")
        module = importlib.import_module(f"{kernels.__name__}.{found.name}")
        if hasattr(module, "CASES") and (not wanted or op in wanted):
            for variant, case in module.CASES.items():
                shapes = {**module.SHAPES, **module.LARGE}
                yield op, variant, case, {n: s for n, s in shapes.items() if fits(case, s)}


def fits(case: Case, shape: tuple) -> bool:
    """Whether this machine can run it often: on CPU, some seconds in all."""
    traffic = case.traffic(shape, "float32")
    return not CPU or (traffic.bytes < LARGEST[0] and traffic.operations < LARGEST[1])


def floor_of(traffic: Traffic, dtype: str, ceiling: dict) -> float:
    return max(
        traffic.bytes / ceiling["bytes_per_s"],
        traffic.operations / ceiling["operations_per_s"][dtype],
    )


def disagreement(case: Case, arrays: tuple) -> float:
    """|kernel - reference| / |reference|, the largest over results, from poisoned memory."""
    expected = jax.jit(lambda *a: case.run("xla", *a))(*arrays)
    spoilt = jax.tree.map(lambda y: jnp.full_like(y, jnp.nan), (expected, expected))
    jax.block_until_ready(spoilt)
    del spoilt
    got = jax.jit(lambda *a: case.run("pallas", *a))(*arrays)

    def distance(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-30)

    # NaN, unlike a number, is the largest for this `max`.
    return float(jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(distance, got, expected)))))


def optax_step(variant: str, arrays: tuple) -> Program | None:
    """The step as optax makes it, under vmap over members."""
    rates, params, grads, moments, master = arrays
    make = OPTAX.get(variant)
    if make is None or master is not None:
        return None

    def member(rate, p, g, moments):
        optimizer = make(rate)
        states, tree = jax.tree.flatten(optimizer.init(p))
        # In every state of these the counts are scalars and the rest are the moments, in order.
        given = iter(moments)
        states = [next(given) if x.ndim else x for x in states]
        updates, state = optimizer.update(g, tree.unflatten(states), p)
        moments = tuple(x for x in jax.tree.leaves(state) if x.ndim)
        return optax.apply_updates(p, updates), moments

    def again(arrays, results):
        rates, _, grads, _ = arrays
        return rates, results[0], grads, results[1]

    return Program(jax.vmap(member), (rates, params, grads, moments), again)


def measure(
    variant: str, case: Case, shape: tuple, dtype: str, ceiling: dict, repeats: int
) -> dict[str, Any]:
    key = jax.random.key(0)
    arrays = case.make(key, shape, dtype)
    again = {} if case.again is None else {"again": case.again}
    traffic = case.traffic(shape, dtype)
    floor = floor_of(traffic, dtype, ceiling)
    programs = {"xla": Program(lambda *a: case.run("xla", *a), arrays, **again)}
    row: dict[str, Any] = {"shape": shape, "dtype": dtype, **traffic._asdict(), "floor_s": floor}
    if CPU:
        row["kernel"] = "none: auto is XLA"
    else:
        row["disagreement"] = disagreement(case, arrays)
        if not row["disagreement"] < AGREE[dtype]:
            raise RuntimeError(
                f"{variant}, {shape}, {dtype}: kernel and reference are apart: {row}"
            )
        programs["kernel"] = Program(lambda *a: case.run("pallas", *a), arrays, **again)
    if case.bar is not None:
        programs["bar"] = Program(*case.bar(key, shape, dtype))
    elif case.again is not None and (theirs := optax_step(variant, arrays)) is not None:
        programs["bar"] = theirs
    for name, taken in seconds(programs, repeats).items():
        row[f"{name}_s"], row[f"{name}_share"] = taken, floor / taken
    return row


def population_products(dtypes: list[str], ceiling: dict, repeats: int) -> list[dict]:
    """XLA's product of one input with a matrix for each member, which decides on a kernel."""
    rows = []
    for dtype in dtypes:
        for members in MEMBERS:
            for width in WIDTHS:
                keys = jax.random.split(jax.random.key(0))
                x = jax.random.normal(keys[0], (ROWS, width)).astype(dtype)
                w = jax.random.normal(keys[1], (members, width, width)).astype(dtype)
                run = lambda x, w: jax.vmap(jnp.matmul, (None, 0))(x, w)
                size = x.size + w.size + members * ROWS * width
                traffic = Traffic(size * x.dtype.itemsize, 2 * members * ROWS * width**2)
                floor = floor_of(traffic, dtype, ceiling)
                taken = seconds({"xla": Program(run, (x, w))}, repeats)["xla"]
                row = {"members": members, "width": width, "rows": ROWS, "dtype": dtype}
                row |= {**traffic._asdict(), "floor_s": floor, "xla_s": taken}
                rows.append({**row, "xla_share": floor / taken})
    return rows


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    number = lambda key, scale, form: format(row[key] * scale, form) if key in row else "-"
    kernel = row.get("kernel", number("kernel_s", 1e6, ".1f"))
    cells = [
        name,
        row["dtype"],
        number("bytes", 1e-6, ".2f"),
        number("operations", 1e-6, ".1f"),
        number("floor_s", 1e6, ".1f"),
        number("xla_s", 1e6, ".1f"),
        number("xla_share", 1, ".2f"),
        kernel,
        number("kernel_share", 1, ".2f"),
        number("bar_s", 1e6, ".1f"),
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| op | dtype | MB | MFLOP | floor, us | XLA, us | share | kernel, us | share | bar, us |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ceilings, XLA and kernels.")
    parser.add_argument("ops", nargs="*", default=[], help="such as gated_dense; else all")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    ceiling = ceilings(options.dtypes, options.repeats)
    print(f"{jax.devices()[0].device_kind}: copy {ceiling['bytes_per_s'] / 1e9:.1f} GB/s")
    for dtype, rate in ceiling["operations_per_s"].items():
        print(f"product, {dtype}: {rate / 1e9:.1f} GFLOP/s")
    print(HEADER, flush=True)
    results: dict[str, dict] = {}
    for op, variant, case, shapes in cases(options.ops):
        for name, shape in shapes.items():
            for dtype in (d for d in options.dtypes if d in case.dtypes):
                row = measure(variant, case, shape, dtype, ceiling, options.repeats)
                results.setdefault(op, {}).setdefault(variant, {})[f"{name} {dtype}"] = row
                print(line(f"{op}, {variant}: {name} {shape}", row), flush=True)
    products = []
    if not options.ops or "population_dense" in options.ops:
        products = population_products(options.dtypes, ceiling, options.repeats)
    for row in products:
        name = f"population_dense: {row['members']} x [{ROWS}, {row['width']}, {row['width']}]"
        print(line(name, row), flush=True)
    if products:
        poor = sum(row["xla_share"] < ENOUGH for row in products)
        print(f"population_dense: XLA below {ENOUGH:.0%} of the floor in {poor} of {len(products)}")
    if by_default(parser, options):
        record(
            "kernels",
            {
                "repeats": options.repeats,
                "ceilings": ceiling,
                "results": results,
                "population_dense": products,
                "kernels": "none on CPU: auto is XLA" if CPU else "compiled",
            },
        )


if __name__ == "__main__":
    main()
