"""A population hypergradient: what replicas' scores say about the bias of their own gradients.

P replicas at hyperparameters h_r = h + d_r, sum d_r = 0, each with a score L_r and a hypergradient
g_r of its own. Neither is enough. The g_r are precise but may be biased: truncated, first-order, or
blind to effects beyond their horizon. The secants between scores have no such bias but are noisy:
regressing L_r on d_r gives the gradient at h (the zero-order signal of HDET, arXiv 2604.24708),
with a variance that grows as the spread shrinks, and with curvature leaking in as it grows.

Combined, the first is a control variate for the second. Let G and H be gradient and Hessian of the
true score at h, and g_r = G + b + H d_r with a bias b. The replicas' own gradients predict
differences of score by the trapezoidal rule,

    c_r = d_r . (g_r + g) / 2 = d_r . (G + b) + d_r' H d_r / 2,        g = mean_r g_r = G + b,

and what is left of the scores, r_r = (L_r - c_r) - mean = -d_r . b + noise, is linear in the
offsets whatever H: curvature has cancelled. Its slope

    s = (D'D)^-1 D'r,        E s = -b,

measures the bias, and g + s is unbiased. It is also the secant of L - c plus the known slope of c:
a control variate whose coefficient is 1.

The slope is only as good as the scores. Under a prior b ~ N(0, t (D'D)^-1) (as uncertain in each
direction as the design is coarse) the posterior mean is s shrunk by one factor, which the usual
F statistic estimates,

    F = |D s|^2 / (D n^2),    n^2 = |r - D s|^2 / (P - 1 - D),    gradient = g + max(0, 1 - 1/F) s,

so that replicas which carry no information leave the first-order hypergradient alone. The factor
does not depend on units: it is the same after any linear change of hyperparameters.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _checks, _fan_out, _tree
from ._types import Carry, Estimate, Estimator, HParams, Key, Params, PyTree, Scalar, Split
from .evolution._common import own_key


class SecantInfo(NamedTuple):
    """The parts of a combined hypergradient."""

    first_order: HParams  # mean of the replicas' own
    secant: HParams  # from the scores alone
    correction: HParams  # the slope s before it is shrunk
    share: Scalar  # of the correction that was applied, in [0, 1]
    noise: Scalar  # standard deviation n of a score
    diverged: jax.Array  # bool [P]: left out
    rank: jax.Array  # int32: directions that the offsets span; in others it is first-order


class SecantCarry(NamedTuple):
    """The carry of `secant`."""

    members: Carry  # [P, ...], of the estimator inside
    offsets: HParams  # [P, ...], raw
    key: Key
    age: jax.Array  # int32: estimates since the offsets were drawn


def secant_gradient(
    scores: jax.Array, hparams: HParams, grads: HParams, *, noise: float | Scalar | None = None
) -> tuple[HParams, SecantInfo]:
    """The hypergradient at the mean of P replicas, from scores [P] and their own hypergradients.

    Leaves of `hparams` and `grads` are [P, ...]. Exact for a quadratic score without noise and a
    constant bias, for any Hessian and spread, in the directions that the replicas span; in others
    it is the first-order mean. `noise` is the standard deviation of a score, if it is known.
    Without it, it is estimated from what the regression leaves, for which P must be at least two
    more than the number D of scalars; with as many diverged replicas as leave fewer than that, the
    correction is dropped (`share` is 0).

    Replicas whose score, hyperparameters or gradient are not finite are left out; without any left
    the gradient is NaN. Half precision is computed in float32. Raises ValueError if P is too small
    or the leaves disagree on it.
    """
    _check_sizes(scores, hparams, grads, noise)
    h, g = (_matrix(x) for x in (hparams, grads))
    sound = jnp.isfinite(scores) & jnp.isfinite(h).all(1) & jnp.isfinite(g).all(1)
    mean = lambda x: _fan_out.masked_mean(sound, x)
    keep = lambda x: _tree.where(sound, x, jnp.zeros_like(x))
    # From one of them, so that equal ones are exactly zero: their rounding would span directions.
    apart = keep(h - h[jnp.argmax(sound)][None])
    offsets = keep(apart - mean(apart)[None])
    first = mean(g)
    scores = keep(scores.astype(h.dtype))
    predicted = jnp.sum(offsets * keep(g + first[None]), axis=1) / 2
    centred = lambda x: keep(x - mean(x))
    regress, rank = _regression(offsets)
    correction, fitted = regress(centred(scores - predicted))
    secant, _ = regress(centred(scores))
    left = jnp.sum((centred(scores - predicted) - fitted) ** 2)
    freedom = sound.sum() - 1 - rank
    if noise is None:
        variance = jnp.where(freedom > 0, left / jnp.maximum(freedom, 1), jnp.inf)
    else:
        variance = jnp.asarray(noise, h.dtype) ** 2
    explained = jnp.sum(fitted**2)
    known = explained > rank * variance
    ratio = jnp.where(known, rank * variance, 0) / jnp.where(known, explained, 1)
    share = jnp.where(known, 1 - ratio, 0)
    grad = jnp.where(sound.any(), first + share * correction, jnp.nan)
    tree = lambda x: _untangle(x, hparams)
    info = SecantInfo(
        tree(first), tree(secant), tree(correction), share, jnp.sqrt(variance), ~sound, rank
    )
    return tree(grad), info


def secant(
    estimator: Estimator,
    key: Key,
    *,
    size: int,
    width: float | PyTree,
    every: int | None = None,
    noise: float | Scalar | None = None,
) -> Estimator:
    """`estimator` in `size` replicas around the hyperparameters, combined by `secant_gradient`.

    Replicas have carries of their own, and offsets evenly spaced over -+ `width` (a number, or a
    tree of them) in raw units, in an order of its own for every scalar and in pairs of opposite
    ones, which keeps curvature out of the slopes. Take three replicas or more per scalar: with two,
    a quarter of all draws for two scalars span but one direction (`SecantInfo.rank`). Replicas keep
    both from one estimate to the next: their scores then tell of effects over all this time,
    far beyond the horizon of one estimate. All replicas get the same split.

    Every `every` estimates they converge, as in HDET: carries become their mean (over floating
    leaves) and offsets are drawn anew; None never does. A replica that diverged is left out and
    goes on from the carry of one that did not. The value of the estimate is the mean score.

    The carry is a `SecantCarry`, the info a `SecantInfo`. Costs `size` estimates. Raises ValueError
    for fewer replicas than `secant_gradient` needs, or a width that is not finite and >= 0.
    """
    _checks.has_functions("secant", "estimator", estimator, ("init", "estimate"))
    _checks.positive_int("secant", "size", size, least=2)
    if every is not None:
        _checks.positive_int("secant", "every", every)

    def draw(key: Key, hparams: HParams) -> HParams:
        widths = _widths(width, hparams)
        spread = _fan_out.mirrored(key, size, hparams)
        return jax.tree.map(lambda o, w: (o * w).astype(o.dtype), spread, widths)

    def init(params: Params, hparams: HParams) -> SecantCarry:
        one = estimator.init(params, hparams)
        members = jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x))), one)
        now, later = jax.random.split(own_key(key, params, hparams))
        age = jnp.zeros((), jnp.int32)
        carry = _tree.strong(SecantCarry(members, draw(now, hparams), later, age))
        return _tree.vary_like(carry, (params, hparams))

    def estimate(hparams: HParams, carry: SecantCarry, split: Split):
        around = jax.tree.map(lambda x, d: x[None] + d, hparams, carry.offsets)
        each, members = jax.vmap(estimator.estimate, (0, 0, None))(around, carry.members, split)
        sound = jnp.isfinite(each.value) & jax.vmap(_tree.all_finite)((each.grad, members))
        scores = jnp.where(sound, each.value, jnp.nan)
        grad, info = secant_gradient(scores, around, each.grad, noise=noise)
        grad = _tree.cast_like(grad, hparams)
        donor = jnp.where(sound, jnp.arange(size), jnp.argmax(sound))
        members = _tree.vary_like(members, donor)
        members = lax.cond(sound.all(), lambda: members, lambda: _tree.take(members, donor))
        value = jnp.where(sound.any(), _fan_out.masked_mean(sound, each.value), jnp.nan)
        carry = SecantCarry(members, carry.offsets, carry.key, carry.age + 1)
        return Estimate(value, grad, info), _converge(carry, hparams)

    def _converge(carry: SecantCarry, hparams: HParams) -> SecantCarry:
        if every is None:
            return carry

        def anew():
            now, later = jax.random.split(carry.key)
            members = _fan_out.average(carry.members, jnp.ones(size, bool))
            new = SecantCarry(members, draw(now, hparams), later, jnp.zeros_like(carry.age))
            return _tree.vary_like(new, carry)

        return lax.cond(carry.age == every, anew, lambda: carry)

    return Estimator(init, estimate)


def _regression(offsets):
    """Least squares on centred offsets [P, D], of least norm: y -> (slope, fitted); its rank."""
    scale = jnp.sqrt(jnp.sum(offsets**2, axis=0))
    scale = jnp.where(scale > 0, scale, 1)
    u, s, v = jnp.linalg.svd(offsets / scale[None], full_matrices=False)
    tiny = 10 * max(offsets.shape) * jnp.finfo(offsets.dtype).eps
    spans = s > tiny * jnp.max(s, initial=0)

    def regress(y):
        along = jnp.where(spans, u.T @ y, 0)
        slope = v.T @ (along / jnp.where(spans, s, 1)) / scale
        return slope, u @ along

    return regress, spans.sum(dtype=jnp.int32)


def _matrix(tree: HParams) -> jax.Array:
    """[P, D]."""
    rows = jnp.concatenate([jnp.reshape(x, (x.shape[0], -1)) for x in jax.tree.leaves(tree)], 1)
    return rows.astype(jnp.promote_types(rows.dtype, jnp.float32))  # no decomposition in less


def _untangle(vector: jax.Array, like: HParams) -> HParams:
    """Leaves [...] for those [P, ...] of `like`."""
    leaves, tree = jax.tree.flatten(like)
    out, start = [], 0
    for x in leaves:
        shape = jnp.shape(x)[1:]
        stop = start + jnp.size(x) // jnp.shape(x)[0]
        out.append(vector[start:stop].reshape(shape).astype(x.dtype))
        start = stop
    return tree.unflatten(out)


def _widths(width, hparams: HParams) -> HParams:
    single = jax.tree.structure(width) == jax.tree.structure(0.0)
    widths = jax.tree.map(lambda _: width, hparams) if single else width
    if jax.tree.structure(widths) != jax.tree.structure(hparams):
        raise ValueError(
            "secant: `width` must be a number, or one per leaf in the structure of `hparams`, "
            f"{jax.tree.structure(hparams)}; got {jax.tree.structure(width)}."
        )
    for x in jax.tree.leaves(widths):
        _checks.number("secant", "width", x)
    return widths


def _check_sizes(scores, hparams, grads, noise) -> None:
    trees = {"hparams": hparams, "grads": grads}
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves((scores, trees))}
    if len(sizes) != 1 or jnp.ndim(scores) != 1:
        named = jax.tree_util.tree_leaves_with_path({"scores": scores, **trees})
        listing = ", ".join(f"{_checks.path(k)}: {_checks.describe(x)}" for k, x in named)
        raise ValueError(
            "secant_gradient: `scores` must be [P], and every leaf of `hparams` and `grads` "
            f"[P, ...]; got {listing}."
        )
    _checks.same_tree("secant_gradient", "grads", grads, "`hparams`", hparams)
    if noise is not None:
        _checks.number("secant_gradient", "noise", noise)
    ((size,),) = sizes
    count = _tree.size(hparams) // size
    if noise is None and size < count + 2:
        raise ValueError(
            f"secant_gradient: {size} replicas are too few to tell the noise of {count} slopes; "
            f"take {count + 2} or more, or pass the standard deviation of a score as `noise`."
        )
