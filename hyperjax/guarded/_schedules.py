"""Schedules of optax whose every number may be traced, with derivatives in all of them.

Those of optax test their arguments with a Python `if`, so that traced lengths, peaks and rates
raise TracerBoolConversionError under jit and vmap. Values are those of optax wherever it has any.
Lengths and beginnings may be fractions of a step. At the kinks, where a phase begins or ends, the
derivative is that of the phase that holds still. What is constant in optax and works there
(`constant_schedule`, `join_schedules`) is not repeated here.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._types import Scalar

Number = float | Scalar


def polynomial_schedule(
    init_value: Number,
    end_value: Number,
    power: Number,
    transition_steps: Number,
    transition_begin: Number = 0,
) -> optax.Schedule:
    """`optax.polynomial_schedule`: from `init_value` to `end_value` as (1 - t / steps)^power.

    As in optax, `transition_steps` of 0 holds `init_value` forever. Raises ValueError for a length
    or beginning that is a negative Python number.
    """
    where = "guarded.polynomial_schedule"
    _check_lengths(where, transition_steps=transition_steps, transition_begin=transition_begin)

    def schedule(count):
        t, first, end, p, steps, begin = _reals(
            count, init_value, end_value, power, transition_steps, transition_begin
        )
        done, moving = _progress(t - begin, steps)
        # 0^p where the transition is over, which is 1 for p = 0.
        left = jnp.where(moving, (1 - done) ** p, jnp.where(p == 0, 1.0, 0.0))
        return jnp.where(steps > 0, (first - end) * left + end, first)

    return schedule


def linear_schedule(
    init_value: Number,
    end_value: Number,
    transition_steps: Number,
    transition_begin: Number = 0,
) -> optax.Schedule:
    """`optax.linear_schedule`: `polynomial_schedule` of power 1."""
    return polynomial_schedule(init_value, end_value, 1.0, transition_steps, transition_begin)


def exponential_decay(
    init_value: Number,
    transition_steps: Number,
    decay_rate: Number,
    transition_begin: Number = 0,
    staircase: bool = False,
    end_value: Number | None = None,
) -> optax.Schedule:
    """`optax.exponential_decay`: init_value decay_rate^(t / transition_steps).

    `end_value` bounds it from below for a rate below 1, else from above. `staircase` rounds the
    exponent down. As in optax, a length or a rate of 0 holds `init_value`. Raises ValueError for a
    length, beginning or rate that is a negative Python number.
    """
    _check_lengths(
        "guarded.exponential_decay",
        transition_steps=transition_steps,
        transition_begin=transition_begin,
        decay_rate=decay_rate,
    )

    def schedule(count):
        bound = init_value if end_value is None else end_value
        t, first, steps, rate, begin, last = _reals(
            count, init_value, transition_steps, decay_rate, transition_begin, bound
        )
        active = (steps > 0) & (rate != 0)
        exponent = jnp.where(t > begin, t - begin, 0) / jnp.where(steps > 0, steps, 1)
        exponent = jnp.floor(exponent) if staircase else exponent
        value = first * jnp.where(active, rate, 1) ** exponent
        if end_value is not None:
            bounded = jnp.where(rate < 1, jnp.maximum(value, last), jnp.minimum(value, last))
            value = jnp.where(active, bounded, value)
        return value

    return schedule


def cosine_decay_schedule(
    init_value: Number, decay_steps: Number, alpha: Number = 0.0, exponent: Number = 1.0
) -> optax.Schedule:
    """`optax.cosine_decay_schedule`: half a cosine from `init_value` to alpha `init_value`.

    A length of 0, which optax refuses, is at its end from the start. Raises ValueError for a
    length that is a negative Python number.
    """
    _check_lengths("guarded.cosine_decay_schedule", decay_steps=decay_steps)

    def schedule(count):
        t, first, steps, low, power = _reals(count, init_value, decay_steps, alpha, exponent)
        return first * ((1 - low) * _half_cosine(t, steps, power) + low)

    return schedule


def warmup_cosine_decay_schedule(
    init_value: Number,
    peak_value: Number,
    warmup_steps: Number,
    decay_steps: Number,
    end_value: Number = 0.0,
    exponent: Number = 1.0,
) -> optax.Schedule:
    """`optax.warmup_cosine_decay_schedule`: linear to `peak_value`, then a cosine to `end_value`.

    `decay_steps` is the length of both together. No warm-up, 0 steps, begins at the peak. A peak
    of 0 still ends at `end_value`, where optax stays at 0: the derivative in the peak would not
    exist otherwise. Raises ValueError for a length that is a negative Python number.
    """
    where = "guarded.warmup_cosine_decay_schedule"
    _check_lengths(where, warmup_steps=warmup_steps, decay_steps=decay_steps)

    def schedule(count):
        t, first, peak, warmup, steps, end, power = _reals(
            count, init_value, peak_value, warmup_steps, decay_steps, end_value, exponent
        )
        done, _ = _progress(t, warmup)
        falling = (peak - end) * _half_cosine(t - warmup, steps - warmup, power) + end
        return jnp.where(t < warmup, first + (peak - first) * done, falling)

    return schedule


def piecewise_constant_schedule(
    init_value: Number,
    boundaries: jax.typing.ArrayLike | Sequence[Number],
    scales: jax.typing.ArrayLike | Sequence[Number],
) -> optax.Schedule:
    """`init_value` times the product of all `scales` whose boundary has been reached.

    As `optax.piecewise_constant_schedule(init_value, {boundary: scale, ...})`, but with arrays
    [k] or lists, since a traced number cannot be the key of a dictionary. The derivative in
    boundaries is zero. Raises ValueError if the two are not vectors of one length.
    """
    shapes = [jnp.shape(jnp.asarray(x)) for x in (boundaries, scales)]
    if len(shapes[0]) != 1 or shapes[0] != shapes[1]:
        raise ValueError(
            "guarded.piecewise_constant_schedule: `boundaries` and `scales` must be vectors of one "
            f"length; got shapes {shapes[0]} and {shapes[1]}."
        )

    def schedule(count):
        t, first, at, factors = _reals(count, init_value, boundaries, scales)
        return first * jnp.prod(jnp.where(t >= at, factors, 1))

    return schedule


def _half_cosine(t: Scalar, steps: Scalar, power: Scalar) -> Scalar:
    """From 1 at t = 0 to 0 at `steps` and beyond."""
    done, moving = _progress(t, steps)
    height = jnp.where(moving, 0.5 * (1 + jnp.cos(jnp.pi * done)), 1.0)
    return jnp.where(moving, height**power, jnp.where(power == 0, 1.0, 0.0))


def _progress(t: Scalar, steps: Scalar) -> tuple[Scalar, Scalar]:
    """t / steps clipped to [0, 1), and whether the phase is not yet over; 0 if it is.

    Where it is over the quotient is chosen away, so that neither 0 / 0 nor the infinite slope of
    a root at its end gets into the derivative.
    """
    moving = t < steps
    started = moving & (t > 0)
    return jnp.where(started, t, 0) / jnp.where(moving & (steps > 0), steps, 1), moving


def _reals(count, *values):
    """All as arrays of the type of `values`; Python numbers take that of the others."""
    dtype = jnp.result_type(0.0, *jax.tree.leaves(values))  # a list counts by its entries
    return [jnp.asarray(x).astype(dtype) for x in (count, *values)]


def _check_lengths(where: str, **values: Number) -> None:
    for name, value in values.items():
        if isinstance(value, int | float):
            _checks.number(where, name, value)
