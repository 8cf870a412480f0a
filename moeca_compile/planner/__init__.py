"""The planner: sample a model, measure its drift and costs, search, and return a schedule."""

from __future__ import annotations

from moeca_compile.planner.calibration import calibrate
from moeca_compile.planner.drift.thresholds import expert_thresholds

__all__ = ["calibrate", "expert_thresholds"]
