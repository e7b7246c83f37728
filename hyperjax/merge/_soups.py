"""Model soups (Wortsman et al. 2022, arXiv 2203.05482): averages of models that were trained from
one start with different hyperparameters, at the price of one model when used."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .. import _checks, _tree
from .._types import Batch, Batches, Params, PyTree, Scalar
from ._common import broken, check_mask, cleaned, common_type, count_members, finite, wide


class Soup(NamedTuple):
    """One model made of P."""

    params: Params  # in the shapes and types of one member; NaN if no member could be used
    weights: PyTree  # [P], share of each member; for `learned` a tree like params of such
    excluded: jax.Array  # bool [P]: left out beforehand, by the mask or as not finite
    info: PyTree  # of the recipe; `()` if it has none


class GreedyInfo(NamedTuple):
    """How the greedy soup was made; smaller scores are better."""

    score: Scalar  # of the soup
    scores: jax.Array  # [P], of each member alone
    order: jax.Array  # int32 [P]: members from best to worst, in which they were tried
    tried: jax.Array  # [P]: score of the soup with the candidate, in that order


class LearnedInfo(NamedTuple):
    """How the learned soup was made."""

    temperature: Scalar  # the positive factor learnt for the logits
    losses: jax.Array  # [steps]
    finite: jax.Array  # bool: every step's loss was; if not, do not use the soup


def uniform(members: Params, mask: jax.Array | None = None) -> Soup:
    """The mean of all members.

    Args:
      members: leaves [P, ...].
      mask: bool [P], who takes part; all by default. A member with a weight that is not finite
        never does.

    Averages are taken in float32 at least and returned in the members' type. Raises TypeError for
    leaves that are not real floating-point numbers, ValueError for leaves that disagree on P.
    """
    used, excluded = _used("uniform", members, mask)
    count = jnp.sum(used)
    weights = used / jnp.maximum(count, 1).astype(common_type(members))
    params = jax.tree.map(lambda x: _average(x, weights), cleaned(members, used))
    return Soup(broken(params, count > 0), weights, excluded, ())


def greedy(
    members: Params,
    score: Callable[[Params], Scalar],
    *,
    scores: jax.Array | None = None,
    mask: jax.Array | None = None,
    ties: str = "add",
) -> Soup:
    """The running mean of members, each added if the score of the mean allows it (Recipe 1).

    Members are tried from the best to the worst, so the soup scores no worse than the best member.

    Args:
      members: leaves [P, ...].
      score: params of one model -> scalar on held-out data, smaller is better: an error rate, not
        an accuracy.
      scores: [P], of each member alone, if known; else they are computed one by one.
      mask: bool [P], who takes part. A member with a weight or a score that is not finite never
        does.
      ties: whether an equal score is enough: "add" as the paper has it (>=), "discard" as the
        authors' code (>). Small held-out sets have many ties.

    P evaluations beside those of the members. `weights` are 1 / count for those that were added.
    Raises as `uniform` does, and for a score that is not a real scalar.
    """
    _checks.one_of("greedy", "ties", ties, ("add", "discard"))
    _checks.is_callable("greedy", "score", score)
    used, _ = _used("greedy", members, mask)
    members = cleaned(members, used)
    checked = _checks.scalar_loss("greedy", "score", lambda params, hparams, batch: score(params))
    scored = lambda params: checked(params, (), ())
    alone = lax.map(scored, members) if scores is None else scores
    if jnp.shape(alone) != used.shape:
        raise ValueError(
            f"greedy: `scores` must be one number per member, {used.shape}; got "
            f"{_checks.describe(alone)}."
        )
    used = used & jnp.isfinite(alone)
    alone = jnp.where(used, alone, jnp.nan)
    order = jnp.argsort(jnp.where(used, alone, jnp.inf), stable=True).astype(jnp.int32)
    mean, count, best, added, tried = _climb(members, scored, alone, order, used, ties)
    weights = (
        jnp.zeros(alone.shape, common_type(members))
        .at[order]
        .set(added / jnp.maximum(count, 1).astype(common_type(members)))
    )
    tried = jnp.where(used[order], tried, jnp.nan)
    params = broken(mean, count > 0)
    return Soup(params, weights, ~used, GreedyInfo(best, alone, order, tried))


def _climb(members, scored, alone, order, used, ties: str):
    """The running mean, how many it holds, its score; in order, who was added and what it scored
    with them."""
    like = _tree.take(members, jnp.zeros((), jnp.int32))

    def taste(carry, index):
        mean, count, best = carry
        size = count + 1  # a quotient of int32 would be float32
        with_it = jax.tree.map(
            lambda m, x: m + (x[index] - m) / size.astype(m.dtype), mean, members
        )
        got = scored(_tree.cast_like(with_it, like)).astype(best.dtype)
        better = got <= best if ties == "add" else got < best
        added = used[index] & (better | (count == 0)) & jnp.isfinite(got)
        mean = _tree.where(added, with_it, mean)
        return (mean, count + added, jnp.where(added, got, best)), (added, got)

    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), like)
    start = (empty, jnp.zeros((), jnp.int32), jnp.asarray(jnp.nan, alone.dtype))
    start = _tree.vary_like(start, (members, alone))
    (mean, count, best), (added, tried) = lax.scan(taste, start, order)
    return _tree.cast_like(mean, like), count, best, added, tried


def mix(members: Params, mixing: PyTree, mask: jax.Array | None = None) -> Params:
    """The members' average with weights softmax(mixing).

    Args:
      members: leaves [P, ...].
      mixing: [P] for one weight per member, or a tree like `members` with one [P] per tensor.
      mask: as in `uniform`; who is left out has weight 0.

    Differentiable in `mixing` and in members, so that a hypergradient can learn the recipe: it is
    a response, `lambda h, carry, batches: (mix(members, h["mixing"]), carry)`.
    """
    used, _ = _used("mix", members, mask)
    members = cleaned(members, used)
    weights = shares(members, mixing, used)
    params = jax.tree.map(_average, members, weights)
    return broken(params, used.any())


def learned(
    members: Params,
    loss: Callable[[Params, Scalar, Batch], Scalar],
    batches: Batches,
    *,
    optimizer: optax.GradientTransformation | None = None,
    per: str = "tensor",
    mask: jax.Array | None = None,
) -> Soup:
    """Coefficients learnt by gradient descent on held-out data: the paper's learned soup.

    Args:
      members: leaves [P, ...].
      loss: (params, temperature, batch) -> scalar; multiply the logits by `temperature`, which is
        positive and starts at 1.
      batches: held-out data, leaves [steps, ...], one step each.
      optimizer: AdamW at 0.05 without decay by default, as the authors' code has it by layer.
      per: "tensor" for one coefficient per member and tensor, "model" for one per member.
      mask: as in `uniform`.

    Starts from the uniform soup. The factor is exp of what is learnt, the coefficients are a
    softmax. Returns `weights` as a tree like params of [P] either way. All P models are in memory.

    Raises ValueError for an unknown `per` and batches whose leading axes differ, TypeError for a
    loss that is not a scalar.
    """
    _checks.one_of("learned", "per", per, ("tensor", "model"))
    _checks.is_callable("learned", "loss", loss)
    _checks.count_steps("learned", batches)
    used, excluded = _used("learned", members, mask)
    members = cleaned(members, used)
    optimizer = optax.adamw(0.05, weight_decay=0.0) if optimizer is None else optimizer
    flat = lambda x: jnp.zeros(x.shape[0], wide(x.dtype))
    common = common_type(members)
    zero = jnp.zeros((), common)
    mixing = jax.tree.map(flat, members) if per == "tensor" else jnp.zeros(used.shape, common)

    def objective(recipe, batch):
        mixing, log_factor = recipe
        params = jax.tree.map(_average, members, shares(members, mixing, used))
        return loss(params, jnp.exp(log_factor), batch)

    checked = _checks.scalar_loss(
        "learned", "loss", lambda recipe, h, batch: objective(recipe, batch)
    )

    def step(carry, batch):
        recipe, state = carry
        value, grad = jax.value_and_grad(checked)(recipe, (), batch)
        updates, state = optimizer.update(grad, state, recipe)
        moved: PyTree = optax.apply_updates(recipe, updates)
        return (moved, state), value

    recipe = mixing, zero
    start = _tree.strong((recipe, optimizer.init(recipe)))
    start = _tree.vary_like(start, (members, batches))
    (recipe, _), losses = lax.scan(step, start, batches)
    mixing, log_factor = recipe
    weights = shares(members, mixing, used)
    params = broken(jax.tree.map(_average, members, weights), used.any())
    info = LearnedInfo(jnp.exp(log_factor), losses, jnp.all(jnp.isfinite(losses)))
    return Soup(params, weights, excluded, info)


def shares(members: Params, mixing: PyTree, used: jax.Array) -> PyTree:
    """A tree like members of weights [P] that sum to 1 over those used."""
    if jax.tree.structure(mixing) == jax.tree.structure(0):
        mixing = jax.tree.map(lambda x: mixing, members)
    _same_structure(mixing, members, used)

    def one(logits):
        top = lax.stop_gradient(jnp.max(logits, initial=-jnp.inf, where=used))
        heights = jnp.where(used, jnp.exp(jnp.where(used, logits - top, 0)), 0)
        return heights / jnp.maximum(jnp.sum(heights), jnp.finfo(heights.dtype).tiny)

    return jax.tree.map(one, mixing)


def _same_structure(mixing: PyTree, members: Params, used: jax.Array) -> None:
    got, expected = jax.tree.structure(mixing), jax.tree.structure(members)
    faults = [_checks.describe(x) for x in jax.tree.leaves(mixing) if jnp.shape(x) != used.shape]
    if got != expected or faults:
        raise ValueError(
            f"mix: `mixing` must be one array [{used.size}] or have the structure of `members` "
            f"with such an array at every leaf; got {faults or got}, expected {expected}."
        )


def _used(where: str, members: Params, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """bool [P]: who takes part, and who does not."""
    size = count_members(where, "members", members)
    used = finite(members)
    if mask is not None:
        check_mask(where, mask, size)
        used = used & mask
    return used, ~used


def _average(x: jax.Array, weights: jax.Array) -> jax.Array:
    """[P, ...] and [P] to [...], summed in float32 at least."""
    return jnp.tensordot(weights.astype(wide(x.dtype)), x.astype(wide(x.dtype)), 1).astype(x.dtype)
