"""The one pass manager: runs passes on a copy, times, checks and dumps each, and names the one that failed.

Passes know nothing of this; so a pass is a plain function, and timing or dumping is written once.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from torch.fx import GraphModule

from moeca_compile.errors import InvariantError, MoecaError
from moeca_compile.graph import fx
from moeca_compile.passes.dump import Dump, does_nothing
from moeca_compile.passes.facts import Facts
from moeca_compile.passes.verify import GraphState

C = TypeVar("C")
log = logging.getLogger(__name__)

VERIFY = "MOECA_VERIFY"  # environment variable

Finder = Callable[[GraphModule, Facts], Facts]
# What a pass may know beside the graph depends on its stage: the facts, a row to build, an ONNX model to write.
Pass = Callable[[GraphModule, C], GraphModule]


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What one pass did: milliseconds, the graph's node count before and after, and whether it changed anything: the
    graph, or for a finder the facts."""

    name: str
    ms: float
    nodes_before: int
    nodes_after: int
    modified: bool


@dataclass
class PassManager:
    """Runs passes.

    Attributes:
        dump: a folder for the graphs, numbered in order of the passes, and an index of what each pass did.
        disable: names of passes to leave out.
        verify: after each pass check that the graph still says what its nodes compute (`passes/verify.py`); by default
            as the environment variable MOECA_VERIFY says.
        records: one for each pass that ran.
    """

    dump: Path | None = None
    disable: tuple[str, ...] = ()
    verify: bool = field(default_factory=lambda: os.environ.get(VERIFY, "") not in ("", "0"))
    records: list[PassRecord] = field(default_factory=list)

    def find(self, finders: Sequence[Finder], gm: GraphModule, facts: Facts) -> Facts:
        """Run read-only passes in order; each adds to the facts.

        Raises:
            InvariantError: one failed.
        """
        size = len(gm.graph.nodes)
        for finder in finders:
            start = time.perf_counter()
            with self._named(finder.__name__):
                after = finder(gm, facts)
            added = [entry.name for entry in fields(facts) if getattr(facts, entry.name) != getattr(after, entry.name)]
            self._record(finder.__name__, start, size, size, bool(added))
            if self.dump is not None:
                Dump(self.dump).found(self.records[-1], added, does_nothing(finder))
            facts = after
        return facts

    def rewrite(self, passes: Sequence[Pass[C]], gm: GraphModule, context: C, label: str = "") -> GraphModule:
        """Run graph passes in order, on a copy: the given graph stays as it is.

        Args:
            context: what these passes know beside the graph.
            label: goes before the passes' names in records and dumps.

        Raises:
            InvariantError: one failed, or left a graph that is none.
        """
        gm = fx.copied(gm)
        for function in passes:
            if function.__name__ in self.disable:
                log.info("pass %s is disabled", function.__name__)
                continue
            gm = self._run(function, gm, context, label)
        gm.recompile()
        return gm

    def _run(self, function: Pass[C], gm: GraphModule, context: C, label: str) -> GraphModule:
        name, before = label + function.__name__, calls_of(gm)
        dump = None if self.dump is None else Dump(self.dump).begin(name, gm)
        state = GraphState(gm) if self.verify else None
        start = time.perf_counter()
        with self._named(function.__name__):
            after = function(gm, context)
            if dump is not None:
                dump.write(after)
            after.graph.lint()
        self._record(name, start, len(before), len(after.graph.nodes), calls_of(after) != before)
        if state is not None and (problem := state.problem_of(after, function, context)):
            raise InvariantError(f"pass {function.__name__} broke the graph: {problem}{self._around(1)}")
        if dump is not None:
            dump.note(self.records[-1], does_nothing(function))
        return after

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Says which pass it was, where one fails."""
        try:
            yield
        except MoecaError:
            raise
        except Exception as error:
            raise InvariantError(f"pass {name} failed: {error!r}{self._around(0)}") from error

    def _around(self, count: int) -> str:
        """What helps to find a fault: the passes before, and where their graphs are.

        Args:
            count: how many of the last records are of the pass itself.
        """
        names = [record.name for record in self.records[: len(self.records) - count]]
        graphs = f"the graphs are in {self.dump}" if self.dump else "MOECA_DUMP=folder writes the graphs there"
        return f"; passes before it: {', '.join(names[-6:]) or 'none'}; {graphs}"

    def _record(self, name: str, start: float, before: int, after: int, modified: bool) -> None:
        self.records.append(PassRecord(name, (time.perf_counter() - start) * 1e3, before, after, modified))
        log.debug("%s: %d -> %d nodes, %.1f ms", name, before, after, self.records[-1].ms)


def calls_of(gm: GraphModule) -> list[tuple[Any, ...]]:
    """What the nodes are, to compare a graph with itself after a pass: FX replaces arguments, it never changes them."""
    return [(node, node.op, node.target, node.args, node.kwargs, node.meta.get(fx.MARK)) for node in gm.graph.nodes]
