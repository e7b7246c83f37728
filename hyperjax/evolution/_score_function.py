"""Score-function gradients, for hyperparameters that can only be drawn: REINFORCE."""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._types import (
    Carry,
    Estimate,
    Estimator,
    HParams,
    Key,
    Loss,
    Params,
    PyTree,
    Response,
    Scalar,
    Split,
)
from . import _common


class Distribution(NamedTuple):
    """What is drawn given hparams, and how probable it was."""

    sample: Callable[[Key, HParams], PyTree]
    log_prob: Callable[[HParams, PyTree], Scalar]  # differentiable in hparams


class ScoreFunctionState(NamedTuple):
    """The carry of `score_function`."""

    carry: Carry
    key: Key


class ScoreFunctionInfo(NamedTuple):
    """What was sampled, and how noisy the gradient is."""

    standard_error: HParams  # of each entry of the gradient
    sampled: PyTree  # [samples, ...]
    scores: jax.Array  # [samples]
    diverged: jax.Array  # int32: samples whose score was not finite


def score_function(
    response: Response,
    score: Loss,
    init: Callable[[Params, HParams], Carry],
    distribution: Distribution,
    *,
    key: Key,
    samples: int,
    chunk: int | None = None,
) -> Estimator:
    """The gradient of E S(x), x drawn given hparams, with the leave-one-out baseline.

    For choices that have no derivative: `response` and `score` are given a drawn x where they take
    hparams, and `hparams` holds the parameters of the distribution of x, say logits. grad = mean
    over samples of (S(x_i) - mean of the others' S) d log p(x_i) / d hparams (REINFORCE; baseline
    of Kool, van Hoof, Welling 2019, "Buy 4 REINFORCE samples, get a baseline for free"). It is
    unbiased, since the baseline of x_i is independent of x_i. All of hparams must act through
    `log_prob` alone.

    The standard error counts in that samples share baselines: with n samples, k = 1 / (n - 1)^2
    and s^2 the sample variance of the terms, Cov of two terms is k grad^2, hence
    (s^2 / n + k grad^2) / (1 + k) is unbiased for the variance.

    `value` is the mean score of the samples. All train from the same carry on the same batches; the
    next estimate goes on from the carry of the first sample whose score is finite, which is as good
    a draw as any of these, and from the same carry as before if there is none. `init(params, x)` is
    given one more draw.

    A sample with a score that is not finite is left out and counted; with fewer than two left
    gradient and standard error are NaN. What is left out is not learnt from: a score that maps
    divergence to a large number is.

    Args:
      distribution: `categorical()`, `bernoulli()` or your own.
      key: as of `antithetic`.
      samples: at least 2.
      chunk: runs trained at once; None is all.

    Raises ValueError or TypeError for arguments out of range, hparams that are not floating point,
    or a score that is not a scalar.
    """
    where = "score_function"
    _common.check_factory(where, response, init, key, chunk)
    _checks.has_functions(where, "distribution", distribution, ("sample", "log_prob"))
    _checks.positive_int(where, "samples", samples, least=2)
    score = _checks.scalar_loss(where, "score", score)

    def start(params: Params, hparams: HParams) -> ScoreFunctionState:
        params, hparams = _tree.strong((params, hparams))
        now, later = jax.random.split(_common.own_key(key, params, hparams))
        carry = init(params, distribution.sample(now, hparams))
        return ScoreFunctionState(_tree.strong(carry), later)

    def estimate(hparams: HParams, state: ScoreFunctionState, split: Split):
        _checks.differentiable(where, "hparams", hparams)
        hparams = _tree.strong(hparams)
        now, later = jax.random.split(state.key)
        keys = jax.random.split(now, samples)
        drawn = jax.vmap(distribution.sample, in_axes=(0, None))(keys, hparams)

        def run(x):
            params, carry = response(x, state.carry, split.train)
            return score(params, x, split.valid), carry

        scores, carries = _common.each(run, drawn, chunk)
        steepness = jax.vmap(jax.grad(distribution.log_prob), in_axes=(None, 0))(hparams, drawn)
        value, grad, error = _leave_one_out(scores, steepness)
        info = ScoreFunctionInfo(error, drawn, scores, _common.count_diverged(scores))
        sound = jnp.isfinite(scores)
        chosen = _tree.take(carries, jnp.argmax(sound))  # the first
        carry = _tree.where(jnp.any(sound), chosen, state.carry)
        return Estimate(value, grad, info), ScoreFunctionState(carry, later)

    return Estimator(start, estimate)


def _leave_one_out(scores: jax.Array, steepness: HParams) -> tuple[Scalar, HParams, HParams]:
    """Mean score, gradient and standard error from scores [N] and d log p [N, ...]."""
    sound = jnp.isfinite(scores)
    n = jnp.sum(sound).astype(scores.dtype)
    known = jnp.where(sound, scores, 0)
    value = jnp.sum(known) / n
    # S_i - (n value - S_i) / (n - 1); 0 / 0 for n = 1, where there is no baseline.
    above = jnp.where(sound, (known - value) * n, 0) / (n - 1)
    terms = jax.tree.map(lambda g: _common.rows(above, g) * g, steepness)
    grad, error = _common.mean_and_error(terms, sound)

    def corrected(e, g):
        k = (1 / (n - 1) ** 2).astype(g.dtype)
        return jnp.sqrt((e**2 + k * g**2) / (1 + k))

    return value, grad, jax.tree.map(corrected, error, grad)


def categorical() -> Distribution:
    """Independent choices: logits [..., options] in every leaf, int32 [...] in 0 .. options - 1."""

    def sample(key: Key, logits: HParams) -> PyTree:
        choose = lambda k, x: jax.random.categorical(k, x).astype(jnp.int32)
        return _by_leaf(choose, key, logits)

    def log_prob(logits: HParams, drawn: PyTree) -> Scalar:
        def one(x, i):
            return jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(x), i[..., None], axis=-1))

        return _total(jax.tree.map(one, logits, drawn))

    return Distribution(sample, log_prob)


def bernoulli() -> Distribution:
    """Independent switches: logits of any shape, drawn as 0 or 1 in their shape and type."""

    def sample(key: Key, logits: HParams) -> PyTree:
        switch = lambda k, x: jax.random.bernoulli(k, jax.nn.sigmoid(x)).astype(x.dtype)
        return _by_leaf(switch, key, logits)

    def log_prob(logits: HParams, drawn: PyTree) -> Scalar:
        one = lambda x, on: jnp.sum(on * x - jax.nn.softplus(x))  # log sigmoid(x) or of -x
        return _total(jax.tree.map(one, logits, drawn))

    return Distribution(sample, log_prob)


def _total(tree: PyTree) -> Scalar:
    return functools.reduce(operator.add, jax.tree.leaves(tree))


def _by_leaf(function, key: Key, tree: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, map(function, keys, leaves))
