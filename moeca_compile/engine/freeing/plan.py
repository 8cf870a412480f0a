"""Frees weights that only prologues read, once the values of a trajectory's timesteps are all computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeca_compile.engine.freeing.weights import DROP, HOST, FreedWeights
from moeca_compile.engine.trajectories.timesteps import StepKey
from moeca_compile.graph.content import Stamp, bits
from moeca_compile.graph.variant import Variant

if TYPE_CHECKING:
    from moeca_compile.engine.compiled_schedule import CompiledSchedule
    from moeca_compile.engine.hoisted import Hoisted
    from moeca_compile.engine.prologues import Prologues


@dataclass
class PlannedValues:
    """The hoisted values of one conditioning at all timesteps of a trajectory.

    Attributes:
        inputs: by position among a call's arguments, a copy of each input that the values came from.
        weights: by position, a stamp of each weight that they came from.
        fixed, table, rows: as in `engine/hoisted.py`.
    """

    inputs: dict[int, Any]
    weights: dict[int, Stamp]
    fixed: dict[int, Tensor]
    table: dict[int, Tensor]
    rows: dict[StepKey, int]

    def fits(self, args: Sequence[Any]) -> bool:
        """Whether a call's inputs are those that the values came from, bit for bit."""
        return all(_is_equal(args[i], copy) for i, copy in self.inputs.items())


class WeightFreeing:
    """Frees the weights of one program that only its prologues read.

    Args:
        freed: the freed weights of the handle.
        prologues: of the program.
        compiled: the handle's schedule for the program.

    Attributes:
        plans: stored values, which outlive their trajectory: those of the last one; once weights were dropped, those
            that there will ever be.
    """

    def __init__(self, freed: FreedWeights, prologues: Prologues, compiled: CompiledSchedule) -> None:
        self.freed, self._prologues, self._compiled = freed, prologues, compiled
        self.plans: list[PlannedValues] = []

    @cached_property
    def _variants(self) -> list[Variant]:
        return [self._compiled.variants.variant(row) for row in self._compiled.schedule.distinct_rows()]

    @cached_property
    def _weights(self) -> tuple[int, ...]:
        """Positions of the weights that no step reads."""
        taken = {i for variant in self._variants for i in variant.takes}
        return tuple(i for i in self._prologues.weights if i not in taken)

    @cached_property
    def invariant(self) -> frozenset[int]:
        """The values that the schedule's steps read and that don't depend on the timestep."""
        read = {position for variant in self._variants for position in variant.hoists}
        return frozenset(position for position in read if self._prologues.hoisted[position].level == "invariant")

    def weight_bytes(self, args: Sequence[Any]) -> int:
        """Bytes of the weights that no step reads, freed or not."""
        return sum(args[i].numel() * args[i].element_size() for i in self._weights)

    def plan_for(self, args: Sequence[Any]) -> PlannedValues | None:
        """The stored values for a call with these arguments."""
        return next((plan for plan in self.plans if plan.fits(args)), None)

    def arguments(self, takes: Sequence[int], args: Sequence[Any]) -> Sequence[Any]:
        """The arguments of a call whose variant takes those at the positions `takes`, with the values of weights among
        them that were freed for calls of another kind.

        Raises:
            StateError: such a weight was dropped.
        """
        if not self.freed or not any(self.freed.has(args[i]) for i in takes):
            return args
        self.warn_of_copies("calls of another kind read weights that were freed")
        return self.freed.values(args)

    def warn_of_copies(self, reason: str) -> None:
        """Warn that freed weights are copied from the host."""
        self._compiled.program.warned.once(
            f"free_hoisted: {reason}. Weights are copied from the host at each of them, which is slow. Pass the "
            "timesteps (moeca_compile.trajectory(model, timesteps=...)), or leave free_hoisted out"
        )

    def after_call(
        self, compiled: CompiledSchedule, streams: Sequence[Hoisted], args: Sequence[Any], step: int
    ) -> None:
        """Free the weights if the values of all steps are computed, for all streams of a trajectory.

        Args:
            compiled: the schedule that ran.
            streams: hoisted values of each stream of the trajectory.
            args: of the call.
            step: number of the call in its trajectory. In call 1 of a stream every stream has had a call.
        """
        if step != 1 or compiled is not self._compiled:
            return
        weights = [args[i] for i in self._weights if self.freed.can_free(args[i])]
        has_freed = any(self.freed.has(args[i]) for i in self._weights)
        if not (weights or has_freed):
            self._warn_of_nothing(args)
        if not weights and not (has_freed and self.freed.mode == HOST):
            return
        if not all(hoisted.is_planned(self._prologues) for hoisted in streams):
            if any(hoisted.plan.expected for hoisted in streams):
                compiled.program.warned.once(
                    "free_hoisted frees nothing: the hoisted values of all steps weren't computed beforehand, because "
                    "the timesteps aren't those that were expected, or an input changes from step to step, or the "
                    "values take more memory than the weights. Leave free_hoisted out, or pass the timesteps"
                )
            return
        self.plans = [hoisted.planned() for hoisted in streams]
        if self.freed.mode == DROP:
            dropped = set(map(id, weights))
            for plan in self.plans:
                for i in [i for i in plan.weights if id(args[i]) in dropped]:
                    del plan.weights[i]
        self.freed.free(weights)

    def _warn_of_nothing(self, args: Sequence[Any]) -> None:
        once = self._compiled.program.warned.once
        if self.freed.mode == HOST and any(args[i].device.type == "cpu" for i in self._weights):
            once(
                "free_hoisted='host' frees nothing: the model is in the host's memory already. 'drop' gives up the "
                "weights that no step reads, for fixed timesteps and conditioning"
            )
            return
        once(
            "free_hoisted frees nothing: each weight is read by the steps themselves, or shares its memory "
            "(moeca_compile.explain tells the bytes that only prologues read). Leave free_hoisted out"
        )


def _is_equal(value: Any, copy: Any) -> bool:
    if not isinstance(value, Tensor):
        return bool(value == copy)
    if (value.shape, value.dtype, value.device) != (copy.shape, copy.dtype, copy.device):
        return False
    return torch.equal(bits(value), bits(copy))
