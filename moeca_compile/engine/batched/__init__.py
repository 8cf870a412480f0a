"""Requests at different steps that share the calls of a compiled model."""
