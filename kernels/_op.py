"""What ops share: which implementation runs, and what tests and benchmarks know of each."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax

# "auto" takes what was measured faster on the backend; a named one raises where it cannot run.
Implementation: TypeAlias = Literal["auto", "xla", "pallas", "interpret"]


class Traffic(NamedTuple):
    """The least a program has to do: each array read once, each result written once."""

    bytes: int
    operations: int  # of floating point, two per multiply-add


class Case(NamedTuple):
    """One way to call an op, for the tests and for `benchmarks/kernels.py`.

    The benchmark finds the `CASES` of every module here, and runs them on its `SHAPES` and, on an
    accelerator, on its `LARGE`.
    """

    make: Callable[..., tuple]  # (key, shape, dtype) -> arrays
    run: Callable[..., Any]  # (implementation, *arrays) -> results
    traffic: Callable[..., Traffic]  # of (shape, dtype)
    # (key, shape, dtype) -> a function and its arrays, whose time the op's is held against
    bar: Callable[..., tuple[Callable, tuple]] | None = None
    # (arrays, results) -> the arrays of the next run: in a loop, an op that works in place has to
    # take its own results, or what it overwrites is copied first
    again: Callable[[tuple, Any], tuple] | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


def choose(
    where: str,
    implementation: str,
    *,
    platforms: tuple[str, ...],
    faster_on: tuple[str, ...],
    unfit: Callable[[str], str | None] = lambda backend: None,
) -> str:
    """ "xla", "interpret", or the platform whose compiled kernel is to run.

    `platforms` have a compiled kernel, `faster_on` are those where it was measured to be faster, by
    the names of `jax.default_backend()`. `unfit` says of one of them why the kernel does not take
    these arguments, if so: then "auto" is "xla". Raises ValueError for an unknown name, and for
    "pallas" where there is no kernel or it is unfit.
    """
    known = get_args(Implementation)
    if implementation not in known:
        raise ValueError(f"{where}: `implementation` is {implementation!r}, expected {known}.")
    if implementation in ("xla", "interpret"):
        return implementation
    backend = jax.default_backend()
    if implementation == "auto":
        return backend if backend in faster_on and unfit(backend) is None else "xla"
    if backend not in platforms:
        raise ValueError(
            f"{where}: `implementation` is 'pallas' and the backend {backend!r}, expected one of "
            f"{platforms}; 'auto', 'xla' and 'interpret' run on any."
        )
    if (reason := unfit(backend)) is not None:
        raise ValueError(f"{where}: {reason} for the compiled kernel; 'auto' and 'xla' take it.")
    return backend


def varying(*arrays: jax.Array | None) -> frozenset[str]:
    """The mesh axes over which any of these arrays varies, inside shard_map."""
    return frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None)
    )


def alike(*arrays: Any) -> tuple:
    """The arrays, all typed as varying over the axes that any of them varies over.

    A kernel's operands have to agree. The derivative of this is the sum over the axes.
    """
    axes = varying(*arrays)

    def one(x):
        missing = tuple(sorted(axes - varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return tuple(None if x is None else one(x) for x in arrays)


def result(shape: tuple[int, ...], dtype: Any, *operands: jax.Array | None):
    """The type of a kernel's result, which varies as its operands do."""
    x = next(x for x in operands if x is not None)
    kind = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
