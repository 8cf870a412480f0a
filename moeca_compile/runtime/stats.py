"""Statistics of the last trajectory: one record for each call, and totals. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

NO_CALL = (
    "Methods of the original model run past what torch.compile gave: use moeca_compile.compile(model), or compile "
    'the method, as in torch.compile(model.forward_with_cfg, backend="moeca")'
)

MAX_RECORDS = 4096  # of one trajectory; the oldest are dropped


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


@dataclass(frozen=True)
class Stats:
    """What `stats(model)` returns: the calls of the last trajectory, and the memory held now.

    Attributes:
        steps: one record for each call, in order.
        state_bytes: bytes of all cached state of this model.
        mac_fraction: MACs that ran / MACs of the same calls with everything computed (1.0 before the first call).
        graphs: number of graphs that a call of this model runs (1: no graph break).
        compile_seconds: seconds of capturing, rewriting and compiling, by variant name. `kernels`: seconds of waiting
            for the C++ compiler, for all variants of a `warmup` together.
        hoisted_bytes: bytes of hoisted values, which don't depend on the latent.
        uncached: where and why calls ran uncached, and the remedy: graph breaks, or a graph that isn't cached.
        warnings: how often each warning of this handle came up; each text is shown once.
    """

    steps: tuple[StepRecord, ...]
    state_bytes: int
    mac_fraction: float
    graphs: int
    compile_seconds: dict[str, float]
    hoisted_bytes: int = 0
    warnings: Mapping[str, int] = field(default_factory=dict)
    uncached: str = ""

    def __str__(self) -> str:
        ran = Counter(record.variant for record in self.steps)
        variants = ", ".join(f"{count} x {name}" for name, count in ran.items())
        cold = sum(record.cold for record in self.steps)
        none = "" if self.graphs or self.uncached else f"; no call came through this handle. {NO_CALL}"
        totals = (
            f"{len(self.steps)} calls ({variants or 'none'}, {cold} cold), "
            f"{self.mac_fraction:.1%} of the MACs, {self.state_bytes / 2**20:.2f} MiB of state, "
            f"{self.graphs} graph(s){none}"
        )
        return f"{totals}\n{self.uncached}" if self.uncached else totals
