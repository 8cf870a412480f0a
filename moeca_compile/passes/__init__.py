"""Passes: graph -> facts (`find_*`, `count_*`) or graph -> graph. One file a pass; the order is in `pipeline.py`."""
