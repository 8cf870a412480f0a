"""The steps of one run on tensors: the sampler's update, the output rule, and the model called where a step computes.

The user's own sampler is closed. In this run of the same steps, derivatives can be carried along (`derivatives.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from moeca_compile.engine.output_program import OutputProgram
from moeca_compile.planner.output.fit import term_parts
from moeca_compile.planner.output.paths import is_doubled
from moeca_compile.planner.output.sampler import SamplerStep
from moeca_compile.planner.rollout import Call

Parts = tuple[Tensor, ...]  # of the guidance: one, or two


class CallFailed(Exception):
    """The model can't be called outside the sampler's loop."""


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

        Raises:
            CallFailed: the model raises an error; it may need what the sampler sets around its calls.
        """
        parts: list[Tensor] = []
        for program, args, doubled in self.calls[step]:
            place, given = program.latent, list(args)
            assert place is not None
            given[place] = (torch.cat([latent, latent]) if doubled else latent).to(args[place])
            try:
                with torch.autocast(**self.autocast):
                    output = program.call.run(given)[0]
            except Exception as error:
                raise CallFailed(str(error)) from error
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

    def computes(self, step: int) -> bool:
        """Whether the run that was recorded computed the model at a step."""
        return step in self.calls.calls

    def after_call(self, state: State, output: Parts) -> State:
        """The state with what the model returned, as far as later steps weigh it."""
        kept = max((int(term[1:]) for term in self.terms if term != "x"), default=0)
        return replace(state, outputs=(output, *state.outputs[:kept]))

    def moved(self, step: int, state: State, row: Sequence[float]) -> State:
        """The state before the next step. It is linear in the state, so it serves for a state's derivatives, too.

        Args:
            step: its number.
            state: before the step, with the step's output if that is computed.
            row: the step's weights, by term.
        """
        sampler = self.sampler[step]
        weighed = [(weight, term) for weight, term in zip(row, self.values(step, state), strict=True) if term]
        returned = tuple(
            reduce(operator.add, (weight * term[part] for weight, term in weighed)) for part in range(len(sampler.now))
        )
        latent = sampler.constant(state.latent, state.last) + sampler.effect(returned)
        return State(latent, returned, state.outputs)

    def values(self, step: int, state: State) -> list[Sequence[Tensor]]:
        """The parts of each term; empty where its output isn't there yet."""
        count = len(self.sampler[step].now)
        return [term_parts(name, state.latent, state.outputs, count) for name in self.terms]
