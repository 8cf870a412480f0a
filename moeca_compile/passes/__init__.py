"""Passes: graph -> facts (`find_*`, `count_*`) or graph -> graph. One file a pass; the order is in `pipeline.py`."""

from moeca_compile.passes.registry import register, unregister

__all__ = ["register", "unregister"]
