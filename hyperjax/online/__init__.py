"""Hypergradients along training: no second run, no storage of the first.

`rtho` and `marthe` are estimators, for `tune`. They have no form as an optax transformation: their
tangents need products with the Hessian of the training loss, and a transformation sees gradients
only. `hypergradient_descent` and `ultimate` look at the last update alone, for which the gradients
are enough, so they are transformations: an ordinary training loop gets them by changing one line.
"""

from ._hypergradient_descent import HypergradientDescentState as HypergradientDescentState
from ._hypergradient_descent import hypergradient_descent as hypergradient_descent
from ._marthe import MartheCarry as MartheCarry
from ._marthe import MartheInfo as MartheInfo
from ._marthe import marthe as marthe
from ._rtho import RthoCarry as RthoCarry
from ._rtho import rtho as rtho
from ._ultimate import UltimateState as UltimateState
from ._ultimate import ultimate as ultimate
