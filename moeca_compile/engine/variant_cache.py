"""The variants of one graph that share one state layout, each built and compiled when a row first needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from moeca_compile.engine.compiler import Compiler
from moeca_compile.graph import fx
from moeca_compile.graph.capture import under_compile_lock
from moeca_compile.graph.fit import fit
from moeca_compile.graph.variant import StateSlot, Variant
from moeca_compile.inspect.trace import artifact
from moeca_compile.lowering.inductor.kernels import kernels_later
from moeca_compile.lowering.inductor.lower import Executable
from moeca_compile.passes.dump import text_of
from moeca_compile.passes.transform.layout import state_layout
from moeca_compile.pipeline import Analysis, build_variant
from moeca_compile.schedule import Row, Schedule


class VariantCache:
    """The variants with the state of one schedule. Any schedule with the same state may use them.

    Args:
        analysis: of the graph.
        compiler: of the graph.
        state_schedule: the schedule, fitted to the graph, that says which outputs of each region are cached.
        other: makes the analysis of the graph at another size; None: every size is fixed.

    Attributes:
        layout: slots of the state.
        built: by row, the variant's graph.
        executables: by row, the compiled variant.
    """

    def __init__(
        self, analysis: Analysis, compiler: Compiler, state_schedule: Schedule,
        other: Callable[[], Analysis | None] = lambda: None,
    ) -> None:  # fmt: skip
        self.layout: tuple[StateSlot, ...] = state_layout(analysis.facts.regions, state_schedule)
        self.built: dict[Row, Variant] = {}
        self.executables: dict[Row, Executable] = {}
        self._analysis, self._compiler, self._state_schedule = analysis, compiler, state_schedule
        self._other = other

    def variant(self, row: Row) -> Variant:
        """The graph of `row`, built on first use and not compiled."""
        if row not in self.built:
            with under_compile_lock():
                begin, name = time.perf_counter(), f"v{len(self.built)}"
                options = self._compiler.options
                variant, records = build_variant(self._analysis, self._state_schedule, row, options, name)
                self.built[row] = variant
                self._compiler.note(name, begin, records)
                artifact(f"moeca_{name}", lambda: text_of(variant.gm), self._compiler.compile_id)
        return self.built[row]

    def compile(self, variant: Variant, args: Sequence[Any]) -> Executable:
        """Compile `variant` for tensors like `args`, on first use.

        Raises:
            LoweringError: the inner compiler refused it.
        """
        with under_compile_lock():
            if variant.row not in self.executables:
                self.executables[variant.row] = self._lowered(variant, args)
        return self.executables[variant.row]

    def compile_together(self, variants: Iterable[tuple[Variant, Sequence[Any]]]) -> None:
        """Compile several variants; the C++ compiler works on the kernels of one while the next is lowered.

        If one of them fails, none is stored. `compile` then raises the error of the failed variant.

        Args:
            variants: each with example arguments.
        """
        if not self._compiler.writes_kernels:
            return
        executables: dict[Row, Executable] = {}
        with under_compile_lock(), suppress(Exception), kernels_later() as wait:
            for variant, args in variants:
                if variant.row not in self.executables:
                    executables[variant.row] = self._lowered(variant, args)
            begin = time.perf_counter()
            wait()
            self._compiler.note("kernels", begin)
            self.executables.update(executables)  # only now: other threads run what is stored there

    def _lowered(self, variant: Variant, args: Sequence[Any]) -> Executable:
        return self._compiler.lower(variant, args, other=partial(self._at_other_size, variant, args))

    def _at_other_size(self, variant: Variant, args: Sequence[Any]) -> tuple[Variant, Sequence[Any]] | None:
        """The variant of the same row at another size, with its weights among `args` and fake tensors for the rest."""
        analysis = self._other()
        if analysis is None:
            return None
        unbound = replace(self._state_schedule, fingerprint="")  # sizes of tables are part of a graph's
        schedule = fit(unbound, analysis.facts.regions, self._compiler.options.granularity)
        other, _ = build_variant(analysis, schedule, variant.row, self._compiler.options, variant.name)
        weights = {i: arg for i, arg in zip(variant.takes, args, strict=False) if self._compiler.inputs[i].is_weight}
        takes = [weights.get(i) for i in other.takes]
        fakes = [node.meta["val"] for node in fx.placeholders(other.gm)]
        takes += [None] * (len(fakes) - len(takes))
        return other, [fake if weight is None else weight for fake, weight in zip(fakes, takes, strict=True)]
