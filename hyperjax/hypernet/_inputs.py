"""What a generated hypernetwork reads: the given vector, a learnt embedding, or noise."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks
from .._types import HParams, Key, PyTree
from ._types import ravel


class Inputs(NamedTuple):
    """From hparams to a vector: `init(key, hparams) -> phi`, `apply(phi, hparams) -> [d]`."""

    init: Callable[[Key, HParams], PyTree]
    apply: Callable[[PyTree, HParams], jax.Array]


def given() -> Inputs:
    """All scalars of hparams: hyperparameters, or what an example has (dynamic inputs).

    `init` raises TypeError for leaves that are not floating-point, ValueError if none is there or
    one is empty.
    """

    def init(key: Key, hparams: HParams) -> PyTree:
        _checks.has_entries("given", "hparams", hparams)
        _checks.differentiable("given", "hparams", hparams)
        return ()

    return Inputs(init, lambda phi, hparams: ravel(hparams))


def task_embedding(count: int, size: int) -> Inputs:
    """Row hparams of a learnt table [count, size]; hparams is the number of a task, an integer.

    Rows begin standard normal. A number below zero or not below `count` gives NaN. The table is
    `phi.inputs`. Raises TypeError for hparams that are not one integer.
    """
    _checks.positive_int("task_embedding", "count", count)
    _checks.positive_int("task_embedding", "size", size)

    def init(key: Key, hparams: HParams) -> jax.Array:
        _index("task_embedding", hparams)
        return jax.random.normal(key, (count, size), float)

    def apply(table: jax.Array, hparams: HParams) -> jax.Array:
        index = _index("task_embedding", hparams)
        row = table.at[index].get(mode="fill", fill_value=jnp.nan)
        return jnp.where(index >= 0, row, jnp.nan)  # `at` would count from the end

    return Inputs(init, apply)


def static_input(size: int) -> Inputs:
    """One learnt vector [size], whatever hparams are: the same weights for all (static inputs).

    Raises ValueError unless `size` is a positive integer.
    """
    _checks.positive_int("static_input", "size", size)
    return Inputs(
        lambda key, hparams: jax.random.normal(key, (size,), float),
        lambda vector, hparams: vector,
    )


def noise_input(size: int) -> Inputs:
    """Standard normal noise [size] from hparams, a PRNG key: a distribution over params.

    Raises ValueError unless `size` is a positive integer, TypeError for hparams that are no key.
    """
    _checks.positive_int("noise_input", "size", size)

    def draw(hparams: HParams) -> jax.Array:
        one = _is_leaf(hparams)
        if not (one and jnp.issubdtype(jnp.result_type(hparams), jax.dtypes.prng_key)):
            raise TypeError(
                f"noise_input: `hparams` must be a key such as `jax.random.key(0)`; "
                f"got {_checks.describe(hparams) if one else repr(hparams)}."
            )
        return jax.random.normal(hparams, (size,), float)

    def init(key: Key, hparams: HParams) -> PyTree:
        jax.eval_shape(draw, hparams)
        return ()

    return Inputs(init, lambda phi, hparams: draw(hparams))


def joined(parts: Mapping[str, Inputs]) -> Inputs:
    """Several inputs side by side; hparams is a dict with an entry for each of `parts`.

    `joined({"task": task_embedding(10, 8), "key": noise_input(4)})` reads {"task": 3, "key": key}.

    Raises ValueError without parts, and for hparams that are no dict with the same keys.
    """
    parts = dict(parts)
    if not parts:
        raise ValueError("joined: `parts` is empty; pass at least one input.")

    def init(key: Key, hparams: HParams) -> PyTree:
        if not isinstance(hparams, Mapping) or set(hparams) != set(parts):
            raise ValueError(
                f"joined: `hparams` must be a dict with the keys {sorted(parts)}; got "
                f"{sorted(hparams) if isinstance(hparams, Mapping) else type(hparams).__name__}."
            )
        keys = jax.random.split(key, len(parts))
        return {n: p.init(k, hparams[n]) for k, (n, p) in zip(keys, parts.items(), strict=True)}

    def apply(phi: PyTree, hparams: HParams) -> jax.Array:
        return jnp.concatenate([p.apply(phi[n], hparams[n]) for n, p in parts.items()])

    return Inputs(init, apply)


def _index(where: str, hparams: HParams) -> jax.Array:
    one = _is_leaf(hparams)
    if not one or jnp.ndim(hparams) or not jnp.issubdtype(jnp.result_type(hparams), jnp.integer):
        raise TypeError(
            f"{where}: `hparams` must be one integer, the number of a task; got "
            f"{_checks.describe(hparams) if one else repr(hparams)}. For many at once use "
            "`jax.vmap`."
        )
    return jnp.asarray(hparams)


def _is_leaf(tree: PyTree) -> bool:
    return jax.tree.structure(tree) == jax.tree.structure(0)
