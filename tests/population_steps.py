"""Random members, the ways to step them, and what exact arithmetic makes of it."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.kernels import _population_update as op
from hyperjax.kernels._population_rules import Adam, Sgd

# Every kind of step. Rates differ between members.
VARIANTS = {
    "sgd": {},
    "momentum": {},
    "adam": {},
    "adamw": {},
    "clip": {"max_norm": True},
    "master": {"master": True},
    "stochastic": {"seed": True},
}
LOW = ("master", "stochastic")


def draw(variant: str, shape: tuple[int, ...], dtype: Any = "float32", seed: int = 0) -> tuple:
    """(rates, params, grads, moments) and options for `population_apply` and its like."""
    keys = iter(jax.random.split(jax.random.key(seed), 12))
    *members, _ = shape
    wide = jnp.promote_types(dtype, jnp.float32)
    normal = lambda dtype=dtype: jax.random.normal(next(keys), shape, dtype)
    number = lambda low, high: jax.random.uniform(next(keys), members, wide, low, high)
    params, grads = normal(), normal()
    trace, nu = normal(wide), jnp.square(normal(wide))
    if variant in ("sgd", "momentum"):
        moments = (trace,) if variant == "momentum" else ()
        rates = {"learning_rate": number(0.01, 0.1), "weight_decay": number(0.0, 0.1)}
        rates |= {"momentum": number(0.5, 0.99)} if moments else {}
    else:
        moments = (trace, nu)
        rates = {"learning_rate": number(0.01, 0.1), "b1": number(0.5, 0.99)}
        rates |= {"b2": number(0.9, 0.999), "eps_root": number(1e-4, 1e-2)}
        rates |= {} if variant == "adam" else {"weight_decay": number(0.0, 0.1)}
    options = {}
    if "max_norm" in VARIANTS[variant]:
        # Some members are clipped, others not.
        options["max_norm"] = number(0.5, 1.5) * math.sqrt(shape[-1])
    if "master" in VARIANTS[variant]:
        options["master"] = (params + 1e-3 * normal(wide)).astype(wide)
    if "seed" in VARIANTS[variant]:
        words = jax.random.bits(next(keys), (*members, 2), jnp.uint32)
        options["seed"] = words
    return (rates, params, grads, moments), options


def rule(rates: dict) -> Adam | Sgd:
    return Adam(step=jnp.asarray(3), **rates) if "b1" in rates else Sgd(**rates)


def call(function, implementation: str, args: tuple, options: dict):
    rates, params, grads, moments = args
    return function(rule(rates), params, grads, moments, **options, implementation=implementation)


def apply(implementation: str, args: tuple, options: dict):
    return call(op.population_apply, implementation, args, options)


def converge(implementation: str, args: tuple, keep: jax.Array, options: dict):
    function = lambda rule, params, grads, moments, **kw: op.population_converge(
        rule, params, grads, moments, keep, **kw
    )
    return call(function, implementation, args, options)


def ulps(actual: Any, expected: Any) -> float:
    """The largest difference over all leaves, in units of the type's eps at the larger of 1 and
    the number: results here are sums of a few terms of size about 1."""

    def one(a: jax.Array, b: jax.Array) -> float:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if not jnp.issubdtype(b.dtype, jnp.floating):
            np.testing.assert_array_equal(a, b)
            return 0.0
        x, y = (np.asarray(v, np.float64) for v in (a, b))
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
        fine = np.isfinite(y)
        gap = np.abs(np.where(fine, x, 0) - np.where(fine, y, 0))
        size = np.maximum(1, np.abs(np.where(fine, y, 0)))
        return float((gap / size).max(initial=0)) / float(jnp.finfo(b.dtype).eps)

    leaves = jax.tree.leaves(jax.tree.map(one, actual, expected))
    return max(leaves, default=0.0)


def programs(f, *args) -> list[str]:
    """The kernels in what `f` is traced to, by name and grid."""
    return list(_kernels(jax.make_jaxpr(f)(*args).jaxpr))


def _kernels(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield f"{eqn.params['name']} {tuple(eqn.params['grid_mapping'].grid)}"
        else:
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from _kernels(inner)


kernel = partial(apply, "interpret")
xla = partial(apply, "xla")
