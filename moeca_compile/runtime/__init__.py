"""Everything that runs steps without torch: the clock, the step rule, `Session` and the runtimes of bundles."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeca_compile.runtime.batched.session import BatchedSession
    from moeca_compile.runtime.bundle.bundle import Bundle
    from moeca_compile.runtime.session import Session

_MODULES = {"BatchedSession": "batched.session", "Bundle": "bundle.bundle", "Session": "session"}
__all__ = ["BatchedSession", "Bundle", "Session"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'moeca_compile.runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moeca_compile.runtime.{_MODULES[name]}"), name)
