"""What an estimator is given in `compare_estimators`, and the ways in which it makes one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from .. import evolution, linsolve, online
from .._implicit import AdjointInfo, ImplicitResponse, implicit
from .._inner import InnerState, stationary
from .._planned import Plan
from .._tree import norm
from .._types import (
    Batch,
    Estimate,
    Estimator,
    HParams,
    Key,
    LinearSolve,
    Loss,
    PyTree,
    Split,
)
from .._unroll import unroll
from ._check_problem import Problem
from ._grid import quantity

ROUNDS = 3  # estimates after which one that remembers is looked at


class Facts(NamedTuple):
    """What decides whether an estimator applies."""

    steps: int
    hparams: int  # scalar ones
    params: int
    own_units: bool  # raw values are the hyperparameters themselves
    budget: int | None  # bytes


class Case(NamedTuple):
    """One draw, as an estimator meets it inside a compiled program."""

    problem: Problem
    start: InnerState  # of training
    raw: HParams
    split: Split
    whole: Batch
    key: Key  # for randomness of the estimator's own
    budget: int | None

    @property
    def step(self) -> Callable:
        return self.problem.training.step

    @property
    def score(self) -> Loss:
        return self.problem.score

    def init(self, params: PyTree, hparams: HParams) -> InnerState:
        del params, hparams
        return self.start

    def implicit(self, solve: LinearSolve | linsolve.AdaptiveSolve) -> ImplicitResponse:
        """Stationary for the loss over the whole training set, wherever the steps end."""
        zero = stationary(lambda p, h, batch: self.problem.loss(p, h, self.whole))
        return implicit(unroll(self.step), zero, solve=solve)


class Contestant(NamedTuple):
    """An estimator, and when it cannot be one.

    `run(case, memory)` is what is measured; `memory` comes from `prepare(case)`, which is not, and
    is None without it. `refuse(facts)` is the reason why it does not apply, or "".
    """

    name: str
    call: str
    run: Callable[[Case, Any], Estimate]
    prepare: Callable[[Case], Any] | None = None
    refuse: Callable[[Facts], str] = lambda facts: ""
    exact: bool = False  # may serve as the reference
    note: str = ""


def report(info: PyTree) -> dict[str, jax.Array | Plan]:
    """What of an `Estimate.info` is worth a look: scalars by name, or a plan."""
    if isinstance(info, AdjointInfo):
        return {
            "products": info.solve.iterations,
            "residual": info.solve.residual,
            "curvature": info.solve.curvature,
            "stationarity": info.stationarity,
            "bound": info.bound,
        }
    if isinstance(info, evolution.EvolutionInfo):
        return {"standard_error": norm(info.standard_error), "diverged": info.diverged}
    if isinstance(info, online.MartheInfo):
        return {"decay": jnp.mean(ravel_pytree(info.decay)[0])}
    return {"chosen": info} if isinstance(info, Plan) else {}


def describe(plan: Plan) -> str:
    """`reverse mode, checkpoint=8, 1.2 MiB expected`."""
    chosen = plan.chosen
    kept = "" if chosen.checkpoint is None else f", checkpoint={chosen.checkpoint!r}"
    return f"{chosen.mode} mode{kept}, {quantity(chosen.bytes)} expected"


# ---- ways to make an estimate ------------------------------------------------------------------


def once(make: Callable[[Case], Estimator]) -> Callable[[Case, Any], Estimate]:
    """From the start, over all steps."""

    def run(case: Case, memory: None) -> Estimate:
        estimator = make(case)
        carry = estimator.init(case.start.params, case.raw)
        return estimator.estimate(case.raw, carry, case.split)[0]

    return run


def in_pieces(make: Callable[[Case], Estimator], pieces: int | None) -> Callable:
    """The last of successive estimates, each over its share of the steps; None: a step each."""

    def run(case: Case, memory: None) -> Estimate:
        estimator = make(case)
        fold = lambda x: x.reshape(pieces or len(x), -1, *x.shape[1:])
        train = jax.tree.map(fold, case.split.train)

        def body(carry, part):
            result, carry = estimator.estimate(case.raw, carry, Split(part, case.split.valid))
            return carry, result

        first = estimator.init(case.start.params, case.raw)
        results = lax.scan(body, first, train)[1]
        return jax.tree.map(lambda x: x[-1], results)

    return run


def remembering(make: Callable[[Case], Estimator]) -> tuple[Callable, Callable]:
    """`run` and `prepare` of estimates from one start, each with what those before remembered."""

    def forget(first, carry):
        return carry._replace(carry=first.carry)

    def prepare(case: Case) -> PyTree:
        estimator = make(case)
        first = estimator.init(case.start.params, case.raw)

        def body(carry, _):
            return forget(first, estimator.estimate(case.raw, carry, case.split)[1]), None

        return lax.scan(body, first, None, length=ROUNDS - 1)[0]

    def run(case: Case, memory: PyTree) -> Estimate:
        return make(case).estimate(case.raw, memory, case.split)[0]

    return run, prepare
