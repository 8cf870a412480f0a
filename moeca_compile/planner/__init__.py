"""The planner: sample a model, measure its drift and costs, search, and return a schedule.

The names are imported when they are first used: `planner.request` is read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeca_compile.planner.calibration import calibrate
    from moeca_compile.planner.drift.thresholds import expert_thresholds
    from moeca_compile.planner.front import calibrate_front
    from moeca_compile.planner.measured import measurements
    from moeca_compile.planner.shards import calibrate_shard, merge_shards

_MODULES = {
    "calibrate": "calibration",
    "calibrate_front": "front",
    "calibrate_shard": "shards",
    "expert_thresholds": "drift.thresholds",
    "measurements": "measured",
    "merge_shards": "shards",
}
__all__ = [
    "calibrate", "calibrate_front", "calibrate_shard", "expert_thresholds", "measurements", "merge_shards",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'moeca_compile.planner' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moeca_compile.planner.{_MODULES[name]}"), name)
