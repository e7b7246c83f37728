"""One guard for every optimizer: no gradient entry is exactly zero."""

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._types import PyTree

_MARGIN = 1024.0


def nudge(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, given entries just above zero for those of gradients and params that are zero.

    Roots and norms have no derivative at exactly zero, and many pieces of optax take them. Their
    meta-gradients are NaN there; of `nudge(optax.amsgrad(0.1))` they are finite. Also for nadam,
    radam, ademamix, adopt, novograd, muon, `scale_by_rms(eps_in_sqrt=False)`,
    `normalize_by_update_norm`, `clip_by_block_rms` and `adaptive_grad_clip`, each of which a test
    looks at.

    An entry becomes 1.1e-16 in float32 and bfloat16, 1.5e-151 in float64: 1,024 times the root of
    the smallest normal number, so that its square times 1 - b2 still has a root. Other entries
    pass unchanged. With an eps far above it the value hardly changes: Adam moves such a parameter
    by 1e-8 learning rates rather than 0. Pieces without such an eps take it for a signal: not for
    signs (sign_sgd, lion, rprop) nor trust ratios (lamb, lars), which would take a full step.

    The derivative at zero is as large as the eps of `optimizer` leaves it, 1 / eps for Adam.
    `guarded.adam` and `guarded.clip_by_global_norm` are smoother, and to be preferred.

    Raises TypeError at trace time for float16, in which the square of such an entry is zero.
    """
    _checks.has_functions("guarded.nudge", "optimizer", optimizer, ("init", "update"))

    def update(updates, state, params=None):
        params = None if params is None else _nudged(params)
        return optimizer.update(_nudged(updates), state, params)

    return optax.GradientTransformation(optimizer.init, update)


def _nudged(tree: PyTree) -> PyTree:
    def one(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        info = jnp.finfo(x.dtype)
        size = _MARGIN * float(info.tiny) ** 0.5
        if size > float(info.eps):
            raise TypeError(
                f"guarded.nudge: {x.dtype} has no room between zero and its smallest square root; "
                "use float32 or bfloat16."
            )
        return jnp.where(x == 0, x + jnp.asarray(size, x.dtype), x)

    return jax.tree.map(one, tree)
