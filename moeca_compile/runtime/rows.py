"""Which row a call gets: the schedule's, unless the cache is cold. Torch and the bundle's session share this rule."""

from __future__ import annotations

from typing import NamedTuple

from moeca_compile.runtime.state import StreamState
from moeca_compile.schedule import Row, Schedule


class Choice(NamedTuple):
    """`cold`: a full row against the schedule. `past_end`: no row is left. `far`: the row's timestep, if it is far."""

    row: Row
    cold: bool = False
    past_end: bool = False
    far: float | None = None


def choose_row(schedule: Schedule, step: int, timestep: float | None, state: StreamState) -> Choice:
    """The row of `step`. `timestep` None: it wasn't read, and the row goes by counting. An adaptive schedule's row is
    chosen by what the stream's last step showed."""
    full = schedule.rows[0]
    if schedule.adaptive is not None:
        row = schedule.rows[state.pace.choose(schedule.adaptive, step, state.figure())]
        cold = row != full and not state.can_run(row, step)
        return Choice(full if cold else row, cold)
    index = schedule.row_index(step, timestep)
    if index is None:
        return Choice(full, past_end=True)
    far = schedule.timesteps[index] if timestep is not None and schedule.is_far(index, timestep) else None
    row = schedule.rows[index]
    if row != full and not state.can_run(row, step):
        return Choice(full, cold=True, far=far)
    return Choice(row, far=far)
