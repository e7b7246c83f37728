"""Successive halving (Karnin et al. 2013; Jamieson and Talwalkar 2016, arXiv 1502.07943): train
all for a while, keep the best, train those further."""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .. import _checks, _layout, _tree
from .._population import PopulationState, population
from .._tuner import run
from .._types import Exchange, PyTree, Split, State, Tuner

# Members that do not meet. `exchange.isolation` is the public one, but stands above this package.
ALONE = Exchange(lambda members: (), lambda key, state, members, score: (members, state, ()))


class Rung(NamedTuple):
    """One stage, in plain integers: what a program is compiled for."""

    members: int  # how many train in it
    budget: int  # outer steps that each of them has had when it ends, earlier rungs included


class RungRecord(NamedTuple):
    """What happened in one rung of n members."""

    slots: jax.Array  # int32 [n]: the row each of them had at the start
    score: jax.Array  # [n], at the end of the rung; NaN: it has diverged
    metrics: PyTree  # of the members' tuner, [steps, n, ...]


class Halved(NamedTuple):
    """Who is left, the best first."""

    members: State  # leaves [n, ...], n the members of the last rung
    slots: jax.Array  # int32 [n]: the row each of them had at the start
    rungs: tuple[RungRecord, ...]


def rungs(members: int, budget: int, *, eta: int = 3, least: int = 1) -> tuple[Rung, ...]:
    """One bracket: `members` at first, 1/eta of them, rounded down, in each rung after.

    Budgets are round(budget / eta^k) from the last rung backwards, for as long as they are
    `least` or more. A single member that is left early trains on to the end.

    Raises ValueError unless members, least <= budget and eta - 1 are positive integers.
    """
    _checks.positive_int("rungs", "members", members)
    ladder = budgets(budget, eta=eta, least=least)
    return tuple(Rung(max(1, members // eta**i), b) for i, b in enumerate(ladder))


def brackets(budget: int, *, eta: int = 3, least: int = 1) -> tuple[tuple[Rung, ...], ...]:
    """The brackets of Hyperband (Li et al. 2018, arXiv 1603.06560), the most daring first.

    Bracket s starts with floor((s_max + 1) / (s + 1)) eta^s members: the numbers of the paper's
    table, which its algorithm, rounding up a little later, exceeds (34 and 15 for 27 and 9).
    Every rung is then exactly 1/eta of the one before.

    Raises ValueError unless least <= budget and eta - 1 are positive integers.
    """
    ladder = budgets(budget, eta=eta, least=least)
    count = len(ladder)
    made = []
    for s in reversed(range(count)):
        start = count // (s + 1) * eta**s
        sizes = [start // eta**i for i in range(s + 1)]
        made.append(tuple(map(Rung, sizes, ladder[count - 1 - s :])))
    return tuple(made)


def budgets(budget: int, *, eta: int, least: int) -> tuple[int, ...]:
    """round(budget / eta^k), ascending, for every k with budget / eta^k >= least."""
    _checks.positive_int("rungs", "eta", eta, least=2)
    _checks.positive_int("rungs", "least", least)
    _checks.positive_int("rungs", "budget", budget, least=least)
    down = itertools.takewhile(lambda d: least * d <= budget, (eta**k for k in itertools.count()))
    return tuple(round(budget / d) for d in down)[::-1]


def survivors(score: jax.Array, keep: int) -> jax.Array:
    """The `keep` best rows of `score` [P], int32, the best (smallest) first.

    Scores that are not finite come last: they are kept only where there are too few others.
    """
    order = jnp.argsort(jnp.where(jnp.isfinite(score), score, jnp.inf), stable=True)
    return order[:keep].astype(jnp.int32)


def compact(members: State, score: jax.Array, keep: int) -> tuple[State, jax.Array]:
    """The `keep` best members, leaves [keep, ...], and the rows they had, int32 [keep].

    Under vmap a masked member costs what a living one does; one that is left out costs nothing.
    Pure; `keep` is static, so compiled programs are as many as there are sizes.

    Raises ValueError unless 1 <= keep <= P.
    """
    size = jnp.shape(score)[0]
    if _checks.positive_int("compact", "keep", keep) > size:
        raise ValueError(f"compact: `keep` must be at most the {size} members; got {keep}.")
    slots = survivors(score, keep)
    return _tree.take(members, slots), slots


def successive_halving(
    tuner: Tuner,
    rungs: Sequence[Rung],
    *,
    chunk: int | Literal["auto"] = "auto",
    mesh: Mesh | None = None,
) -> Callable[[State, Split], Halved]:
    """`train(members, splits) -> Halved`: rung by rung, with the losers left out of the program.

    `members` are states of `tuner` with leaves [P, ...], as `jax.vmap(tuner.init)(params, hparams)`
    makes them, P the members of the first rung. Leaves of `splits` are [budget of the last rung,
    ...], as in `run`, and shared by all members. The score that counts is that of the last outer
    step of a rung. Whoever is kept goes on from where it was, not from the beginning.

    Sizes are static, so all of it may stand inside one `jit`; without, every rung is a scan of its
    own. The cost is sum over rungs of members times (budget - budget before).

    Args:
      tuner: of one member; with `score_only` plain training, with `hypergradient` members that
        tune themselves in the meantime.
      rungs: from `rungs` or `brackets`, or any with fewer members and larger budgets each time.
      chunk, mesh: as in `population`. A mesh's first axis must divide the members of every rung.

    Raises ValueError for rungs that grow or do not get on, and at trace time unless members and
    splits fit the rungs.
    """
    stages = _check_rungs(rungs, mesh)
    group = population(tuner, ALONE, chunk=chunk, mesh=mesh)

    def train(members: State, splits: Split) -> Halved:
        _check_sizes(stages, members, splits)
        slots = jnp.arange(stages[0].members, dtype=jnp.int32)
        records, done = [], 0
        for stage, following in zip(stages, [*stages[1:], stages[-1]], strict=True):
            part = jax.tree.map(lambda x, a=done, b=stage.budget: x[a:b], splits)
            key = jax.random.key(0)  # nothing is drawn from it
            state = PopulationState(members, (), key)
            state, metrics = run(group, state, part)
            own = metrics.members
            score = jnp.where(own.finite[-1], own.value[-1], jnp.nan)
            records.append(RungRecord(slots, score, own))
            members, kept = compact(state.members, score, following.members)
            slots, done = slots[kept], stage.budget
        return Halved(members, slots, tuple(records))

    return train


def _check_rungs(rungs, mesh) -> tuple[Rung, ...]:
    where = "successive_halving"
    stages = tuple(Rung(*r) for r in rungs)
    if not stages:
        raise ValueError(f"{where}: `rungs` is empty; pass for example `rungs(27, 27)`.")
    devices = _layout.device_count(mesh)
    for stage in stages:
        _checks.positive_int(where, "rungs.members", stage.members)
        _checks.positive_int(where, "rungs.budget", stage.budget)
        if stage.members % devices:
            raise ValueError(
                f"{where}: {stage.members} members cannot be shared equally by {devices} devices; "
                "end with a rung that they divide."
            )
    pairs = list(itertools.pairwise(stages))
    if any(a.members < b.members or a.budget >= b.budget for a, b in pairs):
        raise ValueError(
            f"{where}: `rungs` must have fewer or as many members, and a larger budget, each "
            f"time; got {[tuple(s) for s in stages]}."
        )
    return stages


def _check_sizes(stages, members, splits) -> None:
    found = _checks.count_steps("successive_halving", splits)
    if found != stages[-1].budget:
        raise ValueError(
            f"successive_halving: `splits` holds {found} outer steps, but the rungs end at "
            f"{stages[-1].budget}."
        )
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(members)}
    if sizes != {(stages[0].members,)}:
        raise ValueError(
            f"successive_halving: every leaf of `members` needs the leading axis "
            f"{stages[0].members}, the members of the first rung; got {sorted(sizes)}. Make them "
            "with `jax.vmap(tuner.init)(params, hparams)`."
        )
