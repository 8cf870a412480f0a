"""moeca beside what one would use instead: one model, one set of seeds, one process. How to run it: `__main__.py`."""
