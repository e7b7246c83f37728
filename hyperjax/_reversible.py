"""Training that can be run backwards: reverse mode without a trajectory.

Gradient descent with momentum is undone step by step, on integers (`_integers`), from the end of
training to its beginning; on the way each step is differentiated at the state that it really had.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _checks, _tree
from . import _integers as integers
from ._treeverse import inexact, spread, step_vjp
from ._types import Batches, Estimate, HParams, Loss, Params, PyTree, Response, Split

Schedule = Callable[[HParams, jax.Array], PyTree]


class ReversibleState(NamedTuple):
    """The carry of reversible training."""

    params: Params
    velocity: Params
    steps: jax.Array  # so far, int32


class ReversibleInfo(NamedTuple):
    """Whether a reversible hypergradient can be trusted; it is NaN unless the first two hold.

    `rounding` is near zero where the training is that of floating point, and 1 where all gradients
    or all moves of a leaf were rounded to zero. It is the sum of |rounding| over entries and steps
    by the sum of what was rounded: of gradients or of moves (rate times velocity), whichever is
    more, and of the leaf with the most.
    """

    recovered: jax.Array  # the backward run ended where the forward run began, bit for bit
    fits: jax.Array  # momenta were inside [least_momentum, 1], all numbers inside the range
    rounding: jax.Array  # in [0, 1]; of no meaning unless `fits`


class Reversible(NamedTuple):
    """What `reversible` makes: the carry to train from, and the response."""

    init: Callable[[Params, HParams], ReversibleState]
    response: Response


def reversible(
    loss: Loss,
    rate: Schedule,
    momentum: Schedule,
    *,
    least_momentum: float = 0.9,
    fraction: int | None = None,
) -> Reversible:
    """Gradient descent with momentum whose reverse mode stores the last state only.

    `Reversible.response` trains as `unroll(inner(loss, lambda h: optax.sgd(rate, momentum)).step)`
    does, to about float precision, and `Reversible.init(params, hparams)` makes its carry, from
    which training can go on. Reverse mode runs the training backwards, recomputes every gradient
    and has the derivative in hparams, in params and velocity of the carry, and in batches. On a
    CPU it takes 1.2 to 1.4 times as long as that of `unroll` (benchmarks/unrolled.py). No forward
    mode, no second derivatives.

    Args:
      rate, momentum: functions of (hparams, t), t the number of steps before this one (int32,
        counted on by the carry): a shared value `lambda h, t: h["rate"]` or a schedule
        `lambda h, t: h["rate"][t]`. A scalar, or a tree like params of scalars or arrays of the
        leaf's shape. Momentum is rounded to multiples of 2^-16 for float32 leaves, of 2^-32 for
        float64.
      least_momentum: in [0.5, 1), a bound for momentum from below. It sets the memory: steps *
        log2(1 / least_momentum) bits per entry of params in words of 32 (64) bits. One word does
        for 10,000 steps at 0.999 and for about 160 (370) steps at 0.9; the words after the first
        grow with the number of steps.
      fraction: numbers are multiples of 2^-fraction; default 25 for float32 (52 for float64). The
        entries of params and velocity must stay below 2^(30 - fraction) (2^(62 - fraction)), 32
        (1024) by default; at most 30 (62). Gradients and moves (rate times velocity) are rounded
        to such multiples too, so that float32 wants both well above 1e-7. If gradients are not,
        scale the loss up and the rate down; if moves are not, use float64.

    If a number leaves the range or momentum leaves [least_momentum, 1], the params that come out
    are NaN, and so is the gradient if the backward run does not end where the forward run began,
    as may happen where a gradient is not computed the same way twice. Rounding raises no such
    alarm: the gradient is that of the training as rounded, and zero in the rate if every gradient
    was rounded to zero. `ReversibleInfo.rounding`, in `Estimate.info`, says how much it was.

    Raises ValueError for options out of range, TypeError for params that are neither float32 nor
    float64.
    """
    _checks.is_callable("reversible", "rate", rate)
    _checks.is_callable("reversible", "momentum", momentum)
    if not isinstance(least_momentum, float) or not 0.5 <= least_momentum < 1:
        raise ValueError(
            f"reversible: `least_momentum` must be in [0.5, 1); got {least_momentum!r}. Less "
            "momentum loses more than a bit per step: use `unroll(step, checkpoint='binomial')`."
        )
    if fraction is not None:
        _checks.positive_int("reversible", "fraction", fraction)
    gradient = jax.grad(_checks.scalar_loss("reversible", "loss", loss))

    def init(params: Params, hparams: HParams) -> ReversibleState:
        del hparams
        _checks.differentiable("reversible", "params", params)
        params = _tree.strong(params)
        return ReversibleState(params, _tree.zeros_like(params), jnp.zeros((), jnp.int32))

    def pace(hparams, t, params):
        """Rate and momentum: lists with an entry per leaf, of its type."""
        return (
            _per_leaf("rate", rate(hparams, t), params),
            _per_leaf("momentum", momentum(hparams, t), params),
        )

    return Reversible(init, ReversibleResponse(gradient, pace, float(least_momentum), fraction))


def _per_leaf(name, value, params) -> list[jax.Array]:
    structure = jax.tree.structure(params)
    if jax.tree.structure(value) == jax.tree.structure(0):
        value = structure.unflatten([value] * structure.num_leaves)
    leaves, like = jax.tree.leaves(value), jax.tree.leaves(params)
    if jax.tree.structure(value) != structure or any(
        jnp.shape(x) not in ((), p.shape) for x, p in zip(leaves, like, strict=True)
    ):
        got = ", ".join(_checks.describe(x) for x in leaves)
        raise ValueError(
            f"reversible: `{name}` must return a scalar, or a tree like params of scalars or "
            f"arrays of the leaf's shape; got {got}. Index a schedule by the step: `h[...][t]`."
        )
    pairs = zip(leaves, like, strict=True)
    return [_tree.vary_like(jnp.asarray(x).astype(p.dtype), p) for x, p in pairs]


# ------------------------------------------------------------------------ the response


@dataclass(frozen=True)
class ReversibleResponse:
    """See `reversible`. A response by `__call__`; `estimate` is its hypergradient with a report."""

    gradient: Callable
    pace: Callable
    least_momentum: float
    fraction: int | None

    def __call__(
        self, hparams: HParams, carry: ReversibleState, batches: Batches
    ) -> tuple[Params, ReversibleState]:
        return self._train(hparams, carry, batches, _blank(hparams, carry))

    def estimate(
        self, score: Loss, hparams: HParams, carry: ReversibleState, split: Split
    ) -> tuple[Estimate, ReversibleState]:
        """The hypergradient, with a `ReversibleInfo`."""
        train = lambda h, receipt: self._train(h, carry, split.train, receipt)
        params, pull, end = jax.vjp(train, hparams, _blank(hparams, carry), has_aux=True)
        outer = jax.value_and_grad(lambda p, h: score(p, h, split.valid), argnums=(0, 1))
        value, (through, direct) = outer(params, hparams)
        indirect, flags = pull(through)
        info = ReversibleInfo(flags[0] > 0, flags[1] > 0, flags[2].astype(value.dtype))
        return Estimate(value, jax.tree.map(jnp.add, direct, indirect), info), end

    def _train(self, hparams, carry, batches, receipt):
        """Nothing depends on `receipt`: the backward run writes its report as the cotangent."""
        steps = _checks.count_steps("reversible", batches)
        carry = _tree.vary_like(carry, hparams)
        # The flags vary as the carry does, and with them whatever they turn into NaN.
        hparams, batches = _tree.vary_like((hparams, batches), carry)
        leaves, structure = jax.tree.flatten(carry.params)
        grids = [integers.make_grid(x.dtype, self.fraction) for x in leaves]
        words = max(-(-steps // integers.steps_per_word(g, self.least_momentum)) for g in grids)

        first = jax.tree.map(lambda x: x[0], batches)
        gradient, for_gradient = jax.closure_convert(self.gradient, carry.params, hparams, first)
        on_leaves = lambda w, *rest: jax.tree.leaves(gradient(structure.unflatten(w), *rest))
        paced = lambda h, t: self.pace(h, t, carry.params)
        pace, for_pace = jax.closure_convert(paced, hparams, carry.steps)

        run = _Run(on_leaves, pace, grids, self.least_momentum, steps, words).reversing()
        rest = (hparams, batches, _tree.vary_like((for_gradient, for_pace), carry))
        velocity = jax.tree.leaves(carry.velocity)
        leaves, velocity = run(leaves, velocity, receipt, carry.steps, rest)
        params = structure.unflatten(leaves)
        return params, ReversibleState(params, structure.unflatten(velocity), carry.steps + steps)


def _blank(hparams, carry):
    return _tree.vary_like(jnp.zeros(3), (hparams, carry))


class _Run(NamedTuple):
    """A number of steps on lists of leaves, forwards and backwards."""

    gradient: Callable
    pace: Callable
    grids: list[integers.Grid]
    least_momentum: float
    steps: int
    words: int

    def reversing(self) -> Callable:
        """(params, velocity) after all steps, with its backward rule."""

        @jax.custom_jvp
        def backward(residuals, cotangents):
            return _backward(self, residuals, cotangents)

        @backward.defjvp
        def _(primals, tangents):
            # Its integers have no derivative; without this it would be silently zero.
            raise TypeError(
                "reversible: there are no second derivatives through integers. Use "
                "`unroll(step, checkpoint='binomial')`, which has Hessians forward over reverse."
            )

        def pullback(residuals, cotangents):
            _, (_, _, _, (hparams, batches, consts)) = residuals
            dw, du, dh, dbatches, dconsts, flags = backward(residuals, cotangents)
            like = zip((dh, dbatches, dconsts), (hparams, batches, consts), strict=True)
            return dw, du, flags, None, tuple(spread(*pair) for pair in like)

        run = jax.custom_vjp(lambda *inputs: _forward(self, *inputs)[0])
        run.defvjp(functools.partial(_forward, self), pullback)
        return run

    def each(self, function: Callable, *lists: list) -> list:
        return [function(*x) for x in zip(self.grids, *lists, strict=True)]

    def enter(self, leaves, velocity) -> list[integers.Entry]:
        return self.each(functools.partial(integers.enter, self.words), leaves, velocity)

    def params(self, entries) -> list[jax.Array]:
        return self.each(lambda grid, x: integers.to_float(grid, x.w), entries)

    def word(self, t):
        """Which word of `lost` step t uses."""
        return t // -(-self.steps // self.words)


def _forward(run, leaves, velocity, receipt, count, rest):
    del receipt
    hparams, batches, (for_gradient, for_pace) = rest

    def body(state, now):
        entries, fits, rounded = state
        t, batch = now
        rates, momenta = _alone(run.pace, hparams, count + t, *for_pace)
        grads = _alone(run.gradient, run.params(entries), hparams, batch, *for_gradient)
        step = functools.partial(integers.step, run.least_momentum, run.word(t))
        entries, fit, more = zip(*run.each(step, entries, grads, rates, momenta), strict=True)
        rounded = jax.tree.map(jnp.add, rounded, list(more))
        return (list(entries), _all([fits, *fit]), rounded), None

    representable = functools.partial(run.each, integers.representable)
    fits = _all([*representable(leaves), *representable(velocity)])
    rounded = [_tree.vary_like(jnp.zeros((2, 2), x.dtype), x) for x in leaves]
    (entries, fits, rounded), _ = lax.scan(
        body,
        (run.enter(leaves, velocity), fits, rounded),
        (jnp.arange(run.steps, dtype=jnp.int32), batches),
    )
    out = run.params(entries), run.each(lambda grid, x: integers.to_float(grid, x.u), entries)
    return _unless(fits, out), ((entries, fits, rounded), (leaves, velocity, count, rest))


def _backward(run, residuals, cotangents):
    (entries, fits, rounded), (leaves, velocity, count, (hparams, batches, consts)) = residuals
    for_gradient, for_pace = consts

    def field(w, hparams, now, for_gradient, for_pace):
        t, batch = now
        grads = run.gradient(w, hparams, batch, *for_gradient)
        return grads, run.pace(hparams, t, *for_pace)

    def body(state, now):
        entries, (dw, du), totals = state
        t, batch = now
        rates, momenta = _alone(run.pace, hparams, count + t, *for_pace)
        after, entries = entries, run.each(integers.unmove, entries, rates)
        w = run.params(entries)
        grads = _alone(run.gradient, w, hparams, batch, *for_gradient)
        entries = run.each(functools.partial(integers.unpush, run.word(t)), entries, grads, momenta)
        du, dr, dm = zip(
            *run.each(integers.pull, dw, du, entries, after, rates, momenta), strict=True
        )
        now = (count + t, batch)
        through = step_vjp(field, w, hparams, now, consts, [*du, *dr, *dm])
        dw = jax.tree.map(jnp.add, dw, through[0])
        du = run.each(lambda grid, x, m: x * integers.as_used(grid, m), list(du), momenta)
        totals = jax.tree.map(jnp.add, totals, (through[1], through[3]))
        return (entries, (dw, du), totals), through[2]

    start = entries, cotangents, _tree.zeros_like((inexact(hparams), inexact(consts)))
    times = jnp.arange(run.steps, dtype=jnp.int32)
    end, dbatches = lax.scan(body, start, (times, batches), reverse=True)
    entries, (dw, du), (dh, dconsts) = end
    pairs = zip(jax.tree.leaves(entries), jax.tree.leaves(run.enter(leaves, velocity)), strict=True)
    recovered = _all([jnp.all(x == y) for x, y in pairs])
    grads = _unless(fits & recovered, (dw, du, dh, dbatches, dconsts))
    return *grads, jnp.stack([x.astype(float) for x in (recovered, fits, _largest(rounded))])


def _alone(function, *inputs):
    """`function(*inputs)`, compiled the same way whatever stands around it.

    Forward and backward run must agree in every bit; fused with their different surroundings, a
    sum may be taken in another order.
    """
    # Leaf by leaf: inside shard_map one barrier would make all of them vary where one does.
    fence = lambda tree: jax.tree.map(lax.optimization_barrier, tree)
    return fence(function(*fence(inputs)))


def _all(flags) -> jax.Array:
    return functools.reduce(jnp.logical_and, flags)


def _largest(rounded) -> jax.Array:
    """The largest share, among leaves' [2, 2] of parts and wholes; no share of nothing."""
    share = lambda x: jnp.max(x[:, 0] / jnp.where(x[:, 1] > 0, x[:, 1], 1))
    return functools.reduce(jnp.maximum, [share(x).astype(float) for x in rounded])


def _unless(flag, tree):
    """`tree`, or NaN where the flag is down."""
    return jax.tree.map(lambda x: jnp.where(flag, x, jnp.nan), tree)
