"""The prologues of a graph: programs that compute its hoisted values for one or many steps, built on first use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from moeca_compile.engine.compiler import Compiler
from moeca_compile.engine.freeing.weights import FreedWeights
from moeca_compile.errors import LoweringError, warn
from moeca_compile.graph import fx
from moeca_compile.graph.autocast import without_autocast
from moeca_compile.graph.capture import under_compile_lock
from moeca_compile.graph.content import needs_device_sync
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.inductor.lower import Executable
from moeca_compile.lowering.inductor.over_steps import lower_over_steps
from moeca_compile.pipeline import Analysis, build_prologue


class Prologues:
    """The prologues of one captured graph.

    Attributes:
        hoisted: the hoisted values; all positions refer to this list.
        of_step: positions of the values that depend on the timestep.
        step_bytes: bytes of those values, for one step.
        timesteps, condition: positions of these inputs among a call's arguments.
        ready: each compiled prologue, by the positions of the values that it computes.
        by_step: values can't be computed for many timesteps at once.
        weights: positions of the weights that the graph reads.
        freed: the freed weights of the handle; None: none will be freed.
    """

    def __init__(self, analysis: Analysis, compiler: Compiler, freed: FreedWeights | None = None) -> None:
        facts = analysis.facts
        positions = {source.name: i for i, source in enumerate(facts.inputs)}
        self.hoisted = facts.hoisted
        self.of_step = tuple(position for position, value in enumerate(self.hoisted) if value.level == "step")
        self.step_bytes = sum(self.hoisted[position].bytes for position in self.of_step)
        self.timesteps = tuple(positions[name] for name in facts.roles.timesteps)
        self.condition = tuple(positions[name] for name in facts.roles.condition)
        self.ready: dict[tuple[int, ...], tuple[Variant, Executable]] = {}
        self._analysis, self._compiler, self.freed = analysis, compiler, freed
        inputs = enumerate(zip(fx.placeholders(analysis.gm), facts.inputs, strict=True))
        self.weights = tuple(i for i, (node, source) in inputs if source.is_weight and node.users)
        self._built: dict[tuple[int, ...], Variant] = {}
        self._mapped: dict[tuple[int, ...], Executable] = {}
        # in the interpreter each value must be bitwise that of one step computed alone
        self.by_step = compiler.options.inner == "eager" or not self.timesteps

    def prologue(self, gives: tuple[int, ...], args: Sequence[Any]) -> tuple[Variant, Executable]:
        """The compiled program of some hoisted values.

        Args:
            gives: positions of the values, all of one level.
            args: of a call, for which the program is compiled.

        Raises:
            LoweringError: the inner compiler refused it.
        """
        if gives not in self.ready:
            with under_compile_lock():
                if gives not in self.ready:
                    variant = self._variant(gives)
                    examples = [*(args[i] for i in variant.takes), *self._examples(variant.hoists)]
                    often = self._runs_at_every_step(gives, examples)
                    self.ready[gives] = variant, self._compiler.lower(variant, examples, often)
        return self.ready[gives]

    def over_steps(self, gives: tuple[int, ...]) -> tuple[Variant, Executable] | None:
        """The program of some hoisted values for many timesteps at once. The timestep inputs and the results have a
        leading axis [timesteps]. None: values are computed for each step by itself."""
        if self.by_step:
            return None
        variant = self._variant(gives)
        if gives not in self._mapped:
            axes = [position for position, i in enumerate(variant.takes) if i in self.timesteps]
            self._mapped[gives] = without_autocast(lower_over_steps(variant, axes))
        return variant, self._mapped[gives]

    def give_up_steps(self, error: LoweringError) -> None:
        """Compute each step by itself from now on, because the mapped program failed."""
        self.by_step = True
        warn(f"{error}. They are computed at each step, which is slower")

    def _variant(self, gives: tuple[int, ...]) -> Variant:
        if gives not in self._built:
            with under_compile_lock():
                begin, name = time.perf_counter(), f"prologue{len(self._built)}"
                self._built[gives], records = build_prologue(self._analysis, gives, self._compiler.options, name)
                self._compiler.note(name, begin, records)
        return self._built[gives]

    def _runs_at_every_step(self, gives: tuple[int, ...], args: Sequence[Any]) -> bool:
        """Whether the program runs at every step: it depends on the timestep, which the host doesn't read. Any other
        program runs once a trajectory; for all steps together if the timesteps are known. Freed weights are at another
        address at each run, so a CUDA graph can't read them."""
        if self.freed is not None:
            return False
        unread = self._compiler.options.cuda_graphs or any(map(needs_device_sync, args))
        return unread and any(self.hoisted[position].level == "step" for position in gives)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the hoisted values."""
        return [fx.shape(node) for node in fx.resolve(self._analysis.gm, (value.value for value in self.hoisted))]

    def _examples(self, hoists: tuple[int, ...]) -> list[torch.Tensor]:
        """Tensors like the hoisted values at these positions."""
        examples = []
        for node in fx.resolve(self._analysis.gm, (self.hoisted[position].value for position in hoists)):
            value = fx.need(node)
            examples.append(torch.empty(fx.shape(node), dtype=value.dtype, device=value.device))
        return examples
