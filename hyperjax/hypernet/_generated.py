"""Hypernetworks from parts: inputs, body, outputs."""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._types import HParams, Key, Params, PyTree
from ._bodies import Body, mlp
from ._inputs import Inputs, given
from ._outputs import Head, Outputs, draw, emit, whole
from ._types import Hypernet

_DRAWS = 16  # of standard normal inputs, by which the scale of the features is measured


@jax.tree_util.register_static
@dataclass(frozen=True)
class Layout:
    """What params look like; no leaf of a tree, so that optimizers do not see it."""

    tree: Any  # a PyTreeDef, which is no type to name
    leaves: tuple[jax.ShapeDtypeStruct, ...]


class Generated(NamedTuple):
    """The weights of a `generated` hypernetwork."""

    inputs: PyTree
    codes: jax.Array  # [slots, code]
    body: PyTree
    heads: tuple[Head, ...]
    layout: Layout


def generated(
    *, body: Body | None = None, outputs: Outputs | None = None, inputs: Inputs | None = None
) -> Hypernet:
    """Params that a network makes from hparams, by the design choices of hypernetworks.

    | choice | options |
    |---|---|
    | inputs | `given()` (the default), `task_embedding(tasks, size)`, `noise_input(size)`, \
`joined(parts)` |
    | static or dynamic inputs | `static_input(size)` or `task_embedding` against `given()` |
    | outputs | `whole()` (the default), `per_leaf()`, `chunks(size)`, `per_unit()` |
    | static or dynamic outputs | `apply(phi, h)` against `jax.vmap(apply, (None, 0))(phi, rows)` |
    | architecture | `mlp((16, 64, 128))` (the default), `identity()`, `recurrent(64)`, \
`attention(32)`, `convolution((32, 32))` |

    >>> import hyperjax as hj
    >>> from hyperjax.hypernet import chunks, generated, recurrent, task_embedding
    >>> net = generated(inputs=task_embedding(10, 32), body=recurrent(64), outputs=chunks(100))

    phi is a `Generated`. The choices are those of Chauhan et al. 2024 (arXiv 2306.06955), whose
    table was not at hand. Types are those of params; the network has the widest of them.

    The weights begin with the variance of the params given to `init`, leaf by leaf, if the inputs
    have unit variance: hyperfan-in of Chang et al. 2020 (arXiv 2312.08399), with the second moment
    of the features measured on normal inputs in place of derived, so that it holds for any body. A
    leaf whose entries are all equal, such as a zero bias or a scale of ones, begins as it is.

    `init` raises TypeError for leaves of params that are not real floating-point arrays,
    ValueError if there are none or one is empty, and either for hparams that the inputs cannot
    read.
    """
    inputs, body, outputs = inputs or given(), body or mlp(), outputs or whole()
    _checks.has_functions("generated", "inputs", inputs, ("init", "apply"))
    _checks.has_functions("generated", "body", body, ("init", "apply"))
    _checks.has_functions("generated", "outputs", outputs, ("split", "join", "start"))

    def init(key: Key, params: Params, hparams: HParams) -> Generated:
        _checks.differentiable("generated", "params", params)
        _checks.has_entries("generated", "params", params)
        leaves, tree = jax.tree.flatten(_tree.strong(params))
        layout = Layout(tree, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))
        dtype = jnp.result_type(*leaves)
        cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), _tree.strong(tree))
        tables = zip(*map(outputs.split, _moments(leaves, dtype)), strict=True)
        starts = [outputs.start(*pair) for pair in tables]
        slots = count_slots(outputs, layout)
        keys = jax.random.split(key, 4 + len(starts))
        source = cast(inputs.init(keys[0], hparams))
        codes = jax.random.normal(keys[1], (sum(slots), outputs.code), dtype)
        size = jax.eval_shape(inputs.apply, source, hparams).shape[-1]
        core = cast(body.init(keys[2], size + outputs.code))
        probes = jax.random.normal(keys[3], (_DRAWS, size), dtype)
        seen = jax.vmap(lambda z: body.apply(core, body_rows(z, codes)))(probes)
        parts = jnp.split(seen, slot_ends(slots), axis=1)
        heads = [draw(k, s, f) for k, s, f in zip(keys[4:], starts, parts, strict=True)]
        return Generated(source, codes, core, tuple(heads), layout)

    def apply(phi: Generated, hparams: HParams) -> Params:
        z = inputs.apply(phi.inputs, hparams).astype(phi.codes.dtype)
        features = body.apply(phi.body, body_rows(z, phi.codes))
        parts = jnp.split(features, slot_ends(count_slots(outputs, phi.layout)), axis=0)
        tables = [emit(h, f) for h, f in zip(phi.heads, parts, strict=True)]
        like = phi.layout.leaves
        leaves = outputs.join(tables, [x.shape for x in like])
        return phi.layout.tree.unflatten(
            [x.astype(y.dtype) for x, y in zip(leaves, like, strict=True)]
        )

    return Hypernet(init, apply)


def body_rows(z: jax.Array, codes: jax.Array) -> jax.Array:
    """What the body reads: z beside the code of every slot, [slots, d + code]."""
    return jnp.concatenate([jnp.broadcast_to(z, (len(codes), *z.shape)), codes], axis=1)


def count_slots(outputs: Outputs, layout: Layout) -> list[int]:
    """The slots of every table."""
    return [x.shape[0] for x in jax.eval_shape(outputs.split, list(layout.leaves))]


def slot_ends(slots: list[int]) -> list[int]:
    return list(itertools.accumulate(slots[:-1]))


def _moments(leaves: list[jax.Array], dtype) -> tuple[list[jax.Array], list[jax.Array]]:
    """What every weight is to vary by and lie around: its leaf's root mean square and 0.

    0 and its value in a leaf of equal entries, which was not drawn.
    """
    spreads, levels = [], []
    for leaf in leaves:
        x = leaf.astype(dtype)
        drawn = jnp.any(x != x.reshape(-1)[0])
        deviation = jnp.where(drawn, jnp.sqrt(jnp.mean(x**2)), 0)
        spreads.append(jnp.broadcast_to(deviation, x.shape))
        levels.append(jnp.where(drawn, 0, x))
    return spreads, levels
