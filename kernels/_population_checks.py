"""What the fused optimizers refuse, and how they say so."""

import jax.numpy as jnp

from ._population_rules import Adam, Sgd


def check(where: str, rule, params, grads, moments, max_norm, norm, master, seed):
    """Raise for what does not fit; otherwise the names of the moments."""
    names = _moments(where, rule, moments)
    shape, members = jnp.shape(params), jnp.shape(params)[:-1]
    if not shape or not jnp.issubdtype(params.dtype, jnp.floating):
        raise ValueError(
            f"{where}: `params` is {params.dtype} {shape}, expected a float of shape "
            "(..., parameters)."
        )
    wide = jnp.promote_types(params.dtype, jnp.float32)
    streams = {"grads": grads, **dict(zip(names, moments, strict=True))}
    streams |= {} if master is None else {"master": master}
    for name, x in streams.items():
        if jnp.shape(x) != shape:
            raise ValueError(
                f"{where}: `{name}` has shape {jnp.shape(x)}, expected that of `params`, {shape}."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{where}: `{name}` is {x.dtype}, expected a float.")
    if master is not None and master.dtype != wide:
        raise ValueError(f"{where}: `master` is {master.dtype}, expected {wide}.")
    if seed is not None:
        _check_seed(where, params, master, seed, members)
    if norm is not None and max_norm is None:
        raise ValueError(f"{where}: `norm` is given without `max_norm`, which it is compared with.")
    numbers = {"max_norm": max_norm, "norm": norm, **rule._asdict()}
    for name, x in numbers.items():
        if x is not None and jnp.shape(x) not in ((), members):
            raise ValueError(
                f"{where}: `{name}` has shape {jnp.shape(x)}, expected a scalar or one number per "
                f"member, {members}."
            )
    return names


def _moments(where: str, rule, moments) -> tuple[str, ...]:
    if not isinstance(rule, Sgd | Adam):
        raise TypeError(f"{where}: `rule` is {type(rule).__name__}, expected Sgd or Adam.")
    names = ("mu", "nu") if isinstance(rule, Adam) else ("trace",) * (rule.momentum is not None)
    if not isinstance(moments, tuple) or len(moments) != len(names):
        raise ValueError(f"{where}: `moments` has {len(moments)} entries, expected {names}.")
    return names


def _check_seed(where: str, params, master, seed, members) -> None:
    if master is not None:
        raise ValueError(f"{where}: `seed` and `master` are given, expected one of them.")
    if params.dtype != jnp.bfloat16:
        raise ValueError(
            f"{where}: `seed` is given for params in {params.dtype}, expected bfloat16: others are "
            "rounded to the nearest."
        )
    dtype = jnp.result_type(seed)
    if jnp.shape(seed) not in ((2,), (*members, 2)) or dtype not in (jnp.int32, jnp.uint32):
        raise ValueError(
            f"{where}: `seed` is {dtype} {jnp.shape(seed)}, "
            f"expected int32 or uint32 of shape (2,) or {(*members, 2)}."
        )
