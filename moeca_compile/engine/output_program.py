"""A whole model as one column: cheap steps forecast what the model returns and run no part of it.

Nothing is captured. A computed step calls the model as it is, so this serves every model that can be called, also one
whose graph breaks, that is quantized, offloaded or sharded. What is kept is what the model returns: a few latents.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeca_compile.dtypes import name_of
from moeca_compile.engine.compiled_schedule import CompiledSchedule
from moeca_compile.engine.compiler import Compiler
from moeca_compile.engine.program import Program, shape_of_sample
from moeca_compile.engine.trajectories.agreement import Agreement
from moeca_compile.engine.variant_cache import VariantCache
from moeca_compile.errors import ScheduleError
from moeca_compile.graph.regions import Cut, Region, RegionMap
from moeca_compile.graph.variant import StateSlot, Variant
from moeca_compile.lowering.inductor.lower import Executable
from moeca_compile.options import Options
from moeca_compile.passes.transform.layout import state_layout
from moeca_compile.runtime.output_weights import OutputWeights
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Action, Row, Schedule
from moeca_compile.schedule.forecast import COPY, Weights
from moeca_compile.schedule.granularity import OUTPUT

Outputs = tuple[Tensor, ...]
Call = Callable[[Sequence[Any]], Outputs]


@dataclass(frozen=True)
class OutputCall:
    """One kind of call of a model.

    Attributes:
        run: from a call's arguments to the tensors that the model returns.
        regions: the model as one region, with the shapes, dtypes and devices of what it returns.
        timestep, latent: their positions among the arguments; None: not known.
        more_timesteps: positions of further timesteps.
        condition: positions of the tensors that tell guidance streams apart.
        roles: names of the timestep and of the latent; "" where they aren't known.
    """

    run: Call
    regions: RegionMap
    timestep: int | None
    latent: int | None
    condition: tuple[int, ...]
    roles: tuple[str, str] = ("", "")
    more_timesteps: tuple[int, ...] = ()


@dataclass
class _NothingHoisted:
    """The prologues of a program without a graph: there are none."""

    timesteps: tuple[int, ...]
    condition: tuple[int, ...]
    hoisted: tuple[Any, ...] = ()
    of_step: tuple[int, ...] = ()
    step_bytes: int = 0
    by_step: bool = True
    ready: dict[Any, Any] = field(default_factory=dict)


class OutputProgram(Program):
    """One kind of call of a model, and the schedules that it runs.

    Args:
        args: of a call.
        key: as for `Program`.

    Raises:
        ScheduleError: the schedule has other columns, or rows that compute a part of a region.
    """

    def __init__(
        self, call: OutputCall, args: Sequence[Any], options: Options, schedule: Schedule, warned: Warned,
        key: Hashable = None, agreement: Agreement | None = None,
    ) -> None:  # fmt: skip
        self.options, self.warned, self.call, self.is_announced = options, warned, call, False
        self.key = object() if key is None else key
        self.compiler = Compiler(options, args)
        self.timestep, self.latent, self.condition = call.timestep, call.latent, call.condition
        self.more_timesteps = call.more_timesteps
        self.prologues = _NothingHoisted((), call.condition)  # type: ignore[assignment]
        self.packs_experts, self.buffers, self.caches, self.freeing = False, None, (), None
        self.agreement = agreement
        self.nodes, self.roles = 0, call.roles
        self.regions = call.regions
        self.latent_shape = shape_of_sample(args, call.latent)
        self.warn_of_size(schedule)
        self.compiled_schedule = self.compiled(schedule.with_interval(0.0))

    def compiled(
        self, schedule: Schedule, state_schedule: Schedule | None = None, order: int | None = None
    ) -> CompiledSchedule:
        """As `Program.compiled`."""
        fitted = self._fitted(state_schedule or schedule)
        variants = OutputVariants(self.call, state_layout(self.regions, fitted), fitted.depth(0))
        return CompiledOutput(self, self._fitted(schedule), variants, order)

    def _fitted(self, schedule: Schedule) -> Schedule:
        bound = schedule.bind((OUTPUT,), self.regions.fingerprint, OUTPUT)
        if any(not isinstance(action, Action) for row in bound.rows for action in row) or bound.adaptive is not None:
            raise ScheduleError(
                "granularity='output' takes rows of COMPUTE, REUSE and FORECAST: the model's output has no parts and "
                "no drift metric. Use granularity='region' for partial rows and adaptive schedules"
            )
        return bound


class _Step(NamedTuple):
    """What a variant of an output runs on. `weights`: of the schedule's output rule, by term; None: none at this step.
    `polynomial`: weights of y0, y1, ... otherwise. `observe`: is called with what a computed step returns."""

    args: Sequence[Any]
    kept: Sequence[Tensor | None]
    terms: tuple[str, ...]
    weights: Sequence[float] | None
    polynomial: Weights
    latent: Tensor | None
    observe: Callable[[Tensor], None] | None = None


class CompiledOutput(CompiledSchedule):
    """A schedule of a model's output, ready to run."""

    program: OutputProgram
    variants: OutputVariants

    def __init__(
        self, program: OutputProgram, schedule: Schedule, variants: OutputVariants, order: int | None = None
    ) -> None:
        super().__init__(program, schedule, variants, order)
        has_latent = program.latent is not None
        self._rule = None if schedule.output is None else OutputWeights(schedule, program.warned, has_latent)

    def arguments(
        self, variant: Variant, args: Sequence[Any], state: StreamState | None, step: int,
        hoisted: Sequence[torch.Tensor] | None = None,
    ) -> list[Any]:  # fmt: skip
        """What a step of `variant` runs on, as its only argument."""
        rule, latent, weights = self._rule, self.program.latent, None
        if rule is not None and state is not None:
            weights = rule.at(state, step, self.program.regions.regions[0].shapes[0])
        polynomial = COPY
        if variant.wants_coefficients and state is not None:
            polynomial = self.driver.coefficients(state, step)[0]
        kept = () if state is None else state.tensors
        terms = () if rule is None else rule.terms
        values = None if latent is None else args[latent]
        return [_Step(args, kept, terms, weights, polynomial, values, self._checked(state, step, values))]

    def _checked(self, state: StreamState | None, step: int, latent: Tensor | None) -> Callable[[Tensor], None] | None:
        """The check of the sampler's first update."""
        check = None if self._rule is None else self._rule.sampler
        if check is None or state is None or latent is None:
            return None
        return check.observer(state, step, lambda: _wide(latent), torch.finfo(latent.dtype).eps)

    def examples(self, variant: Variant, args: Sequence[Any], hoisted: Any) -> list[Any]:
        kept = [self.zeros(slot) for slot in range(len(self.layout))]
        return [_Step(args, kept, (), None, COPY, None)]


class OutputVariants(VariantCache):
    """The variants of an output: the model, its last output, and the forecast."""

    def __init__(self, call: OutputCall, layout: tuple[StateSlot, ...], depth: int) -> None:
        self.layout, self.depth = layout, depth
        self.built: dict[Row, Variant] = {}
        self.executables: dict[Row, Executable] = {}
        self._call = call

    def variant(self, row: Row) -> Variant:
        """Of a row; it can run at once."""
        if row not in self.built:
            computes = row[0] is Action.COMPUTE
            slots = tuple(range(len(self.layout)))
            self.executables[row] = self._compute if computes else self._forecast
            self.built[row] = Variant(
                name="v0" if computes else "v1",
                row=row,
                gm=None,
                takes=(),
                reads=() if computes else slots,
                writes=slots[:: self.depth] if computes and self.depth else (),
                wants_coefficients=row[0] is Action.FORECAST,
                wants_now=False,
                outputs=len(self._call.regions.regions[0].outputs),
                macs=int(computes),
            )
        return self.built[row]

    def compile(self, variant: Variant, args: Sequence[Any]) -> Executable:
        """There is nothing to compile."""
        return self.executables[variant.row]

    def compile_together(self, wanted: Iterable[tuple[Variant, Sequence[Any]]]) -> None:
        """There is nothing to compile."""

    def _compute(self, arguments: Sequence[Any]) -> Sequence[Tensor]:
        step: _Step = arguments[0]
        outputs = self._call.run(step.args)
        if not self.depth:
            return outputs
        kept = [output.clone() for output in outputs]  # the caller may write to what it gets
        if step.weights is not None:
            values = [kept[0], *(value for value in step.kept[: self.depth - 1] if value is not None)]
            outputs = (_weighted(step, values), *outputs[1:])
        if step.observe is not None:
            step.observe(_wide(outputs[0]))
        return [*outputs, *kept]

    def _forecast(self, arguments: Sequence[Any]) -> Sequence[Tensor]:
        step: _Step = arguments[0]
        results = []
        for first in range(0, len(step.kept), self.depth):
            values = [value for value in step.kept[first : first + self.depth] if value is not None]
            if step.weights is not None and not first:
                results.append(_weighted(step, values))
            else:
                results.append(_polynomial(values, step.polynomial))
        return results


def _polynomial(values: Sequence[Tensor], weights: Weights) -> Tensor:
    """w0 y0 + w1 y1 + ..., in at least float32; y0 where it isn't a floating number."""
    if not values[0].is_floating_point():
        return values[0].clone()
    weighted = zip(values, weights, strict=False)
    return _total(((_wide(value), weight) for value, weight in weighted if weight), values[0])


def _weighted(step: _Step, values: Sequence[Tensor]) -> Tensor:
    """The output rule's sum. `values`: y0, y1, ..., each [B, C, ...]; the latent may have fewer channels than they."""
    assert step.weights is not None
    weighted = zip(step.terms, step.weights, strict=True)  # 0: of a value that isn't there yet, early in a trajectory
    return _total(((_value(step, values, term), weight) for term, weight in weighted if weight), values[0])


def _total(weighted: Iterable[tuple[Tensor, float]], like: Tensor) -> Tensor:
    """The sum, in the dtype of `like`; zeros for nothing."""
    total: Tensor | None = None
    for value, weight in weighted:
        total = value * weight if total is None else total.add_(value, alpha=weight)
    return torch.zeros_like(like) if total is None else total.to(like.dtype)


def _value(step: _Step, values: Sequence[Tensor], term: str) -> Tensor:
    """What a term of the output rule weighs, as large as an output."""
    if term[0] == "y":
        return _wide(values[int(term[1])])
    if term != "x":
        first, second = _wide(values[int(term[1])]).chunk(2)
        difference = first - second
        return torch.cat([difference, difference])
    assert step.latent is not None
    missing = values[0].shape[1] - step.latent.shape[1]
    latent = _wide(step.latent)
    return torch.nn.functional.pad(latent, (*2 * (latent.dim() - 2) * (0,), 0, missing)) if missing else latent


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def output_regions(outputs: Outputs) -> RegionMap:
    """A model that returns such tensors, as one region."""
    cuts = []
    for number, output in enumerate(outputs):
        size = output.numel() * output.element_size()
        dtype, device = name_of(output.dtype), str(output.device)
        cuts.append(Cut(f"output_{number}", tuple(output.shape), dtype, device, size))
    return RegionMap((Region(key=OUTPUT, kind="span", layer=0, cuts=tuple(cuts), body=(), macs=1),))
