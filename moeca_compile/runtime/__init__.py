"""What exists while images are being made. Importable without torch; only `dispatch.py` and `probe.py` need it."""
