"""HDET (arXiv 2604.24708) for a training loop of one's own on several devices."""

from collections.abc import Callable, Hashable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _tree
from .._space import Space
from .._types import HParams, Key, Params, PyTree
from . import _controller


class LoopState(NamedTuple):
    """The same on all devices."""

    key: Key
    base: _controller.Base


class LoopEvents(NamedTuple):
    """What one convergence did, the same on all devices."""

    diverged: jax.Array  # bool [P]
    score: jax.Array  # [P]; NaN where diverged
    base: HParams  # constrained values of the centre from now on
    velocity: HParams
    signal: HParams
    bounded: HParams


class HdetLoop(NamedTuple):
    """Three pure functions; see `hdet_loop`."""

    init: Callable[[Key, HParams, int], LoopState]
    hparams: Callable[[LoopState, jax.Array], HParams]
    converge: Callable[..., tuple[Params, LoopState, LoopEvents]]


def hdet_loop(
    space: Space,
    *,
    width: float | PyTree = 1 / 9,
    gain: float = 0.5,
    momentum: float = 0.9,
    sigma: float | Literal["running"] = "running",
    update: Literal["log", "linear"] = "log",
    decay: float | PyTree = 0.0,
    warm_up: int = 0,
) -> HdetLoop:
    """A controller of rates, and of any scalar else, for an ordinary data-parallel loop.

    The loop keeps its model, optimizer and all-reduced gradients. It asks for its hyperparameters
    instead of holding them, and every T steps it converges:

        loop = hj.exchange.hdet_loop(hj.space({"lr": hj.loguniform(1e-6, 1.0)}))
        state = loop.init(key, raw, size)                       # once; `size` devices
        values = loop.hparams(state, lax.axis_index("data"))    # constrained values of this device
        ...                                                     # T steps with values["lr"]
        params, state, events = loop.converge(state, params, loss, "data")

    `init(key, hparams, size)` takes the raw base, without a leading axis. `converge` takes the mean
    loss of this device over the T steps and returns the mean of the params over devices, which are
    then equal again (inside `shard_map` also by type). The state is the same on every device; pass
    it replicated. `axis_name` may be that of a mesh, or of a `vmap`. Arguments as in `hdet`, which
    is the same controller; a device whose loss or params are not finite is left out of the mean and
    takes it. Its optimizer is sound where gradients go through `all_reduce`.

    Cost: one all-reduce of the params per convergence. With width 0 this is data parallelism, bit
    for bit if the number of devices is a power of two (a sum of equal numbers rounds otherwise).

    Raises as `hdet` does, and ValueError for a state that was made for another number of devices.
    """
    conf = _controller.settings(
        "hdet_loop", space, width, gain, momentum, sigma, update, decay, warm_up
    )

    def init(key: Key, hparams: HParams, size: int) -> LoopState:
        key, shuffle = jax.random.split(key)
        hparams = jax.tree.map(jnp.asarray, hparams)
        return LoopState(key, _controller.fan(conf, shuffle, hparams, size))

    def hparams(state: LoopState, index: jax.Array) -> HParams:
        return space.constrain(_tree.take(state.base.assigned, index))

    def converge(
        state: LoopState, params: Params, loss: jax.Array, axis_name: Hashable
    ) -> tuple[Params, LoopState, LoopEvents]:
        size = jax.tree.leaves(state.base.assigned)[0].shape[0]
        if lax.axis_size(axis_name) != size:
            raise ValueError(
                f"hdet_loop: the state is for {size} devices, but axis {axis_name!r} has "
                f"{lax.axis_size(axis_name)}; pass its size to `init`."
            )
        sound = jnp.isfinite(loss) & _tree.all_finite(params)
        here = (jnp.arange(size) == lax.axis_index(axis_name)) & sound
        # A sum, rather than a gather, is the same on all devices by type as well.
        scores = lax.psum(jnp.where(here, loss, 0), axis_name)
        alive = lax.psum(here.astype(jnp.int32), axis_name) > 0
        scores = jnp.where(alive, scores, jnp.nan)
        key, shuffle = jax.random.split(state.key)
        base, report = _controller.follow(conf, shuffle, state.base, state.base.assigned, scores)
        events = LoopEvents(
            ~alive, scores, space.constrain(base.raw), base.velocity, report.signal, report.bounded
        )
        return _average(params, sound, alive.sum(), axis_name), LoopState(key, base), events

    return HdetLoop(init, hparams, converge)


def _average(params: Params, sound, count, axis_name) -> Params:
    """The mean over sound devices; NaN if there is none."""

    def one(x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return lax.pmax(jnp.where(sound, x, jnp.zeros_like(x)), axis_name)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        total = lax.psum(jnp.where(sound, wide, 0), axis_name)
        return jnp.where(count > 0, total / count, jnp.nan).astype(x.dtype)

    return jax.tree.map(one, params)
