"""Learning curves continued by regression (Baker et al. 2017, arXiv 1705.10823): how good will a
training become that has run for a while, and is it worth going on?"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from .. import _checks


class CurveModels(NamedTuple):
    """One ridge regression for each length of the known part: row t - 1 is for t points."""

    weights: jax.Array  # [T, F], of features that are centred and scaled
    centre: jax.Array  # [F]
    scale: jax.Array  # [F]
    offset: jax.Array  # [T]: the mean of the final scores
    penalty: jax.Array  # [T]
    deviation: jax.Array  # [T]: root mean square of the leave-one-out residuals
    residuals: jax.Array  # [T, n]: final score minus the prediction of a fit without that curve


class Forecast(NamedTuple):
    """The final score, as a normal distribution."""

    mean: jax.Array
    deviation: jax.Array


PENALTIES = tuple(10.0**k for k in range(-3, 4))


def fit_curves(
    curves: jax.Array, traits: jax.Array, *, penalties: tuple[float, ...] = PENALTIES
) -> CurveModels:
    """Regressions of the last point of a curve on its first t points, for every t at once.

    Features are the known part of the curve, its first and second differences, and `traits`:
    whatever else is known of a training, such as raw hyperparameters and numbers of parameters.
    Each is centred and scaled by its deviation over the curves given. The paper's regression is a
    support vector machine or ordinary least squares; this one is ridge, in closed form, with the
    penalty (a multiple of the number of curves) that has the smallest leave-one-out error, and that
    error for the deviation, in place of a cross-validation. A curve with a point that is not
    finite is left out.

    Args:
      curves: [n, T], of completed trainings; a smaller score is better.
      traits: [n, H]; H may be 0.

    Curves in half precision are taken as float32. Raises ValueError unless both are matrices with
    n >= 3 rows, and penalties are positive.
    """
    curves, traits = _check_curves(curves, traits)
    for value in penalties:
        _checks.number("fit_curves", "penalties", value, positive=True)
    length = curves.shape[1]
    known = jnp.isfinite(curves).all(1) & jnp.isfinite(traits).all(1)
    weight = known.astype(curves.dtype)
    total = jnp.maximum(weight.sum(), 1)
    mean = lambda x: jnp.where(known[:, None], x, 0).sum(0) / total
    features = _features(curves, traits)
    # Away from a row of their own, so that features without any spread have exactly none.
    row = jnp.where(known.any(), features[jnp.argmax(known)], 0)
    centre = row + mean(features - row[None])
    centred = jnp.where(known[:, None], features - centre[None], 0)
    scale = jnp.sqrt((centred**2).sum(0) / total)
    scale = jnp.where(scale > 0, scale, 1)
    scaled = centred / scale[None]
    offset = mean(curves[:, -1:])[0]
    target = jnp.where(known, curves[:, -1] - offset, 0)
    strengths = jnp.asarray(penalties, curves.dtype) * total

    def fit(t):
        usable = scaled * _usable(t, length, traits.shape[1])[None].astype(scaled.dtype)
        return _ridge(usable, target, weight, strengths)

    weights, penalty, residuals = jax.lax.map(fit, jnp.arange(1, length + 1))
    residuals = jnp.where(known[None], residuals, jnp.nan)
    square = jnp.where(known[None], residuals**2, 0).sum(1) / total
    # Two curves say nothing of a third, and without any there is no model.
    deviation = jnp.where(weight.sum() >= 3, jnp.sqrt(square), jnp.nan)
    return CurveModels(
        weights, centre, scale, jnp.full(length, offset), penalty, deviation, residuals
    )


def _ridge(x, y, weight, strengths):
    """(weights, penalty, leave-one-out residuals) of the best strength; rows of weight 0 are 0.

    With an intercept that is not penalized, predictions are H y with H = ww'/n + K (K + s)^-1, K
    the Gram matrix of centred rows; leaving row i out, its residual is r_i / (1 - H_ii). The
    centre and the scale of the features are not fitted again: the first is absorbed in the
    intercept, the second only defines the penalty.
    """
    values, vectors = jnp.linalg.eigh(x @ x.T)
    values = jnp.maximum(values, 0)
    rotated = vectors.T @ y
    mean = weight / jnp.maximum(weight.sum(), 1)

    def leave_out(strength):
        shrink = values / (values + strength)
        leverage = mean + (vectors**2) @ shrink
        rest = y - vectors @ (shrink * rotated)
        return jnp.where(weight > 0, rest / (1 - jnp.where(weight > 0, leverage, 0)), 0)

    residuals = jax.vmap(leave_out)(strengths)
    best = jnp.argmin((residuals**2).sum(1))
    dual = vectors @ (rotated / (values + strengths[best]))
    return x.T @ dual, strengths[best], residuals[best]


def predict_curve(
    models: CurveModels, curve: jax.Array, traits: jax.Array, known: jax.Array | int
) -> Forecast:
    """The final score of a training of which the first `known` points of `curve` are there.

    `curve` is [..., T], the rest of it is not looked at; `traits` is [..., H]; `known` from 1 to T
    may be traced. The forecast is [...]. Where a known point or a trait is not finite the mean is
    inf: the training has failed.

    Raises ValueError at trace time unless the shapes are those of the fit.
    """
    length = models.offset.shape[0]
    width = models.centre.shape[0] - _curve_features(length)
    curve, traits = jnp.asarray(curve), jnp.asarray(traits)
    if curve.shape[-1:] != (length,) or traits.shape != (*curve.shape[:-1], width):
        raise ValueError(
            f"predict_curve: `curve` must be [..., {length}] and `traits` [..., {width}], as in "
            f"the fit; got {_checks.describe(curve)} and {_checks.describe(traits)}."
        )
    given = _checks.entries(known)
    if given is not None and (given.dtype.kind not in "iu" or not 1 <= given <= length):
        raise ValueError(
            f"predict_curve: `known` must be an integer from 1 to {length}; got {known}."
        )
    batch = curve.shape[:-1]
    seen = (jnp.arange(length) < known)[None]
    rows = math.prod(batch)  # not -1: there may be no traits
    part = jnp.where(seen, curve.reshape(rows, length), 0)
    rest = traits.reshape(rows, width).astype(part.dtype)
    sound = jnp.isfinite(part).all(1) & jnp.isfinite(rest).all(1)
    scaled = (_features(part, rest) - models.centre[None]) / models.scale[None]
    scaled = jnp.where(_usable(known, length, width)[None], scaled, 0)
    row = jnp.asarray(known) - 1
    mean = scaled @ models.weights[row] + models.offset[row]
    mean = jnp.where(sound, mean, jnp.inf).reshape(batch)
    return Forecast(mean, jnp.broadcast_to(models.deviation[row], batch))


def outclassed(forecast: Forecast, best: jax.Array | float) -> jax.Array:
    """The probability that the final score will not be below `best`: Phi((mean - best) / sigma).

    Stop where it is `confidence` or more (the paper: 0.95 or 0.99). 1 for a failed training.
    """
    gap = forecast.mean - best
    sure = jnp.where(gap >= 0, 1.0, 0.0).astype(gap.dtype)
    safe = jnp.where(forecast.deviation > 0, forecast.deviation, 1)
    normal = norm.cdf(gap / safe)
    found = jnp.where(forecast.deviation == 0, sure, normal)
    failed = jnp.isposinf(forecast.mean)
    return jnp.where(failed, 1, jnp.where(jnp.isnan(forecast.deviation), jnp.nan, found))


def _curve_features(length: int) -> int:
    return length + max(length - 1, 0) + max(length - 2, 0)


def _features(curves: jax.Array, traits: jax.Array) -> jax.Array:
    """[..., F]: points, first and second differences, traits."""
    slopes = jnp.diff(curves, axis=-1)
    return jnp.concatenate([curves, slopes, jnp.diff(slopes, axis=-1), traits], axis=-1)


def _usable(known, length: int, width: int) -> jax.Array:
    """bool [F]: the features that need no more than the first `known` points."""
    last = [jnp.arange(length), jnp.arange(1, length), jnp.arange(2, length)]
    return jnp.concatenate([*last, jnp.full(width, -1)]) < known


def _check_curves(curves, traits):
    curves, traits = jnp.asarray(curves), jnp.asarray(traits)
    fit = curves.ndim == traits.ndim == 2 and len(curves) == len(traits) >= 3 and curves.shape[1]
    if not fit or not jnp.issubdtype(curves.dtype, jnp.floating):
        raise ValueError(
            "fit_curves: `curves` must be floats [n, T] and `traits` [n, H], with a row for each "
            f"of 3 trainings or more; got {_checks.describe(curves)} and "
            f"{_checks.describe(traits)}."
        )
    dtype = jnp.promote_types(curves.dtype, jnp.float32)
    return curves.astype(dtype), traits.astype(dtype)
