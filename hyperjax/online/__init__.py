"""Hypergradients along training: no second run, no storage of the first."""
