"""HINT: every task is a box of embeddings, and what is learnt holds in all of it.

Krukowski et al. 2024, "HyperInterval" (arXiv 2405.15444). A hypernetwork maps the box to a box of
weights, the target network an input to a box of logits. Training minds the worst of them, so that
any point of the box may stand for the task, and boxes of tasks may share one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._types import Key, Params, PyTree, Scalar
from ..hypernet import Generated, Hypernet, Outputs, generated, mlp, whole
from ..hypernet._generated import body_rows, count_slots, slot_ends
from ..hypernet._outputs import Head
from ..hypernet._types import Phi
from ._interval import (
    Interval,
    interval,
    interval_dense,
    monotone_image,
    refuse_falling,
    worst_logits,
)
from ._learner import Continual, Embedding, learner

# `box(embedding, share) -> Interval [d]` with the radii times `share`, 0 to 1.
Box: TypeAlias = Callable[[Embedding, jax.Array | float], Interval]


class Region(NamedTuple):
    """The embedding of a task and its radii before the softmax; [d], or [tasks, d] for all."""

    centre: jax.Array
    raw: jax.Array


class HintBatch(NamedTuple):
    """A minibatch for `hint`."""

    share: jax.Array | float  # of the radii that is in force, 0 to 1: see `radius_schedule`
    x: jax.Array  # [batch, ...]
    labels: jax.Array  # [batch], integers


def learnt_radii(size: float | jax.Array) -> Box:
    """Boxes of a `Region`: radii size * softmax(raw), of which the sum is `size`, may be traced.

    Raises ValueError unless `size` is a number >= 0.
    """
    _checks.number("learnt_radii", "size", size)

    def box(region: Region, share: jax.Array | float) -> Interval:
        return interval(region.centre, share * size * jax.nn.softmax(region.raw))

    return box


def nested_boxes(size: float | jax.Array) -> Box:
    """Boxes of an embedding [d] around size / 2d * cos(embedding), of radius size / d.

    All of them hold the box of radius size / 2d around zero, whatever the embeddings are: a
    network made from there is one for all tasks. Only the radii grow with `share`.

    Raises ValueError unless `size` is a number >= 0.
    """
    _checks.number("nested_boxes", "size", size)

    def box(embedding: jax.Array, share: jax.Array | float) -> Interval:
        unit = size / embedding.shape[-1]
        return interval(unit / 2 * jnp.cos(embedding), jnp.full_like(embedding, 1) * unit * share)

    return box


def radius_schedule(steps: int) -> jax.Array:
    """The share of the radii at each step of a task: from 0 to 1 over the first half, [steps].

    Raises ValueError unless `steps` is an integer >= 2.
    """
    _checks.positive_int("radius_schedule", "steps", steps, least=2)
    return jnp.minimum(1, jnp.arange(steps) / max(steps // 2 - 1, 1))


def bounded_perceptron(
    hidden: Sequence[int] = (64, 64),
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    outputs: Outputs | None = None,
) -> Hypernet:
    """The perceptron `generated(body=mlp(hidden), outputs=outputs)`, applied to an `Interval`.

    `apply(phi, box)` returns params with intervals for leaves: bounds of what the perceptron gives
    for the embeddings in the box [d], and what it gives for the middle. `phi` is that of the
    perceptron. `activation` must nowhere fall, which is checked as by `interval_map`.

    Raises ValueError for an activation that is seen to fall, such as silu or gelu; `init` and
    `apply` raise TypeError for a box that is no `Interval` of vectors.
    """
    outputs = outputs or whole()
    refuse_falling("bounded_perceptron", "activation", activation, jnp.zeros((1, 1)))
    net = generated(body=mlp(hidden, activation=activation), outputs=outputs)

    def init(key: Key, params: Params, box: Interval) -> Generated:
        _check_box(box)
        return net.init(key, params, box.middle)

    def apply(phi: Generated, box: Interval) -> PyTree:
        _check_box(box)
        like = phi.layout.leaves
        x = Interval(*(body_rows(z, phi.codes) for z in _cast(box, phi.codes)))
        for layer in phi.body:
            x = monotone_image(activation, interval_dense(x, layer["w"], layer["b"]))
        ends = slot_ends(count_slots(outputs, phi.layout))
        parts = zip(*(jnp.split(z, ends, axis=0) for z in x), strict=True)
        tables = [_emit(h, Interval(*f)) for h, f in zip(phi.heads, parts, strict=True)]
        shapes = [leaf.shape for leaf in like]
        joined = [outputs.join(list(ends), shapes) for ends in zip(*tables, strict=True)]
        leaves = zip(*joined, strict=True)
        return phi.layout.tree.unflatten(
            [_cast(Interval(*ends), y) for ends, y in zip(leaves, like, strict=True)]
        )

    return Hypernet(init, apply)


def hint(
    logits: Callable[[PyTree, jax.Array], Interval],
    net: Hypernet,
    optimizer: optax.GradientTransformation,
    *,
    box: Box,
    strength: float | jax.Array,
    middle: float = 0.5,
) -> Continual:
    """Tasks in a row whose embeddings are boxes. The steps take a `HintBatch`.

    The loss of a task is kappa * CE(middle) + (1 - kappa) * CE(worst) with the cross-entropies of
    the middle network and of the worst logits of the box. kappa falls from 1 to `middle` as the
    share of the radii grows from 0 to 1.

    Args:
      logits: `logits(params, x) -> Interval [batch, classes]`, the target network in interval
        arithmetic, such as `interval_dense`; params has intervals for leaves.
      net: a hypernetwork from a box to such params: `bounded_perceptron(...)`.
      box: `learnt_radii(size)` with a `Region` for `embeddings`, or `nested_boxes(size)` with an
        array.
      strength: of the penalty, (|lower|^2 + |middle|^2 + |upper|^2) / 3 of how far the three have
        moved for each of the tasks before, at their full radii; see `output_regularized`.
      middle: the last kappa, 0 to 1.

    Raises ValueError if `strength` or `middle` is out of range, TypeError if `logits` does not
    return an `Interval`.
    """
    _checks.is_callable("hint", "logits", logits)
    _checks.is_callable("hint", "box", box)
    _checks.has_functions("hint", "net", net, ("init", "apply"))
    _checks.number("hint", "strength", strength)
    if (known := _checks.number("hint", "middle", middle)) is not None and known > 1:
        raise ValueError(f"hint: `middle` must be from 0 to 1; got {middle!r}.")
    whole_box = Hypernet(
        lambda key, params, embedding: net.init(key, params, box(embedding, 1.0)),
        lambda phi, embedding: net.apply(phi, box(embedding, 1.0)),
    )

    def objective(phi: Phi, embedding: Embedding, batch: HintBatch) -> Scalar:
        share = jnp.asarray(batch.share, jax.tree.leaves(phi)[0].dtype)
        bounds = logits(net.apply(phi, box(embedding, share)), batch.x)
        if not isinstance(bounds, Interval):
            raise TypeError(
                "hint: `logits` must return an `Interval`, as `interval_dense` does; got "
                f"{type(bounds).__name__}."
            )
        cross = optax.softmax_cross_entropy_with_integer_labels
        plain = jnp.mean(cross(bounds.middle, batch.labels))
        worst = jnp.mean(cross(worst_logits(bounds, batch.labels), batch.labels))
        kappa = 1 - (1 - middle) * share
        return kappa * plain + (1 - kappa) * worst

    return learner("hint", objective, whole_box, optimizer, strength=strength / 3, ahead=None)


def _emit(head: Head, features: Interval) -> Interval:
    rows = interval_dense(features, head.weight)
    if head.gain is not None:
        ends = head.gain * rows.lower, head.gain * rows.upper
        rows = Interval(jnp.minimum(*ends), head.gain * rows.middle, jnp.maximum(*ends))
    return Interval(*(z + head.offset for z in rows))


def _cast(x: Interval, like) -> Interval:
    return Interval(*(z.astype(like.dtype) for z in x))


def _check_box(box: Interval) -> None:
    if not isinstance(box, Interval) or jnp.ndim(box.middle) != 1:
        found = box.middle if isinstance(box, Interval) else box
        kind = f"{type(box).__name__} of {', '.join(map(_checks.describe, jax.tree.leaves(found)))}"
        raise TypeError(
            "bounded_perceptron: the box must be an `Interval` of vectors [d], such as "
            f"`interval(embedding, radius)`; got {kind}."
        )
