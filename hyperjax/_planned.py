"""From a budget of memory to a way of differentiating training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax

from . import _checks, _tree
from ._estimators import hypergradient
from ._treeverse import inexact, refill, snapshots_for
from ._types import Batch, Carry, Estimate, Estimator, HParams, Loss, Params, Split, State
from ._unroll import unroll

Step = Callable[[State, HParams, Batch], State]


@dataclass(frozen=True)
class Option:
    """A way of differentiating, with what it is expected to take."""

    mode: Literal["forward", "reverse"]
    checkpoint: int | Literal["binomial"] | None  # of `unroll`
    bytes: int
    cost: float  # in trainings without a derivative


@jax.tree_util.register_static
@dataclass(frozen=True)
class Plan:
    """What `planned` chose, and from what. A pytree without leaves."""

    chosen: Option
    options: tuple[Option, ...]  # by rising cost
    budget: int


def planned(
    step: Step,
    score: Loss,
    init: Callable[[Params, HParams], Carry],
    *,
    budget: int,
) -> Estimator:
    """The hypergradient through training by whatever is fastest within `budget` bytes.

    The gradient is that of `hypergradient(unroll(step), score, init)` in any case. Chosen while
    tracing, from shapes alone, among forward mode, reverse mode, reverse mode with a state every
    k steps (the k that takes least memory), and with binomial checkpoints. With n scalar
    hyperparameters, T steps, S bytes of state and R bytes that reverse mode records per step, the
    expected bytes and the cost in trainings without a derivative are

        forward    (1 + n) (2 S + max(L, (R - S) / 2)) + C    1 + n
        reverse    T R + W                                    2.8
        every k    (T / k) S + k R + W                        3.7       and the data, unless k
                                                                        divides T
        binomial   sqrt(2 T) S + W                            4.2,      W = R + 3 S + C for one step

    L is the largest array within a step. What a step records and computes from hyperparameters or
    closed-over arrays alone counts once, as C; those themselves lie in memory anyway.

    Tests hold the bytes to a factor of three of what XLA allocates beside inputs and outputs. The
    costs come from times of benchmarks/unrolled.py on a CPU, with forward mode for one scalar set
    to 2, and repeat to a tenth: forward mode wins with one scalar, and with two takes 1.1 to 1.2
    times as long as reverse mode. Inside vmap the budget is that of one member.

    `Estimate.info` is the `Plan`: static, so that it passes through jit, scan and vmap.

    Raises ValueError at trace time if nothing fits; the message names the least budget that would
    do.
    """
    _checks.is_callable("planned", "step", step)
    _checks.positive_int("planned", "budget", budget)
    begin = hypergradient(unroll(step), score, init).init

    def estimate(hparams: HParams, carry: Carry, split: Split) -> tuple[Estimate, Carry]:
        _checks.differentiable("planned", "hparams", hparams)
        hparams = _tree.strong(hparams)  # numbers of Python have no size
        steps = _checks.count_steps("planned", split.train)
        plan = _plan(_forecast(step, hparams, carry, split.train, steps), budget)
        chosen = plan.chosen
        response = unroll(step, checkpoint=chosen.checkpoint)
        inside = hypergradient(response, score, init, mode=chosen.mode)
        result, carry = inside.estimate(hparams, carry, split)
        return result._replace(info=plan), carry

    return Estimator(begin, estimate)


def _plan(options: tuple[Option, ...], budget: int) -> Plan:
    fitting = [option for option in options if option.bytes <= budget]
    if not fitting:
        least = min(options, key=lambda option: option.bytes)
        name = f"{least.mode} mode, checkpoint={least.checkpoint!r}"
        raise ValueError(
            f"planned: no derivative of this training fits into `budget` of {budget:,} bytes; the "
            f"least is {least.bytes:,} ({name}). Raise the budget, truncate, or see `reversible`."
        )
    return Plan(fitting[0], options, budget)


def _forecast(step, hparams, carry, batches, steps) -> tuple[Option, ...]:
    state = sum(_bytes(x) for x in jax.tree.leaves(carry))
    record, constant, largest = _record(step, hparams, carry, batches)
    scalars = _tree.size(hparams)
    once = record + constant + 3 * state
    data = sum(_bytes(x) for x in jax.tree.leaves(batches))
    # Batches are folded into whole segments, of which a rest makes a copy.
    segments = lambda k: -(-steps // k) * state + k * record + once + (data if steps % k else 0)
    k = min(range(1, steps + 1), key=segments)
    segmented = segments(k)
    forward = constant + (1 + scalars) * (2 * state + max(largest, (record - state) // 2))
    options = (
        Option("forward", None, forward, 1.0 + scalars),
        Option("reverse", None, steps * record + once, 2.8),
        Option("reverse", k, segmented, 3.7),
        Option("reverse", "binomial", snapshots_for(steps) * state + once, 4.2),
    )
    return tuple(sorted(options, key=lambda option: (option.cost, option.bytes)))


class _Record(NamedTuple):
    """Bytes that reverse mode keeps, and the largest array that a step makes."""

    each: int  # with every step
    constant: int  # once for all steps
    largest: int


def _record(step, hparams, carry, batches) -> _Record:
    """Of the residuals, each counted once, without what is there anyway."""
    first = jax.tree.map(lambda x: x[0], batches)

    def residuals(hparams, state, batch):
        def on_inexact(parts, h):
            return inexact(step(refill(parts, state), h, batch))

        return jax.tree.leaves(jax.vjp(on_inexact, inexact(state), hparams)[1])

    program = jax.make_jaxpr(residuals)(hparams, carry, first).jaxpr
    scalars, states = len(jax.tree.leaves(hparams)), len(jax.tree.leaves(carry))
    # What depends on none of state and data is computed once, before the first step.
    inputs = _ids([*program.constvars, *program.invars[:scalars]])
    fixed, largest = inputs.copy(), 0
    for equation in program.eqns:
        if all(id(x) in fixed for x in equation.invars if not _is_literal(x)):
            fixed |= _ids(equation.outvars)
        else:
            largest = max([largest, *(_bytes(x.aval) for x in equation.outvars)])
    # The state is kept, as part of the trajectory; everything else that comes in is there anyway.
    inputs |= _ids(program.invars[scalars + states :])
    kept = {id(x): _bytes(x.aval) for x in program.outvars if id(x) not in inputs}
    constant = sum(size for key, size in kept.items() if key in fixed)
    return _Record(sum(kept.values()) - constant, constant, largest)


def _ids(variables) -> set[int]:
    return {id(x) for x in variables}


def _is_literal(x) -> bool:
    return hasattr(x, "val")


def _bytes(x) -> int:
    return math.prod(x.shape) * x.dtype.itemsize
