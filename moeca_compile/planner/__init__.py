"""The planner: sample a model, measure its drift and costs, search, and return a schedule."""

from __future__ import annotations

from moeca_compile.planner.calibration import calibrate
from moeca_compile.planner.drift.thresholds import expert_thresholds
from moeca_compile.planner.front import calibrate_front

__all__ = ["calibrate", "calibrate_front", "expert_thresholds"]
