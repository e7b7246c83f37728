"""Layers under vmap over members with weights of their own: the naive way against others.

    python benchmarks/population_layers.py            # five to ten minutes on two cores
    python benchmarks/population_layers.py --layers embedding gru --members 8

One training step is the gradient of a layer's mean squared output against a target, in its weights
and in its input, and SGD on the weights; steps follow one another in `lax.scan`, as training does.
All members see the same batch, in float32. Each formulation of a layer runs for 1, 8 and 32
members; the first named is what vmap makes of the usual code. "one by one" is `lax.map` over
members, which is what `population` does on CPU. Medians of rounds in which every formulation of a
layer has its turn, to and fro; compilation is apart. "unit CNN" is a whole model: two convolutions
of 3 x 3, 16 and 32 channels, 28 x 28 images in batches of 32, max pooling, SGD.

What is at least 1.3 times as fast as the naive way at both 8 and 32 members is in
`hyperjax.layers`; the other rows are here so that nobody need try again. On two CPU cores: patches
30 and 54 times the naive way for 3 x 3 convolutions (8 and 32 members), 28 and 52 along one axis,
17 and 39 in groups, 4 and 7 depthwise; a whole network 14 and 23 times, one by one 19 and 34. No
other way to write embedding, attention, recurrent cells or layer norm gains at both sizes: an LSTM
with all inputs multiplied first 1.11 and 1.52, a GRU 1.13 and 1.23, layer norm one by one 0.87 and
1.62, one-hot products 0.12 and 0.32.
"""

import argparse
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import by_default, compiled, median_times, record
from jax import lax

from hyperjax.layers import conv

MEMBERS = (1, 8, 32)
TARGET = 1.3
CNN = {"of the Python loop": 2.5, "of naive vmap": 8.0}  # rates at 8 members


class Layer(NamedTuple):
    weights: Callable[[np.random.Generator], Any]  # of one member
    x: Callable[[np.random.Generator], jax.Array]
    ways: dict[str, Callable]  # of all members' weights, leaves [members, ...], and x
    steps: int = 4


def draw(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape) / np.prod(shape[:-1]) ** 0.5, jnp.float32)


def every(apply: Callable) -> Callable:
    return lambda weights, x: jax.vmap(apply, in_axes=(0, None))(weights, x)


def one_by_one(apply: Callable) -> Callable:
    return lambda weights, x: lax.map(lambda w: apply(w, x), weights)


# ------------------------------------------------------------------------------ convolutions


def shifted(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """A product for each entry of the window, added up; entry by entry where it is depthwise."""
    window = kernel.shape[:-2]
    pads = [(0, 0), *(((k - 1) // 2, k // 2) for k in window), (0, 0)]
    padded, terms = jnp.pad(x, pads), []
    for offset in np.ndindex(*window):
        end = [o + n for o, n in zip(offset, x.shape[1:-1], strict=True)]
        seen = lax.slice(padded, (0, *offset, 0), (len(x), *end, x.shape[-1]))
        into = kernel.shape[-2]
        term = (
            seen @ kernel[offset]
            if into > 1
            else seen * jnp.reshape(kernel[offset], (1,) * (x.ndim - 1) + (-1,))
        )
        terms.append(term)
    return functools.reduce(operator.add, terms)


def convolution(
    shape: tuple[int, ...], window: tuple[int, ...], out: int, groups: int = 1
) -> Layer:
    into = shape[-1] // groups
    how = lambda name: lambda w, x: conv(x, w, groups=groups, implementation=name)
    each = {name: how(name) for name in ("xla", "patches")}
    each |= {"shifts": shifted} if groups in (1, shape[-1]) else {}
    ways = {name: every(apply) for name, apply in each.items()}
    ways |= {f"{name}, one by one": one_by_one(apply) for name, apply in each.items()}
    weights = lambda rng: draw(rng, *window, into, out)
    return Layer(weights, lambda rng: draw(rng, *shape), ways, steps=2)


# --------------------------------------------------------------------------------- embedding


def offset_rows(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """One table of all members' rows, and tokens that count on from member to member."""
    members, count, width = table.shape
    begin = jnp.reshape(count * jnp.arange(members), (members, *(1,) * tokens.ndim))
    return jnp.reshape(table, (-1, width))[begin + tokens[None]]


def embedding() -> Layer:
    one_hot = lambda table, tokens: jax.nn.one_hot(tokens, len(table), dtype=table.dtype) @ table
    rows = lambda table, tokens: table[tokens]
    ways = {
        "rows": every(rows),
        "rows, one by one": one_by_one(rows),
        "one-hot": every(one_hot),
        "offset rows": offset_rows,
    }
    tokens = lambda rng: jnp.asarray(rng.integers(0, 256, (16, 64)))
    return Layer(lambda rng: draw(rng, 256, 64), tokens, ways)


# --------------------------------------------------------------------------------- attention


def attend(weights, x: jax.Array, fused: bool, native: bool) -> jax.Array:
    """Causal self-attention with four heads: [n, length, width]."""
    n, length, width = x.shape
    *into, out = weights
    if fused:
        q, k, v = jnp.split(x @ jnp.concatenate(into, axis=-1), 3, axis=-1)
    else:
        q, k, v = (x @ w for w in into)
    q, k, v = (jnp.reshape(a, (n, length, 4, width // 4)) for a in (q, k, v))
    if native:
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    else:
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / (width // 4) ** 0.5
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e30)
        y = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), v)
    return jnp.reshape(y, (n, length, width)) @ out


def attention() -> Layer:
    plain = functools.partial(attend, fused=False, native=False)
    ways = {
        "einsum": every(plain),
        "einsum, one by one": one_by_one(plain),
        "queries, keys, values in one": every(functools.partial(attend, fused=True, native=False)),
        "jax.nn's": every(functools.partial(attend, fused=False, native=True)),
    }
    weights = lambda rng: [draw(rng, 64, 64) for _ in range(4)]
    return Layer(weights, lambda rng: draw(rng, 8, 64, 64), ways)


# --------------------------------------------------------------------------------- recurrent


def gru_cell(h: jax.Array, seen: jax.Array, own: jax.Array) -> jax.Array:
    r, z, n = jnp.split(seen, 3, axis=-1)
    hr, hz, hn = jnp.split(h @ own, 3, axis=-1)
    z = jax.nn.sigmoid(z + hz)
    return (1 - z) * jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn) + z * h


def lstm_cell(state, seen: jax.Array, own: jax.Array):
    c, h = state
    i, f, g, o = jnp.split(seen + h @ own, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return c, jax.nn.sigmoid(o) * jnp.tanh(c)


def recur(weights, x: jax.Array, gates: int, before: bool) -> jax.Array:
    """[n, length, width]; `before` projects the inputs of all times at once."""
    into, own = weights
    times = jnp.moveaxis(x, 1, 0)
    zero = jnp.zeros((len(x), own.shape[0]), x.dtype)

    def step(state: Any, now: jax.Array) -> tuple[Any, Any]:
        seen = now if before else now @ into
        state = gru_cell(state, seen, own) if gates == 3 else lstm_cell(state, seen, own)
        return state, state if gates == 3 else state[1]

    state = zero if gates == 3 else (zero, zero)
    return lax.scan(step, state, times @ into if before else times)[1]


def recurrent(gates: int) -> Layer:
    inside = functools.partial(recur, gates=gates, before=False)
    before = functools.partial(recur, gates=gates, before=True)
    ways = {
        "cell": every(inside),
        "cell, one by one": one_by_one(inside),
        "inputs first": every(before),
        "inputs first, one by one": one_by_one(before),
    }
    weights = lambda rng: (draw(rng, 64, gates * 64), draw(rng, 64, gates * 64))
    return Layer(weights, lambda rng: draw(rng, 16, 64, 64), ways, steps=2)


# ---------------------------------------------------------------------------- layer norm


def norm(weights, x: jax.Array, moments: bool) -> jax.Array:
    scale, shift = weights
    # Of an input that differs from member to member, as it does behind the first layer.
    x = x * scale
    mean = jnp.mean(x, -1, keepdims=True)
    square = (
        jnp.mean(x * x, -1, keepdims=True) - mean * mean
        if moments
        else jnp.var(x, -1, keepdims=True)
    )
    return (x - mean) * lax.rsqrt(square + 1e-6) * scale + shift


def layer_norm() -> Layer:
    plain = functools.partial(norm, moments=False)
    ways = {
        "centred": every(plain),
        "centred, one by one": one_by_one(plain),
        "moments": every(functools.partial(norm, moments=True)),
    }
    weights = lambda rng: (1 + draw(rng, 1, 64), draw(rng, 1, 64))
    return Layer(weights, lambda rng: draw(rng, 1024, 64), ways, steps=8)


# ------------------------------------------------------------------------------ whole model


def network(params, images: jax.Array, implementation: Any) -> jax.Array:
    def pooled(x):
        n, height, width, channels = x.shape
        return jnp.max(x.reshape(n, height // 2, 2, width // 2, 2, channels), (2, 4))

    x = images
    for w, b in params[:-1]:
        x = pooled(jax.nn.relu(conv(x, w, implementation=implementation) + b[None, None, None]))
    w, b = params[-1]
    return x.reshape(len(x), -1) @ w + b[None]


def unit_cnn() -> Layer:
    how = lambda name: functools.partial(network, implementation=name)
    ways = {name: every(how(name)) for name in ("xla", "patches")}
    ways |= {f"{name}, one by one": one_by_one(how(name)) for name in ("xla", "patches")}
    shapes = (3, 3, 1, 16), (3, 3, 16, 32), (7 * 7 * 32, 10)
    weights = lambda rng: [(draw(rng, *s), jnp.zeros(s[-1])) for s in shapes]
    return Layer(weights, lambda rng: draw(rng, 32, 28, 28, 1), ways, steps=2)


LAYERS: dict[str, Callable[[], Layer]] = {
    "conv 3x3": lambda: convolution((16, 14, 14, 16), (3, 3), 32),
    "conv of 5, one axis": lambda: convolution((16, 64, 32), (5,), 32),
    "depthwise 3x3": lambda: convolution((16, 14, 14, 32), (3, 3), 32, groups=32),
    "four groups, 3x3": lambda: convolution((16, 14, 14, 32), (3, 3), 32, groups=4),
    "embedding": embedding,
    "attention": attention,
    "gru": functools.partial(recurrent, 3),
    "lstm": functools.partial(recurrent, 4),
    "layer norm": layer_norm,
    "unit CNN": unit_cnn,
}


def training(apply: Callable, steps: int) -> Callable:
    """Steps of all members in one scan, on weights and (where it is real) on the input."""

    def loss(weights, x):
        return jnp.sum(jnp.square(apply(weights, x) - 1)) / x.shape[0]

    def step(state, _):
        weights, x = state
        if not jnp.issubdtype(x.dtype, jnp.floating):
            value, grads = jax.value_and_grad(loss)(weights, x)
            return (optax.apply_updates(weights, optax.tree.scale(-1e-4, grads)), x), value
        value, (grads, at_x) = jax.value_and_grad(loss, argnums=(0, 1))(weights, x)
        weights = optax.apply_updates(weights, optax.tree.scale(-1e-4, grads))
        return (weights, x - 1e-4 * at_x), value

    return lambda state: lax.scan(step, state, length=steps)


def contest(layer: Layer, members: int, rounds: int) -> dict[str, dict]:
    rng = np.random.default_rng(0)
    each = [layer.weights(rng) for _ in range(members)]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), layer.x(rng)
    calls, facts = {}, {}
    for name, way in layer.ways.items():
        calls[name], facts[name] = compiled(training(way, layer.steps), state)
    values = {name: np.asarray(call()[1]) for name, call in calls.items()}
    naive, *_ = layer.ways
    times = median_times(calls, rounds)
    work = members * layer.steps
    return {
        name: {
            "member_steps_per_s": work / times[name]["wall_s"],
            "gain": times[naive]["wall_s"] / times[name]["wall_s"],
            "cpu_gain": times[naive]["cpu_s"] / times[name]["cpu_s"],
            "difference": float(np.max(np.abs(values[name] / values[naive] - 1))),
            **facts[name],
            **times[name],
        }
        for name in layer.ways
    }


def loop(members: int, rounds: int) -> float:
    """Member-steps per second of the unit CNN in a Python loop of compiled steps, XLA's way."""
    layer, rng = unit_cnn(), np.random.default_rng(0)
    each = [layer.weights(rng) for _ in range(members)]
    x = layer.x(rng)
    states = [(jax.tree.map(lambda leaf: leaf[None], w), x) for w in each]
    # No scan, as XLA's convolution is fast in a program of its own only, and neither gradient of
    # the input nor update, which favours it.
    step = lambda state: jax.value_and_grad(
        lambda w: jnp.sum(jnp.square(network(w, state[1], "xla") - 1)) / len(x)
    )(jax.tree.map(lambda leaf: leaf[0], state[0]))
    program = jax.jit(step).lower(states[0]).compile()
    call = lambda: [jax.block_until_ready(program(state)) for state in states]
    return members / median_times({"loop": call}, rounds)["loop"]["wall_s"]


def show(label: str, members: int, rows: dict[str, dict]) -> None:
    for name, row in rows.items():
        print(
            f"{label:20} {members:3} members {name:28} {row['member_steps_per_s']:9.0f} per s"
            f"  x {row['gain']:6.2f} (cpu x {row['cpu_gain']:6.2f})"
            f"  compiled in {row['compile_s']:4.1f} s",
            flush=True,
        )


def verdicts(results: dict[str, dict[int, dict]]) -> dict[str, dict[str, float]]:
    """The least gain over 8 and 32 members of each way, of those measured at both."""
    found: dict[str, dict[str, float]] = {}
    for label, sizes in results.items():
        if not {8, 32} <= set(sizes):
            continue
        least = {name: min(sizes[r][name]["gain"] for r in (8, 32)) for name in sizes[8]}
        found[label] = {name: gain for name, gain in list(least.items())[1:]}
        for name, gain in found[label].items():
            word = "gains" if gain >= TARGET else "does not gain"
            print(f"{label}: {name} {word} (x {gain:.2f} at least)", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Layers for populations.")
    parser.add_argument("--layers", nargs="*", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--members", nargs="*", type=int, default=list(MEMBERS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    results: dict[str, dict[int, dict]] = {}
    for label in options.layers:
        results[label] = {}
        for members in options.members:
            results[label][members] = contest(LAYERS[label](), members, options.rounds)
            show(label, members, results[label][members])
    least = verdicts(results)
    data: dict[str, Any] = {"rounds": options.rounds, "target": TARGET, "least_gain": least}
    if "unit CNN" in results and 8 in results["unit CNN"]:
        rows = results["unit CNN"][8]
        best = max(rows[name]["member_steps_per_s"] for name in rows if not name.startswith("xla"))
        python = loop(8, options.rounds)
        ratios = {
            "of the Python loop": best / python,
            "of naive vmap": best / rows["xla"]["member_steps_per_s"],
        }
        for name, ratio in ratios.items():
            word = "reached" if ratio >= CNN[name] else "MISSED on one device"
            print(f"unit CNN, 8 members: x {ratio:.2f} {name}, target {CNN[name]}: {word}")
        data["unit CNN"] = {"python_loop_per_s": python, "best_per_s": best, **ratios}
    if by_default(parser, options):
        record("population_layers", {**data, "results": results})


if __name__ == "__main__":
    main()
