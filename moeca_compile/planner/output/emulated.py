"""The steps of one run on tensors: the sampler's update, the output rule, and the model called where a step computes.

A run of the user's sampler always begins at its first step. This one begins at any, so that what a change of one
step's weights does to the samples costs the steps after it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moeca_compile.engine.output_program import OutputProgram
from moeca_compile.planner.output.fit import Weights, term_parts
from moeca_compile.planner.output.paths import is_doubled
from moeca_compile.planner.output.sampler import SamplerStep
from moeca_compile.planner.rollout import Call
from moeca_compile.schedule.output import MAX_OUTPUTS

Parts = tuple[Tensor, ...]  # of the guidance: one, or two


@dataclass(frozen=True)
class State:
    """Before a step.

    Attributes:
        latent: [N, C, ...] float32.
        last: the parts of what the step before returned; empty before the first.
        outputs: the parts of the model's last outputs, latest first.
    """

    latent: Tensor
    last: Parts = ()
    outputs: tuple[Parts, ...] = ()


@dataclass
class RecordedCalls:
    """The calls of the computed steps of a run: a watcher for `SampledModel.run`.

    Attributes:
        calls: by step, one for each call: its program, its inputs as they were then, and whether they take both halves
            of the guidance in one batch.
        rounding: the greatest `finfo.eps` of what the model takes, computes in and returns.
    """

    calls: dict[int, list[tuple[OutputProgram, list[Any], bool]]] = field(default_factory=dict)
    rounding: float = 0.0
    autocast: dict[str, Any] = field(default_factory=dict)  # the sampler's
    _copies: dict[int, Tensor] = field(default_factory=dict)  # by position: most inputs are the same at all steps

    def __call__(self, call: Call) -> None:
        if not call.is_computed:
            return
        assert isinstance(call.program, OutputProgram)
        assert call.latent is not None
        args = [self._copied(place, arg) for place, arg in enumerate(call.args)]
        self.calls.setdefault(call.record.step, []).append((call.program, args, is_doubled(call.latent)))
        device = call.latent.device.type
        self.autocast = {"device_type": device, "enabled": torch.is_autocast_enabled(device)}
        self.autocast["dtype"] = torch.get_autocast_dtype(device)
        dtypes = [call.latent.dtype, call.results[0].dtype]
        if self.autocast["enabled"]:
            dtypes.append(self.autocast["dtype"])
        self.rounding = max(self.rounding, *(torch.finfo(dtype).eps for dtype in dtypes))

    def _copied(self, place: int, arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        copy = self._copies.get(place)
        if copy is None or copy.shape != arg.shape or copy.dtype != arg.dtype or not torch.equal(copy, arg):
            copy = self._copies[place] = arg.clone()
        return copy

    def model(self, step: int, latent: Tensor) -> Parts:
        """What the model returns at a computed step for another latent, on the latent's device.

        Args:
            step: that the run computed.
            latent: [N, C, ...] float32.

        Returns:
            The parts [N, C, ...] float32; channels past the latent's, of a learned variance, are left out.
        """
        parts: list[Tensor] = []
        for program, args, doubled in self.calls[step]:
            place, given = program.latent, list(args)
            assert place is not None
            given[place] = (torch.cat([latent, latent]) if doubled else latent).to(args[place])
            with torch.autocast(**self.autocast):
                output = program.call.run(given)[0]
            parts += output.detach().to(latent)[:, : latent.shape[1]].chunk(1 + doubled)
        return tuple(parts)


@dataclass(frozen=True)
class EmulatedSampler:
    """A sampler with an output rule.

    Args:
        sampler: the update of each step.
        terms: of the rule.
        calls: of the computed steps.
    """

    sampler: Sequence[SamplerStep]
    terms: tuple[str, ...]
    calls: RecordedCalls

    def run(self, state: State, weights: Weights, first: int = 0) -> list[State]:
        """The states before step `first` and after it and each later step.

        Args:
            state: before step `first`.
            weights: of all steps.
        """
        states = [state]
        for step in range(first, len(self.sampler)):
            states.append(self.moved(step, self.computed(step, states[-1]), weights[step]))
        return states

    def computed(self, step: int, state: State) -> State:
        """With the model's output, if the step computes it."""
        if step not in self.calls.calls:
            return state
        output = self.calls.model(step, state.latent)
        return State(state.latent, state.last, (output, *state.outputs[: MAX_OUTPUTS - 1]))

    def moved(self, step: int, state: State, row: Sequence[float]) -> State:
        """The state before the next step. `row`: the step's weights, by term."""
        sampler = self.sampler[step]
        parts = range(len(sampler.now))
        weighed = [(weight, term) for weight, term in zip(row, self.values(step, state), strict=True) if term]
        returned = tuple(torch.stack([weight * term[part] for weight, term in weighed]).sum(0) for part in parts)
        latent = sampler.constant(state.latent, state.last) + sampler.effect(returned)
        return State(latent, returned, state.outputs)

    def values(self, step: int, state: State) -> list[Sequence[Tensor]]:
        """The parts of each term; empty where its output isn't there yet."""
        count = len(self.sampler[step].now)
        return [term_parts(name, state.latent, state.outputs, count) for name in self.terms]
