"""The folder that `dump` names: each graph before and after, what each pass did, the variants and the schedule.

It is for reading and for `diff -r`: nothing in it but `times.md` differs between two runs of the same model.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

from moeca_compile.graph.variant import StateSlot, Variant
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.action import format_row, legend_of

if TYPE_CHECKING:
    from moeca_compile.passes.manager import PassRecord

INDEX = "index.md"
TIMES = "times.md"
_HEAD = """# Passes, in the order in which they ran

| pass | nodes | what it did | files |
|---|---|---|---|
"""


class Dump:
    """One folder, to which several models and programs may write in turn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, name: str, gm: GraphModule) -> GraphDump:
        """The graph before a pass."""
        return GraphDump(self, name, gm)

    def found(self, record: PassRecord, facts: Sequence[str], nothing: str) -> None:
        """What a finder learned."""
        self.line(record, f"found {', '.join(facts)}" if facts else f"found nothing. {nothing}".strip())

    def line(self, record: PassRecord, what: str, files: str = "") -> None:
        """One pass in the index, and its time beside it."""
        self._row(record.name, f"{record.nodes_before} -> {record.nodes_after}", what, files)
        with (self.folder / TIMES).open("a") as file:
            file.write(f"{record.ms:10.1f} ms  {record.name}\n")

    def variant(self, variant: Variant, layout: Sequence[StateSlot], inputs: Sequence[str]) -> None:
        """The final text of a variant with its row and what it takes in and hands out."""
        acts = format_row(variant.row, legend_of([variant.row])) or "a prologue"
        head = [
            f"{variant.name}: {acts}",
            f"{variant.node_count} nodes, {variant.macs} MACs",
            "takes " + ", ".join(inputs[i] for i in variant.takes),
            *(["hoisted " + ", ".join(map(str, variant.hoists))] if variant.hoists else []),
            *(f"reads {_described(layout[i])}" for i in variant.reads),
            *(f"writes {_described(layout[i])}" for i in variant.writes),
        ]
        name = self._free(f"variant_{variant.name}")
        (self.folder / name).write_text("\n".join([*head, "", text_of(variant.gm)]))
        moved = f"{variant.macs} MACs, reads {len(variant.reads)} and writes {len(variant.writes)} states"
        self._row(f"**{variant.name}** {acts}", str(variant.node_count), moved, f"[variant]({name})")

    def schedule(self, schedule: Schedule) -> None:
        """The schedule as a grid: a line a region, a column a step. Nothing where the folder has it already."""
        text = f"{schedule}\n"
        if not any(path.read_text() == text for path in self.folder.glob("schedule*.txt")):
            name = self._free("schedule")
            (self.folder / name).write_text(text)
            self._row("**schedule**", "", text.partition("\n")[0], f"[schedule]({name})")

    def _row(self, name: str, nodes: str, what: str, files: str) -> None:
        index = self.folder / INDEX
        head = "" if index.exists() else _HEAD
        with index.open("a") as file:
            file.write(f"{head}| {name} | {nodes} | {what} | {files} |\n")

    def _free(self, stem: str) -> str:
        """A name for a new file: several programs may write here."""
        number = len(list(self.folder.glob(f"{stem}.txt")) + list(self.folder.glob(f"{stem}.*.txt")))
        return f"{stem}.{number}.txt" if number else f"{stem}.txt"


class GraphDump:
    """One pass: the graph as it was, and as the pass left it."""

    def __init__(self, folder: Dump, name: str, gm: GraphModule) -> None:
        self.dump = folder
        number = len(list(folder.folder.glob("*.before.txt")))
        self.stem = f"{number:03d}_{name.replace(' ', '_')}"
        (folder.folder / f"{self.stem}.before.txt").write_text(text_of(gm))

    def write(self, gm: GraphModule) -> None:
        (self.dump.folder / f"{self.stem}.after.txt").write_text(text_of(gm))

    def note(self, record: PassRecord, nothing: str) -> None:
        files = f"[before]({self.stem}.before.txt) [after]({self.stem}.after.txt)"
        self.dump.line(record, "changed" if record.modified else f"nothing to do. {nothing}".strip(), files)


def text_of(gm: GraphModule) -> str:
    """The graph to read: shapes and dtypes beside each value."""
    gm.recompile()
    return str(gm.print_readable(print_output=False))


def does_nothing(function: Callable[..., Any]) -> str:
    """What a pass, or its file, says of graphs in which it finds nothing to do."""
    for place in (function, sys.modules.get(function.__module__)):
        sentence = re.search(r"Does nothing[^.]*\.", " ".join((getattr(place, "__doc__", None) or "").split()))
        if sentence:
            return sentence.group(0)
    return ""


def _described(slot: StateSlot) -> str:
    owner = f"region {slot.region}" if slot.region >= 0 else "the model"
    return f"{slot.name}: {slot.slot} of output {slot.output} of {owner}, {slot.dtype} {list(slot.shape)}"
