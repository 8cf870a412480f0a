"""Variant -> a callable, through Inductor."""
