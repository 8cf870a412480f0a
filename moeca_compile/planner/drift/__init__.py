"""How far a model's values change from step to step, measured on uncached trajectories."""
