"""The programs of a graph's hoisted values: built when they are first needed, for one step or for many."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from moeca_compile.engine.compiler import Compiler
from moeca_compile.errors import LoweringError, MoecaWarning
from moeca_compile.graph import fx
from moeca_compile.graph.autocast import without_autocast
from moeca_compile.graph.capture import under_compile_lock
from moeca_compile.graph.content import needs_device_sync
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.inductor.lower import Executable
from moeca_compile.lowering.inductor.over_steps import lower_over_steps
from moeca_compile.pipeline import Analysis, build_prologue


class Prologues:
    """Those of one captured graph.

    Attributes:
        hoisted: the values; all positions are in this list.
        of_step: positions of those that change with the timestep, and the bytes of one step's.
        timestep, condition: positions of the inputs among a call's arguments.
        ready: by the positions that it gives, each prologue that can run.
        by_step: values can't be computed for many timesteps at once.
    """

    def __init__(self, analysis: Analysis, compiler: Compiler) -> None:
        context = analysis.facts
        positions = {one.name: i for i, one in enumerate(context.inputs)}
        self.hoisted = context.hoisted
        self.of_step = tuple(p for p, value in enumerate(self.hoisted) if value.level == "step")
        self.step_bytes = sum(self.hoisted[p].bytes for p in self.of_step)
        self.timestep = positions.get(context.roles.timestep)
        self.condition = tuple(positions[name] for name in context.roles.condition)
        self.ready: dict[tuple[int, ...], tuple[Variant, Executable]] = {}
        self._analysis, self._compiler = analysis, compiler
        self._built: dict[tuple[int, ...], Variant] = {}
        self._mapped: dict[tuple[int, ...], Executable] = {}
        # in the interpreter every value is bitwise that of a call by itself
        self.by_step = compiler.options.inner == "eager" or self.timestep is None

    def prologue(self, gives: tuple[int, ...], args: Sequence[Any]) -> tuple[Variant, Executable]:
        """The program of these hoisted values (positions in `hoisted`, all of one level), made to run for such calls.

        Raises:
            LoweringError: the inner compiler refused it.
        """
        if gives not in self.ready:
            with under_compile_lock():
                if gives not in self.ready:
                    variant = self._variant(gives)
                    given = [*(args[i] for i in variant.takes), *self._examples(variant.hoists)]
                    self.ready[gives] = variant, self._compiler.lower(variant, given, self._often(gives, given))
        return self.ready[gives]

    def over_steps(self, gives: tuple[int, ...]) -> tuple[Variant, Executable] | None:
        """The same for many timesteps at once, the timestep and the results with a leading axis; None: not possible."""
        if self.by_step or self.timestep is None:
            return None
        variant = self._variant(gives)
        if gives not in self._mapped:
            self._mapped[gives] = without_autocast(lower_over_steps(variant, variant.takes.index(self.timestep)))
        return variant, self._mapped[gives]

    def give_up_steps(self, error: LoweringError) -> None:
        self.by_step = True
        warnings.warn(f"{error}. They are computed at each step, which is slower", MoecaWarning, stacklevel=2)

    def _variant(self, gives: tuple[int, ...]) -> Variant:
        if gives not in self._built:
            with under_compile_lock():
                begin, name = time.perf_counter(), f"prologue{len(self._built)}"
                self._built[gives], records = build_prologue(self._analysis, gives, self._compiler.options, name)
                self._compiler.note(name, begin, records)
        return self._built[gives]

    def _often(self, gives: tuple[int, ...], args: Sequence[Any]) -> bool:
        """Whether they are computed at every step: those of a timestep, where nobody waits to read it. Elsewhere they
        are computed once a trajectory, for all steps together once the timesteps are known."""
        unread = self._compiler.options.cuda_graphs or any(map(needs_device_sync, args))
        return unread and any(self.hoisted[position].level == "step" for position in gives)

    def _examples(self, hoists: tuple[int, ...]) -> list[torch.Tensor]:
        nodes = fx.resolve(self._analysis.gm, (self.hoisted[position].value for position in hoists))
        return [torch.empty(fx.shape(node), dtype=fx.need(node).dtype, device=fx.need(node).device) for node in nodes]
