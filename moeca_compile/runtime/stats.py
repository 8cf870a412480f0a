"""Statistics of trajectories: one record for each call, and totals. No torch here."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from moeca_compile.schedule.made_for import timesteps_line
from moeca_compile.schedule.output import OutputFacts

NO_CALL = (
    "Methods of the original model, and the models of a pipeline, run past what torch.compile gave: use "
    "moeca_compile.compile(model or pipeline), or compile the method, as in torch.compile(model.forward_with_cfg, "
    'backend="moeca")'
)

MAX_RECORDS = 4096  # of one trajectory; the oldest are dropped
MAX_TRAJECTORIES = 256  # of one handle since its last reset; the oldest are dropped


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One call of the model.

    Attributes:
        step: its number in the trajectory, from 0.
        stream: its guidance stream, by name or by number from "0". "None": the call fits no stream. In a session "":
            the stream has no name.
        variant: the program that ran.
        ms: host milliseconds of the variant and of the hoisted values, without compiling.
        overhead_ms: host milliseconds of the rest of the call, without compiling.
        macs: multiply-accumulates that ran.
        cold: state was missing, so that everything was computed.
        dropped: expert branches past the experts' capacity, which were left out.
        full_macs: multiply-accumulates of the same call with everything computed; 0: not known.
        timestep: as the model received it; None: it wasn't read.
    """

    step: int
    stream: str
    variant: str
    ms: float
    overhead_ms: float
    macs: int
    cold: bool
    dropped: int = 0
    full_macs: int = 0
    timestep: float | None = None

    @property
    def total_ms(self) -> float:
        """Host milliseconds of the call, without compiling."""
        return self.ms + self.overhead_ms

    @property
    def is_computed(self) -> bool:
        """Whether everything was computed."""
        return self.macs >= self.full_macs > 0


@dataclass(frozen=True)
class Stats:
    """What `stats(model)` returns: the calls since the last reset, and the memory held now. It prints as a table.

    Attributes:
        steps: one record for each call of the last trajectory, in order.
        state_bytes: bytes of all cached state of this model.
        mac_fraction: MACs that ran / MACs of the same calls with everything computed, in the last trajectory (1.0
            before the first call).
        graphs: number of graphs that a call of this model runs (1: no graph break).
        compile_seconds: seconds of capturing, rewriting and compiling, by variant name. `kernels`: seconds of waiting
            for the C++ compiler, for all variants of a `warmup` together.
        hoisted_bytes: bytes of hoisted values, which don't depend on the latent.
        freed_bytes: bytes that `free_hoisted` has freed on the device: those of the weights that only prologues read,
            less those of the largest, in whose memory stand-ins lie.
        uncached: where and why calls ran uncached, and the remedy: graph breaks, or a graph that isn't cached.
        unshared: by variant, why its last further size (image, prompt, batch) was compiled for itself.
        warnings: how often each warning of this handle came up; each text is shown once.
        trajectories: the records of each trajectory since the last `reset`, in order; the last is `steps`. At most 256
            are kept for a handle.
        on_host: the model runs where the host does, so that host milliseconds are those of the work. False: it runs on
            an accelerator, which works on after the host has gone on.
        timesteps: that the schedule was made for, one a row, as the model receives them; empty: any.
        searched_timesteps: they were searched, so they aren't the sampler's own: pass it `timesteps`.
        output_weights: what the schedule's output weights were fitted to, where, and what they weigh; None: none.
    """

    steps: tuple[StepRecord, ...]
    state_bytes: int
    mac_fraction: float
    graphs: int
    compile_seconds: dict[str, float]
    hoisted_bytes: int = 0
    freed_bytes: int = 0
    warnings: Mapping[str, int] = field(default_factory=dict)
    uncached: str = ""
    unshared: Mapping[str, str] = field(default_factory=dict)
    trajectories: tuple[tuple[StepRecord, ...], ...] = ()
    on_host: bool = True
    timesteps: tuple[float, ...] = ()
    searched_timesteps: bool = False
    output_weights: OutputFacts | None = None

    @property
    def speedup(self) -> float | None:
        """Time of the last trajectory's calls if each took as long as a computed step, over the time they took.

        A computed step counts with its median over this trajectory and those before it since the last reset, so that
        the figure of a trajectory stays as it is. None: there was no computed step to compare with, or the milliseconds
        are the host's alone.
        """
        return self._speedup(self.steps, self.trajectories or (self.steps,))

    def __str__(self) -> str:
        ran = Counter(record.variant for record in self.steps)
        variants = ", ".join(f"{count} x {name}" for name, count in ran.items())
        cold = sum(record.cold for record in self.steps)
        none = "" if self.graphs or self.uncached else f"; no call came through this handle. {NO_CALL}"
        lines = [
            f"{len(self.steps)} calls ({variants or 'none'}, {cold} cold), "
            f"{self.mac_fraction:.1%} of the MACs, {self.state_bytes / 2**20:.2f} MiB of state, "
            f"{self.graphs} graph(s){none}"
        ]
        if self.freed_bytes:
            lines[0] += f"; {self.freed_bytes / 2**20:.2f} MiB of weights freed"
        if line := timesteps_line(self.timesteps, self.searched_timesteps):
            lines.append(line)
        if self.output_weights is not None:
            lines.append(str(self.output_weights))
        if self.uncached:
            lines.append(self.uncached)
        lines += [f"{name} is compiled for each size: {reason}" for name, reason in self.unshared.items()]
        if self.steps:
            lines += [self._time(self.steps, self.trajectories or (self.steps,)), "", *_table(self.steps)]
        if len(self.trajectories) > 1:
            calls = sum(map(len, self.trajectories))
            lines += ["", f"{len(self.trajectories)} trajectories since the last reset, {calls} calls:"]
            for number, records in enumerate(self.trajectories):
                so_far = self.trajectories[: number + 1]
                lines.append(f"{number:>3}: {len(records)} calls, {self._time(records, so_far)}")
        return "\n".join(lines)

    def _time(self, records: Sequence[StepRecord], so_far: Sequence[Sequence[StepRecord]]) -> str:
        milliseconds = f"{sum(record.total_ms for record in records):.1f} ms"
        if not self.on_host:
            return f"{milliseconds} on the host, which doesn't wait for the device; moeca_compile.compare times both"
        speedup = self._speedup(records, so_far)
        return milliseconds if speedup is None else f"{milliseconds}, {speedup:.2f} times as fast as computed steps"

    def _speedup(self, records: Sequence[StepRecord], so_far: Sequence[Sequence[StepRecord]]) -> float | None:
        """Of one trajectory, which is the last of those so far."""
        spent = sum(record.total_ms for record in records)
        computed = _computed_ms(record for trajectory in so_far for record in trajectory)
        if not (self.on_host and spent) or any(record.full_macs not in computed for record in records):
            return None
        return sum(computed[record.full_macs] for record in records) / spent


def _computed_ms(records: Iterable[StepRecord]) -> dict[int, float]:
    """Median milliseconds of a computed step, by its MACs: batches and sizes differ in them."""
    times: dict[int, list[float]] = defaultdict(list)
    for record in records:
        if record.is_computed:
            times[record.full_macs].append(record.total_ms)
    return {macs: statistics.median(values) for macs, values in times.items()}


def _table(records: Sequence[StepRecord]) -> list[str]:
    """A line for each call. The column `stream` is left out where all calls are of one."""
    names = ["step", "timestep", "stream", "variant", "ms", "overhead"]
    rows = [names]
    for record in records:
        timestep = "" if record.timestep is None else f"{record.timestep:g}"
        variant = f"{record.variant} cold" if record.cold else record.variant
        times = f"{record.ms:.2f}", f"{record.overhead_ms:.2f}"
        rows.append([str(record.step), timestep, record.stream, variant, *times])
    columns = [0, 1, 2, 3, 4, 5] if len({record.stream for record in records}) > 1 else [0, 1, 3, 4, 5]
    widths = [max(len(row[column]) for row in rows) for column in columns]
    lines = []
    for row in rows:
        cells = [row[column].rjust(width) for column, width in zip(columns, widths, strict=True)]
        lines.append("  ".join(cells))
    return lines
