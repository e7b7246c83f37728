"""Accelerator kernels, imported as ``hyperjax.kernels``."""

if __name__ != "hyperjax.kernels":
    raise ImportError("Install hyperjax, then `import hyperjax.kernels`.")

from ._gated_dense import gated_dense as gated_dense
from ._op import Implementation as Implementation
from ._population_rules import Adam as Adam
from ._population_rules import Sgd as Sgd
from ._population_update import population_apply as population_apply
from ._population_update import population_converge as population_converge
from ._population_update import population_update as population_update
from ._vector_update import VectorUpdate as VectorUpdate
from ._vector_update import vector_update as vector_update
