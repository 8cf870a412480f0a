"""A report of a small model that has run nothing, for the tests of the page."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

import moeca_compile as moeca
from moeca_compile.inspect.report import Report
from moeca_compile.schedule import Partial, Row, Schedule
from moeca_compile.schedule.action import parse_row
from tests import toy

KEYS = ["blocks.0", "blocks.0.moe", "blocks.1", "blocks.1.moe"]


def row(text: str) -> Row:
    """A letter a region; `a` computes a part of it."""
    return parse_row(text, {"a": Partial(0.1, 0.2)})


@cache
def report(graphs: str = "") -> Report:
    """Explained for `uniform:3`; with the graphs of the passes if `graphs` names a file for the page."""
    torch._dynamo.reset()
    inputs = torch.randn(2, 2, 4, 4), torch.full((2,), 500.0), torch.tensor([1, 2])
    return moeca.explain(toy.model().eval(), *inputs, schedule="uniform:3", inner="eager", html=graphs or None)


def with_rows(*rows: str, **attributes: Any) -> Report:
    """The report with another schedule: a letter a region."""
    schedule = Schedule(tuple(map(row, rows)), tuple(KEYS), order=1, **attributes)
    return replace(report(), schedule=schedule)
