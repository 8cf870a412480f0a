"""Which row a call gets: the schedule's, unless the cache is cold. Torch and the bundle's session share this rule."""

from __future__ import annotations

from typing import NamedTuple

from moeca_compile.runtime.state import StreamState
from moeca_compile.schedule import Row, Schedule


class Choice(NamedTuple):
    """`cold`: a full row against the schedule. `warning`: what the caller should know, once; "" is nothing."""

    row: Row
    cold: bool = False
    warning: str = ""


def choose_row(schedule: Schedule, step: int, timestep: float | None, state: StreamState) -> Choice:
    """The row of `step`. `timestep` None: it wasn't read, and the row goes by counting. An adaptive schedule's row is
    chosen by what the stream's last step showed. Past the end of a schedule that ends, all is computed."""
    full = schedule.rows[0]
    if schedule.adaptive is not None:
        row = schedule.rows[state.pace.choose(schedule.adaptive, step, state.figure())]
        cold = row != full and not state.can_run(row, step)
        return Choice(full if cold else row, cold)
    if schedule.timesteps and timestep is not None:
        return _by_timestep(schedule, step, timestep, state)
    state.coming = None
    index = schedule.row_index(step)
    if index is None:
        return Choice(full, warning=_past_end(schedule, step))
    row = schedule.rows[index]
    if row != full and not state.can_run(row, step):
        return Choice(full, cold=True)
    return Choice(row)


def warning_of_counted(schedule: Schedule, step: int, timestep: float | None) -> str:
    """What to know of a step whose row was found by counting alone, by a graph that can do nothing else."""
    if schedule.row_index(step) is None:
        return _past_end(schedule, step)
    if not schedule.timesteps or timestep is None or schedule.timeline.is_at(step, timestep):
        return ""
    return (
        f"step {step} is at timestep {timestep:g}, but row {step} of the schedule was made for "
        f"{schedule.timesteps[step]:g}. The fused graph counts steps and doesn't look at timesteps, so the quality "
        "isn't known. Use the bundle's variants (Session), or calibrate and export a schedule for this sampler"
    )


def _by_timestep(schedule: Schedule, step: int, timestep: float, state: StreamState) -> Choice:
    full, timeline, before = schedule.rows[0], schedule.timeline, state.place
    if before is None or state.last_step != step - 1:
        here = state.coming = timeline.begin(timestep)
        unknown = here.off or (step == 0 and here.row > 0)
        warning = _not_calibrated_for(schedule, step, timestep, here.row) if unknown else ""
        return Choice(full, schedule.rows[here.row] != full, warning)
    row, here = timeline.go_on(before, timestep)
    state.coming = here
    strays = here.off and not before.off
    return Choice(row, warning=_not_calibrated_for(schedule, step, timestep, before.row + 1) if strays else "")


def _past_end(schedule: Schedule, step: int) -> str:
    return (
        f"step {step} is past the schedule's last row ({len(schedule.rows)} rows): computed in full. Make the schedule "
        "for this number of steps, or use an open-ended one (uniform)"
    )


def _not_calibrated_for(schedule: Schedule, step: int, timestep: float, row: int) -> str:
    """`row`: the one that the schedule's own sampler would be at."""
    times = schedule.timesteps
    there = f"has {times[row]:g} there" if step and row < len(times) else f"goes from {times[0]:g} to {times[-1]:g}"
    return (
        f"step {step} is at timestep {timestep:g}, but the schedule {there}: it was made for another sampler or number "
        f"of steps ({len(times)}). What its rows compute is made up where a call passes them, so the share of computed "
        "work isn't the planned one, and the quality isn't known. Make a schedule for this sampler "
        "(moeca_compile.calibrate), or use a uniform one"
    )
