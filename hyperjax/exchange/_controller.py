"""The controller of HDET (arXiv 2604.24708, with the authors' code): replicas whose
hyperparameters are spread around a base, and a base that follows the better ones.

What the controller is: for small differences of score the softmax is linear, and with losses L_r
of members with relative offsets x_r

    signal = sum_r w_r x_r - mean_r x_r  ~  -Cov(L, x) / sigma  ~  -(Var(x) / sigma) dL/dx,
    Var(x) = width^2 (P + 1) / (3 (P - 1)),

a zero-order gradient step of known gain. Since |x_r| <= width, |signal| <= width: one convergence
moves log base by at most gain * width, and a rate that is wrong by a factor R needs at least
log(R) / (gain * width) of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _fan_out, _tree
from .._ranges import Range
from .._space import Space
from .._types import HParams, Key, PyTree

_MARGIN = 1e-3  # of the logarithmic width of a range, kept from either end
_SURPRISE = 100.0  # times the running variance is what a convergence adds to it at most


class Settings(NamedTuple):
    """Of the controller; see `hdet`."""

    space: Space
    width: PyTree  # a number per range
    gain: float
    momentum: float
    sigma: float | str
    update: str
    decay: PyTree  # a number per range
    warm_up: int


class Base(NamedTuple):
    """Where the controller is."""

    calls: jax.Array  # int32: convergences so far
    raw: HParams  # the centre
    velocity: HParams  # mean signal, of the update's own unit
    assigned: HParams  # [P, ...], raw: what members were given last
    variance: jax.Array  # running mean of that of the scores; 0 before there was any


class Report(NamedTuple):
    signal: HParams  # relative for ranges on a log scale, in raw units otherwise
    bounded: HParams  # bool: the base was kept inside its range


def settings(where, space, width, gain, momentum, sigma, update, decay, warm_up) -> Settings:
    if not isinstance(space, Space):
        raise TypeError(f"{where}: `space` must be a Space; got {type(space).__name__}.")
    _checks.number(where, "gain", gain)
    _checks.one_of(where, "update", update, ("log", "linear"))
    _checks.positive_int(where, "warm_up", warm_up, least=0)
    if not 0 <= momentum < 1:
        raise ValueError(f"{where}: `momentum` must be in [0, 1); got {momentum!r}.")
    if sigma != "running":
        _checks.number(where, "sigma", sigma, positive=True)
    width, decay = (_per_range(where, n, x, space) for n, x in (("width", width), ("decay", decay)))
    named = jax.tree_util.tree_leaves_with_path(space.ranges)
    for (keys, r), alpha in zip(named, jax.tree.leaves(width), strict=True):
        _checks.number(where, "width", alpha)
        if r.scale == "log" and not (alpha < 1 and _bounds(r, alpha)[0] < _bounds(r, alpha)[1]):
            raise ValueError(
                f"{where}: `width` {alpha!r} does not fit into the range of "
                f"{_checks.dotted(keys) or 'the value'}, ({r.low:g}, {r.high:g}); on a log scale "
                "it is a share of the value, below 1."
            )
    return Settings(space, width, gain, momentum, sigma, update, decay, warm_up)


def begin(settings: Settings, hparams: HParams) -> Base:
    """From the members' raw hyperparameters [P, ...], whose mean is the base."""
    settings.space.check("hdet", hparams)
    hparams = _tree.strong(hparams)
    # As one of them and what the others differ, which is exact where all are equal.
    centre = jax.tree.map(lambda x: x[0] + (x - x[:1]).mean(0), hparams)
    variance = jnp.zeros((), jnp.result_type(float))
    zero = jnp.zeros((), jnp.int32)
    return _tree.strong(Base(zero, centre, _tree.zeros_like(centre), hparams, variance))


def fan(settings: Settings, key: Key, raw: HParams, size: int) -> Base:
    """From a base without a leading axis, with `size` members around it."""
    settings.space.check("hdet", raw)
    base = begin(settings, _assign(settings, key, raw, size))
    return base._replace(raw=_tree.cast_like(raw, base.raw))


def follow(
    settings: Settings, key: Key, base: Base, hparams: HParams, scores: jax.Array
) -> tuple[Base, Report]:
    """The base moved towards the better members, and new hyperparameters for all.

    `scores` [P] are NaN for diverged members: these count as the worst possible, with weight zero.
    Without any member left the base stays.
    """
    size = scores.shape[0]
    finite = jnp.isfinite(scores)
    weights, variance = _weights(settings, base, scores)
    about = jax.tree.map(_relative, settings.space.ranges, base.raw, base.assigned)
    signal = jax.tree.map(lambda x: _lean(weights, x), about)
    moves = (base.calls >= settings.warm_up) & finite.any()
    signal = jax.tree.map(lambda x: jnp.where(moves, x, 0), signal)
    # Members that descend by themselves take the base with them; exactly zero if they do not.
    drift = jax.tree.map(lambda x, y: _fan_out.masked_mean(finite, x - y), hparams, base.assigned)
    centre = jax.tree.map(jnp.add, base.raw, drift)
    raw, velocity, bounded = _step(settings, moves, centre, base.velocity, signal)
    new = Base(base.calls + 1, raw, velocity, _assign(settings, key, raw, size), variance)
    return _tree.cast_like(new, base), Report(signal, bounded)


def _assign(settings: Settings, key: Key, raw: HParams, size: int) -> HParams:
    """Raw hyperparameters of `size` members around the base, [size, ...]."""
    spread = _fan_out.offsets(key, size, raw)
    near = lambda r, x, width, offset: _shifted(r, x[None], width * offset, 0.0)[0]
    return jax.tree.map(near, settings.space.ranges, raw, settings.width, spread)


def _weights(settings: Settings, base: Base, scores):
    """Softmax of the scores in units of their deviation [P], and the running variance.

    One exploding loss would outweigh hundreds of others in its mean, and so is cut.
    """
    # Whose square has no place in the type is as bad as one that diverged.
    finite = jnp.isfinite(4.0 * scores.shape[0] * scores**2)
    scores = jnp.where(finite, scores, 0)
    # As one of them and what the others differ, which is exact where all are equal.
    one = scores[jnp.argmax(finite)]
    centred = jnp.where(finite, scores - one - _fan_out.masked_mean(finite, scores - one), 0)
    variance = _fan_out.masked_mean(finite, centred**2)
    # Differences by rounding are neither signal nor scale.
    tells = variance > (jnp.finfo(scores.dtype).eps * jnp.abs(scores).max()) ** 2
    beta, last = settings.momentum, base.variance.astype(scores.dtype)
    mixed = beta * last + (1 - beta) * jnp.minimum(variance, _SURPRISE * last)
    running = jnp.where(tells, jnp.where(last > 0, mixed, variance), last)
    sigma = jnp.sqrt(running) if settings.sigma == "running" else jnp.asarray(settings.sigma)
    sigma = jnp.maximum(jnp.where(tells, sigma, jnp.inf), jnp.finfo(scores.dtype).tiny)
    logits = jnp.where(finite, -centred / sigma, -jnp.inf)
    weights = jax.nn.softmax(jnp.where(finite.any(), logits, 0))
    return weights, running


def _lean(weights, x):
    """How far the weighted mean lies from the plain one, along the leading axis."""
    centred = x - x.mean(0, keepdims=True)
    return jnp.tensordot(weights.astype(x.dtype), centred, 1)


def _step(settings: Settings, moves, centre, velocity, signal):
    """(raw, velocity, bounded): momentum, gain and decay, in the unit of the update."""
    beta = settings.momentum

    def one(r: Range, raw, v, s, width, decay):
        log, linear = r.scale == "log", r.scale == "log" and settings.update == "linear"
        value = r.forward(raw) if linear else jnp.ones_like(raw)
        v = jnp.where(moves, beta * v + (1 - beta) * s * value, v)
        gamma = jnp.where(moves, decay, 0)
        push = jnp.where(moves, settings.gain * v / value, 0)
        by = jnp.expm1(push - gamma) if log else push - gamma
        by = jnp.expm1(-gamma) + push if linear else by
        raw, bounded = _shifted(r, raw, by, width)
        return raw, v, bounded

    ranges = settings.space.ranges
    rows = jax.tree.map(one, ranges, centre, velocity, signal, settings.width, settings.decay)
    return jax.tree.transpose(jax.tree.structure(ranges), jax.tree.structure((0, 0, 0)), rows)


def _relative(r: Range, centre, raw):
    if r.scale == "log":
        return r.forward(raw) / r.forward(centre)[None] - 1
    return raw - centre[None]


def _bounds(r: Range, width: float) -> tuple[float, float]:
    """Of a base on a log scale whose members at 1 -+ width stay inside."""
    margin = (r.high / r.low) ** _MARGIN
    return r.low * margin / (1 - width), r.high / margin / (1 + width)


def _shifted(r: Range, raw, by, width: float):
    """(raw, bounded): the value times 1 + by on a log scale, else the raw value plus by.

    On a log scale it stays inside the range. Bit for bit the same where `by` is zero, which a way
    through the bijector would not be.
    """
    if r.scale != "log":
        return raw + by, jnp.zeros(jnp.shape(raw), bool)
    low, high = _bounds(r, width)
    wanted = r.forward(raw) * (1 + by)
    moved = jnp.where(by == 0, raw, r.inverse(jnp.clip(wanted, low, high)))
    return moved, (by != 0) & ((wanted < low) | (wanted > high))


def _per_range(where, name, value, space: Space):
    shape = jax.tree.structure(space.ranges)
    if jax.tree.structure(value) == shape:
        return value
    if jax.tree.structure(value) != jax.tree.structure(0.0):
        raise ValueError(
            f"{where}: `{name}` must be a number, or one per range in the structure of the space, "
            f"{shape}; got {jax.tree.structure(value)}."
        )
    return jax.tree.map(lambda _: value, space.ranges)
