"""moeca-compile: a compiler for diffusion transformers with mixture of experts.

`torch.compile(model, backend="moeca")` is the shortest way in. Everything here is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeca_compile.api import compile, explain, prepare, reset, stats, trajectory, unprepare, warmup
    from moeca_compile.comparison import compare
    from moeca_compile.engine.packages import load
    from moeca_compile.errors import MoecaError
    from moeca_compile.exporting import export
    from moeca_compile.exporting.packages import save
    from moeca_compile.frontend.batched.model import BatchedModel
    from moeca_compile.frontend.model_arguments import disable
    from moeca_compile.options import Options
    from moeca_compile.planner import (
        calibrate,
        calibrate_front,
        calibrate_shard,
        expert_thresholds,
        measurements,
        merge_shards,
    )
    from moeca_compile.schedule import Schedule
    from moeca_compile.schedule.front import Front

_HOMES = {
    "BatchedModel": "frontend.batched.model",
    "Front": "schedule.front",
    "MoecaError": "errors",
    "Options": "options",
    "Schedule": "schedule",
    "calibrate": "planner",
    "calibrate_front": "planner",
    "calibrate_shard": "planner",
    "compare": "comparison",
    "compile": "api",
    "disable": "frontend.model_arguments",
    "expert_thresholds": "planner",
    "load": "engine.packages",
    "measurements": "planner",
    "merge_shards": "planner",
    "explain": "api",
    "export": "exporting",
    "prepare": "api",
    "reset": "api",
    "save": "exporting.packages",
    "stats": "api",
    "trajectory": "api",
    "unprepare": "api",
    "warmup": "api",
}

__all__ = [
    "BatchedModel", "Front", "MoecaError", "Options", "Schedule", "calibrate", "calibrate_front",
    "calibrate_shard", "compare", "compile", "disable", "expert_thresholds", "explain", "export", "load",
    "measurements", "merge_shards", "prepare", "reset", "save", "stats", "trajectory", "unprepare", "warmup",
]  # fmt: skip
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moeca_compile' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moeca_compile.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
