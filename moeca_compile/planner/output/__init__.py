"""Weights of the model's output (`schedule/output.py`): fitted offline, through the user's own sampler."""
