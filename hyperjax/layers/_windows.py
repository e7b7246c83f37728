"""How a window moves over space: its arguments, checked, and what it sees."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Padding: TypeAlias = str | Sequence[tuple[int, int]]


class Windows(NamedTuple):
    """Everything about a window but the data; one entry per axis of space."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]  # negative ones cut off
    dilation: tuple[int, ...]  # from one entry of the window to the next
    holes: tuple[int, ...]  # from one entry of x to the next: 1 has none between


def extent(window: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """How far a window reaches, in each dimension."""
    return [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]


def per_axis(where: str, name: str, value: int | Sequence[int], space: int) -> tuple[int, ...]:
    """One integer >= 1 for each axis of space."""
    given: Any = value if np.ndim(value) else (value,) * space
    try:
        values = tuple(operator.index(v) for v in given)
    except TypeError:
        values = ()
    if len(values) != space or min(values) < 1:
        raise ValueError(
            f"{where}: `{name}` is {value!r}, expected an integer >= 1 or {space} of them, one for "
            "each dimension of the window."
        )
    return values


def pads_of(
    where: str, padding: Padding, sizes: Sequence[int], extents: Sequence[int], strides
) -> tuple[tuple[int, int], ...]:
    """A pair for each dimension, so that the window fits at least once."""
    try:
        if isinstance(padding, str):
            pads = lax.padtype_to_pads(sizes, extents, strides, padding)
        else:
            pads = [(operator.index(low), operator.index(high)) for low, high in padding]
    except (TypeError, ValueError, RuntimeError):
        pads = []
    named = ("SAME", "SAME_LOWER", "VALID")
    if len(pads) != len(sizes) or (isinstance(padding, str) and padding not in named):
        raise ValueError(
            f"{where}: `padding` is {padding!r}, expected one of {', '.join(map(repr, named))}, or "
            f"{len(sizes)} pairs of integers, one for each dimension of the window."
        )
    padded = [n + low + high for n, (low, high) in zip(sizes, pads, strict=True)]
    if any(n < e for n, e in zip(padded, extents, strict=True)):
        raise ValueError(
            f"{where}: the window reaches over {tuple(extents)}, further than `x` with its "
            f"padding, {tuple(padded)}: nothing would come out. Pad more, or take a smaller window."
        )
    return tuple((low, high) for low, high in pads)


def patches(x: jax.Array, windows: Windows) -> jax.Array:
    """What the window sees at each place: [n, *space, in] -> [n, *places, *window * in].

    One axis after the other, so that there are as many slices as the sum of the window's sides and
    not their product; the derivative adds up in the same stages.
    """
    x = _padded(x, windows)
    for axis in reversed(range(len(windows.window))):
        parts = [_slice(x, axis, offset, windows) for offset in range(windows.window[axis])]
        x = jnp.concatenate(parts, axis=-1)
    return x


def _padded(x: jax.Array, windows: Windows) -> jax.Array:
    space = [(low, high, h - 1) for (low, high), h in zip(windows.pads, windows.holes, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *space, (0, 0, 0)])


def _slice(x: jax.Array, axis: int, offset: int, windows: Windows) -> jax.Array:
    """The entries along one axis of space that one entry of the window meets."""
    stride, step = windows.strides[axis], windows.dilation[axis]
    reach = (windows.window[axis] - 1) * step + 1
    last = (x.shape[axis + 1] - reach) // stride * stride
    begin = offset * step
    return lax.slice_in_dim(x, begin, begin + last + 1, stride, axis + 1)
