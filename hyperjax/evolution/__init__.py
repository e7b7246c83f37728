"""Gradients of smoothed objectives from evaluations only."""
