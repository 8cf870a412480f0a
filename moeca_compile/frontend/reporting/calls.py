"""The calls of a model's last trajectory, each with the row of the schedule that it ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from moeca_compile.engine.trajectories.statistics import stats_of
from moeca_compile.frontend.handles import HandleState
from moeca_compile.frontend.model_arguments import plain_module
from moeca_compile.inspect.report import Report
from moeca_compile.schedule import Row, Schedule


def with_calls(model: Any, report: Report, states: Sequence[HandleState]) -> Report:
    """The report with the name of the model's class, or of a function, and the calls of its last trajectory."""
    named = type(plain_module(model)) if isinstance(model, torch.nn.Module) else model
    name = getattr(named, "__name__", type(model).__name__)
    return replace(report, model=name, calls=tuple(_calls(report.schedule, states)))


def _calls(schedule: Schedule, states: Sequence[HandleState]) -> list[dict[str, Any]]:
    """The calls of the last trajectory, where it ran this schedule, each with the number of its row."""
    programs = [program for state in states for program in state.runtime.programs.values()]
    programs = [program for program in programs if program.schedule == schedule]
    if not programs:
        return []
    rows, numbers = schedule.distinct_rows(), dict[str, int | None]()
    for program in programs:
        for row, variant in program.compiled_schedule.variants.built.items():
            number = _number(rows, row)
            is_other = variant.name in numbers and numbers[variant.name] != number
            numbers[variant.name] = None if is_other else number
    return [{**asdict(record), "row": numbers.get(record.variant)} for record in stats_of(states).steps]


def _number(rows: Sequence[Row], row: Row) -> int | None:
    return rows.index(row) if row in rows else None
