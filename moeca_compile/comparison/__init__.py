"""`compare`: speed and quality of a cached model, pipeline or bundle, beside its uncached self."""

from moeca_compile.comparison.entry import compare

__all__ = ["compare"]
