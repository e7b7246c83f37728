"""Gradients of smoothed objectives from evaluations only."""

from ._common import EvolutionInfo as EvolutionInfo
from ._differences import DifferenceState as DifferenceState
from ._differences import antithetic as antithetic
from ._differences import spsa as spsa
from ._persistent import ParticleState as ParticleState
from ._persistent import noise_reuse as noise_reuse
from ._persistent import persistent as persistent
from ._score_function import Distribution as Distribution
from ._score_function import ScoreFunctionInfo as ScoreFunctionInfo
from ._score_function import ScoreFunctionState as ScoreFunctionState
from ._score_function import bernoulli as bernoulli
from ._score_function import categorical as categorical
from ._score_function import score_function as score_function
