"""Unrolled optimization: the derivative of the training loop itself."""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
from jax import lax

from . import _checks, _tree
from ._treeverse import treeverse
from ._types import Batch, Batches, HParams, Params, Response, State

Step = Callable[[State, HParams, Batch], State]


def unroll(
    step: Step,
    *,
    checkpoint: int | Literal["sqrt", "binomial"] | None = None,
    truncate: int | None = None,
) -> Response:
    """The response that runs `step` once per batch, differentiated through every step.

    `step(state, hparams, batch) -> state`, as `inner` makes it; the state has a field `params`.

    Args:
      checkpoint: what reverse mode keeps. None: all that every step records, which is several
        times its state. An integer k: one state every k steps, and the records of k steps while
        a segment is run again; any derivative of any order. "sqrt": k = ceil(sqrt(steps)).
        "binomial": about sqrt(2 steps) states and the record of one step, each step run forward
        at most three times more, the run inside its own derivative included; for grad and
        Hessians forward over reverse only.
      truncate: differentiate the last `truncate` steps only (K-step reverse mode, Shaban et al.
        2019, arXiv 1810.10667). Earlier steps count as constants, which biases the gradient.

    Raises ValueError at trace time if `truncate` exceeds the number of steps, or the leaves of
    the batches differ in their leading axis.
    """
    _checks.is_callable("unroll", "step", step)
    if not isinstance(checkpoint, int) or isinstance(checkpoint, bool):
        _checks.one_of("unroll", "checkpoint", checkpoint, (None, "sqrt", "binomial"))
    else:
        _checks.positive_int("unroll", "checkpoint", checkpoint)
    if truncate is not None:
        _checks.positive_int("unroll", "truncate", truncate)

    def respond(hparams: HParams, carry: State, batches: Batches) -> tuple[Params, State]:
        steps = _checks.count_steps("unroll", batches)
        carry = _tree.vary_like(carry, hparams)  # what is trained depends on them
        if truncate is not None:
            carry, batches = _skip(step, carry, hparams, batches, steps, truncate)
            steps = truncate
        if checkpoint == "binomial":
            state = treeverse(step, carry, hparams, batches, steps)
        elif checkpoint is None:
            state = _scan(step, carry, hparams, batches)
        else:
            length = math.isqrt(steps - 1) + 1 if checkpoint == "sqrt" else checkpoint
            state = _segmented(step, carry, hparams, batches, steps, min(length, steps))
        return state.params, state

    return respond


def _scan(step: Step, state: State, hparams: HParams, batches: Batches) -> State:
    return lax.scan(lambda s, batch: (step(s, hparams, batch), None), state, batches)[0]


def _segmented(step, state, hparams, batches, steps, length) -> State:
    """Nested scans; the outer one keeps the state at the start of each segment."""

    @functools.partial(jax.checkpoint, prevent_cse=False)  # nothing is merged across a scan
    def segment(state, hparams, batches):
        return _scan(step, state, hparams, batches)

    whole = steps // length
    fold = lambda x: x[: whole * length].reshape(whole, length, *x.shape[1:])
    folded = jax.tree.map(fold, batches)
    state, _ = lax.scan(lambda s, b: (segment(s, hparams, b), None), state, folded)
    if whole * length < steps:
        state = segment(state, hparams, jax.tree.map(lambda x: x[whole * length :], batches))
    return state


def _skip(step, state, hparams, batches, steps, truncate):
    """The state before the last `truncate` steps, as a constant, and the batches that are left."""
    if truncate > steps:
        raise ValueError(
            f"unroll: `truncate` is {truncate} but the run has {steps} steps; pass "
            f"truncate <= {steps}, or None to differentiate all of them."
        )
    frozen, constant = lax.stop_gradient((hparams, batches))
    # By index, since a slice of all but the last batches would be a copy of nearly all the data.
    body = lambda t, s: step(s, frozen, _tree.take(constant, t))
    state = lax.stop_gradient(lax.fori_loop(0, steps - truncate, body, lax.stop_gradient(state)))
    return state, jax.tree.map(lambda x: x[steps - truncate :], batches)
