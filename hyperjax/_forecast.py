"""Bytes that a program will take, from the compiled program, before it runs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from . import _checks
from ._types import PyTree


class Forecast(NamedTuple):
    """Bytes on each device, as the compiler has planned them."""

    argument_bytes: int
    output_bytes: int
    aliased_bytes: int  # of outputs that lie where donated arguments lay
    temporary_bytes: int  # beside both
    code_bytes: int  # not known on a CPU: 0

    @property
    def total_bytes(self) -> int:
        """At the end of a call, when arguments, outputs and temporaries are there at once."""
        both = self.argument_bytes + self.output_bytes - self.aliased_bytes
        return both + self.temporary_bytes + self.code_bytes


class Fit(NamedTuple):
    """The largest size whose program fits."""

    size: int
    forecast: Forecast


def forecast(
    function: Callable[..., PyTree], arguments: Sequence[PyTree], *, donate: Sequence[int] = ()
) -> Forecast:
    """What a call of `jax.jit(function, donate_argnums=donate)` on `arguments` will take.

    It compiles and does not run. Arguments may be shapes, from `jax.eval_shape` or
    `jax.ShapeDtypeStruct`: then nothing is allocated either. A function that is jitted already is
    taken as it is, with its own donations.

    Not counted: other arrays of the process, what the allocator loses between arrays (a few per
    cent), work space that a library takes behind the compiler's back, and on a CPU whatever
    compilation itself needs. Every device of a sharded program holds this much.

    Raises ValueError on a backend without an analysis, or for `donate` beside a jitted function.
    """
    _checks.is_callable("forecast", "function", function)
    program: Any = function
    if not hasattr(function, "lower"):
        program = jax.jit(function, donate_argnums=tuple(donate))
    elif donate:
        raise ValueError(
            f"forecast: `function` is jitted already; got `donate` {tuple(donate)} beside it. "
            "Leave it out: what the function donates is known."
        )
    return read_forecast(program.lower(*arguments).compile())


def read_forecast(compiled: Any) -> Forecast:
    """The same of a program that is compiled already."""
    found = compiled.memory_analysis()
    if found is None:
        raise ValueError(
            f"forecast: the backend {jax.default_backend()!r} has no memory analysis; measure a "
            "run with `jax.local_devices()[0].memory_stats()` instead."
        )
    return Forecast(
        int(found.argument_size_in_bytes),
        int(found.output_size_in_bytes),
        int(found.alias_size_in_bytes),
        int(found.temp_size_in_bytes),
        int(found.generated_code_size_in_bytes),
    )


def largest_fit(
    forecast_of: Callable[[int], Forecast], size: int, memory: int, *, multiple: int = 1
) -> Fit:
    """`size`, if what it takes fits into `memory` bytes of a device; else an error with what does.

    For members of a population, a chunk of it, or a batch: `forecast_of(n)` is the `Forecast` of
    the program of size n. Memory of an accelerator is
    `jax.local_devices()[0].memory_stats()["bytes_limit"]`; on a CPU it is the caller's to say.

        def forecast_of(members):
            state = jax.eval_shape(start, members)
            return hj.forecast(pop.step, (state, split), donate=(0,))

        hj.largest_fit(forecast_of, 10_000, 8 * 2**30)

    Sizes that are multiples of `multiple` (the devices, say) are looked at, some three or four of
    them if bytes grow linearly, each for the price of a compilation. Raises MemoryError, with the
    largest size that fits, if `size` does not, and ValueError unless `size` is a multiple.
    """
    _checks.positive_int("largest_fit", "size", size)
    _checks.positive_int("largest_fit", "memory", memory)
    if size % _checks.positive_int("largest_fit", "multiple", multiple):
        raise ValueError(
            f"largest_fit: `size` must be a multiple of {multiple}; got {size}. "
            f"Take {size - size % multiple or multiple}."
        )
    wanted = forecast_of(size)
    if wanted.total_bytes <= memory:
        return Fit(size, wanted)
    found = largest_below(forecast_of, size, wanted, memory, multiple)
    need = f"size {size:,} takes {wanted.total_bytes:,} bytes of {memory:,}"
    if found is None:
        raise MemoryError(f"largest_fit: {need}; not even {multiple} fits.")
    raise MemoryError(
        f"largest_fit: {need}; the largest that fits is {found.size:,}, with "
        f"{found.forecast.total_bytes:,} bytes."
    )


def largest_below(
    forecast_of: Callable[[int], Forecast], size: int, over: Forecast, memory: int, multiple: int
) -> Fit | None:
    """The largest multiple below `size`, which takes `over`, too much; along straight lines."""
    above, below, under = size // multiple, 1, forecast_of(multiple)
    if above == 1 or under.total_bytes > memory:
        return None
    while above - below > 1:
        slope = (over.total_bytes - under.total_bytes) / (above - below)
        # Rounded down, it fits where the line is true; one more then does not, and that is all.
        guess = below + int((memory - under.total_bytes) / slope) if slope > 0 else above
        guess = min(max(guess, below + 1), above - 1)
        found = forecast_of(guess * multiple)
        if found.total_bytes <= memory:
            below, under = guess, found
        else:
            above, over = guess, found
    return Fit(below * multiple, under)
