"""Binomial checkpointing: as few snapshots and forward runs as promised, and the same gradient."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import error, jit

import hyperjax as hj
from hyperjax._treeverse import capacity, snapshots_for, split_table

# ------------------------------------------------------------------------------ the table


@functools.cache
def least_runs(length: int, free: int) -> int:
    """Forward runs needed before each of `length` steps can be reversed, by dynamic programming.

    With a snapshot at the start and `free` more: advance to m, reverse the right part with one
    snapshot less, then the left part. With none free, step i is reached by i runs from the start.
    """
    if length <= 1:
        return 0
    if free == 0:
        return length * (length - 1) // 2
    return min(m + least_runs(length - m, free - 1) + least_runs(m, free) for m in range(1, length))


def runs_by_table(table, length: int, free: int) -> int:
    if length <= 1:
        return 0
    if free == 0:
        return length * (length - 1) // 2
    m = int(table[length, free])
    return m + runs_by_table(table, length - m, free - 1) + runs_by_table(table, m, free)


def most_repeats(table, length: int, free: int) -> int:
    """How often the most repeated step is run forward."""
    if length <= 1:
        return 0
    if free == 0:
        return length - 1
    m = int(table[length, free])
    return max(most_repeats(table, length - m, free - 1), 1 + most_repeats(table, m, free))


def test_split_table_is_optimal():
    for free in range(1, 7):
        table = split_table(80, free + 1)
        for length in range(2, 81):
            assert runs_by_table(table, length, free) == least_runs(length, free), (length, free)


def test_splits_are_inside():
    table = split_table(300, 25)
    lengths = np.arange(2, 301)[:, None]
    assert np.all(table[2:, 1:] >= 1) and np.all(table[2:, 1:] < lengths)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100, 300])
def test_repeats_and_snapshots_are_as_promised(steps):
    snapshots = snapshots_for(steps)
    assert most_repeats(split_table(steps, snapshots), steps, snapshots - 1) <= 2
    assert snapshots <= math.ceil(math.sqrt(2 * steps)) + 1
    # and one snapshot less would not do
    assert snapshots == 1 or capacity(snapshots - 2, 2) < steps


# ------------------------------------------------------------------- what a run really does


def counted(steps: int):
    """Evaluations of the step in one gradient, by a callback from the compiled program."""
    seen = []

    def step(state, hparams, batch):
        # Unordered callbacks that nothing depends on may not be merged or dropped: they have an
        # effect. Inside the vjp of a step it fires once, in the forward part.
        jax.debug.callback(lambda t: seen.append(int(t)), batch)
        return optimize(state, hparams, batch)

    grad = jax.jit(jax.grad(loss_after(step, steps, checkpoint="binomial")))
    grad(0.3).block_until_ready()
    jax.effects_barrier()
    return np.bincount(seen, minlength=steps)


def optimize(state, rate, t):
    """Another map at each step, so that the order of steps matters."""
    x = state.params
    return state._replace(params=x - rate * jnp.sin(x + 0.1 * t))


def loss_after(step, steps, **options):
    respond = hj.unroll(step, **options)
    start = hj.InnerState(jnp.asarray([1.0, -0.5, 2.0]), ())
    return lambda rate: jnp.sum(respond(rate, start, jnp.arange(steps))[0] ** 2)


@pytest.mark.parametrize("steps", [1, 2, 3, 17, 101])
def test_steps_are_evaluated_as_often_as_promised(steps):
    counts = counted(steps)
    # The forward run, at most two repeats, and once inside the step's own vjp; three on average.
    assert counts.min() == 2
    assert counts.max() <= 4
    assert counts.sum() <= 3 * steps
    snapshots = snapshots_for(steps)
    # In total: what the table says, less the first descent, which is part of the forward run.
    table = split_table(steps, snapshots)
    assert counts.sum() <= 2 * steps + runs_by_table(table, steps, snapshots - 1)


def test_stored_states_are_the_snapshots():
    # The largest stack of states that waits for the backward pass, read off its shapes.
    steps = 101
    assert stored_states("binomial", steps) == snapshots_for(steps)


def stored_states(checkpoint, steps) -> int:
    _, pullback = jax.vjp(loss_after(optimize, steps, checkpoint=checkpoint), 0.3)
    return max(x.size // 3 for x in jax.tree.leaves(pullback) if np.shape(x)[-1:] == (3,))


@pytest.mark.parametrize(("checkpoint", "states"), [(None, 100), (20, 5), (4, 25), ("sqrt", 10)])
def test_segments_store_one_state_each(checkpoint, states):
    # Without segments every step stores something, be it the state or a function of it.
    assert stored_states(checkpoint, 100) == states


# ------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 17, 101])
def test_gradient_is_that_of_the_plain_loop(steps):
    plain, binomial = (
        jit(jax.value_and_grad(loss_after(optimize, steps, checkpoint=c)))(0.3)
        for c in (None, "binomial")
    )
    assert error(binomial, plain) < 1e-14


def everything(checkpoint, steps=11):
    """Adam's integer count in the state, float, integer and key leaves in the batch, a closure."""
    rng = np.random.default_rng(0)
    batches = {
        "x": jnp.asarray(rng.normal(size=(steps, 4))),
        "index": jnp.asarray(rng.integers(4, size=steps)),
        "key": jax.random.split(jax.random.key(0), steps),
    }

    def value(hparams, x, captured):
        def loss(w, h, batch):
            noise = jax.random.normal(batch["key"], ())
            error = batch["x"] @ w - jnp.sin(captured) + 0.1 * noise
            return error**2 + h["l2"] * w[batch["index"]] ** 2

        inner = hj.inner(loss, lambda h: optax.adam(h["lr"], eps_root=1e-8))
        respond = hj.unroll(inner.step, checkpoint=checkpoint)
        w, state = respond(hparams, inner.init(jnp.ones(4), hparams), {**batches, "x": x})
        return jnp.sum(w**2), state

    arguments = {"lr": jnp.asarray(0.05), "l2": jnp.asarray(0.1)}, batches["x"], jnp.asarray(0.7)
    return jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(*arguments)


def test_gradients_in_batches_and_closures_with_integer_and_key_leaves():
    (value, state), grads = everything("binomial")
    (expected, _), answers = everything(None)
    assert error(value, expected) < 1e-14
    assert error(grads, answers) < 1e-12
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads))
    assert state.opt_state[0].count == 11


def test_gradient_in_the_start():
    p = problems.net(steps=10)
    loss = lambda params, c: jnp.sum(
        hj.unroll(p.inner.step, checkpoint=c)(
            p.hparams, p.inner.init(params, p.hparams), p.split.train
        )[0]["w"]
    )
    plain, binomial = (
        jit(jax.grad(loss), static_argnums=1)(p.params, c) for c in (None, "binomial")
    )
    assert error(binomial, plain) < 1e-13


def test_vmap_with_a_closure():
    step = lambda shift: lambda s, h, _: s._replace(params=s.params - h * jnp.sin(s.params + shift))
    value = lambda c: lambda shift, rate: loss_after(step(shift), 9, checkpoint=c)(rate)
    shifts, rates = jnp.linspace(0, 1, 4), jnp.linspace(0.1, 0.4, 4)
    plain, binomial = (
        jit(jax.vmap(jax.grad(value(c), argnums=(0, 1))))(shifts, rates) for c in (None, "binomial")
    )
    assert error(binomial, plain) < 1e-13


# ------------------------------------------------------------------------- refusals


def test_forward_mode_is_refused():
    value = loss_after(optimize, 5, checkpoint="binomial")
    with pytest.raises(TypeError, match="can't apply forward-mode"):
        jax.jvp(value, (0.3,), (1.0,))


def test_reverse_mode_twice_is_refused():
    value = loss_after(optimize, 5, checkpoint="binomial")
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(jax.grad(value))(0.3)


def test_forward_over_reverse_is_exact():
    plain, binomial = (
        jit(jax.jacfwd(jax.grad(loss_after(optimize, 17, checkpoint=c))))(0.3)
        for c in (None, "binomial")
    )
    assert error(binomial, plain) < 1e-13


# ------------------------------------------------------ segments, the other checkpoints


@pytest.mark.parametrize(
    ("checkpoint", "steps"),
    [*itertools.product((1, 4, 100, "sqrt"), (1, 4, 17)), (5, 15)],
)
def test_segments_of_any_length_give_the_plain_gradient(checkpoint, steps):
    # Whole segments, a rest, one segment longer than the run.
    plain, segmented = (
        jit(jax.value_and_grad(loss_after(optimize, steps, checkpoint=c)))(0.3)
        for c in (None, checkpoint)
    )
    assert error(segmented, plain) < 1e-14
