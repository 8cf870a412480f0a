"""Tables in pages of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]], left: int | None = 1) -> str:
    """A table. `left`: so many columns stand to the left, the others to the right; None: all to the left."""
    left = len(head) if left is None else left
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, rule, *rows))


def write_table(page: Path, mark: str, head: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> None:
    """Write a table and a note into a page, in place of what stands between its two marks."""
    before, _, after = page.read_text().split(mark)
    page.write_text("".join((before, mark, f"\n\n{markdown(head, rows, left=None)}\n\n{note}\n\n", mark, after)))
