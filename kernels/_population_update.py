"""A step of gradient descent or Adam for many members, each with hyperparameters of its own.

Nothing here is more than arithmetic on what streams through, so the floor is the traffic:
`traffic` counts it. Clipping needs the norms first: one more pass, over the gradients only.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from . import _op
from . import _population_checks as checks
from . import _population_rules as rules
from ._op import Implementation
from ._population_rules import Plan, Rule, Streams

# Named (members, parameters), read by the tests and by the benchmarks; the large ones by these.
SHAPES = {"one": (1, 1), "odd": (7, 3), "ragged": (17, 2051), "network": (4, 26122)}
LARGE = {
    "network": (64, 26122),  # a classifier of 64-128-128-10
    "many": (1024, 65536),
    "long": (64, 2**20),
    "longest": (8, 2**25),
}

# Where a compiled body may run, and where it was measured to be faster than XLA: nowhere so far.
PLATFORMS = ("gpu", "tpu")
FASTER_ON: tuple[str, ...] = ()


class Stepped(NamedTuple):
    params: jax.Array  # [..., P], as all of them
    moments: tuple[jax.Array, ...]
    master: jax.Array | None


class Updated(NamedTuple):
    updates: jax.Array  # to be added to params, in float32 at least
    moments: tuple[jax.Array, ...]
    master: jax.Array | None


class Converged(NamedTuple):
    params: jax.Array  # [R, P], equal rows, unless nobody was left
    moments: tuple[jax.Array, ...]
    master: jax.Array | None
    sound: jax.Array  # bool [R]: kept, and finite after the step; their mean was taken


def population_apply(
    rule: Rule,
    params: jax.Array,
    grads: jax.Array,
    moments: tuple[jax.Array, ...],
    *,
    max_norm: ArrayLike | None = None,
    norm: jax.Array | None = None,
    master: jax.Array | None = None,
    seed: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> Stepped:
    """New params and moments after one step: [..., P] each, read once and written once.

    The leading axes are those of the members; without any, [P], it is one member, and vmap makes
    it many in one pass. `rule` is `Sgd` or `Adam`, whose fields are numbers or have the shape of
    the leading axes.

    The arithmetic is in float32, or in float64 for params in float64. Moments keep their type and
    are meant to be in the wide one: with b2 = 0.999 the second moment would not move in bfloat16.
    Params in bfloat16 are rounded to the nearest, or

    - with `master`, params in the wide type, kept beside: they are what is stepped, and params
      their rounding;
    - with `seed`, int32 or uint32 [2], or [..., 2], to be drawn anew for every step: rounded to a
      neighbour at random, on average to the value itself. Members with one seed round alike.

    `max_norm` scales the gradients of a member down to that 2-norm, as `optax.clip_by_global_norm`.
    The norm is taken in a pass of its own unless it is given as `norm`, as for a member of several
    leaves.

    Forward and reverse mode, of any order, are those of the reference, where rounding has
    derivative 1. With eps_root = 0 the derivative of Adam is NaN where a gradient has always been
    zero, as in optax.

    `auto` is "xla", the reference, until a kernel was measured faster on the backend. A kernel has
    no rule for arrays that jit has sharded: take it inside shard_map, with members apart. A named
    implementation runs or raises: "pallas" the compiled kernel, "interpret" the body for GPUs run
    by XLA, on any backend, for tests. Raises ValueError for other names, shapes or dtypes.
    """
    out = _run("population_apply", rule, "params", params, grads, moments, max_norm, norm, master,
               seed, implementation)  # fmt: skip
    return Stepped(*out)


def population_update(
    rule: Rule,
    params: jax.Array,
    grads: jax.Array,
    moments: tuple[jax.Array, ...],
    *,
    max_norm: ArrayLike | None = None,
    norm: jax.Array | None = None,
    master: jax.Array | None = None,
    seed: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> Updated:
    """`population_apply`, with what is to be added to params in their place.

    For `optax.apply_updates`, which then costs a pass of its own. Sum and params after it are those
    of `population_apply`. (With `master` or `seed`, bit for bit if an entry changes by less than a
    factor of 2^16: the difference of two numbers in bfloat16 is then exact in float32.)
    """
    out = _run("population_update", rule, "updates", params, grads, moments, max_norm, norm, master,
               seed, implementation)  # fmt: skip
    return Updated(*out)


def population_converge(
    rule: Rule,
    params: jax.Array,
    grads: jax.Array,
    moments: tuple[jax.Array, ...],
    keep: jax.Array,
    *,
    max_norm: ArrayLike | None = None,
    norm: jax.Array | None = None,
    master: jax.Array | None = None,
    seed: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> Converged:
    """`population_apply` to [R, P], and then every row of params is the mean over members.

    `keep`, bool [R], are the members to average, such as those with a finite score. One of them
    whose params are not finite after this very step is left out as well: that costs a second pass,
    in that step only, but under vmap always. If none is left, everybody keeps params of their own.
    Inside shard_map it is the mean over the members of one device.

    Moments are those of every member, also where they are lost; `sound` says whose are not. What a
    lost member was made of has derivative 0.

    Raises ValueError for shapes that do not fit, unknown names, and "pallas" where it cannot run.
    """
    where = "population_converge"
    plan, table, seeds, streams = _prepare(where, rule, "params", params, grads, moments, max_norm,
                                           norm, master, seed)  # fmt: skip
    if jnp.ndim(params) != 2 or jnp.shape(keep) != jnp.shape(params)[:1]:
        raise ValueError(
            f"{where}: `params` and `keep` have shapes {jnp.shape(params)} and {jnp.shape(keep)}, "
            "expected (members, parameters) and (members,)."
        )
    if jnp.result_type(keep) != jnp.dtype(bool):
        raise ValueError(f"{where}: `keep` is {jnp.result_type(keep)}, expected bool.")
    how = _choose(where, implementation, params)
    out, finite = _averaged(plan, how)(*_alike(how, table, seeds, jnp.asarray(keep), streams))
    return Converged(*_fields(plan, out), keep & finite)


def _run(where, rule, emit, params, grads, moments, max_norm, norm, master, seed, implementation):
    plan, table, seeds, streams = _prepare(where, rule, emit, params, grads, moments, max_norm,
                                           norm, master, seed)  # fmt: skip
    how = _choose(where, implementation, params)
    return _fields(plan, _member(plan, how)(*_alike(how, table, seeds, streams)))


def _fields(plan: Plan, out: Streams):
    return out[plan.emit], tuple(out[name] for name in plan.moments), out.get("master")


def _prepare(where, rule, emit, params, grads, moments, max_norm, norm, master, seed):
    """The plan, its table, seeds [..., 2] and the streams that it reads."""
    names = checks.check(where, rule, params, grads, moments, max_norm, norm, master, seed)
    members = jnp.shape(params)[:-1]
    rounding = "master" if master is not None else "nearest" if seed is None else "stochastic"
    decay, clip = rule.weight_decay is not None, max_norm is not None
    plan = Plan(names, decay, clip, emit, rounding, jnp.dtype(params.dtype).name)
    if seed is not None:
        seed = jnp.asarray(seed)
        if seed.dtype == jnp.uint32:
            seed = lax.bitcast_convert_type(seed, jnp.int32)
        seed = jnp.broadcast_to(seed, (*members, 2))
    limits = None
    if max_norm is not None:
        if norm is None:
            norm = norm_of(jnp.square(grads.astype(plan.wide)).sum(-1))
        limits = _limits(norm, max_norm)
    streams = {"params": params, "grads": grads, "master": master}
    streams |= dict(zip(names, moments, strict=True))
    reads = {name: streams[name] for name in plan.reads}
    return plan, rules.table(plan, rule, limits, members), seed, reads


def norm_of(squares: jax.Array) -> jax.Array:
    """The root of a sum of squares, with derivative 0 where that is 0."""
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))


def _limits(norm: jax.Array, max_norm: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """By what a gradient is divided and then multiplied, as in optax; by 1 if it passes.

    Chosen before the quotient, whose derivative at a norm of 0 would be NaN.
    """
    max_norm = jnp.asarray(max_norm).astype(norm.dtype)
    passes = (norm == 0) | (norm < max_norm)
    return jnp.where(passes, 1, norm), jnp.where(passes, 1, max_norm)


def _choose(where: str, implementation: str, params: jax.Array) -> str:
    def unfit(backend: str) -> str | None:
        wide = backend == "tpu" and params.dtype == jnp.float64
        return "`params` is float64, expected at most 32 bits on a TPU" if wide else None

    how = _op.choose(where, implementation, platforms=PLATFORMS, faster_on=FASTER_ON, unfit=unfit)
    return how if params.size else "xla"


def _alike(how: str, *operands):
    """Typed alike for a kernel, inside shard_map; here, so that derivatives know of it as well."""
    if how == "xla":
        return operands
    leaves, tree = jax.tree.flatten(operands)
    return tree.unflatten(_op.alike(*leaves))


@functools.cache
def _member(plan: Plan, how: str):
    """The step as a function of (table, seeds, streams) with any leading axes."""
    reference = functools.partial(rules.reference, plan)
    if how == "xla" and plan.rounding != "stochastic":
        return reference
    return _with_derivative(
        plan, reference if how == "xla" else _stacked(plan, how), rules.reference
    )


@functools.cache
def _averaged(plan: Plan, how: str):
    """Step, mean, and who is finite, as a function of (table, seeds, kept, streams) of [R, P]."""
    if how == "xla":
        once = functools.partial(rules.reference_converge, plan)
    else:
        from . import _population_launch as launch

        once = functools.partial(launch.converge, plan, how)

    @jax.custom_jvp
    def run(table, seeds, kept, streams):
        first, finite = once(table, seeds, kept, streams)
        sound = kept & finite
        again = lambda: once(table, seeds, sound, streams)[0]
        alone = lambda: _member(plan, how)(table, seeds, streams)
        case = jnp.where(~sound.any(), 2, jnp.where((sound == kept).all(), 0, 1))
        return lax.switch(case, (lambda: first, again, alone)), finite

    @run.defjvp
    def _(primals, tangents):
        out, finite = run(*primals)
        exact = functools.partial(_exact_mean, _smooth(plan), finite)
        return (out, finite), jax.jvp(exact, primals, tangents)[1]

    return run


def _exact_mean(plan: Plan, finite: jax.Array, table, seeds, kept, streams):
    """What has the derivative of `_averaged`, given who is finite after the step.

    A lost member is replaced by numbers before the step, or it would lose everybody's derivative
    in a number that they share: nothing times NaN is NaN.
    """
    sound = kept & finite
    calm = (finite | ~sound.any())[:, None]
    table = jnp.where(calm, table, 1)
    streams = {name: jnp.where(calm, x, 0) for name, x in streams.items()}
    together, _ = rules.reference_converge(plan, table, seeds, sound, streams)
    alone = rules.reference(plan, table, seeds, streams)
    return jax.tree.map(functools.partial(jnp.where, sound.any()), together, alone), finite


def _with_derivative(plan: Plan, run, reference):
    """`run` with the derivative of the reference, in which rounding has derivative 1.

    As a JVP rule it serves every mode and every order.
    """
    run = jax.custom_jvp(run)

    @run.defjvp
    def _(primals, tangents):
        exact = functools.partial(reference, _smooth(plan))
        return run(*primals), jax.jvp(exact, primals, tangents)[1]

    return run


def _smooth(plan: Plan) -> Plan:
    return plan._replace(rounding="nearest") if plan.rounding == "stochastic" else plan


def _stacked(plan: Plan, how: str):
    """The kernel for any leading axes: all of them are members, and so is an axis of vmap.

    `pallas_call` would batch by itself, by one more axis of its grid. On TPU that makes tiles of
    one row; and this way there is one layout to measure.
    """
    from . import _population_launch as launch  # Pallas, which only who uses it waits for

    @jax.custom_batching.custom_vmap
    def run(table, seeds, streams):
        members = table.shape[:-1]
        flat = lambda x: x.reshape(math.prod(members), x.shape[-1])
        out = launch.step(plan, how, *jax.tree.map(flat, (table, seeds, streams)))
        return {name: x.reshape(*members, x.shape[-1]) for name, x in out.items()}

    @run.def_vmap
    def _(axis_size, in_batched, *args):
        spread = lambda batched, x: x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        out = run(*jax.tree.map(spread, tuple(in_batched), args))
        return out, jax.tree.map(lambda _: True, out)

    return run
