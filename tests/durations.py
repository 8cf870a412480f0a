"""Which test files take long, and which belong in one process. pytest-xdist starts with the longest, so that no process
is alone with one at the end.

The record has seconds of processor time, child processes included, which other work on the machine leaves as they are.
`MOECA_DURATIONS=1 make test` writes it anew; files that take less than `SHORT` seconds aren't in it.
"""

from __future__ import annotations

import json
import os
import resource
from collections import Counter
from pathlib import Path

import pytest

RECORD = Path(__file__).with_name("durations.json")
SHORT = 3.0
# Folders whose files share what a process makes once: exported bundles, a saved package, analyzed blocks, a report,
# uncached digits.
TOGETHER = ("bundle/", "packages/", "passes/", "inspect/", "benchmarks/peers/")

seconds: Counter[str] = Counter()
spent = 0.0  # by this process and its children when the last report was made


def file_of(nodeid: str) -> str:
    """The test's file, relative to this folder: the tests also run from a copy beside an installed package."""
    return nodeid.split("::", 1)[0].removeprefix("tests/")


def unit_of(nodeid: str) -> str:
    """What one process runs: the test's file, or its folder if that is one of `TOGETHER`."""
    file = file_of(nodeid)
    return next((folder for folder in TOGETHER if file.startswith(folder)), file)


def longest_first(items: list[pytest.Item]) -> None:
    """Sort in place. The tests of a unit stay together and in order, and so do units without a record, at the end."""
    recorded: Counter[str] = Counter()
    for file, taken in json.loads(RECORD.read_text()).items():
        recorded[unit_of(file)] += taken
    items.sort(key=lambda item: -recorded[unit_of(item.nodeid)])


def begin() -> None:
    """What was spent so far, on imports, is no test's."""
    global spent
    spent = _processor_seconds()


def measure(report: pytest.TestReport) -> None:
    """Note in a report, in the process that made it, the processor time since the report before."""
    before = spent
    begin()
    report.processor_seconds = spent - before


def _processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def add(report: pytest.TestReport) -> None:
    """Count setup, call and teardown of a test for its file."""
    seconds[file_of(report.nodeid)] += getattr(report, "processor_seconds", 0.0)  # none of a process that died


def write_if_asked() -> None:
    """Files that didn't run keep what the record says of them, those that are gone lose it."""
    if not os.environ.get("MOECA_DURATIONS"):
        return
    merged = json.loads(RECORD.read_text()) | {file: round(taken, 1) for file, taken in seconds.items()}
    long = {file: taken for file, taken in merged.items() if taken >= SHORT and (RECORD.parent / file).exists()}
    RECORD.write_text(json.dumps(dict(sorted(long.items())), indent=1) + "\n")
