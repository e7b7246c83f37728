"""Hyper-schedules of few values, learnt by forward mode over the whole of training."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _checks, _tree
from ._treeverse import inexact, refill
from ._types import Batch, Carry, Estimate, Estimator, HParams, Loss, Params, Split, State

Step = Callable[[State, HParams, Batch], State]


class SharingInfo(NamedTuple):
    """What says whether tangents have run away."""

    largest: jax.Array  # largest entry of a tangent of the state, before it was clipped


def forward_sharing(
    step: Step,
    score: Loss,
    init: Callable[[Params, HParams], Carry],
    *,
    windows: int,
    clip: float | None = None,
) -> Estimator:
    """The hypergradient of a schedule that is constant on `windows` equal parts of training.

    Leaves of hparams are [windows, ...]; `step(state, hparams, batch)` sees the row of the window
    that it is in, `init` sees the first row and `score` the last. Window i of T steps begins at
    step floor(i T / windows).

    Forward mode carries one tangent of the state per scalar, so that memory does not grow with
    the number of steps, nor do errors with the batches of the past: sharing a value averages the
    noisy gradients of the steps in its window (Micaelli and Storkey 2021, arXiv 2007.07869,
    forward-mode differentiation with sharing). A tangent is zero until its window begins and is
    carried only from then on, which saves nearly half of the work; the program has a loop per
    window, and takes as much longer to compile. Loops without shared values: `windows=1` is
    `hypergradient(unroll(step), mode="forward")`.

    Args:
      clip: tangents are clipped entrywise to [-clip, clip] after every step. None, the default,
        leaves them alone, and the gradient is that of reverse mode through the same schedule.
        Clipping biases it, but it stays of use where training amplifies tangents without end.
        The paper clips products with the Hessian at 100, which a step does not show; its outer
        rule (bounded relative changes) belongs to the optimizer.

    `Estimate.info` is a `SharingInfo`, of which `largest > clip` says that there was clipping.

    Raises ValueError at trace time if a leaf of hparams has another leading axis than `windows`,
    or there are fewer steps than windows.
    """
    _checks.is_callable("forward_sharing", "step", step)
    _checks.is_callable("forward_sharing", "init", init)
    score = _checks.scalar_loss("forward_sharing", "score", score)
    _checks.positive_int("forward_sharing", "windows", windows)
    if clip is not None:
        _checks.number("forward_sharing", "clip", clip, positive=True)

    def begin(params: Params, hparams: HParams) -> Carry:
        _check_rows(hparams, windows)
        return _tree.strong(init(params, _row(hparams, 0)))

    def estimate(hparams: HParams, carry: Carry, split: Split) -> tuple[Estimate, Carry]:
        _checks.differentiable("forward_sharing", "hparams", hparams)
        _check_rows(hparams, windows)
        steps = _checks.count_steps("forward_sharing", split.train)
        if steps < windows:
            raise ValueError(
                f"forward_sharing: there are {steps} steps for {windows} windows; pass at least "
                "one batch per window, or fewer windows."
            )
        ends = [i * steps // windows for i in range(windows + 1)]
        carry, tangents, largest = _train(step, hparams, carry, split.train, ends, clip)
        grad, value = _contract(score, hparams, carry, tangents, split.valid, windows)
        return Estimate(value, grad, SharingInfo(largest)), carry

    return Estimator(begin, estimate)


def _check_rows(hparams, windows):
    faults = [
        f"{_checks.path(k)} is {_checks.describe(x)}"
        for k, x in jax.tree_util.tree_leaves_with_path(hparams)
        if jnp.shape(x)[:1] != (windows,)
    ]
    if faults:
        raise ValueError(
            f"forward_sharing: every leaf of `hparams` needs a leading axis of {windows}, one row "
            f"per window; {', '.join(faults)}. Repeat a value with `jnp.full({windows}, value)`."
        )


def _row(hparams, i):
    return jax.tree.map(lambda x: jnp.asarray(x)[i], hparams)


def _train(step, hparams, state, batches, ends, clip):
    """The state at the end, its tangents [windows * scalars, ...], and their largest entry.

    Tangents are a list, one entry per inexact leaf of the state.
    """
    state = _tree.vary_like(state, hparams)
    tangents = [_tree.vary_like(jnp.zeros((0, *x.shape), x.dtype), x) for x in inexact(state)]
    largest = _tree.vary_like(jnp.zeros(()), hparams)
    for i, (start, stop) in enumerate(itertools.pairwise(ends)):
        active = _row(hparams, i)
        scalars = _tree.size(active)
        # Directions of earlier windows leave the active row alone; those of this one begin here.
        along = jax.tree.map(
            functools.partial(_pad, front=tangents[0].shape[0]), _tree.units(active)
        )
        tangents = [_pad(z, back=scalars) for z in tangents]

        body = functools.partial(_body, step, batches, clip, active, along)
        state, tangents, largest = lax.fori_loop(start, stop, body, (state, tangents, largest))
    return state, tangents, largest


def _body(step, batches, clip, hparams, along, t, carry):
    state, tangents, largest = carry
    state, tangents = _push(step, state, tangents, hparams, along, _tree.take(batches, t))
    for z in tangents:
        largest = jnp.maximum(largest, jnp.max(jnp.abs(z), initial=0).astype(largest.dtype))
    if clip is not None:
        tangents = [jnp.clip(z, -clip, clip) for z in tangents]
    return state, tangents, largest


def _pad(x, *, front=0, back=0):
    """`x` with that many rows of zeros before and behind."""
    zeros = lambda n: _tree.vary_like(jnp.zeros((n, *x.shape[1:]), x.dtype), x)
    return jnp.concatenate([zeros(front), x, zeros(back)])


def _push(step, state, tangents, hparams, along, batch):
    """One step of the state, and of all its tangents at once."""

    def on_inexact(parts, h):
        after = step(refill(parts, state), h, batch)
        return inexact(after), after

    def push(z, dh):
        _, out, after = jax.jvp(on_inexact, (inexact(state), hparams), (z, dh), has_aux=True)
        return out, after

    # The state itself does not depend on the direction: vmap computes it once.
    return tuple(reversed(jax.vmap(push, out_axes=(0, None))(tangents, along)))


def _contract(score, hparams, state, tangents, valid, windows):
    """The gradient of the score in the schedule, direct term included, and the score."""
    last = _row(hparams, windows - 1)
    slope = lambda parts, h: score(refill(parts, state).params, h, valid)
    value, (through, direct) = jax.value_and_grad(slope, argnums=(0, 1))(inexact(state), last)
    flat = lambda x, n: x.reshape(n, -1)
    count = tangents[0].shape[0]
    totals = [flat(z, count) @ g.reshape(-1) for z, g in zip(tangents, through, strict=True)]
    indirect = _schedule(sum(totals), hparams, windows)
    add_last = lambda x, d: x.at[-1].add(d.astype(x.dtype))
    return jax.tree.map(add_last, indirect, direct), value


def _schedule(flat, hparams, windows):
    """[windows * scalars] to leaves [windows, ...], window by window."""
    leaves, structure = jax.tree.flatten(hparams)
    rows, offset, out = flat.reshape(windows, -1), 0, []
    for x in leaves:
        size = x.size // windows
        out.append(rows[:, offset : offset + size].reshape(x.shape).astype(x.dtype))
        offset += size
    return structure.unflatten(out)
