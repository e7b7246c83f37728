"""What every test may assume: float64, no silent broadcasting, eight CPU devices, fixed seeds."""

import os
import random

import jax
import numpy as np
import pytest

# Tests wait for the compiler, not for what it makes: a third of the time without its optimizations.
# `XLA_FLAGS= pytest` runs what users run, as CI does with the wheel and with the notebooks.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)

# Set at import, since a backend keeps the settings it started with. Eight devices make sharding
# real on any machine; float64 leaves room to tell an exact method from a nearly exact one.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Libraries that draw from global generators give the same numbers in any order of tests."""
    random.seed(0)
    np.random.seed(0)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
