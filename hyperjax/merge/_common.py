"""What merging shares: members counted, those with weights that are not finite left out."""

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._types import Params


def count_members(where: str, name: str, members: Params) -> int:
    """P, for leaves [P, ...] of real floating-point numbers."""
    _checks.differentiable(where, name, members)
    leaves = jax.tree_util.tree_leaves_with_path(members)
    sizes = {jnp.shape(x)[:1] for _, x in leaves}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        listing = ", ".join(f"{_checks.path(k)}: {_checks.describe(x)}" for k, x in leaves)
        raise ValueError(
            f"{where}: every leaf of `{name}` needs the same leading axis, one entry per member "
            f"and at least one; got {listing or 'no leaves'}. Stack models with "
            "`jax.tree.map(lambda *x: jnp.stack(x), *models)`."
        )
    ((size,),) = sizes
    return size


def check_mask(where: str, mask: jax.Array, size: int) -> None:
    if jnp.shape(mask) != (size,) or jnp.result_type(mask) != jnp.bool_:
        raise ValueError(
            f"{where}: `mask` must be bool[{size}], one entry per member; got "
            f"{_checks.describe(mask)}."
        )


def finite(members: Params) -> jax.Array:
    """bool [P]: whose weights are all finite."""
    return jax.vmap(_tree.all_finite)(members)


def cleaned(members: Params, used: jax.Array) -> Params:
    """`members` with zeros for those that are not used: 0 times NaN is NaN, and so its gradient."""
    return _tree.where(used, members, _tree.zeros_like(members))


def wide(dtype) -> jnp.dtype:
    """The type to sum in: half precision loses the mean of a few dozen models."""
    return jnp.promote_types(dtype, jnp.float32)


def common_type(tree: Params) -> jnp.dtype:
    """One type in which all leaves can be summed."""
    return jnp.result_type(*(wide(x.dtype) for x in jax.tree.leaves(tree)))


def broken(params: Params, any_left: jax.Array) -> Params:
    """`params`, NaN throughout if nobody was left to make them of: never something that looks
    like a model."""
    return jax.tree.map(lambda x: jnp.where(any_left, x, jnp.nan), params)
