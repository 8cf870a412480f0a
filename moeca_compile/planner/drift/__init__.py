"""Drift: how far the values of a model change from step to step, measured on uncached trajectories."""
