"""Equilibria: params that a map leaves where they are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from . import _checks, _tree
from ._inner import Inner, InnerState
from ._types import Batch, HParams, Params

Map: TypeAlias = Callable[[Params, HParams, Batch], Params]


@dataclass(frozen=True)
class FixedPoint:
    """The optimality `params - map(params)`. What `implicit` wants to know of it:"""

    map: Map
    smooth: bool  # False: the map has kinks
    symmetric = False  # its Jacobian, in general

    def __call__(self, params: Params, hparams: HParams, batch: Batch) -> Params:
        return _tree.sub(params, self.map(params, hparams, batch))


def fixed_point(map: Map) -> FixedPoint:
    """The optimality of params = map(params, hparams, batch), for `implicit`.

    The map may be a layer (deep equilibrium models: Bai, Kolter and Koltun 2019, arXiv 1909.01377;
    params are then the activations and hparams the weights), one step of an iterative algorithm,
    or a Bellman operator. I - d map / d params has to be invertible at the fixed point, as it is
    wherever the iteration contracts.

    Raises TypeError unless `map` is a function.
    """
    _checks.is_callable("fixed_point", "map", map)
    return FixedPoint(map, smooth=True)


def iterate(map: Map) -> Inner:
    """Training by applying `map` once per batch, for `unroll`.

    Raises TypeError unless `map` is a function and params are floating point, ValueError at trace
    time if `map` returns another tree.
    """
    _checks.is_callable("iterate", "map", map)

    def init(params: Params, hparams: HParams) -> InnerState:
        del hparams
        _checks.differentiable("iterate", "params", params)
        return InnerState(_tree.strong(params), ())

    def step(state: InnerState, hparams: HParams, batch: Batch) -> InnerState:
        params = map(state.params, hparams, batch)
        _checks.same_tree("iterate", "map", params, "params", state.params)
        return InnerState(params, ())

    return Inner(init, step)
