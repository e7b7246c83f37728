"""Training that can be run backwards: reverse mode without a trajectory.

Gradient descent with momentum,

    u' = m u + g(w),    w' = w - r u',

is undone by w = w' + r u', u = (u' - g(w)) / m, but not in floating point: rounding loses digits
and dividing by m < 1 magnifies the loss exponentially (Maclaurin, Duvenaud and Adams 2015, arXiv
1502.03492). Here w and u are integers in units of 2^-fraction. Adding an integer is undone
exactly; only the product with m loses something, log2(1 / m) bits per entry and step. They are
kept in a second integer b per entry, by a map that is undone exactly as well and is close to

    (u, b) -> (m u, b / m).

It has determinant one, and is therefore a product of shears, each of which adds to one of the two
a rounded multiple of the other and is undone by subtracting the same. With x = 1 - m:

    b += u;    u -= [x b];    b -= u + [(x / m) u];    u += [m x b]        ([.]: rounded down)

The paper instead takes the digits of b in place of those that u loses, which leaves an error of
the size of the denominator of m, too much for 32 bits; here u is m u within two units. Rounding
errors make b grow as b' = (b + 1) / m + 1 at most; before that overflows, another word is begun.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _checks, _tree
from ._treeverse import inexact, spread, step_vjp
from ._types import Batches, Estimate, HParams, Loss, Params, PyTree, Response, Split

Schedule = Callable[[HParams, jax.Array], PyTree]


class ReversibleState(NamedTuple):
    params: Params
    velocity: Params
    count: jax.Array  # steps so far, int32


class ReversibleInfo(NamedTuple):
    """Whether a reversible hypergradient can be trusted; it is NaN unless both hold."""

    recovered: jax.Array  # the backward run ended where the forward run began, bit for bit
    fits: jax.Array  # momenta were inside [least_momentum, 1], all numbers inside the range


class Reversible(NamedTuple):
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
    CPU it takes about as long as that of `unroll` (benchmarks/unrolled.py). No forward mode, no
    second derivatives.

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
        (1024) by default. Gradients are rounded to such multiples too, so that float32 wants
        gradients well above 1e-7: scale the loss up and the rate down, or use float64.

    Nothing is silently wrong: if a number leaves the range or momentum leaves [least_momentum, 1],
    the params that come out are NaN, and so is the gradient if the backward run does not end where
    the forward run began, as may happen where a gradient is not computed the same way twice.
    `Estimate.info` is a `ReversibleInfo`.

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
        info = ReversibleInfo(flags[0] > 0, flags[1] > 0)
        return Estimate(value, jax.tree.map(jnp.add, direct, indirect), info), end

    def _train(self, hparams, carry, batches, receipt):
        """Nothing depends on `receipt`: the backward run writes its report as the cotangent."""
        steps = _checks.count_steps("reversible", batches)
        carry = _tree.vary_like(carry, hparams)
        # The flags vary as the carry does, and with them whatever they turn into NaN.
        hparams, batches = _tree.vary_like((hparams, batches), carry)
        leaves, structure = jax.tree.flatten(carry.params)
        grids = [_grid(x.dtype, self.fraction) for x in leaves]
        words = max(-(-steps // _steps_per_word(g, self.least_momentum)) for g in grids)

        first = jax.tree.map(lambda x: x[0], batches)
        gradient, for_gradient = jax.closure_convert(self.gradient, carry.params, hparams, first)
        on_leaves = lambda w, *rest: jax.tree.leaves(gradient(structure.unflatten(w), *rest))
        paced = lambda h, t: self.pace(h, t, carry.params)
        pace, for_pace = jax.closure_convert(paced, hparams, carry.count)

        run = _Run(on_leaves, pace, grids, self.least_momentum, steps, words).reversing()
        rest = (hparams, batches, _tree.vary_like((for_gradient, for_pace), carry))
        velocity = jax.tree.leaves(carry.velocity)
        leaves, velocity = run(leaves, velocity, receipt, carry.count, rest)
        params = structure.unflatten(leaves)
        return params, ReversibleState(params, structure.unflatten(velocity), carry.count + steps)


def _blank(hparams, carry):
    return _tree.vary_like(jnp.zeros(2), (hparams, carry))


class _Run(NamedTuple):
    """A number of steps on lists of leaves, forwards and backwards."""

    gradient: Callable
    pace: Callable
    grids: list["_Grid"]
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

    def enter(self, leaves, velocity) -> list["_Entry"]:
        return self.each(functools.partial(_enter, self.words), leaves, velocity)

    def params(self, entries) -> list[jax.Array]:
        return self.each(lambda grid, x: _to_float(grid, x.w), entries)

    def word(self, t):
        """Which word of `lost` step t uses."""
        return t // -(-self.steps // self.words)


def _forward(run, leaves, velocity, receipt, count, rest):
    del receipt
    hparams, batches, (for_gradient, for_pace) = rest

    def body(state, now):
        entries, fits = state
        t, batch = now
        rates, momenta = _alone(run.pace, hparams, count + t, *for_pace)
        grads = _alone(run.gradient, run.params(entries), hparams, batch, *for_gradient)
        step = functools.partial(_step, run.least_momentum, run.word(t))
        entries, fit = zip(*run.each(step, entries, grads, rates, momenta), strict=True)
        return (list(entries), _all([fits, *fit])), None

    entries = run.enter(leaves, velocity)
    finite = [jnp.all(jnp.isfinite(x)) for x in (*leaves, *velocity)]
    fits = _all([*finite, *run.each(_inside, entries)])
    (entries, fits), _ = lax.scan(
        body, (entries, fits), (jnp.arange(run.steps, dtype=jnp.int32), batches)
    )
    out = run.params(entries), run.each(lambda grid, x: _to_float(grid, x.u), entries)
    return _unless(fits, out), ((entries, fits), (leaves, velocity, count, rest))


def _backward(run, residuals, cotangents):
    (entries, fits), (leaves, velocity, count, (hparams, batches, consts)) = residuals
    for_gradient, for_pace = consts

    def field(w, hparams, now, for_gradient, for_pace):
        t, batch = now
        grads = run.gradient(w, hparams, batch, *for_gradient)
        return grads, run.pace(hparams, t, *for_pace)

    def body(state, now):
        entries, (dw, du), totals = state
        t, batch = now
        rates, momenta = _alone(run.pace, hparams, count + t, *for_pace)
        after, entries = entries, run.each(_unmove, entries, rates)
        w = run.params(entries)
        grads = _alone(run.gradient, w, hparams, batch, *for_gradient)
        entries = run.each(functools.partial(_unpush, run.word(t)), entries, grads, momenta)
        du, dr, dm = zip(*run.each(_pull, dw, du, entries, after, rates, momenta), strict=True)
        now = (count + t, batch)
        through = step_vjp(field, w, hparams, now, consts, [*du, *dr, *dm])
        dw = jax.tree.map(jnp.add, dw, through[0])
        du = run.each(lambda grid, x, m: x * _as_used(grid, m), list(du), momenta)
        totals = jax.tree.map(jnp.add, totals, (through[1], through[3]))
        return (entries, (dw, du), totals), through[2]

    start = entries, cotangents, _tree.zeros_like((inexact(hparams), inexact(consts)))
    times = jnp.arange(run.steps, dtype=jnp.int32)
    end, dbatches = lax.scan(body, start, (times, batches), reverse=True)
    entries, (dw, du), (dh, dconsts) = end
    pairs = zip(jax.tree.leaves(entries), jax.tree.leaves(run.enter(leaves, velocity)), strict=True)
    recovered = _all([jnp.all(x == y) for x, y in pairs])
    grads = _unless(fits & recovered, (dw, du, dh, dbatches, dconsts))
    return *grads, jnp.stack([recovered, fits]).astype(float)


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


def _unless(flag, tree):
    """`tree`, or NaN where the flag is down."""
    return jax.tree.map(lambda x: jnp.where(flag, x, jnp.nan), tree)


# --------------------------------------------------------------- integers for one leaf


class _Grid(NamedTuple):
    """Numbers of a type as integers in units of 2^-fraction."""

    signed: jnp.dtype
    unsigned: jnp.dtype
    floating: jnp.dtype
    half: int  # half the bits of a word
    fraction: int


class _Entry(NamedTuple):
    """The state of one leaf: integers."""

    w: jax.Array
    u: jax.Array
    lost: jax.Array  # [words, *shape]: what multiplying u with momenta would have lost


def _grid(dtype, fraction: int | None) -> _Grid:
    if dtype == jnp.float32:
        return _Grid(jnp.int32, jnp.uint32, dtype, 16, 25 if fraction is None else fraction)
    if dtype == jnp.float64:
        return _Grid(jnp.int64, jnp.uint64, dtype, 32, 52 if fraction is None else fraction)
    raise TypeError(
        f"reversible: leaves of params must be float32 or float64; got {dtype}. Convert them with "
        "`jnp.asarray(x, jnp.float32)`."
    )


def _steps_per_word(grid: _Grid, least_momentum: float) -> int:
    """How many steps keep b, which starts at zero and grows as b' = (b + 1) / m + 1, in range."""
    bound, steps = 0.0, 0
    least = math.floor(least_momentum * 2**grid.half) / 2**grid.half
    while (bound := (bound + 1) / least + 1) < _limit(grid):
        steps += 1
    return steps


def _limit(grid: _Grid) -> int:
    return 2 ** (2 * grid.half - 2)  # two such numbers can be added


def _to_float(grid, x):
    return x.astype(grid.floating) * 2.0**-grid.fraction


def _to_int(grid, x):
    return jnp.round(x).astype(grid.signed)


def _enter(words, grid, w, u) -> _Entry:
    lost = _tree.vary_like(jnp.zeros((words, *w.shape), grid.signed), w)
    units = lambda x: _to_int(grid, x * 2.0**grid.fraction)
    return _Entry(units(w), units(u), lost)


def _inside(grid, entry) -> jax.Array:
    return jnp.all(jnp.abs(entry.w) < _limit(grid)) & jnp.all(jnp.abs(entry.u) < _limit(grid))


def _step(least, word, grid, entry, grad, rate, momentum) -> tuple[_Entry, jax.Array]:
    """The entry after one step, and whether all numbers stayed in their range."""
    n = _numerator(grid, momentum)
    u, b = _multiply(grid, entry.u, entry.lost[word], n)
    push = grad * 2.0**grid.fraction
    u = u + _to_int(grid, push)
    move = rate * u.astype(grid.floating)
    after = _Entry(entry.w - _to_int(grid, move), u, entry.lost.at[word].set(b))
    # Written so that NaN fails.
    small = jnp.all(jnp.abs(push) < _limit(grid)) & jnp.all(jnp.abs(move) < _limit(grid))
    allowed = jnp.all((math.floor(least * 2**grid.half) <= n) & (n <= 2**grid.half))
    return after, small & allowed & _inside(grid, after)


def _unmove(grid, entry, rate) -> _Entry:
    return entry._replace(w=entry.w + _to_int(grid, rate * entry.u.astype(grid.floating)))


def _unpush(word, grid, entry, grad, momentum) -> _Entry:
    u = entry.u - _to_int(grid, grad * 2.0**grid.fraction)
    u, b = _divide(grid, u, entry.lost[word], _numerator(grid, momentum))
    return entry._replace(u=u, lost=entry.lost.at[word].set(b))


def _pull(grid, dw, du, before, after, rate, momentum):
    """Cotangents of the velocity after the step, of rate and of momentum."""
    du = du - rate * dw
    shaped = lambda x, like: x if jnp.ndim(like) else jnp.sum(x)
    dr = shaped(-dw * _to_float(grid, after.u), rate)
    return du, dr, shaped(du * _to_float(grid, before.u), momentum)


def _numerator(grid, momentum):
    return _to_int(grid, momentum * 2.0**grid.half)


def _as_used(grid, momentum):
    return _numerator(grid, momentum).astype(grid.floating) * 2.0**-grid.half


def _multiply(grid, u, b, n):
    """(u, b) to nearly (m u, b / m), m = n / 2^half: see the top of the file."""
    x, x_by_m, m_by_x = _shears(grid, n)
    b = b + u
    u = u - _scaled(grid, b, x)
    b = b - u - _scaled(grid, u, x_by_m)
    return u + _scaled(grid, b, m_by_x), b


def _divide(grid, u, b, n):
    """The inverse of `_multiply`, for any integers."""
    x, x_by_m, m_by_x = _shears(grid, n)
    u = u - _scaled(grid, b, m_by_x)
    b = b + u + _scaled(grid, u, x_by_m)
    u = u + _scaled(grid, b, x)
    return u, b - u


def _shears(grid, n):
    """x, x / m and m x in units of 2^-(2 half), for x = 1 - m; exact but for x / m."""
    one = 1 << grid.half
    n = jnp.clip(n, one // 2, one).astype(grid.unsigned)
    x = jnp.asarray(one, grid.unsigned) - n
    high, rest = (x << grid.half) // n, (x << grid.half) % n
    x_by_m = (high << grid.half) | ((rest << grid.half) // n)
    most = ~jnp.zeros((), grid.unsigned)  # x / m = 1 would be one more than fits
    return x << grid.half, jnp.where(x < n, x_by_m, most), n * x


def _scaled(grid, y, factor):
    """floor(y * factor / 2^(2 half)), by long multiplication with half words."""
    half, mask = grid.half, (1 << grid.half) - 1
    y_high, y_low = y >> half, (y & mask).astype(grid.unsigned)
    f_high, f_low = factor >> half, factor & mask
    signed = lambda x: x.astype(grid.signed)
    middle = y_low * f_high + (y_low * f_low >> half)
    low = y_high * signed(f_low) + signed(middle & mask)
    return y_high * signed(f_high) + signed(middle >> half) + (low >> half)
