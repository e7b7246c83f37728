"""Adam with a second moment that has a derivative at zero."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from .. import _checks
from .._types import PyTree, Scalar

_EPS_ROOT = 1e-8


def scale_by_adam(
    b1: float | Scalar = 0.9,
    b2: float | Scalar = 0.999,
    eps: float | Scalar = 1e-8,
    eps_root: float | Scalar = _EPS_ROOT,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with `eps_root` 1e-8 by default, and refused if it is zero.

    Adam divides by sqrt(v + eps_root). With the default of optax, 0, the derivative of the root is
    infinite where a gradient entry has always been exactly zero (a dead unit, a pixel that is
    always black), and one such entry makes the whole meta-gradient NaN.

    The price: entries whose second moment is not large against eps_root move less than in plain
    Adam. 1e-8 damps gradients below about 1e-4; a smaller value damps less, and the derivative at
    zero grows as 1 / sqrt(eps_root). Given the same eps_root, values are those of optax.

    Raises ValueError for an eps_root that is not positive.
    """
    _checks.number("guarded.scale_by_adam", "eps_root", eps_root, positive=True)
    return optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)


def adam(
    learning_rate: float | Scalar | optax.Schedule,
    b1: float | Scalar = 0.9,
    b2: float | Scalar = 0.999,
    eps: float | Scalar = 1e-8,
    eps_root: float | Scalar = _EPS_ROOT,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adam` with `eps_root` 1e-8 by default, and refused if it is zero.

    See `scale_by_adam`. Raises ValueError for an eps_root that is not positive.
    """
    _checks.number("guarded.adam", "eps_root", eps_root, positive=True)
    return optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)


def adamw(
    learning_rate: float | Scalar | optax.Schedule,
    b1: float | Scalar = 0.9,
    b2: float | Scalar = 0.999,
    eps: float | Scalar = 1e-8,
    eps_root: float | Scalar = _EPS_ROOT,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: float | Scalar = 1e-4,
    mask: PyTree | Callable[[Any], Any] | None = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw` with `eps_root` 1e-8 by default, and refused if it is zero.

    See `scale_by_adam`. Raises ValueError for an eps_root that is not positive.
    """
    _checks.number("guarded.adamw", "eps_root", eps_root, positive=True)
    return optax.adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
    )
