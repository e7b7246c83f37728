"""Where one hyperparameter may lie, and an unconstrained coordinate for it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from . import _checks

# Of whole numbers: the map and its inverse are right up to here in float32.
MOST = 2**20


@dataclass(frozen=True)
class Range:
    """One leaf of a space; made by the functions below."""

    forward: Callable[[jax.Array], jax.Array]  # raw -> constrained
    inverse: Callable[[jax.Array], jax.Array]
    quantile: Callable[[jax.Array], jax.Array]  # (0, 1) -> raw, the inverse distribution function
    distribution: Callable[[jax.Array], jax.Array]  # raw -> (0, 1), the inverse of `quantile`
    low: float  # bounds of the constrained value; infinite where there is none
    high: float
    init: float | np.ndarray  # constrained
    shape: tuple[int, ...]
    scale: str  # "log" or "linear": how to plot it
    # Raw values for a grid of so many points: [n] of one scalar, or [n, *shape] of the whole leaf.
    levels: Callable[[int], jax.Array]
    faults: Callable[[str, jax.Array], list[str]]  # of constrained values under a name


def loguniform(low: float, high: float, *, init=None, shape: tuple[int, ...] = ()) -> Range:
    """A positive value in (low, high), uniform in its logarithm.

    Bijector: log value = log low + log(high / low) sigmoid(raw). `init` defaults to the geometric
    mean of the bounds. Raises ValueError unless 0 < low < init < high.
    """
    _check_bounds("loguniform", low, high, least=0.0)
    start, width = math.log(low), math.log(high / low)
    init = math.exp(start + width / 2) if init is None else init
    return _make(
        "loguniform",
        lambda raw: jnp.exp(start + width * jax.nn.sigmoid(raw)),
        lambda value: _logit((jnp.log(value) - start) / width),
        _logit, low, high, init, shape, "log",
    )  # fmt: skip


def uniform(low: float, high: float, *, init=None, shape: tuple[int, ...] = ()) -> Range:
    """A value in (low, high), uniform.

    Bijector: value = low + (high - low) sigmoid(raw). `init` defaults to the middle. Raises
    ValueError unless low < init < high.
    """
    _check_bounds("uniform", low, high, least=-math.inf)
    init = (low + high) / 2 if init is None else init
    return _make(
        "uniform",
        lambda raw: low + (high - low) * jax.nn.sigmoid(raw),
        lambda value: _logit((value - low) / (high - low)),
        _logit, low, high, init, shape, "linear",
    )  # fmt: skip


def positive(
    *, scale: float = 1.0, low: float = 0.0, init=None, shape: tuple[int, ...] = ()
) -> Range:
    """A value above `low` without an upper bound.

    Bijector: value = low + scale softplus(raw), raw standard normal when sampled. `init` defaults
    to raw = 0. Raises ValueError unless scale > 0 and init > low.
    """
    _check_scale("positive", scale)
    init = low + scale * math.log(2) if init is None else init
    return _make(
        "positive",
        lambda raw: low + scale * jax.nn.softplus(raw),
        lambda value: inverse_softplus((value - low) / scale),
        jax.scipy.special.ndtri, low, math.inf, init, shape, "linear",
    )  # fmt: skip


def real(*, loc: float = 0.0, scale: float = 1.0, init=None, shape: tuple[int, ...] = ()) -> Range:
    """Any real value.

    Bijector: value = loc + scale raw, raw standard normal when sampled. `init` defaults to `loc`.
    Raises ValueError unless scale > 0.
    """
    _check_scale("real", scale)
    init = loc if init is None else init
    return _make(
        "real",
        lambda raw: loc + scale * raw,
        lambda value: (value - loc) / scale,
        jax.scipy.special.ndtri, -math.inf, math.inf, init, shape, "linear",
    )  # fmt: skip


def integers(
    low: int | np.integer, high: int | np.integer, *, init=None, shape: tuple[int, ...] = ()
) -> Range:
    """A whole number from `low` to `high`, both included, all as likely; of floating type.

    Map: value = floor(low + (high - low + 1) sigmoid(raw)), of which every derivative is zero: for
    `bilevel.self_tuning`, `evolution` and populations, which need none. `init` defaults to the
    middle, rounded down; `unconstrain` takes a number to the nearest whole one.

    Raises ValueError unless low <= init <= high are integers, low < high, within +-2**20, where
    float32 still tells a number from the middle between two; `init` may be an array of `shape`.
    """
    init = np.asarray((low + high) // 2 if init is None else init)
    whole = all(np.asarray(x).dtype.kind in "iu" for x in (low, high, init))
    if not whole or not -MOST <= low < high <= MOST or not ((init >= low) & (init <= high)).all():
        raise ValueError(
            "integers: expected integers low <= init <= high with low < high, within +-2**20; got "
            f"low={low!r}, high={high!r}, init={init.tolist()!r}."
        )
    low, high = int(low), int(high)
    count = high - low + 1
    inverse = lambda value: _logit((jnp.round(value) - low + 0.5) / count)
    made = _make(
        "integers",
        # the sigmoid may round to 1
        lambda raw: jnp.minimum(low + jnp.floor(count * jax.nn.sigmoid(raw)), high),
        inverse, _logit, low - 0.5, high + 0.5, init, shape, "linear",
    )  # fmt: skip
    every = lambda: inverse(jnp.arange(low, high + 1, dtype=float))
    return replace(made, levels=lambda points: made.levels(points) if points < count else every())


def choice(count: int, *, init: int = 0) -> Range:
    """One of `count` possibilities, as a one-hot vector [count] of floating type.

    Map: one-hot of the largest raw value, of which every derivative is zero (see `integers`). Raw
    values are standard normal when sampled, which makes all possibilities as likely; perturbed
    around a mean they are a random utility model. At `init` the raw values are the one-hot vector.

    A raw value that is NaN makes all of it NaN. Raises ValueError unless count >= 2 and
    0 <= init < count; `unconstrain` does for what is not one-hot.
    """
    _checks.positive_int("choice", "count", count, least=2)
    if not isinstance(init, int) or not 0 <= init < count:
        raise ValueError(f"choice: `init` must be an integer in [0, {count}); got {init!r}.")

    def forward(raw: jax.Array) -> jax.Array:
        chosen = jax.nn.one_hot(jnp.argmax(raw, axis=-1), count, dtype=raw.dtype)
        return jnp.where(jnp.isnan(raw).any(axis=-1, keepdims=True), jnp.nan, chosen)

    made = _make(
        "choice", forward, lambda value: value, jax.scipy.special.ndtri, -0.5, 1.5,
        np.eye(count)[init], (count,), "linear",
    )  # fmt: skip
    return replace(made, levels=lambda points: jnp.eye(count, dtype=float), faults=_not_one_hot)


def _make(where, forward, inverse, quantile, low, high, init, shape, scale) -> Range:
    if np.shape(init) not in ((), tuple(shape)):
        raise ValueError(
            f"{where}: `init` must be a number or have shape {tuple(shape)}; got {np.shape(init)}."
        )
    faults = out_of_range("init", init, low, high)
    if faults:
        raise ValueError(f"{where}: {'; '.join(faults)}.")
    midpoints = lambda points: quantile((jnp.arange(points, dtype=float) + 0.5) / points)
    outside = lambda name, x: out_of_range(name, x, low, high)
    distributions = {_logit: jax.nn.sigmoid, jax.scipy.special.ndtri: jax.scipy.special.ndtr}
    return Range(
        forward, inverse, quantile, distributions[quantile], low, high, init, tuple(shape), scale,
        midpoints, outside,
    )  # fmt: skip


def inverse_softplus(y):
    """y + log(1 - exp(-y)), which does not overflow for a large y."""
    return y + jnp.log(-jnp.expm1(-y))


def _logit(p):
    return jnp.log(p) - jnp.log1p(-p)


def _not_one_hot(name: str, x) -> list[str]:
    x = _checks.entries(x)
    if x is None or (np.isin(x, (0, 1)).all() and (x.sum(axis=-1) == 1).all()):
        return []
    return [f"{name} is {np.array2string(x)}, which is not one-hot"]


def out_of_range(name, x, low, high) -> list[str]:
    x = _checks.entries(x)
    if x is None:
        return []  # a traced value has no number yet; the map itself stays well defined
    if np.isnan(x).any():
        return [f"{name} is NaN; pass a number in ({low:g}, {high:g})"]
    if not ((x > low) & (x < high)).all():
        return [f"{name} is {np.array2string(x)}, outside ({low:g}, {high:g})"]
    return []


def _check_bounds(where, low, high, *, least) -> None:
    if not (least < low < high < math.inf):
        rule = "0 < low < high" if least == 0 else "finite low < high"
        raise ValueError(f"{where}: expected {rule}; got low={low!r}, high={high!r}.")


def _check_scale(where, scale) -> None:
    if not 0 < scale < math.inf:
        raise ValueError(f"{where}: `scale` must be positive and finite; got {scale!r}.")
