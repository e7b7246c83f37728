"""Pieces of optax whose derivatives are finite and that take traced hyperparameters."""
