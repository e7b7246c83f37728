"""Hyper-representation: a network that reads, learnt so that linear heads on it learn quickly.

The outer variable is the reader, the inner one a head for each of many small classification tasks;
a head is fitted to its task's support texts, and the reader to what the heads then say of the
query texts. With a penalty the inner problem is strongly convex. What counts is a head for
classes that the reader has never met.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from .._types import Batch, Batches, HParams, Key, Loss, Params
from ._cleaning import Table


class MetaTasks(NamedTuple):
    """Few-shot tasks: row numbers of the texts of each task's classes."""

    support: np.ndarray  # int32 [tasks, ways, shots]
    query: np.ndarray  # int32 [tasks, ways, shots]; no row is in any task's `support`
    classes: np.ndarray  # int32 [tasks, ways]: the label that each way stands for


def meta_split(classes: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint sets of labels: to learn the reader from, and `held_out` to judge it by.

    Raises ValueError unless each has at least two.
    """
    _checks.positive_int("meta_split", "held_out", held_out, least=2)
    if classes - held_out < 2:
        raise ValueError(
            f"meta_split: `held_out` must leave at least two of {classes} classes; got {held_out}."
        )
    order = np.random.default_rng(seed).permutation(classes)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def meta_tasks(
    labels: np.ndarray, classes: np.ndarray, *, tasks: int, ways: int, shots: int, seed: int
) -> MetaTasks:
    """`tasks` draws of `ways` of the `classes`, with `shots` support and as many query rows each.

    Rows are those of `labels`. Those of a class are first cut into halves, support rows and query
    rows, so that what is query in one task is support in none. Raises ValueError if there are too
    few classes, or too few rows of one of them.
    """
    for name, value, least in (("tasks", tasks, 1), ("ways", ways, 2), ("shots", shots, 1)):
        _checks.positive_int("meta_tasks", name, value, least=least)
    if ways > len(classes):
        raise ValueError(f"meta_tasks: {ways} ways need as many classes; got {len(classes)}.")
    pools = {int(c): np.flatnonzero(labels == c) for c in classes}
    few = [c for c, rows in pools.items() if len(rows) < 2 * shots]
    if few:
        raise ValueError(
            f"meta_tasks: {shots} support and query rows need {2 * shots} rows a class; classes "
            f"{few} have fewer. Take fewer shots, or leave these classes out."
        )
    rng = np.random.default_rng(seed)
    halves = {c: np.array_split(rng.permutation(rows), 2) for c, rows in pools.items()}
    chosen = np.stack([rng.permutation(classes)[:ways] for _ in range(tasks)])
    draw = lambda half: np.array(
        [[rng.permutation(halves[int(c)][half])[:shots] for c in task] for task in chosen], np.int32
    )
    return MetaTasks(draw(0), draw(1), chosen.astype(np.int32))


def heads(tasks: int, ways: int, hidden: int) -> Params:
    """A linear head of zeros for each task: {"w": [tasks, hidden, ways], "b": [tasks, ways]}."""
    shapes = {"w": (tasks, hidden, ways), "b": (tasks, ways)}
    return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}


def representation_losses(
    embed: Callable[[HParams, jax.Array], jax.Array], inputs: Table, *, penalty: float
) -> tuple[Loss, Loss, Callable[[Params, HParams, Batch], dict[str, jax.Array]]]:
    """(loss, score, evaluate) with params = `heads` and hparams = what `embed` reads with.

    Batches are {"index": int [tasks, ways, n]}, with rows of `inputs`, in every task as many of
    every class. loss: the sum over tasks of the mean cross-entropy and penalty / 2 times the
    squared norm of the head, so that every head has the problem that it would have alone. score:
    the mean over tasks of the cross-entropy; evaluate(params, hparams, batch): it, and the
    accuracy. `embed(hparams, inputs [n, ...]) -> [n, hidden]`.
    """
    inputs = jnp.asarray(inputs)

    def entropies(params, hparams, batch):
        tasks, ways, each = batch["index"].shape
        features = embed(hparams, inputs[batch["index"].reshape(-1)])
        features = features.reshape(tasks, ways * each, -1)
        logits = jnp.einsum("tnh,thw->tnw", features, params["w"]) + params["b"][:, None]
        labels = jnp.broadcast_to(jnp.repeat(jnp.arange(ways), each)[None], (tasks, ways * each))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        hits = jnp.mean(jnp.argmax(logits, -1) == labels, dtype=losses.dtype)
        return jnp.mean(losses, axis=1), hits

    def loss(params: Params, hparams: HParams, batch: Batch) -> jax.Array:
        fit = jnp.sum(entropies(params, hparams, batch)[0])
        return fit + penalty / 2 * optax.tree.norm(params, squared=True)

    def evaluate(params: Params, hparams: HParams, batch: Batch) -> dict[str, jax.Array]:
        losses, accuracy = entropies(params, hparams, batch)
        return {"loss": jnp.mean(losses), "accuracy": accuracy}

    return loss, lambda p, h, batch: evaluate(p, h, batch)["loss"], evaluate


def meta_batches(rows: np.ndarray, size: int) -> Callable[[Key, int], Batches]:
    """A function `(key, steps) -> {"index": int32 [steps, tasks, ways, size]}`.

    Of every task and class it draws `size` of the rows [tasks, ways, shots], with replacement.

    Raises ValueError unless `size` is a positive integer.
    """
    table = jnp.asarray(rows, jnp.int32)
    _checks.positive_int("meta_batches", "size", size)

    def one(key: Key):
        shape = (*table.shape[:2], size)
        choice = jax.random.randint(key, shape, 0, table.shape[2], jnp.int32)
        return {"index": jnp.take_along_axis(table, choice, axis=2)}

    return lambda key, steps: jax.vmap(one)(
        jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(steps))
    )
