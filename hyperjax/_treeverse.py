"""Reverse mode through a loop with few snapshots: treeverse, also known as binomial checkpointing.

To reverse steps a, ..., b-1 from a snapshot at a: advance to some m, put a snapshot there, reverse
the right part, drop that snapshot, reverse the left part. With s free snapshots and no step run
forward more than r times this covers

    capacity(s, r) = capacity(s - 1, r) + capacity(s, r - 1) = C(s + 1 + r, r)

steps (right part plus left part), which is optimal (Griewank and Walther 2000, Algorithm 799,
there with the snapshot at a counted in). The points m come from a table computed while tracing;
the loop itself is one `lax.scan` from the last step to the first over a fixed stack of snapshots.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _tree
from ._types import Batches, HParams, PyTree, State

Step = Callable[[State, HParams, PyTree], State]


def capacity(free: int, repeats: int) -> int:
    """Steps that `free` snapshots beside the initial one reverse with `repeats` forward runs."""
    return math.comb(free + 1 + repeats, repeats) if repeats >= 0 else 0


def snapshots_for(steps: int, repeats: int = 2) -> int:
    """The fewest snapshots, the initial one included, that keep forward runs <= `repeats`."""
    free = 0
    while capacity(free, repeats) < steps:
        free += 1
    return free + 1


def split_table(steps: int, snapshots: int) -> np.ndarray:
    """table[l, s]: how far to advance before the next snapshot, for l steps and s free ones.

    [steps + 1, snapshots] int32; meaningful for l >= 2 and s >= 1.
    """
    lengths = np.arange(steps + 1)
    table = np.zeros((steps + 1, snapshots), np.int32)
    for free in range(1, snapshots):
        repeats = 1
        todo = lengths >= 2
        while todo.any():
            here = todo & (lengths <= capacity(free, repeats))
            # Left part m <= capacity(free, repeats - 1) and right part l - m <= capacity(free - 1,
            # repeats); within that, m as large as the right part's own optimum allows.
            right = capacity(free - 1, repeats - 1)
            most = capacity(free, repeats - 1)
            least = lengths - capacity(free - 1, repeats)
            m = np.maximum(np.clip(lengths - right, 1, most), least)
            table[here, free] = m[here]
            todo &= ~here
            repeats += 1
    return table


def treeverse(step: Step, state: State, hparams: HParams, batches: Batches, steps: int) -> State:
    """The state after `steps` steps; its derivative stores O(sqrt(steps)) states.

    At most four forward runs of each step in all: the first one, two to restore states, and the
    one inside its own derivative. Reverse mode, and forward mode on top
    of it (Hessians); forward mode alone and reverse mode twice raise from JAX.
    """
    snapshots = snapshots_for(steps)
    table = split_table(steps, snapshots)  # numpy: an array made here would belong to this trace
    first = jax.tree.map(lambda x: x[0], batches)
    step, consts = jax.closure_convert(step, state, hparams, first)
    descent = _first_descent(steps, snapshots)

    def advance(state, start, stop, rest):
        hparams, batches, consts = rest
        body = lambda t, s: step(s, hparams, _tree.take(batches, t), *consts)
        return lax.fori_loop(start, stop, body, state)

    @jax.custom_vjp
    def run(state, *rest):
        return advance(state, 0, steps, rest)

    def forward(state, *rest):
        def segment(state, ends):
            return advance(state, ends[0], ends[1], rest), state

        ends = jnp.asarray(list(zip(descent, [*descent[1:], steps], strict=True)))
        state, stack = lax.scan(segment, state, ends)
        # Slots that the first descent leaves empty are filled with anything of the right type.
        spare = snapshots - len(descent)
        pad = lambda x: jnp.concatenate([x, jnp.repeat(x[:1], spare, 0)]) if spare else x
        return state, (jax.tree.map(pad, stack), rest)

    def backward(residuals, cotangent):
        stack, rest = residuals
        marks = jnp.asarray([*descent, *[steps] * (snapshots - len(descent))])
        stack = (stack, marks, len(descent) - 1)
        return _reverse(step, advance, table, stack, rest, cotangent, steps)

    run.defvjp(forward, backward)
    return run(state, hparams, batches, consts)


def _first_descent(steps: int, snapshots: int) -> list[int]:
    """Where the forward run leaves snapshots: the same walk as the first one of the reversal."""
    table, marks = split_table(steps, snapshots), [0]
    while len(marks) < snapshots and steps - marks[-1] >= 2:
        marks.append(marks[-1] + int(table[steps - marks[-1], snapshots - len(marks)]))
    return marks


def _reverse(step, advance, table, stack, rest, cotangent, steps):
    """From the last step to the first: restore the state, then one vjp."""
    hparams, batches, consts = rest
    state, marks, top = stack
    snapshots, table = len(marks), jnp.asarray(table)

    def descend(t, c):
        stack, marks, top = c
        start = marks[top]
        stop = start + table[t + 1 - start, snapshots - 1 - top]
        new = advance(_tree.take(stack, top), start, stop, rest)
        stack = jax.tree.map(lambda s, x: s.at[top + 1].set(x), stack, new)
        return stack, marks.at[top + 1].set(stop), top + 1

    def body(carry, t):
        (stack, marks, top), ct_state, ct_rest = carry
        unfinished = lambda c: (c[1][c[2]] < t) & (c[2] + 1 < snapshots)
        stack, marks, top = lax.while_loop(unfinished, lambda c: descend(t, c), (stack, marks, top))
        at = advance(_tree.take(stack, top), marks[top], t, rest)
        ct_state, ct_h, ct_b, ct_c = step_vjp(
            step, at, hparams, _tree.take(batches, t), consts, ct_state
        )
        ct_rest = jax.tree.map(jnp.add, ct_rest, (ct_h, ct_c))
        top = jnp.where(marks[top] == t, jnp.maximum(top - 1, 0), top)
        return ((stack, marks, top), ct_state, ct_rest), ct_b

    start = (
        (state, marks, jnp.asarray(top)),
        inexact(cotangent),
        _tree.zeros_like((inexact(hparams), inexact(consts))),
    )
    (_, ct_state, (ct_h, ct_c)), ct_b = lax.scan(body, start, jnp.arange(steps), reverse=True)
    # float0 leaves (integers, keys) have no cotangent; None says so to custom_vjp
    return (
        spread(ct_state, cotangent),
        spread(ct_h, hparams),
        spread(ct_b, batches),
        spread(ct_c, consts),
    )


def step_vjp(step, state, hparams, batch, consts, cotangents: list):
    """Cotangents of the inexact leaves of all four inputs, as lists, like those of the output."""
    inputs = (state, hparams, batch, consts)

    def on_inexact(*parts):
        full = [refill(part, whole) for part, whole in zip(parts, inputs, strict=True)]
        return inexact(step(*full[:3], *full[3]))

    _, pullback = jax.vjp(on_inexact, *map(inexact, inputs))
    return pullback(cotangents)


def _is_inexact(x) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def inexact(tree: PyTree) -> list:
    """The leaves that have a derivative."""
    return [x for x in jax.tree.leaves(tree) if _is_inexact(x)]


def refill(part: list, whole: PyTree) -> PyTree:
    """`whole` with its inexact leaves replaced by `part`."""
    values = iter(part)
    return jax.tree.map(lambda x: next(values) if _is_inexact(x) else x, whole)


def spread(part: list, like: PyTree) -> PyTree:
    """`part` in the structure of `like`, with None where a leaf has no derivative."""
    values = iter(part)
    leaves, tree = jax.tree.flatten(like)
    return tree.unflatten([next(values) if _is_inexact(x) else None for x in leaves])
