"""What exists while images are being made. Importable without torch; only `dispatch.py` and `probe.py` need it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeca_compile.runtime.bundle.bundle import Bundle
    from moeca_compile.runtime.session import Session

_HOMES = {"Bundle": "bundle.bundle", "Session": "session"}
__all__ = ["Bundle", "Session"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moeca_compile.runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moeca_compile.runtime.{_HOMES[name]}"), name)
