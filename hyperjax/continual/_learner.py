"""Continual learning: one hypernetwork, one embedding per task, and outputs that must not move.

The network of task t is h(e_t; phi). While task t is learnt, the outputs of all tasks before it
are held where they were by a penalty on phi, and their embeddings do not move at all: von Oswald,
Henning, Grewe, Sacramento 2020 (arXiv 1906.00695), equation 2.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .. import _checks, _tree
from .._types import Batch, Batches, Key, Loss, Params, PyTree, Scalar
from ..hypernet import Hypernet
from ..hypernet._types import Phi

Embedding: TypeAlias = PyTree  # of one task
Embeddings: TypeAlias = PyTree  # of all: leaves [tasks, ...]
Objective: TypeAlias = Callable[[Phi, Embedding, Batch], Scalar]
Moved: TypeAlias = tuple[Phi, Embedding]  # what a step trains

# The step that an optimizer would take for a gradient: `ahead(grads, opt_state, moved) -> updates`.
Ahead: TypeAlias = Callable[[Moved, PyTree, Moved], PyTree]


class ContinualState(NamedTuple):
    """Hypernetwork, embeddings of all tasks, and what is held of those before."""

    phi: Phi
    embeddings: Embeddings  # leaves [tasks, ...]
    stored: Params  # leaves [tasks, ...]: outputs of all embeddings when the task began
    task: jax.Array  # int32, the one being learnt
    opt_state: PyTree


class ContinualInfo(NamedTuple):
    """One training step on a task, for the eye."""

    loss: jax.Array  # of the task, before the step
    penalty: jax.Array  # mean over the tasks before of |output - stored|^2, without its strength
    finite: jax.Array  # bool; False: the step would have made a NaN, and was left out


class Continual(NamedTuple):
    """Learning of tasks in a row.

    `init(key, params, embeddings) -> state`; `begin(state, task) -> state`, before the first step
    of a task; `step(state, batch) -> (state, info)`. `task` may be traced, so that one program
    learns all of them.
    """

    init: Callable[[Key, Params, Embeddings], ContinualState]
    begin: Callable[[ContinualState, jax.Array | int], ContinualState]
    step: Callable[[ContinualState, Batch], tuple[ContinualState, ContinualInfo]]


def output_regularized(
    loss: Loss,
    net: Hypernet,
    optimizer: optax.GradientTransformation,
    *,
    strength: float | jax.Array,
    ahead: Ahead | None = None,
) -> Continual:
    """Tasks in a row by one hypernetwork with output regularization.

    A step descends, in phi and in the embedding e of task t (from 0), on

        loss(h(e; phi), e, batch) + strength / t * sum_{j < t} |h(e_j; phi) - stored_j|^2

    with stored_j = h(e_j; phi) as it was when the task began. Tasks that are still to come are
    masked, so that h is always evaluated at all embeddings: a step costs one more evaluation of
    the hypernetwork at `tasks` embeddings, whatever the task.

    Args:
      loss: `loss(params, embedding, batch) -> scalar`, with params = net.apply(phi, embedding).
      net: any hypernetwork; its hyperparameters are the embedding of a task.
      optimizer: of (phi, embedding); `begin` starts it anew.
      strength: beta >= 0, may be traced.
      ahead: None, or the step in phi that the penalty looks ahead to, such as
        `lookahead(optimizer)`: the penalty is then on h(e_j; phi + that step), the form of their
        equation 2. The two differ by what the step does to the penalty's gradient, little at small
        steps.

    `init(key, params, embeddings)` takes freshly initialised params of the target network and the
    first embeddings of all tasks, leaves [tasks, ...]. Metrics are those before the step. A step
    that would make anything NaN or infinite changes nothing and is reported.

    A traced `task` is not looked at: whoever passes it sees to it that it is from 0 to tasks - 1.

    Raises TypeError if `loss` is not a real scalar, a leaf is not floating point or `task` is no
    integer; ValueError if `embeddings` are empty or their leaves differ in the leading axis, or a
    concrete `task` is out of range.
    """
    loss = _checks.scalar_loss("output_regularized", "loss", loss)
    _checks.has_functions("output_regularized", "net", net, ("init", "apply"))
    objective = lambda phi, embedding, batch: loss(net.apply(phi, embedding), embedding, batch)
    return learner("output_regularized", objective, net, optimizer, strength=strength, ahead=ahead)


def lookahead(optimizer: optax.GradientTransformation) -> Ahead:
    """The step that `optimizer` would take for the loss of the task alone.

    No derivative is taken through it.
    """
    return lambda grads, opt_state, moved: lax.stop_gradient(
        optimizer.update(grads, opt_state, moved)[0]
    )


def learner(
    where: str,
    objective: Objective,
    net: Hypernet,
    optimizer: optax.GradientTransformation,
    *,
    strength: float | jax.Array,
    ahead: Ahead | None,
) -> Continual:
    """`output_regularized` for a loss that makes its own use of the hypernetwork."""
    _checks.has_functions(where, "optimizer", optimizer, ("init", "update"))
    _checks.number(where, "strength", strength)
    outputs = jax.vmap(net.apply, in_axes=(None, 0))

    def init(key: Key, params: Params, embeddings: Embeddings) -> ContinualState:
        _check_embeddings(where, embeddings)
        _checks.differentiable(where, "embeddings", embeddings)
        embeddings = _tree.strong(embeddings)
        phi = _tree.strong(net.init(key, params, _row(embeddings, 0)))
        stored = _tree.strong(outputs(phi, embeddings))
        opt_state = _tree.strong(optimizer.init((phi, _row(embeddings, 0))))
        return ContinualState(phi, embeddings, stored, jnp.zeros((), jnp.int32), opt_state)

    def begin(state: ContinualState, task: jax.Array | int) -> ContinualState:
        _check_task(where, task, _tasks(state.embeddings))
        task = _tree.vary_like(jnp.asarray(task, jnp.int32), state.phi)
        opt_state = optimizer.init((state.phi, _row(state.embeddings, task)))
        return state._replace(
            stored=outputs(state.phi, state.embeddings),
            task=task,
            opt_state=_tree.cast_like(_tree.vary_like(opt_state, state.phi), state.opt_state),
        )

    def step(state: ContinualState, batch: Batch) -> tuple[ContinualState, ContinualInfo]:
        moved = state.phi, _row(state.embeddings, state.task)
        value, grads = jax.value_and_grad(lambda m: objective(m[0], m[1], batch))(moved)
        step_ahead = None if ahead is None else ahead(grads, state.opt_state, moved)[0]

        def hold(phi: Phi) -> Scalar:
            phi = phi if step_ahead is None else optax.apply_updates(phi, step_ahead)
            return output_drift(outputs(phi, state.embeddings), state.stored, state.task)

        penalty, pull = jax.value_and_grad(hold)(state.phi)
        grads = _tree.axpy(strength, pull, grads[0]), grads[1]
        updates, opt_state = optimizer.update(grads, state.opt_state, moved)
        phi, embedding = _tree.cast_like(optax.apply_updates(moved, updates), moved)
        new = state._replace(
            phi=phi,
            embeddings=jax.tree.map(
                lambda table, row: table.at[state.task].set(row), state.embeddings, embedding
            ),
            opt_state=_tree.cast_like(opt_state, state.opt_state),
        )
        finite = _tree.all_finite((value, penalty, phi, embedding, opt_state))
        return _tree.where(finite, new, state), ContinualInfo(value, penalty, finite)

    return Continual(init, begin, step)


def output_drift(outputs: Params, stored: Params, task: jax.Array | int) -> Scalar:
    """1 / t sum_{j < t} |outputs_j - stored_j|^2 for task t from 0, zero for the first.

    Leaves [tasks, ...]; rows from t on do not count, whatever is in them, nor do their gradients.
    `task` may be traced.
    """
    before = jnp.arange(_tasks(stored)) < task

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        # Masked before the square, the derivative of which would make 0 * NaN = NaN.
        moved = jnp.where(before.reshape(-1, *(1,) * (x.ndim - 1)), x - y, 0)
        return jnp.sum(moved**2) / jnp.maximum(task, 1).astype(x.dtype)

    return functools.reduce(operator.add, jax.tree.leaves(jax.tree.map(one, outputs, stored)))


def learn_tasks(
    learning: Continual,
    state: ContinualState,
    batches: Batches,
    evaluate: Callable[[ContinualState], PyTree],
) -> tuple[ContinualState, ContinualInfo, PyTree]:
    """All tasks one after the other: a scan over tasks of a scan over steps.

    Args:
      batches: leaves [tasks, steps, ...]. For large data let a batch be row numbers, and look them
        up in the loss.
      evaluate: what is measured after each task, for example the accuracies on all tasks.

    Returns the last state, info with leaves [tasks, steps], and what `evaluate` gave, leaves
    [tasks, ...]. Raises ValueError if `batches` are not those of as many tasks as `state` has.
    """
    tasks = _tasks(state.embeddings)
    if (found := _checks.count_steps("learn_tasks", batches)) != tasks:
        raise ValueError(
            f"learn_tasks: leaves of `batches` must be [tasks, steps, ...] with the {tasks} tasks "
            f"that there are embeddings for; got {found}."
        )

    def one(state: ContinualState, task: tuple[jax.Array, Batches]):
        number, data = task
        state, info = lax.scan(learning.step, learning.begin(state, number), data)
        return state, (info, evaluate(state))

    state = _tree.vary_like(state, batches)
    state, (info, seen) = lax.scan(one, state, (jnp.arange(tasks, dtype=jnp.int32), batches))
    return state, info, seen


class Transfer(NamedTuple):
    """How well tasks are kept; scores are the larger the better."""

    final: jax.Array  # mean score over all tasks at the end
    learnt: jax.Array  # mean score of each task right after it was learnt
    backward: jax.Array  # mean change since a task was learnt, over all but the last
    forgetting: jax.Array  # mean loss against the best since it was learnt, over all but the last


def task_transfer(scores: jax.Array) -> Transfer:
    """What is kept, from scores [tasks, tasks]: row i after task i, column j on task j.

    Backward transfer is that of Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), forgetting that of
    Chaudhry et al. 2018 (arXiv 1801.10112), who take the best before the last task. Zero for a
    single task. Larger scores are better. Raises ValueError if `scores` is not square.
    """
    if jnp.ndim(scores) != 2 or jnp.shape(scores)[0] != jnp.shape(scores)[1]:
        raise ValueError(
            f"task_transfer: `scores` must be [tasks, tasks]; got {_checks.describe(scores)}."
        )
    count = scores.shape[0]
    learnt, last = jnp.diagonal(scores), scores[-1]
    if count == 1:
        nothing = jnp.zeros((), scores.dtype)
        return Transfer(last[0], learnt[0], nothing, nothing)
    best = jnp.max(jnp.where(jnp.tri(count, dtype=bool), scores, -jnp.inf)[:-1], axis=0)
    return Transfer(
        jnp.mean(last),
        jnp.mean(learnt),
        jnp.mean((last - learnt)[:-1]),
        jnp.mean((best - last)[:-1]),
    )


def _row(tree: PyTree, index: jax.Array | int) -> PyTree:
    return jax.tree.map(lambda x: x[index], tree)


def _tasks(tree: PyTree) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _check_embeddings(where: str, embeddings: Embeddings) -> None:
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(embeddings)}
    if len(lengths) != 1 or not min(lengths) or min(lengths) == (0,):
        found = jax.tree_util.tree_leaves_with_path(embeddings)
        listing = ", ".join(f"{_checks.path(k)}: {_checks.describe(x)}" for k, x in found)
        raise ValueError(
            f"{where}: leaves of `embeddings` must be [tasks, ...] with the same number of tasks, "
            f"at least one; got {listing or 'no leaves'}. Stack one embedding per task with "
            "`jnp.stack`."
        )


def _check_task(where: str, task: jax.Array | int, tasks: int) -> None:
    if jnp.shape(task) != () or not jnp.issubdtype(jnp.result_type(task), jnp.integer):
        raise TypeError(
            f"{where}: `task` must be one integer, from 0; got {_checks.describe(task)}."
        )
    known = _checks.entries(task)
    if known is not None and not 0 <= known < tasks:
        raise ValueError(f"{where}: `task` must be from 0 to {tasks - 1}; got {known}.")
