"""Tables in pages of Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.protocol import when


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]], left: int | None = 1) -> str:
    """A table. `left`: so many columns stand to the left, the others to the right; None: all to the left."""
    left = len(head) if left is None else left
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, rule, *rows))


def write_table(page: Path, mark: str, head: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> None:
    """Write a table and a note into a page, in place of what stands between its two marks."""
    before, _, after = page.read_text().split(mark)
    page.write_text("".join((before, mark, f"\n\n{markdown(head, rows, left=None)}\n\n{note}\n\n", mark, after)))


def write_held_out(
    results: Path, page: Path, marks: Mapping[str, str], head: Sequence[str],
    rows_of: Callable[[dict[str, Any]], Iterable[Sequence[str]]],
) -> None:  # fmt: skip
    """Write the table of a task's held-out samples into a page, between the task's two marks.

    Args:
        results: a JSON file with `task`, `samples`, `machine` and what `rows_of` reads.
        page: with the marks.
        marks: by the name of the task.
        head: of the table.
        rows_of: gives the table's rows.
    """
    result = json.loads(results.read_text())
    note = f"{result['samples']} held-out {result['task']}; {when(result['machine'])}."
    write_table(page, marks[result["task"]], head, rows_of(result), note)
