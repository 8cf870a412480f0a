"""The programs of a graph's hoisted values: built when they are first needed, for one step or for many."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moeca_compile.errors import LoweringError, MoecaWarning
from moeca_compile.graph import fx
from moeca_compile.graph.autocast import without_autocast
from moeca_compile.graph.capture import under_compile_lock
from moeca_compile.graph.nowait import needs_device_sync
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.inductor.lower import Executable
from moeca_compile.lowering.inductor.over_steps import lower_over_steps
from moeca_compile.options import Options
from moeca_compile.passes.manager import PassRecord
from moeca_compile.pipeline import Analysis, build_prologue


class Prologues:
    """Implements `runtime.hoisted.Prologued`.

    Args:
        lower: makes a variant run for such arguments; and whether it will at many steps, so that compiling pays.
        built: is told of each prologue: its name, when building it began, what the passes did.

    Attributes:
        timestep, condition: positions of the inputs among a call's arguments.
    """

    def __init__(
        self, analysis: Analysis, options: Options, lower: Callable[[Variant, Sequence[Any], bool], Executable],
        built: Callable[[str, float, Sequence[PassRecord]], None],
    ) -> None:  # fmt: skip
        context = analysis.context
        positions = {one.name: i for i, one in enumerate(context.inputs)}
        self.hoisted = context.hoisted
        self.timestep = positions.get(context.roles.timestep)
        self.condition = tuple(positions[name] for name in context.roles.condition)
        self._analysis, self._options, self._lower, self._built = analysis, options, lower, built
        self._found: dict[tuple[int, ...], tuple[Variant, Executable | None]] = {}
        self._mapped: dict[tuple[int, ...], Executable] = {}
        self.by_step = options.inner == "eager"  # there every value is bitwise that of a call by itself

    def prologue(self, gives: tuple[int, ...], args: Sequence[Any]) -> tuple[Variant, Executable]:
        """The program of these hoisted values (positions in `hoisted`, all of one level), made to run for such calls.

        Raises:
            LoweringError: the inner compiler refused it.
        """
        variant, run = self._variant(gives)
        if run is None:
            with under_compile_lock():
                variant, run = self._variant(gives)
                if run is None:
                    given = [*(args[i] for i in variant.takes), *self._examples(variant.hoists)]
                    run = self._lower(variant, given, self._often(gives, given))
                    self._found[gives] = variant, run
        return variant, run

    def over_steps(self, gives: tuple[int, ...]) -> tuple[Variant, Executable] | None:
        """The same for many timesteps at once, the timestep and the results with a leading axis; None: not possible."""
        if self.by_step or self.timestep is None:
            return None
        variant, _ = self._variant(gives)
        if gives not in self._mapped:
            self._mapped[gives] = without_autocast(lower_over_steps(variant, variant.takes.index(self.timestep)))
        return variant, self._mapped[gives]

    def give_up_steps(self, error: LoweringError) -> None:
        self.by_step = True
        warnings.warn(f"{error}. They are computed at each step, which is slower", MoecaWarning, stacklevel=2)

    def _variant(self, gives: tuple[int, ...]) -> tuple[Variant, Executable | None]:
        if gives not in self._found:
            with under_compile_lock():
                begin, name = time.perf_counter(), f"prologue{len(self._found)}"
                variant, records = build_prologue(self._analysis, gives, self._options, name)
                self._found[gives] = variant, None
                self._built(name, begin, records)
        return self._found[gives]

    def _often(self, gives: tuple[int, ...], args: Sequence[Any]) -> bool:
        """Whether they are computed at every step: those of a timestep, where nobody waits to read it. Elsewhere they
        are computed once a trajectory, for all steps together once the timesteps are known."""
        unread = self._options.cuda_graphs or any(map(needs_device_sync, args))
        return unread and any(self.hoisted[position].level == "step" for position in gives)

    def _examples(self, hoists: tuple[int, ...]) -> list[torch.Tensor]:
        nodes = fx.resolve(self._analysis.gm, (self.hoisted[position].value for position in hoists))
        return [torch.empty(fx.shape(node), dtype=fx.need(node).dtype, device=fx.need(node).device) for node in nodes]
