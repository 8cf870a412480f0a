"""Runs a pass list on a copy: times each pass, checks it, dumps before and after, names what failed.

Passes know nothing of this; so a pass is a plain function, and timing or dumping is written once.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch.fx import GraphModule

from moeca_compile.errors import InvariantError, MoecaError
from moeca_compile.graph import fx
from moeca_compile.passes.context import Context

T = TypeVar("T")
log = logging.getLogger(__name__)

INDEX = "index.md"
_HEAD = """# Passes, in the order in which they ran

| pass | nodes | ms | what it did | graphs |
|---|---|---|---|---|
"""

Finder = Callable[[GraphModule, Context], Context]
Rewriter = Callable[[GraphModule, Context], GraphModule]


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What one pass did: milliseconds, and the graph's node count before and after."""

    name: str
    ms: float
    nodes_before: int
    nodes_after: int


@dataclass
class Runner:
    """`dump`: a folder for the graphs, numbered in order of the passes, and an index of what each pass did. `disable`:
    names of passes to leave out."""

    dump: Path | None = None
    disable: tuple[str, ...] = ()
    records: list[PassRecord] = field(default_factory=list)

    def find(self, finders: Sequence[Finder], gm: GraphModule, ctx: Context) -> Context:
        """Run read-only passes in order; each adds its facts to the context."""
        for finder in finders:
            size, start = len(gm.graph.nodes), time.perf_counter()
            ctx = self._guard(finder, gm, ctx)
            self._record(finder.__name__, start, size, len(gm.graph.nodes))
            self._note(finder.__name__, "", "facts only")
        return ctx

    def rewrite(self, rewriters: Sequence[Rewriter], gm: GraphModule, ctx: Context, label: str = "") -> GraphModule:
        """Run graph passes in order, on a copy: the given graph stays as it is."""
        gm = fx.copied(gm)
        for rewriter in rewriters:
            name = label + rewriter.__name__
            if rewriter.__name__ in self.disable:
                log.info("pass %s is disabled", rewriter.__name__)
                continue
            size, before, start = len(gm.graph.nodes), self._text(gm), time.perf_counter()
            gm = self._guard(_checked(rewriter), gm, ctx)
            self._record(name, start, size, len(gm.graph.nodes))
            self._dump(name, rewriter, before, self._text(gm))
        gm.recompile()
        return gm

    def _guard(self, step: Callable[[GraphModule, Context], T], gm: GraphModule, ctx: Context) -> T:
        try:
            return step(gm, ctx)
        except MoecaError:
            raise
        except Exception as error:
            done = ", ".join(record.name for record in self.records[-6:]) or "none"
            raise InvariantError(f"pass {step.__name__} failed: {error!r}; passes before it: {done}") from error

    def _record(self, name: str, start: float, before: int, after: int) -> None:
        self.records.append(PassRecord(name, (time.perf_counter() - start) * 1e3, before, after))
        log.debug("%s: %d -> %d nodes, %.1f ms", name, before, after, self.records[-1].ms)

    def _text(self, gm: GraphModule) -> str:
        """The graph to read, where it is wanted."""
        if self.dump is None:
            return ""
        gm.recompile()
        return str(gm.print_readable(print_output=False))

    def _dump(self, name: str, rewriter: Rewriter, before: str, after: str) -> None:
        if self.dump is None:
            return
        self.dump.mkdir(parents=True, exist_ok=True)
        number = len(list(self.dump.glob("*.before.txt")))
        stem = f"{number:03d}_{name.replace(' ', '_')}"
        for when, text in (("before", before), ("after", after)):
            (self.dump / f"{stem}.{when}.txt").write_text(text)
        self._note(name, stem, "changed" if before != after else f"nothing to do. {_does_nothing(rewriter)}".strip())

    def _note(self, name: str, stem: str, what: str) -> None:
        """A line of the index: which graphs belong to the pass, and what it did."""
        if self.dump is None:
            return
        self.dump.mkdir(parents=True, exist_ok=True)
        index, last = self.dump / INDEX, self.records[-1]
        head = "" if index.exists() else _HEAD
        files = f"[before]({stem}.before.txt) [after]({stem}.after.txt)" if stem else ""
        nodes = f"{last.nodes_before} -> {last.nodes_after}"
        with index.open("a") as file:
            file.write(f"{head}| {name} | {nodes} | {last.ms:.1f} | {what} | {files} |\n")


def _checked(rewriter: Rewriter) -> Rewriter:
    """The pass, and whether its graph is still one: a broken graph is that pass's failure."""

    @functools.wraps(rewriter)
    def run(gm: GraphModule, ctx: Context) -> GraphModule:
        after = rewriter(gm, ctx)
        after.graph.lint()
        return after

    return run


def _does_nothing(rewriter: Rewriter) -> str:
    """What a pass, or its file, says of graphs that it leaves as they are."""
    text = " ".join((rewriter.__doc__ or getattr(sys.modules.get(rewriter.__module__), "__doc__", None) or "").split())
    found = re.search(r"Does nothing[^.]*\.", text)
    return found.group(0) if found else ""
