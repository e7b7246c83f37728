"""Optimizers whose step is one pass over a population: optax transformations on the kernels."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hyperjax.kernels import _population_update as kernel
from hyperjax.kernels._op import Implementation
from hyperjax.kernels._population_rules import Adam, Rounding, Rule, Sgd

from . import _checks
from ._types import Key, Params, PyTree, Scalar

Number = float | Scalar


class FusedState(NamedTuple):
    """State of a fused optimizer."""

    steps: jax.Array  # int32: so far
    moments: tuple[PyTree, ...]  # (), (trace,) or (mu, nu), as params, in float32 at least
    master: Params | None  # params in float32


class FusedTransformation(optax.GradientTransformation):
    """An optax transformation that can also do without updates.

    `apply(grads, state, params) -> (params, state)` is `update` and `optax.apply_updates` in one
    pass: updates, written and read once more, are three streams in ten.
    """

    apply: Callable[[Params, Any, Params], tuple[Params, Any]]  # Any: a FusedState

    def __new__(cls, init, update, apply) -> "FusedTransformation":
        self = super().__new__(cls, init, update)
        self.apply = apply
        return self


def fused_sgd(
    learning_rate: Number | optax.Schedule,
    momentum: Number | None = None,
    weight_decay: Number | None = None,
    *,
    max_norm: Number | None = None,
    rounding: Rounding = "nearest",
    key: Key | None = None,
    implementation: Implementation = "auto",
) -> FusedTransformation:
    """`optax.sgd` in one pass, with decoupled weight decay; see `fused_adam`."""
    rule = lambda rate, count: Sgd(rate, momentum, weight_decay)
    numbers = {"momentum": momentum, "weight_decay": weight_decay}
    moments = 0 if momentum is None else 1
    options = _Options("fused_sgd", learning_rate, max_norm, rounding, key, implementation)
    return _fused(rule, numbers, moments, options)


def fused_adam(
    learning_rate: Number | optax.Schedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    *,
    max_norm: Number | None = None,
    rounding: Rounding = "nearest",
    key: Key | None = None,
    implementation: Implementation = "auto",
) -> FusedTransformation:
    """`optax.adam` in one pass over all members of a population.

        training = hj.inner(loss, lambda h: hj.fused_adam(h["lr"], eps_root=1e-8))

    Written for one member and vmapped over members, as `population` does, every leaf is one kernel
    for all of them. Called with leaves [R, ...] itself, it wants one or more numbers as [R].

    Equal to optax up to rounding: the operations are the same, in the same order, but for products
    and sums that a compiler contracts. With u half the distance from 1 to the next number of the
    type, updates of both are within u lr (11 A + 3 weight_decay |params|) of exact arithmetic on
    the same numbers, bias corrections included, where A = (|(1 - b1) grad| + |b1 mu|) / (1 - b1^t)
    over the root of the second moment. (For quotients and roots rounded as IEEE has it; those of
    GPUs may be coarser.)

    Args:
      learning_rate: a number, or a schedule of the steps so far. Every number may be traced.
      eps_root: with the default of optax the hypergradient is NaN where a gradient has always been
        exactly zero; see `guarded.adam`. Take 1e-8 for hypergradients.
      max_norm: of the gradients of a member over all leaves, as `optax.clip_by_global_norm` before
        the optimizer, with the norm in float32 at least. Costs a pass over the gradients.
      rounding: of params below float32. "master" keeps them in float32 in the state, "stochastic",
        for bfloat16, rounds at random, on average to the value itself. Updates are in float32 for
        that, and to be added by `optax.apply_updates`.
      key: for stochastic rounding, one for all, or [R]. Members with the same key round alike.
      implementation: see `kernels.population_update`. "auto" is XLA until a kernel was measured
        faster.

    Moments are in float32 at least. Raises ValueError for numbers of another shape than () or [R],
    for an unknown rounding, or if it lacks a key or params.
    """
    rule = lambda rate, count: Adam(rate, count, b1, b2, eps, eps_root)
    numbers = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    options = _Options("fused_adam", learning_rate, max_norm, rounding, key, implementation)
    return _fused(rule, numbers, 2, options)


def fused_adamw(
    learning_rate: Number | optax.Schedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    weight_decay: Number = 1e-4,
    *,
    max_norm: Number | None = None,
    rounding: Rounding = "nearest",
    key: Key | None = None,
    implementation: Implementation = "auto",
) -> FusedTransformation:
    """`optax.adamw` in one pass, all leaves decayed; see `fused_adam`."""
    rule = lambda rate, count: Adam(rate, count, b1, b2, eps, eps_root, weight_decay)
    numbers = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root, "weight_decay": weight_decay}
    options = _Options("fused_adamw", learning_rate, max_norm, rounding, key, implementation)
    return _fused(rule, numbers, 2, options)


class _Options(NamedTuple):
    where: str
    learning_rate: Number | optax.Schedule
    max_norm: Number | None
    rounding: Rounding
    key: Key | None
    implementation: Implementation


def _fused(
    rule: Callable[..., Rule], numbers: dict, moments: int, conf: _Options
) -> FusedTransformation:
    _checks.one_of(conf.where, "rounding", conf.rounding, ("nearest", "master", "stochastic"))
    if (conf.key is None) == (conf.rounding == "stochastic"):
        raise ValueError(
            f"{conf.where}: `key` must be given for stochastic rounding, and only for it; got "
            f"rounding={conf.rounding!r} with {'no' if conf.key is None else 'a'} key."
        )
    if conf.key is not None and not jnp.issubdtype(jnp.result_type(conf.key), jax.dtypes.prng_key):
        raise ValueError(
            f"{conf.where}: `key` is {jnp.result_type(conf.key)}, expected one of `jax.random.key`."
        )

    def init(params: Params) -> FusedState:
        zeros = lambda x: jnp.zeros(jnp.shape(x), _wide(x))
        like = tuple(jax.tree.map(zeros, params) for _ in range(moments))
        master = jax.tree.map(lambda x: x.astype(_wide(x)), params)
        master = master if conf.rounding == "master" else None
        return FusedState(jnp.zeros((), jnp.int32), like, master)

    def run(step, grads, state: FusedState, params):
        rate = conf.learning_rate
        rate = rate(state.steps) if callable(rate) else rate
        more = {"learning_rate": rate, "max_norm": conf.max_norm, "steps": state.steps}
        members = _members(conf, more | numbers)
        count = optax.safe_increment(state.steps)
        return _step(conf, step, rule(rate, count), members, count, grads, state, params)

    def update(updates, state, params=None):
        if params is None:
            if conf.rounding != "nearest" or numbers.get("weight_decay") is not None:
                raise ValueError(f"{conf.where}: `params` must be given to update; got None.")
            params = updates  # only their type is read
        return run(kernel.population_update, updates, state, params)

    return FusedTransformation(init, update, functools.partial(run, kernel.population_apply))


def _step(conf: _Options, step, rule, members: tuple[int, ...], count, grads, state, params):
    """What `step` makes of every leaf, flat: new params or updates, and the state."""
    flat = lambda x: jnp.reshape(x, (*members, -1))
    leaves, tree = jax.tree.flatten(grads)
    if wrong := [jnp.shape(x) for x in leaves if jnp.shape(x)[: len(members)] != members]:
        raise ValueError(
            f"{conf.where}: numbers are given for {members[0]} members, and a gradient has shape "
            f"{wrong[0]}, expected ({members[0]}, ...); for one member give scalars."
        )
    masters = () if state.master is None else (state.master,)
    streams = [tree.flatten_up_to(x) for x in (params, *state.moments, *masters)]
    norm = None if conf.max_norm is None else _norm(leaves, members)
    size, out = len(state.moments), []
    for place, (g, p, *rest) in enumerate(zip(leaves, *streams, strict=True)):
        rest = [flat(x) for x in rest]
        first, moments, master = step(
            rule,
            flat(p),
            flat(g),
            tuple(rest[:size]),
            max_norm=conf.max_norm,
            norm=norm,
            master=rest[size] if masters else None,
            seed=None if conf.key is None else _seed(conf.key, count, place),
            implementation=conf.implementation,
        )
        done = (first, *moments, *((master,) if masters else ()))
        out.append([x.reshape(jnp.shape(g)) for x in done])
    first, *rest = [tree.unflatten(column) for column in zip(*out, strict=True)]
    return first, FusedState(count, tuple(rest[:size]), rest[size] if masters else None)


def _members(conf: _Options, numbers: dict) -> tuple[int, ...]:
    """() for one member, (R,) if a number is [R]."""
    shapes = {name: jnp.shape(x) for name, x in numbers.items() if x is not None}
    if conf.key is not None:
        shapes["key"] = conf.key.shape
    found = {shape for shape in shapes.values() if shape}
    if len(found) > 1 or any(len(shape) > 1 for shape in found):
        raise ValueError(
            f"{conf.where}: numbers must be scalars, or one per member, of one length; got shapes "
            f"{shapes}."
        )
    return found.pop() if found else ()


def _norm(leaves: list[jax.Array], members: tuple[int, ...]) -> jax.Array:
    squares = [jnp.square(x.astype(_wide(x))).reshape(*members, -1).sum(-1) for x in leaves]
    return kernel.norm_of(sum(squares[1:], squares[0]))


def _seed(key: Key, count: jax.Array, leaf: int) -> jax.Array:
    def draw(key, count):
        own = jax.random.fold_in(jax.random.fold_in(key, count), leaf)
        return jax.random.bits(own, (2,), jnp.uint32)

    axes = tuple(0 if x.ndim else None for x in (key, count))
    return draw(key, count) if axes == (None, None) else jax.vmap(draw, axes)(key, count)


def _wide(x) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(x), jnp.float32)
