"""ASHA (Li et al. 2020, arXiv 1810.05934): promotion as soon as the scores allow it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._population import PopulationState, population
from .._types import HParams, Params, PyTree, Scalar, Split, State, Tuner
from ._halving import ALONE, survivors


class AshaState(NamedTuple):
    """State of `asha`, for N candidates, P slots and K rungs."""

    members: State  # leaves [N, ...]: every candidate, started or not, as far as it has trained
    steps: jax.Array  # int32 [N]: outer steps it has had
    finished: jax.Array  # int32 [N]: rungs it has finished
    promoted: jax.Array  # int32 [N]: rungs it may train in: 0 before its start
    scores: jax.Array  # [N, K]: at the end of each rung; NaN: not there yet, or diverged there
    slots: jax.Array  # int32 [P]: the candidate that each slot trains; N: it has nothing to do


class AshaMetrics(NamedTuple):
    """One step of all slots, for the eye."""

    value: Scalar  # of the leader: its score at the highest rung that anyone has finished
    finite: jax.Array  # whether there is a leader
    leader: jax.Array  # int32: its row among the candidates
    slots: jax.Array  # int32 [P]: who trained in this step; N: nobody
    finished: jax.Array  # bool [P]: who reached the end of a rung, or diverged
    members: PyTree  # metrics of the slots, [P, ...]; without meaning where nobody trained


def asha(
    tuner: Tuner,
    budgets: Sequence[int],
    *,
    slots: int,
    eta: int = 3,
    chunk: int | Literal["auto"] = "auto",
) -> Tuner:
    """A tuner of N candidates, of which `slots` train at a time: a free slot takes the next job.

    The next job is the promotion of a candidate in the top 1/eta of its rung that has not been
    promoted, from the highest rung that has one, and otherwise the start of a new candidate; ties
    go to the better score, and then to the lower row. On one accelerator nothing is asynchronous:
    all slots take their outer step together, and jobs of different lengths end at different
    steps. What is left of ASHA is that nobody waits for a rung to be full, so that all slots are
    busy until the candidates run out. Whoever is promoted goes on from where it was. One that
    diverges frees its slot at once and is never promoted.

    `init(params, hparams) -> AshaState`, leaves [N, ...] in both trees, all of them kept in
    memory, so that anyone can be promoted at any time. `step(state, split)` gives every slot the
    same split.

    Args:
      budgets: outer steps that a candidate has had at the end of each rung, ascending.
      slots: at most N. What a step costs.
      eta: 1/eta of a rung is promoted.
      chunk: as in `population`.

    Raises ValueError for budgets that do not ascend, eta < 2 or more slots than candidates.
    """
    marks = _check_budgets(budgets)
    _checks.positive_int("asha", "slots", slots)
    _checks.positive_int("asha", "eta", eta, least=2)
    group = population(tuner, ALONE, chunk=chunk)

    def init(params: Params, hparams: HParams) -> AshaState:
        count = _count("asha", (params, hparams), slots)
        none = jnp.zeros(count, jnp.int32)
        members = jax.vmap(tuner.init)(params, hparams)
        first = jnp.arange(slots, dtype=jnp.int32)
        blank = jnp.full((count, len(marks)), jnp.nan, float)
        state = AshaState(members, none, none, none.at[first].set(1), blank, first)
        return _tree.vary_like(state, (params, hparams))

    def step(state: AshaState, split: Split) -> tuple[AshaState, AshaMetrics]:
        rows, count = state.slots, len(state.steps)
        busy = rows < count
        training = _tree.take(state.members, jnp.minimum(rows, count - 1))
        key = jax.random.key(0)  # nothing is drawn from it
        stepped, metrics = group.step(PopulationState(training, (), key), split)
        own = metrics.members
        write = lambda table, values: table.at[rows].set(values, mode="drop")  # not from idle slots
        steps = state.steps.at[rows].add(1, mode="drop")
        rung = state.finished.at[rows].get(mode="clip")
        sound = own.finite & jnp.isfinite(own.value)
        full = steps.at[rows].get(mode="clip") == jnp.asarray(marks, jnp.int32)[rung]
        done = busy & (full | ~sound)
        score = jnp.where(sound, own.value, jnp.nan).astype(state.scores.dtype)
        ended = jnp.where(done, rows, count)  # out of bounds, and so dropped, unless it is done
        state = state._replace(
            members=jax.tree.map(write, state.members, stepped.members),
            steps=steps,
            finished=state.finished.at[ended].add(1, mode="drop"),
            scores=state.scores.at[ended, rung].set(score, mode="drop"),
        )
        leader, value = _leader(state)
        found = AshaMetrics(value, jnp.isfinite(value), leader, rows, done, own)
        return _refill(state, done | ~busy, eta), found

    return Tuner(init, step)


def _refill(state: AshaState, free: jax.Array, eta: int) -> AshaState:
    """Free slots take jobs in the order of their urgency."""
    count = len(state.steps)
    urgency = _urgency(state, eta)
    order = jnp.argsort(urgency).astype(jnp.int32)[: len(free)]
    jobs = jnp.where(urgency[order] < _NEVER, order, count)
    turn = jnp.cumsum(free) - 1
    slots = jnp.where(free, jobs[jnp.maximum(turn, 0)], state.slots)
    started = jnp.where(free, slots, count)
    return state._replace(slots=slots, promoted=state.promoted.at[started].add(1, mode="drop"))


_NEVER = jnp.iinfo(jnp.int32).max


def _urgency(state: AshaState, eta: int) -> jax.Array:
    """int32 [N], the smallest first: promotions by rung and rank, then new ones by row."""
    count, levels = state.scores.shape
    index = jnp.arange(count, dtype=jnp.int32)
    there = state.finished[:, None] > jnp.arange(levels)[None]  # [N, K]: has finished that rung
    ranks = jnp.argsort(jax.vmap(lambda s: survivors(s, count), 1, 1)(state.scores), axis=0)
    top = there.sum(0) // eta  # [K]
    at = jnp.maximum(state.finished - 1, 0)  # the last rung finished
    rank = jnp.take_along_axis(ranks, at[:, None], axis=1)[:, 0].astype(jnp.int32)
    sound = jnp.isfinite(jnp.take_along_axis(state.scores, at[:, None], axis=1)[:, 0])
    resting = (state.finished > 0) & (state.promoted == state.finished)
    promotable = resting & (state.finished < levels) & sound & (rank < top[at])
    fresh = state.promoted == 0
    new = jnp.where(fresh, levels * count + index, _NEVER)
    return jnp.where(promotable, (levels - 1 - at) * count + rank, new)


def _leader(state: AshaState) -> tuple[jax.Array, jax.Array]:
    """The best at the highest rung with a finite score, and that score; NaN without one."""
    some = jnp.isfinite(state.scores).any(0)
    top = jnp.where(some, jnp.arange(len(some)), 0).max()
    column = state.scores[:, top]
    row = survivors(column, 1)[0]
    return row, jnp.where(some.any(), column[row], jnp.nan)


def _check_budgets(budgets) -> tuple[int, ...]:
    marks = tuple(budgets)
    for mark in marks:
        _checks.positive_int("asha", "budgets", mark)
    if not marks or list(marks) != sorted(set(marks)):
        raise ValueError(
            f"asha: `budgets` must be ascending integers, one per rung; got {marks!r}. For "
            "example (1, 3, 9)."
        )
    return marks


def _count(where: str, trees, slots: int) -> int:
    named = jax.tree_util.tree_leaves_with_path(trees)
    sizes = {jnp.shape(x)[:1] for _, x in named}
    if len(sizes) != 1 or () in sizes:
        listing = ", ".join(f"{_checks.path(k[1:])}: {_checks.describe(x)}" for k, x in named)
        raise ValueError(
            f"{where}: every leaf of `params` and `hparams` needs the same leading axis, one entry "
            f"per candidate; got {listing}."
        )
    ((count,),) = sizes
    if count < slots:
        raise ValueError(
            f"{where}: {count} candidates cannot fill {slots} slots; take fewer slots."
        )
    return count
