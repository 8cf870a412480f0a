"""What is exported where the model's output is cached: one graph of the whole model, and who runs the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moeca_compile.engine.output_program import OutputCall, OutputProgram, output_regions
from moeca_compile.errors import CaptureError, LoweringError
from moeca_compile.exporting import request
from moeca_compile.exporting.request import Captured
from moeca_compile.frontend.arguments import Arguments
from moeca_compile.frontend.output_path import latent_of, timestep_of
from moeca_compile.options import Options
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Schedule


def capture_output(model: torch.nn.Module, arguments: Arguments, options: Options) -> Captured:
    """Capture a prepared model whose output is cached. Its `program` calls the model as it is.

    Raises:
        CaptureError: it isn't one graph.
        LoweringError: as `request.capture`; or the schedule needs a timestep or a latent that wasn't found.
        ScheduleError: the schedule isn't for a model's output.
    """
    try:
        whole = replace(options, granularity="region", schedule=Schedule.full(), order=None)
        captured = request.capture(model, arguments, whole)
    except CaptureError as error:
        raise CaptureError(
            f"{error}. compile(model, granularity='output') needs no graph; a bundle runs the model as one graph"
        ) from error
    schedule = options.resolved_schedule()
    call = _call(captured, model, schedule)
    return replace(captured, program=OutputProgram(call, captured.args, options, schedule, Warned()))


def _call(captured: Captured, model: torch.nn.Module, schedule: Schedule) -> OutputCall:
    """The call of the model, with the latent and the timestep that `compile` finds for such a call."""
    outputs = tuple(request.call_with(model, captured, captured.args))
    positions = {entry.name: position for position, entry in enumerate(captured.inputs)}
    given = [positions[name] for name in sorted(captured.places, key=captured.places.__getitem__)]
    names = [captured.called.get(captured.inputs[position].name, "") for position in given]
    place = latent_of([captured.args[position] for position in given], names, outputs[0])
    latent = None if place is None else given[place]
    place = timestep_of(names)
    timestep = captured.network.timestep if place is None else given[place]
    _refuse_missing(captured, schedule, timestep, latent)
    condition = tuple(position for position in given if position not in (latent, timestep))

    def run(args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        return tuple(request.call_with(model, captured, args))

    return OutputCall(run, output_regions(outputs), timestep, latent, condition)


def _refuse_missing(captured: Captured, schedule: Schedule, timestep: int | None, latent: int | None) -> None:
    rule = schedule.output
    if schedule.timesteps and timestep is None:
        raise LoweringError(
            "the schedule finds its rows by timestep, but no input of the model was found to be one: pass the timestep "
            "as a tensor, not as a number, or export a schedule without timesteps"
        )
    if rule is not None and "x" in rule.terms and latent is None:
        raise LoweringError(
            "the schedule's output weights are for the latent too, but no input has the output's sizes: calibrate for "
            "this model, or export a schedule without weights"
        )
    if rule is not None and captured.results[0][1] != min(place for _, place in captured.results):
        raise LoweringError(
            "the schedule's output weights are for the model's first output, but its graph gives the outputs in "
            "another order: wrap the model so that it returns one tensor"
        )
