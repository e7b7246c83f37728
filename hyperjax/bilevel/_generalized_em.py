"""Generalized EM for few-shot classification, a layer per iteration, with tunable settings."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks, _tree
from .._types import HParams, PyTree, Response, Scalar
from .._unroll import unroll
from . import _dirichlet


class Episode(NamedTuple):
    """A few-shot task: some labelled examples of every class, and queries to be classified."""

    support: jax.Array  # [examples, features]
    labels: jax.Array  # [examples], integers in [0, classes)
    query: jax.Array  # [queries, features]


class EMSettings(NamedTuple):
    """Scalars, the same in all layers, or [layers]; `scale` is a scalar."""

    balance: Scalar | float  # >= 0: how much classes with few queries are held to be absent
    temperature: Scalar | float  # > 0: how soft assignments are
    scale: Scalar | float  # > 0, of the features


class EMState(NamedTuple):
    """State of generalized EM on one episode."""

    params: jax.Array  # [queries, classes]: ln u, the logarithm of the assignments
    classes: PyTree  # theta, what is estimated for each class: leaves [classes, features]
    log_share: jax.Array  # [classes]: ln pi, the share of the queries that each class has
    episode: Episode | None  # None where it is kept beside the state


class GeneralizedEM(NamedTuple):
    """EM on one episode: `init(episode, hparams)`, `step(state, hparams, layer)`.

    `check(episodes)`, leaves [episodes, ...], raises ValueError for what is wrong with those whose
    entries are known; `transduce` calls it, since under its vmap nothing is known.
    """

    init: Callable[[Episode, HParams], EMState]
    step: Callable[[EMState, HParams, jax.Array | int], EMState]
    check: Callable[[Episode], None] = lambda episodes: None


class _Family(NamedTuple):
    """Densities p(z | theta). Weights of examples are [examples, classes]."""

    check: Callable  # (where, episode or episodes)
    start: Callable  # (support, weights, scale) -> theta
    fit: Callable  # (theta, features, weights, scale) -> theta
    log_density: Callable  # (theta, features, scale) -> [examples, classes], up to a term in z


def gaussian_em(
    classes: int, *, settings: Callable[[HParams], EMSettings] = lambda h: h
) -> GeneralizedEM:
    """Generalized EM with p(z | theta_k) = N(theta_k, I) on features multiplied by a scale.

    A step is one iteration, or one layer. With u the assignments of the queries to classes and
    pi_k = mean of u_k over the |Q| queries, it descends

        - sum over the support of ln p(z | theta_y) - sum_nk u_nk ln p(z_n | theta_k)
        - balance |Q| sum_k pi_k ln pi_k + temperature sum_nk u_nk ln u_nk

    by u = softmax((ln p + balance ln pi) / temperature), which minimizes it with the concave term
    in pi replaced by its tangent, and then theta, pi from u. It never goes up, whatever the
    settings; balance = temperature = 1 is EM for a mixture with weights pi, balance = 0 is soft
    k-means. The first theta are the means of the support and the first pi is uniform, so that the
    balance of the first layer has no effect and no gradient.

    `init(episode, hparams)` and `step(state, hparams, layer)` are those of one episode; `transduce`
    makes a response of them, for many episodes. `layer` (int32) is an index into settings of shape
    [layers].

    Args:
      classes: of the support, >= 2. Queries may be of fewer.
      settings: hparams to `EMSettings`; `softplus_settings` for those that are to be learnt.

    Raises ValueError if there is one class, the episode's shapes do not fit or, where they are
    concrete, a label is out of range, a class has no example or a setting is out of range. Labels
    in which one of the first two only shows at run time make all results NaN.

    Reference: Zhou et al. 2025 (arXiv 2412.16739), the Gaussian case, where lambda is balance |Q|;
    their code learns lambda / |Q| too. It takes ln(pi + 1e-6) for ln pi, which here is exact above
    the smallest normal number, and the cross-entropy of probabilities as if they were logits, for
    which see `assignment_loss`.
    """
    return _generalized_em("gaussian_em", classes, settings, _gaussian())


def dirichlet_em(
    classes: int,
    *,
    settings: Callable[[HParams], EMSettings] = lambda h: h,
    fit_steps: int = 10,
) -> GeneralizedEM:
    """Generalized EM with p(z | alpha_k) Dirichlet, for features on the simplex.

    As `gaussian_em`, but for features that are **log**-probabilities, such as
    `jax.nn.log_softmax(logits)` of a classifier or a vision-language model (for probabilities
    themselves, those that underflow would be lost). They are sharpened first: z = softmax(scale *
    features), so that `scale` is an inverse temperature of that classifier.

    The alpha of a layer come from `fit_steps` steps of majorize-minimize from those of the layer
    before (the first: from 1, on the support). None of them lowers the likelihood, so the objective
    of `gaussian_em` never goes up here either. Their number regularizes: with one example a class
    the likelihood of the support alone has no maximum, alpha grows without end. In the paper they
    run to a tolerance of 1e-11.

    Raises ValueError as `gaussian_em` does; also where features are concrete and off the simplex.

    Reference: Zhou et al. 2025 (arXiv 2412.16739), the Dirichlet case. There, features are
    probabilities of the very classes and the first assignments, before any alpha; here they may be
    of any number of other classes, and the first alpha come from the support.
    """
    _checks.positive_int("dirichlet_em", "fit_steps", fit_steps)
    family = _Family(
        _on_simplex,
        lambda z, w, scale: _dirichlet.start(_sharpen(z, scale), w, fit_steps),
        lambda a, z, w, scale: _dirichlet.fit(a, _sharpen(z, scale), w, fit_steps),
        lambda a, z, scale: _dirichlet.log_density(a, _sharpen(z, scale)),
    )
    return _generalized_em("dirichlet_em", classes, settings, family)


def softplus_settings(raw: EMSettings) -> EMSettings:
    """Settings from any numbers: softplus of them, plus 1 for the temperature."""
    soft = jax.nn.softplus
    return EMSettings(soft(raw.balance), 1 + soft(raw.temperature), soft(raw.scale))


def transduce(em: GeneralizedEM, layers: int) -> Response:
    """The response that classifies the queries of many episodes in `layers` steps of `em`.

    `response(hparams, carry, episodes)`, leaves of episodes [episodes, ...], returns ln u
    [episodes, queries, classes] and the carry, which is not used. As a response it is tuned by
    `tune(hypergradient(response, assignment_loss, lambda params, hparams: params), optimizer)` on
    splits of episodes and the labels of their queries.

    Raises ValueError if a leaf of hparams is neither a scalar nor [layers], and what `init` of `em`
    raises for an episode, where episodes are concrete.
    """
    _checks.has_functions("transduce", "em", em, ("init", "step", "check"))
    _checks.positive_int("transduce", "layers", layers)

    def one(hparams: HParams, episode: Episode) -> jax.Array:
        # Beside the state rather than in it, reverse mode keeps one copy of the episode.
        step = lambda s, h, t: em.step(s._replace(episode=episode), h, t)._replace(episode=None)
        start = em.init(episode, hparams)._replace(episode=None)
        return unroll(step)(hparams, start, jnp.arange(layers))[0]

    def respond(hparams: HParams, carry: PyTree, episodes: Episode) -> tuple[jax.Array, PyTree]:
        _checks.count_steps("transduce", episodes)
        faults = [
            f"{_checks.path(k)} is {_checks.describe(x)}"
            for k, x in jax.tree_util.tree_leaves_with_path(hparams)
            if jnp.shape(x) not in ((), (layers,))
        ]
        if faults:
            raise ValueError(
                f"transduce: every leaf of `hparams` must be a scalar or have shape ({layers},), "
                f"an entry per layer; {', '.join(faults)}."
            )
        em.check(episodes)
        return jax.vmap(one, in_axes=(None, 0))(hparams, episodes), carry

    return respond


def assignment_loss(log_assignments: jax.Array, hparams: HParams, labels: jax.Array) -> Scalar:
    """The cross-entropy of ln u [..., classes] with integer labels [...], a mean over queries."""
    del hparams
    picked = jnp.take_along_axis(log_assignments, labels[..., None], axis=-1)
    return -jnp.mean(picked)


# ------------------------------------------------------------------------ the iteration


def _generalized_em(where, classes, settings, family: _Family) -> GeneralizedEM:
    _checks.positive_int(where, "classes", classes, least=2)
    _checks.is_callable(where, "settings", settings)

    def check(episodes: Episode) -> None:
        jax.eval_shape(jax.vmap(lambda episode: _check_shapes(where, episode)), episodes)
        _check_labels(where, episodes.labels, classes)
        family.check(where, episodes)

    def init(episode: Episode, hparams: HParams) -> EMState:
        _check_shapes(where, episode)
        _check_labels(where, episode.labels, classes)
        family.check(where, episode)
        episode = _tree.strong(episode)
        scale = _settings(where, settings, hparams, None, episode.query.dtype).scale
        theta = family.start(episode.support, _one_hot(episode, classes), scale)
        flat = _tree.vary_like(jnp.zeros(classes, episode.query.dtype), (episode, theta))
        log_u = jnp.zeros((len(episode.query), classes), flat.dtype) - jnp.log(1.0 * classes)
        log_u = _tree.vary_like(log_u.astype(flat.dtype), flat)
        return EMState(log_u, theta, flat - jnp.log(1.0 * classes).astype(flat.dtype), episode)

    def step(state: EMState, hparams: HParams, layer: jax.Array | int) -> EMState:
        episode = state.episode
        assert episode is not None
        dtype, queries = episode.query.dtype, len(episode.query)
        now = _settings(where, settings, hparams, layer, dtype)
        logits = family.log_density(state.classes, episode.query, now.scale)
        logits = logits + now.balance * state.log_share[None]
        log_u = jax.nn.log_softmax(logits / now.temperature)
        share = jax.nn.logsumexp(log_u, axis=0) - jnp.log(1.0 * queries).astype(dtype)
        # A class that is gone: the balance would multiply its logarithm without end.
        share = jnp.maximum(share, jnp.log(jnp.finfo(dtype).tiny))
        features = jnp.concatenate([episode.support, episode.query])
        weights = jnp.concatenate([_one_hot(episode, classes), jnp.exp(log_u)])
        theta = family.fit(state.classes, features, weights, now.scale)
        return EMState(log_u, theta, share, episode)

    return GeneralizedEM(init, step, check)


def _one_hot(episode: Episode, classes: int) -> jax.Array:
    """[examples, classes]; NaN for a label out of range, which must not pass for no example."""
    rows = jax.nn.one_hot(episode.labels, classes, dtype=episode.query.dtype)
    inside = (episode.labels >= 0) & (episode.labels < classes)
    return jnp.where(inside[:, None], rows, jnp.nan)


def _settings(where, settings, hparams, layer, dtype) -> EMSettings:
    """Those of one layer, in the type of the features; None is for what all layers share."""
    found = settings(hparams)
    if not isinstance(found, EMSettings):
        raise TypeError(
            f"{where}: `settings(hparams)` must be an EMSettings; got {type(found).__name__}."
        )
    for name, x in found._asdict().items():
        known = _checks.entries(x)
        # "Not above" rather than "below", for NaN.
        good = known is None or np.all(known >= 0 if name == "balance" else known > 0)
        if not good or jnp.ndim(x) > (name != "scale"):
            bound = ">= 0" if name == "balance" else "positive"
            kind = "a scalar" if name == "scale" else "a scalar or [layers]"
            raise ValueError(f"{where}: `{name}` must be {bound}, {kind}; got {x}.")
    pick = lambda x: x[0 if layer is None else layer] if jnp.ndim(x) else x
    return jax.tree.map(lambda x: pick(jnp.asarray(x, dtype)), found)


def _check_shapes(where, episode: Episode) -> None:
    support, labels, query = episode
    shapes = (
        jnp.ndim(support) == jnp.ndim(query) == 2
        and jnp.shape(labels) == jnp.shape(support)[:1]
        and jnp.shape(query)[1:] == jnp.shape(support)[1:]
        and jnp.size(query) > 0
    )
    if not shapes or not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        got = ", ".join(f"{n}: {_checks.describe(x)}" for n, x in episode._asdict().items())
        raise ValueError(
            f"{where}: an episode is support [examples, features], integer labels [examples] and "
            f"query [queries, features]; got {got}. For many episodes use `transduce`, or vmap."
        )
    _checks.differentiable(where, "episode", (support, query))


def _check_labels(where, labels: jax.Array, classes: int) -> None:
    """Of one episode [examples] or of many [episodes, examples]."""
    known = _checks.entries(labels)
    if known is None:
        return
    rows = np.sort(known.reshape(-1, known.shape[-1]))
    inside = np.all((rows >= 0) & (rows < classes), axis=1)
    faults = ~inside | (1 + np.count_nonzero(np.diff(rows), axis=1) != classes)
    if np.any(faults):
        first = int(np.argmax(faults))
        raise ValueError(
            f"{where}: `labels` must name each of the {classes} classes 0 to {classes - 1} at "
            f"least once and no other; got {np.unique(rows[first]).tolist()}"
            + (f" in episode {first}." if known.ndim > 1 else ".")
        )


# ------------------------------------------------------------------------ the families


def _gaussian() -> _Family:
    def fit(theta, z, weights, scale):
        del theta, scale  # the means of scaled features are the scaled means
        return (weights.T @ z) / jnp.sum(weights, axis=0)[:, None]

    def log_density(theta, z, scale):
        # Without |z|^2, which the classes share.
        return scale**2 * (z @ theta.T - jnp.sum(theta**2, axis=1)[None] / 2)

    start = lambda z, weights, scale: fit(None, z, weights, scale)
    return _Family(lambda where, episode: None, start, fit, log_density)


def _sharpen(features: jax.Array, scale: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(scale * features)


def _on_simplex(where, episode: Episode) -> None:
    for name in ("support", "query"):
        known = _checks.entries(getattr(episode, name))
        if known is None:
            continue
        worst = np.max(np.abs(np.sum(np.exp(known), axis=-1) - 1))
        if not worst <= 1e-3 or not np.all(np.isfinite(known)):
            raise ValueError(
                f"{where}: rows of `{name}` must be finite logarithms of probabilities that sum to "
                f"one, as `jax.nn.log_softmax(logits)` makes them; a sum is {worst:.3g} off."
            )
