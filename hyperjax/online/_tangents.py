"""Tangents of a training state along every scalar hyperparameter, pushed forward step by step.

A tangent has the structure of the state, without the leaves that are not inexact (counters and
keys have no derivative, None stands there), and a leading axis [N]: one row per scalar
hyperparameter, leaves in the order of `jax.tree.leaves`, entries in row-major order.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._types import Batch, HParams, Loss, Params, PyTree, Scalar, State

Step = Callable[[State, HParams, Batch], State]
Tangent = PyTree


def check(where: str, hparams: HParams) -> HParams:
    """`hparams` as strongly typed arrays; refused if there is nothing to differentiate in."""
    _checks.differentiable(where, "hparams", hparams)
    if not _tree.size(_tree.strong(hparams)):
        raise ValueError(
            f"{where}: `hparams` has no entries, so there is nothing to estimate; pass at least "
            "one, for example {'lr': jnp.asarray(0.1)}."
        )
    hparams = _tree.strong(hparams)
    return _tree.vary_like(hparams, hparams)  # all leaves alike, as their tangents will be


def start(
    where: str, init: Callable[[Params, HParams], State], params: Params, hparams: HParams
) -> tuple[State, Tangent]:
    """The first state, and how it depends on hparams: not at all for most `init`."""
    hparams = check(where, hparams)
    make = lambda h: _tree.strong(init(params, h))
    state, tangent = _forward(make, (hparams,), (_tree.units(hparams),))
    if not hasattr(state, "params"):
        raise TypeError(
            f"{where}: `init` must return a state with a field `params`, as `inner` makes it; got "
            f"{type(state).__name__}."
        )
    return state, tangent


def push(
    step: Step, state: State, tangent: Tangent, hparams: HParams, batch: Batch
) -> tuple[State, Tangent]:
    """One step: A Z + B, for the derivatives A of `step` in the state and B in hparams."""
    smooth, rest = _partition(state)
    return _forward(
        lambda s, h: step(_merge(s, rest), h, batch),
        (smooth, hparams),
        (tangent, _tree.units(hparams)),
    )


def push_apart(
    step: Step, state: State, tangent: Tangent, hparams: HParams, batch: Batch
) -> tuple[State, Tangent, Tangent]:
    """One step with A Z and B by themselves."""
    smooth, rest = _partition(state)
    after, newest = _forward(lambda h: step(state, h, batch), (hparams,), (_tree.units(hparams),))
    _, carried = _forward(lambda s: step(_merge(s, rest), hparams, batch), (smooth,), (tangent,))
    return after, carried, newest


def decayed(factor: Scalar | float, tangent: Tangent) -> Tangent:
    """`factor` times the tangent, a scalar or one per row; 0 forgets even what overflowed."""

    def one(z):
        f = jnp.reshape(jnp.asarray(factor, z.dtype), (-1,) + (1,) * (z.ndim - 1))
        return jnp.where(f == 0, jnp.zeros_like(z), f * z)

    return jax.tree.map(one, tangent)


def score_slopes(
    score: Loss, params: Params, hparams: HParams, batch: Batch
) -> tuple[Scalar, Params, HParams]:
    """The score, and its derivatives in params and, directly, in hparams."""
    value, (through, direct) = jax.value_and_grad(score, argnums=(0, 1))(params, hparams, batch)
    return value, through, direct


def along(slope: Params, tangent: Tangent) -> jax.Array:
    """<slope, Z> by rows: [N]."""
    return jax.vmap(lambda z: _tree.dot(z, slope))(tangent.params)


def unflatten(row: jax.Array, hparams: HParams) -> HParams:
    """[N] in the structure, shapes and types of hparams."""
    leaves, tree = jax.tree.flatten(hparams)
    stops = [0]
    for x in leaves:
        stops.append(stops[-1] + x.size)
    parts = [
        row[a:b].reshape(x.shape).astype(x.dtype)
        for x, a, b in zip(leaves, stops[:-1], stops[1:], strict=True)
    ]
    return jax.tree.unflatten(tree, parts)


def flatten(hparams: HParams) -> jax.Array:
    """The entries of hparams: [N]."""
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(hparams)])


def _forward(function: Callable[..., State], primals: tuple, tangents: tuple):
    """`function(*primals)` once, and its derivative along every row of `tangents`."""

    def one(*row):
        smooth, tangent, rest = jax.jvp(
            lambda *xs: _partition(function(*xs)), primals, row, has_aux=True
        )
        return smooth, tangent, rest

    smooth, tangent, rest = jax.vmap(one, out_axes=(None, 0, None))(*tangents)
    return _merge(smooth, rest), tangent


def _partition(state: State) -> tuple[State, State]:
    """The inexact leaves, None elsewhere, and the others."""
    inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    return (
        jax.tree.map(lambda x: x if inexact(x) else None, state),
        jax.tree.map(lambda x: None if inexact(x) else x, state),
    )


def _merge(smooth: State, rest: State) -> State:
    either = lambda a, b: b if a is None else a
    return jax.tree.map(either, smooth, rest, is_leaf=lambda x: x is None)
