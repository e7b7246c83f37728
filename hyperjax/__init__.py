"""Differentiable tuning in JAX: hypergradients, best responses, populations."""

from . import evolution as evolution
from . import exchange as exchange
from . import guarded as guarded
from . import linsolve as linsolve
from . import online as online
from ._best_response import best_response as best_response
from ._estimators import hypergradient as hypergradient
from ._estimators import restart as restart
from ._estimators import score_only as score_only
from ._hypernet import GatedLeaf as GatedLeaf
from ._hypernet import Hypernet as Hypernet
from ._hypernet import gated as gated
from ._implicit import Adjoint as Adjoint
from ._implicit import AdjointInfo as AdjointInfo
from ._implicit import ImplicitResponse as ImplicitResponse
from ._implicit import implicit as implicit
from ._implicit import root_vjp as root_vjp
from ._inner import Inner as Inner
from ._inner import InnerState as InnerState
from ._inner import inner as inner
from ._inner import stationary as stationary
from ._population import PopulationMetrics as PopulationMetrics
from ._population import PopulationState as PopulationState
from ._population import population as population
from ._space import Range as Range
from ._space import Space as Space
from ._space import loguniform as loguniform
from ._space import positive as positive
from ._space import real as real
from ._space import space as space
from ._space import uniform as uniform
from ._tuner import Metrics as Metrics
from ._tuner import TunerState as TunerState
from ._tuner import run as run
from ._tuner import tune as tune
from ._types import Estimate as Estimate
from ._types import Estimator as Estimator
from ._types import Exchange as Exchange
from ._types import SolveInfo as SolveInfo
from ._types import Split as Split
from ._types import Tuner as Tuner
from ._unroll import unroll as unroll

__version__ = "0.1.0"
