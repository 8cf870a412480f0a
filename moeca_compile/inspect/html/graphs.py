"""The graphs before and after each pass: read from the folder that `dump` writes, and stored line by line.

Two graphs before and after a pass differ in few lines, so each distinct line is stored once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LINES = 1_000_000  # of all graphs together; 7 MB in the page
_FOLDERS = re.compile(r"(# File: )\S*/")
_STEM = re.compile(r"(\d+)_(.+)\.before\.txt")


@dataclass(frozen=True, slots=True)
class PassGraphs:
    """The graph before and after one pass.

    Attributes:
        name: of the pass, as in `Report.passes`.
        before: the graph's text.
        after: the graph's text.
    """

    name: str
    before: str
    after: str


def written(folder: Path) -> list[Path]:
    """The graphs before passes that a dump has written, in the order of the passes."""
    numbered = [(int(match[1]), path) for path in folder.glob("*.before.txt") if (match := _STEM.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def read(befores: Sequence[Path], names: Sequence[str]) -> tuple[PassGraphs, ...]:
    """The graphs of these passes; `names`: of all passes, as in `Report.passes`."""
    names_of_files = {name.replace(" ", "_"): name for name in names}
    graphs = []
    for path in befores:
        match = _STEM.fullmatch(path.name)
        after = path.with_name(path.name.replace(".before.txt", ".after.txt"))
        if match is not None and match[2] in names_of_files and after.exists():
            name = names_of_files[match[2]]
            graphs.append(PassGraphs(name, _text(path), _text(after)))
    return tuple(graphs)


def _text(path: Path) -> str:
    """A graph's text; files of the model's code by their name, without the folders of this machine."""
    return _FOLDERS.sub(r"\1", path.read_text())


def interned(graphs: Sequence[PassGraphs]) -> dict[str, Any]:
    """The graphs of passes that changed them.

    Returns:
        `lines`: each distinct line once; `texts`: each distinct graph as numbers of lines; `passes`: by name of a pass
        its graphs before and after, as numbers of texts; `left_out`: passes whose graphs would be too long together.
    """
    numbers: dict[str, int] = {}
    texts: dict[str, int] = {}
    stored: list[list[int]] = []
    passes: dict[str, list[int]] = {}
    left_out: list[str] = []
    room = MAX_LINES
    for graph in graphs:
        if graph.before == graph.after or graph.name in passes:
            continue
        new = [text for text in (graph.before, graph.after) if text not in texts]
        if sum(text.count("\n") + 1 for text in new) > room:
            left_out.append(graph.name)
            continue
        for text in new:
            texts[text] = len(stored)
            stored.append([numbers.setdefault(line, len(numbers)) for line in text.splitlines()])
            room -= len(stored[-1])
        passes[graph.name] = [texts[graph.before], texts[graph.after]]
    return {"lines": list(numbers), "texts": stored, "passes": passes, "left_out": left_out}
