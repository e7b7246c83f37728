"""Hypergradients through training, against a hand-written loop and equinox's checkpointed scan.

    python benchmarks/unrolled.py [REPEATS]

100 steps of gradient descent of a 784-128-10 net on batches of 128, float32, and the gradient in
100 learning rates, one per step; then the memory of reversible training from 100 to 10,000 steps,
and forward against reverse mode for few shared rates. Makes an environment with equinox from PyPI
and writes results/unrolled.json. Two to three minutes on two free cores, most of it compilation
and installation. To reach, in the same run: `unroll` as fast as the hand-written loop, `binomial`
with no more memory and time than equinox, reversible below 4 MB and flat, one shared rate in
forward mode by choice.
"""

import itertools
import subprocess
import sys
from pathlib import Path

import _measure

STEPS, BATCH, SIZES = 100, 128, (784, 128, 10)
MOMENTUM = 0.90625  # a multiple of 2^-16, to which `reversible` rounds it
CHECKPOINTS = 10  # equinox's, as in the study that set the goal


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    if "--inside" in sys.argv:
        return measure(repeats)
    python = _measure.environment(["equinox"])
    command = [str(python), str(Path(__file__).resolve()), str(repeats), "--inside"]
    subprocess.run(command, check=True)


def measure(repeats: int) -> None:
    data = {
        "task": {"steps": STEPS, "batch": BATCH, "sizes": SIZES, "repeats": repeats},
        "rate per step": compare(per_step(), repeats),
        "shared rates": compare(shared(), repeats),
        "reversible temp_bytes by steps": flatness(),
        "chosen": chosen(),
    }
    data["bars"] = bars(data)
    print(_measure.record("unrolled", data))
    for part in ("rate per step", "shared rates"):
        for name, row in data[part].items():
            print(f"{name:42} {row['wall_s'] * 1e3:8.1f} ms {row['temp_bytes'] / 1e6:8.2f} MB")
    for name, value in (*data["reversible temp_bytes by steps"].items(), *data["bars"].items()):
        print(f"{name:42} {value}")


def compare(programs: dict, repeats: int) -> dict:
    """Compile, check each against its reference, time by turns."""
    import numpy as np

    calls, rows = {}, {}
    for name, (function, arguments, _) in programs.items():
        calls[name], rows[name] = _measure.compiled(function, *arguments)
    grads = {name: np.asarray(call()) for name, call in calls.items()}
    for name, (*_, reference) in programs.items():
        distance = np.linalg.norm(grads[name] - grads[reference])
        rows[name]["difference"] = float(distance / np.linalg.norm(grads[reference]))
        assert rows[name]["difference"] < 5e-4, (name, rows[name])
    times = _measure.median_times(calls, repeats)
    return {name: rows[name] | times[name] for name in calls}


# --------------------------------------------------------------------------- the task


def problem(steps: int = STEPS):
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    pairs = itertools.pairwise(SIZES)
    params = [(draw(m, n) * m**-0.5, jnp.zeros(n, jnp.float32)) for m, n in pairs]
    labels = lambda *shape: jnp.asarray(rng.integers(SIZES[-1], size=shape))
    train = (draw(steps, BATCH, SIZES[0]), labels(steps, BATCH), jnp.arange(steps))
    valid = (draw(BATCH, SIZES[0]), labels(BATCH), jnp.zeros((), int))
    return params, train, valid


def loss(params, hparams, batch):
    import jax

    x, y, _ = batch
    *hidden, (w, b) = params
    for v, c in hidden:
        x = jax.nn.relu(x @ v + c)
    scores = jax.nn.log_softmax(x @ w + b)
    return -(scores * jax.nn.one_hot(y, SIZES[-1])).sum(-1).mean()


def step(state, rates, batch):
    """Descent at the rate of the step; shared rates are summed, so that each has a gradient."""
    import jax

    rate = rates[batch[-1]] if rates.size == STEPS else rates.sum()
    grads = jax.grad(loss)(state.params, rates, batch)
    return state._replace(params=jax.tree.map(lambda p, g: p - rate * g, state.params, grads))


def init(params, hparams):
    import hyperjax as hj

    return hj.InnerState(params, ())


def by_hyperjax(response, mode="reverse"):
    import hyperjax as hj

    estimator = hj.hypergradient(response, loss, init, mode=mode)
    return lambda rates, params, split: (
        estimator.estimate(rates, init(params, rates), split)[0].grad
    )


def by_scan(scan):
    """The gradient as one would write it by hand around a scan."""
    import jax

    import hyperjax as hj

    def value(rates, params, split):
        body = lambda p, batch: (step(hj.InnerState(p, ()), rates, batch).params, None)
        return loss(scan(body, params, split.train)[0], rates, split.valid)

    return jax.grad(value)


def reversible(momentum: float):
    import hyperjax as hj

    train = hj.reversible(loss, lambda h, t: h[t], lambda h, t: momentum, least_momentum=momentum)
    estimator = hj.hypergradient(train.response, loss, train.init)
    return lambda rates, params, split: (
        estimator.estimate(rates, train.init(params, rates), split)[0].grad
    )


def momentum_by_unroll():
    """What `reversible` computes, by full unrolling in floating point."""
    import jax

    import hyperjax as hj

    def update(state, rates, batch):
        grads = jax.grad(loss)(state.params, rates, batch)
        velocity = jax.tree.map(lambda u, g: MOMENTUM * u + g, state.opt_state, grads)
        params = jax.tree.map(lambda p, u: p - rates[batch[-1]] * u, state.params, velocity)
        return hj.InnerState(params, velocity)

    begin = lambda p, h: hj.InnerState(p, jax.tree.map(lambda x: 0 * x, p))
    estimator = hj.hypergradient(hj.unroll(update), loss, begin)
    return lambda rates, params, split: (
        estimator.estimate(rates, begin(params, rates), split)[0].grad
    )


# --------------------------------------------------------------------- the contenders


def per_step() -> dict:
    import equinox.internal as eqxi
    import jax
    import jax.numpy as jnp

    import hyperjax as hj

    params, train, valid = problem()
    inputs = (jnp.full(STEPS, 0.1, jnp.float32), params, hj.Split(train, valid))
    slow = (jnp.full(STEPS, 0.01, jnp.float32), *inputs[1:])
    scan = lambda *args: eqxi.scan(*args, kind="checkpointed", checkpoints=CHECKPOINTS)
    hand, momentum = "scan by hand", "momentum, unroll"
    return {
        hand: (by_scan(jax.lax.scan), inputs, hand),
        "unroll": (by_hyperjax(hj.unroll(step)), inputs, hand),
        "unroll sqrt": (by_hyperjax(hj.unroll(step, checkpoint="sqrt")), inputs, hand),
        "unroll binomial": (by_hyperjax(hj.unroll(step, checkpoint="binomial")), inputs, hand),
        f"equinox, {CHECKPOINTS} checkpoints": (by_scan(scan), inputs, hand),
        momentum: (momentum_by_unroll(), slow, momentum),
        "momentum, reversible": (reversible(MOMENTUM), slow, momentum),
    }


def shared() -> dict:
    """The same training with n rates that are added up: how forward mode scales with n."""
    import jax.numpy as jnp

    import hyperjax as hj

    params, train, valid = problem()
    inputs = lambda n: (jnp.full(n, 0.1 / n, jnp.float32), params, hj.Split(train, valid))
    programs = {}
    for n in (1, 2, 4):
        for mode in ("forward", "reverse"):
            gradient = by_hyperjax(hj.unroll(step), mode)
            programs[f"{n} shared, {mode}"] = (gradient, inputs(n), f"{n} shared, forward")
    return programs


def flatness() -> dict:
    """Compiled, not run: 10,000 batches would be 4 GB of input."""
    import jax
    import jax.numpy as jnp

    import hyperjax as hj

    params, train, valid = problem(1)
    found = {}
    for steps in (100, 1000, 10_000):
        longer = lambda x, n=steps: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
        rates = jax.ShapeDtypeStruct((steps,), jnp.float32)
        split = hj.Split(jax.tree.map(longer, train), valid)
        _, facts = _measure.compiled(reversible(0.999), rates, params, split)
        found[str(steps)] = facts["temp_bytes"]
    return found


def chosen() -> dict:
    """What `planned` makes of one shared rate and of one rate per step, with 64 and 10 MB."""
    import jax
    import jax.numpy as jnp

    import hyperjax as hj

    params, train, valid = problem()
    found = {}
    for name, n, budget in (
        ("1 rate, 64 MB", 1, 64_000_000),
        ("100 rates, 100 MB", STEPS, 100_000_000),
        ("100 rates, 16 MB", STEPS, 16_000_000),
        ("100 rates, 10 MB", STEPS, 10_000_000),
    ):
        estimate = hj.planned(step, loss, init, budget=budget).estimate
        rates = jnp.full(n, 0.1, jnp.float32)
        arguments = rates, init(params, rates), hj.Split(train, valid)
        plan = jax.eval_shape(estimate, *arguments)[0].info
        _, facts = _measure.compiled(lambda *xs, f=estimate: f(*xs)[0].grad, *arguments)
        option = plan.chosen
        found[name] = {
            "mode": option.mode,
            "checkpoint": option.checkpoint,
            "forecast_bytes": option.bytes,
            "temp_bytes": facts["temp_bytes"],
        }
    return found


def bars(data: dict) -> dict:
    """What was to be reached, as ratios and numbers."""
    rows, few = data["rate per step"], data["shared rates"]
    flat = data["reversible temp_bytes by steps"]
    peer = rows[f"equinox, {CHECKPOINTS} checkpoints"]
    ratio = lambda a, b, what: round(a[what] / b[what], 3)
    return {
        "unroll / scan, time (<= 1)": ratio(rows["unroll"], rows["scan by hand"], "wall_s"),
        "binomial / equinox, time (<= 1)": ratio(rows["unroll binomial"], peer, "wall_s"),
        "binomial / equinox, bytes (<= 1)": ratio(rows["unroll binomial"], peer, "temp_bytes"),
        "reversible, most bytes (< 4e6)": max(flat.values()),
        "reversible, 10,000 / 100 steps, bytes": round(flat["10000"] / flat["100"], 3),
        "1 shared rate, chosen": data["chosen"]["1 rate, 64 MB"]["mode"],
        "1 shared rate, forward bytes": few["1 shared, forward"]["temp_bytes"],
        "1 shared rate, reverse bytes": few["1 shared, reverse"]["temp_bytes"],
        **{
            f"{n} shared, forward / reverse, time": ratio(
                few[f"{n} shared, forward"], few[f"{n} shared, reverse"], "wall_s"
            )
            for n in (1, 2, 4)
        },
    }


if __name__ == "__main__":
    main()
