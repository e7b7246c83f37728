"""The formulas of the fused optimizers, on arrays or blocks of them: reference and kernels alike.

A number of a member (a rate, a bias correction) is a column of a table [members, columns]; what
has an entry per parameter (gradients, moments) is a stream [members, parameters].
"""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

Rounding: TypeAlias = Literal["nearest", "master", "stochastic"]
Emit: TypeAlias = Literal["params", "updates"]
Streams: TypeAlias = dict[str, jax.Array]


class Sgd(NamedTuple):
    """`optax.sgd`, with decoupled weight decay. A field is a number, or one per member.

    The moments are `(trace,)`, or `()` without momentum.
    """

    learning_rate: ArrayLike
    momentum: ArrayLike | None = None
    weight_decay: ArrayLike | None = None


class Adam(NamedTuple):
    """`optax.adam`, with `weight_decay` `optax.adamw`. A field is a number, or one per member.

    The moments are `(mu, nu)`. `step` is the number of this one, the first being 1.
    """

    learning_rate: ArrayLike
    step: ArrayLike
    b1: ArrayLike = 0.9
    b2: ArrayLike = 0.999
    eps: ArrayLike = 1e-8
    eps_root: ArrayLike = 0.0
    weight_decay: ArrayLike | None = None


Rule: TypeAlias = Sgd | Adam


class Plan(NamedTuple):
    """What is known before tracing."""

    moments: tuple[str, ...]  # (), ("trace",) or ("mu", "nu")
    decay: bool
    clip: bool
    emit: Emit
    rounding: Rounding
    low: str  # the type of the params

    @property
    def columns(self) -> tuple[str, ...]:
        own = {(): (), ("trace",): ("momentum",)}
        adam = ("b1", "rest1", "scale1", "b2", "rest2", "scale2", "eps", "eps_root")
        names = ("learning_rate", *own.get(self.moments, adam))
        return names + ("decay",) * self.decay + ("norm", "max_norm") * self.clip

    @property
    def wide(self) -> DTypeLike:
        """The type of the arithmetic: float32 at least."""
        return jnp.promote_types(self.low, jnp.float32)

    @property
    def reads(self) -> tuple[str, ...]:
        """The streams that come in."""
        if self.rounding == "master":
            rest = ("master", "params") if self.emit == "updates" else ("master",)
        else:
            used = self.decay or self.emit == "params" or self.rounding == "stochastic"
            rest = ("params",) * used
        return ("grads", *self.moments, *rest)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.emit, *self.moments, *(("master",) if self.rounding == "master" else ()))


def table(plan: Plan, rule: Rule, clip: tuple | None, members: tuple[int, ...]) -> jax.Array:
    """The columns of a plan: [*members, columns]."""
    values: dict[str, ArrayLike | None] = {"learning_rate": rule.learning_rate}
    if isinstance(rule, Adam):
        step = jnp.asarray(rule.step)
        # As optax has it: a plain 0.999 is taken from 1 in double precision.
        for name, decay in (("1", rule.b1), ("2", rule.b2)):
            values |= {
                f"b{name}": decay,
                f"rest{name}": 1 - decay,
                f"scale{name}": 1 - decay**step,
            }
        values |= {"eps": rule.eps, "eps_root": rule.eps_root}
    else:
        values["momentum"] = rule.momentum
    values["decay"] = rule.weight_decay
    if clip is not None:
        values["norm"], values["max_norm"] = clip
    wide = [jnp.asarray(values[name]).astype(plan.wide) for name in plan.columns]
    return jnp.stack([jnp.broadcast_to(x, members) for x in wide], -1)


def tile(plan: Plan, row: Streams, streams: Streams, index: jax.Array, seed) -> Streams:
    """One step of some entries; `index` is their place in the member, `seed` two int32."""
    source, update, moments = advance(plan, row, streams)
    if plan.rounding != "nearest":
        params = streams["params"].astype(plan.wide) if plan.emit == "updates" else None
        return moments | finish(plan, source + update, params, index, seed)
    return moments | {plan.emit: update if plan.emit == "updates" else source + update}


def advance(plan: Plan, row: Streams, streams: Streams) -> tuple[jax.Array, jax.Array, Streams]:
    """What is updated, the update and the moments, in the wide type.

    The operations are those of optax, in its order.
    """
    x = {name: value.astype(plan.wide) for name, value in streams.items()}
    grads, moments = x["grads"], {}
    source = x.get("master" if plan.rounding == "master" else "params", grads)
    if plan.clip:
        grads = grads / row["norm"] * row["max_norm"]
    if plan.moments == ("trace",):
        moments["trace"] = step = grads + row["momentum"] * x["trace"]
    elif plan.moments:
        moments["mu"] = row["rest1"] * grads + row["b1"] * x["mu"]
        moments["nu"] = row["rest2"] * (grads * grads) + row["b2"] * x["nu"]
        root = jnp.sqrt(moments["nu"] / row["scale2"] + row["eps_root"])
        step = moments["mu"] / row["scale1"] / (root + row["eps"])
    else:
        step = grads
    if plan.decay:
        step = step + row["decay"] * source
    return source, -row["learning_rate"] * step, moments


def finish(plan: Plan, new: jax.Array, params, index: jax.Array, seed) -> Streams:
    """New params, in the wide type, as what a plan writes of them."""
    out = {"master": new} if plan.rounding == "master" else {}
    if plan.rounding == "stochastic":
        low = stochastic(new, index, seed)
    else:
        low = new.astype(plan.low).astype(plan.wide)
    return out | {plan.emit: low - params if plan.emit == "updates" else low}


def stochastic(x: jax.Array, index: jax.Array, seed) -> jax.Array:
    """float32 rounded to one of its two neighbours in bfloat16, on average to itself.

    Sixteen random bits are added below those that are kept. They are a hash of seed and index
    (twice the finalizer of MurmurHash3, a permutation of 32 bits): the same on every machine, and
    cheaper than the traffic it hides behind, which a cryptographic generator is not.
    """
    noise = _mix(_mix(index ^ seed[0]) + seed[1]) & 0xFFFF
    bits = lax.bitcast_convert_type(x, jnp.int32) + noise
    rounded = lax.bitcast_convert_type(bits & -0x10000, jnp.float32)
    return jnp.where(jnp.abs(x) < jnp.inf, rounded, x)


def _mix(x: jax.Array) -> jax.Array:
    # Signed, since not every backend has unsigned products; these wrap around all the same.
    for shift, factor in ((16, 0x85EBCA6B - 2**32), (13, 0xC2B2AE35 - 2**32)):
        x = (x ^ lax.shift_right_logical(x, jnp.int32(shift))) * jnp.int32(factor)
    return x ^ lax.shift_right_logical(x, jnp.int32(16))


def dtypes(plan: Plan, streams: Streams) -> dict[str, DTypeLike]:
    """The type of everything a plan writes."""
    first = {"params": jnp.dtype(plan.low), "updates": plan.wide}
    return {name: first[name] if name in first else streams[name].dtype for name in plan.writes}


def reference(plan: Plan, table: jax.Array, seeds: jax.Array | None, streams: Streams) -> Streams:
    """The definition: table [..., columns], seeds [..., 2], streams [..., P] to streams."""
    row = {name: table[..., k : k + 1] for k, name in enumerate(plan.columns)}
    shape = streams["grads"].shape
    index = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    seed = None if seeds is None else (seeds[..., :1], seeds[..., 1:])
    out = tile(plan, row, streams, index, seed)
    return {name: out[name].astype(t) for name, t in dtypes(plan, streams).items()}


def reference_converge(
    plan: Plan, table: jax.Array, seeds: jax.Array | None, kept: jax.Array, streams: Streams
) -> tuple[Streams, jax.Array]:
    """One step, then the mean of the params of the members kept (bool [R]) in every row.

    Also whether all new params of a member are finite, bool [R]. The mean is that of differences
    from the first member kept, so that equal rows stay what they are.
    """
    row = {name: table[:, k : k + 1] for k, name in enumerate(plan.columns)}
    source, update, moments = advance(plan, row, streams)
    new = source + update
    first = jnp.argmax(kept)
    far = jnp.where(kept[:, None], new - new[first][None], 0)
    mean = (new[first] + far.sum(0) / jnp.maximum(kept.sum(), 1).astype(new.dtype))[None]
    index = lax.broadcasted_iota(jnp.int32, mean.shape, 1)
    seed = None if seeds is None else tuple(seeds[first])
    out = moments | finish(plan, mean, None, index, seed)
    types = dtypes(plan, streams)
    out = {name: jnp.broadcast_to(out[name], new.shape).astype(types[name]) for name in types}
    return out, jnp.isfinite(new).all(1)
