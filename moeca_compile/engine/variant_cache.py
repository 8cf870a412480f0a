"""The variants of one graph that keep the same state: each built and compiled when a row first needs it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from moeca_compile.engine.compiler import Compiler
from moeca_compile.graph.capture import under_compile_lock
from moeca_compile.graph.variant import StateSlot, Variant
from moeca_compile.lowering.inductor.kernels import kernels_later
from moeca_compile.lowering.inductor.lower import Executable
from moeca_compile.passes.transform.layout import state_layout
from moeca_compile.pipeline import Analysis, build_variant
from moeca_compile.schedule import Row, Schedule


class VariantCache:
    """Any schedule may take variants from it whose state is that of `kept`.

    Args:
        kept: the schedule, fitted to the graph, that says what is kept of each region.

    Attributes:
        layout: the state's slots.
        built: by row, without being compiled.
        executables: by row, what runs.
    """

    def __init__(self, analysis: Analysis, compiler: Compiler, kept: Schedule) -> None:
        self.layout: tuple[StateSlot, ...] = state_layout(analysis.facts.regions, kept)
        self.built: dict[Row, Variant] = {}
        self.executables: dict[Row, Executable] = {}
        self._analysis, self._compiler, self._kept = analysis, compiler, kept

    def variant(self, row: Row) -> Variant:
        """The graph of `row`, built on first use; nothing is compiled yet."""
        if row not in self.built:
            with under_compile_lock():
                begin, name = time.perf_counter(), f"v{len(self.built)}"
                variant, records = build_variant(self._analysis, self._kept, row, self._compiler.options, name)
                self.built[row] = variant
                self._compiler.note(name, begin, records)
        return self.built[row]

    def compile(self, variant: Variant, args: Sequence[Any]) -> Executable:
        """Compile `variant` for tensors like `args`.

        Raises:
            LoweringError: the inner compiler refused it.
        """
        with under_compile_lock():
            if variant.row not in self.executables:
                self.executables[variant.row] = self._compiler.lower(variant, args)
        return self.executables[variant.row]

    def compile_together(self, wanted: Iterable[tuple[Variant, Sequence[Any]]]) -> None:
        """Compile variants, each for tensors like those beside it, so that the C++ compiler works on the kernels of one
        while the next is lowered. If anything is refused none is kept: compiled by itself, each says what is wrong."""
        if not self._compiler.writes_kernels:
            return
        made: dict[Row, Executable] = {}
        with under_compile_lock(), suppress(Exception), kernels_later() as wait:
            for variant, args in wanted:
                if variant.row not in self.executables:
                    made[variant.row] = self._compiler.lower(variant, args)
            begin = time.perf_counter()
            wait()
            self._compiler.note("kernels", begin)
            self.executables.update(made)  # not before: other threads run what they find there
