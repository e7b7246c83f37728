"""What the benchmark runs of the fused optimizers, and the least it has to cost."""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from . import _population_rules as rules
from . import _population_update as op
from ._op import Case, Traffic
from ._population_rules import Adam, Plan, Sgd
from ._population_update import LARGE as LARGE
from ._population_update import SHAPES as SHAPES


def traffic(
    shape: tuple[int, int],
    dtype: DTypeLike,
    *,
    rule: Literal["sgd", "momentum", "adam", "adamw"] = "adamw",
    emit: rules.Emit = "params",
    rounding: rules.Rounding = "nearest",
    clip: bool = False,
) -> Traffic:
    """The least that a step costs: params and gradients of `dtype`, moments in the wide type.

    Clipping reads the gradients once more. `population_converge` has the same traffic.
    """
    moments = {"sgd": (), "momentum": ("trace",)}.get(rule, ("mu", "nu"))
    plan = Plan(moments, rule == "adamw", clip, emit, rounding, jnp.dtype(dtype).name)
    narrow, wide = jnp.dtype(dtype).itemsize, jnp.dtype(plan.wide).itemsize
    cost = lambda name: narrow if name in ("params", "grads") else wide
    entry = sum(cost(name) for name in (*plan.reads, *plan.writes)) + narrow * clip
    # A root or a quotient is one.
    ops = {(): 1, ("trace",): 3}.get(moments, 14) + 2 * plan.decay + 4 * clip + (emit == "params")
    size = math.prod(shape)
    return Traffic(size * entry + shape[0] * len(plan.columns) * wide, size * ops)


def _case(
    rule: Literal["sgd", "momentum", "adam", "adamw"],
    *,
    emit: rules.Emit = "params",
    rounding: rules.Rounding = "nearest",
    clip: bool = False,
    mean: bool = False,
) -> Case:
    """Rates [R], then streams [R, P]; where params are rounded they are in bfloat16."""
    step = {"params": op.population_apply, "updates": op.population_update}[emit]

    def make(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike) -> tuple:
        keys = jax.random.split(key, 5)
        draw = lambda key, dtype: jax.random.normal(key, shape, dtype)
        params, grads = (draw(k, dtype) for k in keys[:2])
        wide = jnp.promote_types(params.dtype, jnp.float32)
        moments = {"sgd": (), "momentum": (draw(keys[2], wide),)}
        adam = draw(keys[2], wide), jnp.square(draw(keys[3], wide))
        rates = 1e-3 * (1 + jax.random.uniform(keys[4], shape[:1], wide))
        master = params.astype(wide) if rounding == "master" else None
        return rates, params, grads, moments.get(rule, adam), master

    def run(implementation: str, rates, params, grads, moments, master):
        decay = 1e-2 if rule == "adamw" else None
        if rule.startswith("adam"):
            numbers = Adam(rates, jnp.full(rates.shape, 10, jnp.int32), weight_decay=decay)
        else:
            numbers = Sgd(rates, 0.9 if rule == "momentum" else None, decay)
        seed = jnp.array([1, 2], jnp.int32) if rounding == "stochastic" else None
        options = {"max_norm": 1.0 if clip else None, "master": master, "seed": seed}
        options |= {"implementation": implementation}
        if mean:
            keep = jnp.ones(rates.shape, bool)
            return op.population_converge(numbers, params, grads, moments, keep, **options)
        return step(numbers, params, grads, moments, **options)

    cost = partial(traffic, rule=rule, emit=emit, rounding=rounding, clip=clip)
    dtypes = ("float32", "bfloat16") if rounding == "nearest" else ("bfloat16",)
    return Case(make, run, cost, again=_again, dtypes=dtypes)


def _again(arrays: tuple, results) -> tuple:
    rates, params, grads, _, _ = arrays
    if isinstance(results, op.Updated):
        # An update takes the place of a gradient, if it has its type.
        grads = results.updates if results.updates.dtype == grads.dtype else grads
        return rates, params, grads, results.moments, results.master
    return rates, results.params, grads, results.moments, results.master


CASES = {
    "sgd": _case("sgd"),
    "momentum": _case("momentum"),
    "adam": _case("adam"),
    "adamw": _case("adamw"),
    "adamw updates": _case("adamw", emit="updates"),
    "adamw clip": _case("adamw", clip=True),
    "adamw master": _case("adamw", rounding="master"),
    "adamw stochastic": _case("adamw", rounding="stochastic"),
    "adamw converge": _case("adamw", mean=True),
}
