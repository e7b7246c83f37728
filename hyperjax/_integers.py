"""Momentum on integers, undone exactly: what `reversible` computes with, leaf by leaf.

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
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import _tree


class Grid(NamedTuple):
    """Numbers of a type as integers in units of 2^-fraction."""

    signed: jnp.dtype
    unsigned: jnp.dtype
    floating: jnp.dtype
    half: int  # half the bits of a word
    fraction: int


class Entry(NamedTuple):
    """The state of one leaf: integers."""

    w: jax.Array
    u: jax.Array
    lost: jax.Array  # [words, *shape]: what multiplying u with momenta would have lost


def make_grid(dtype, fraction: int | None) -> Grid:
    if dtype == jnp.float32:
        return _checked(Grid(jnp.int32, jnp.uint32, dtype, 16, fraction or 25))
    if dtype == jnp.float64:
        return _checked(Grid(jnp.int64, jnp.uint64, dtype, 32, fraction or 52))
    raise TypeError(
        f"reversible: leaves of params must be float32 or float64; got {dtype}. Convert them with "
        "`jnp.asarray(x, jnp.float32)`."
    )


def _checked(grid: Grid) -> Grid:
    most = 2 * grid.half - 2
    if grid.fraction > most:
        raise ValueError(
            f"reversible: `fraction` must be at most {most} for {grid.floating} leaves, which "
            f"leaves room for entries below one; got {grid.fraction}."
        )
    return grid


def steps_per_word(grid: Grid, least_momentum: float) -> int:
    """How many steps keep b, which starts at zero and grows as b' = (b + 1) / m + 1, in range."""
    bound, steps = 0.0, 0
    least = math.floor(least_momentum * 2**grid.half) / 2**grid.half
    while (bound := (bound + 1) / least + 1) < limit(grid):
        steps += 1
    return steps


def limit(grid: Grid) -> int:
    return 2 ** (2 * grid.half - 2)  # two such numbers can be added


def to_float(grid, x):
    return x.astype(grid.floating) * 2.0**-grid.fraction


def _to_int(grid, x):
    return jnp.round(x).astype(grid.signed)


def enter(words, grid, w, u) -> Entry:
    lost = _tree.vary_like(jnp.zeros((words, *w.shape), grid.signed), w)
    units = lambda x: _to_int(grid, x * 2.0**grid.fraction)
    return Entry(units(w), units(u), lost)


def representable(grid, x) -> jax.Array:
    """Whether all of x is in the range, as it must be before it is made integer; NaN is not."""
    # Not asked of the integers: what is too large becomes the least integer, and so does its abs.
    return jnp.all(jnp.abs(x) < limit(grid) * 2.0**-grid.fraction)


def step(least, word, grid, entry, grad, rate, momentum) -> tuple[Entry, jax.Array, jax.Array]:
    """The entry after one step, whether all numbers stayed in their range, and what was rounded.

    The last is [2, 2]: sums over the entries of |rounding| and of what was rounded, of the
    gradient and of the move.
    """
    n = numerator(grid, momentum)
    u, b = multiply(grid, entry.u, entry.lost[word], n)
    push = grad * 2.0**grid.fraction
    u = u + _to_int(grid, push)
    move = rate * u.astype(grid.floating)
    after = Entry(entry.w - _to_int(grid, move), u, entry.lost.at[word].set(b))
    # Written so that NaN fails.
    small = [jnp.all(jnp.abs(x) < limit(grid)) for x in (push, move, after.w, after.u)]
    allowed = jnp.all((math.floor(least * 2**grid.half) <= n) & (n <= 2**grid.half))
    size = lambda x: jnp.sum(jnp.abs(x))
    rounded = jnp.stack([jnp.stack([size(x - jnp.round(x)), size(x)]) for x in (push, move)])
    return after, functools.reduce(jnp.logical_and, small, allowed), rounded


def unmove(grid, entry, rate) -> Entry:
    return entry._replace(w=entry.w + _to_int(grid, rate * entry.u.astype(grid.floating)))


def unpush(word, grid, entry, grad, momentum) -> Entry:
    u = entry.u - _to_int(grid, grad * 2.0**grid.fraction)
    u, b = divide(grid, u, entry.lost[word], numerator(grid, momentum))
    return entry._replace(u=u, lost=entry.lost.at[word].set(b))


def pull(grid, dw, du, before, after, rate, momentum):
    """Cotangents of the velocity after the step, of rate and of momentum."""
    du = du - rate * dw
    shaped = lambda x, like: x if jnp.ndim(like) else jnp.sum(x)
    dr = shaped(-dw * to_float(grid, after.u), rate)
    return du, dr, shaped(du * to_float(grid, before.u), momentum)


def numerator(grid, momentum):
    return _to_int(grid, momentum * 2.0**grid.half)


def as_used(grid, momentum):
    return numerator(grid, momentum).astype(grid.floating) * 2.0**-grid.half


def multiply(grid, u, b, n):
    """(u, b) to nearly (m u, b / m), m = n / 2^half: see the top of the file."""
    x, x_by_m, m_by_x = _shears(grid, n)
    b = b + u
    u = u - _scaled(grid, b, x)
    b = b - u - _scaled(grid, u, x_by_m)
    return u + _scaled(grid, b, m_by_x), b


def divide(grid, u, b, n):
    """The inverse of `multiply`, for any integers."""
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
