"""What ran: one record a call of the last trajectory. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

PAST = (
    "Methods of the original model run past what torch.compile gave: use moeca_compile.compile(model), or compile "
    'the method, as in torch.compile(model.forward_with_cfg, backend="moeca")'
)

MAX_RECORDS = 4096  # of one trajectory; older ones go


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One call of the model.

    Attributes:
        step: its number in the trajectory, from 0.
        stream: its guidance stream, by name or by number from "0"; "None" for a call that couldn't be placed. In
            sessions "" where none was named.
        variant: the program that ran.
        ms: milliseconds on the host of the variant and of looking up hoisted values, without compiling.
        overhead_ms: milliseconds of the call outside the variant, without compiling.
        macs: multiply-accumulates that ran.
        cold: whether state was missing, so that everything was computed.
        dropped: expert branches without a row, where experts have a capacity.
        full_macs: multiply-accumulates of the same call, everything computed; 0 where that isn't known.
        timestep: as the model received it; None where it wasn't read.
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
    """`stats(model)`: the last trajectory's calls, and what is held now.

    Attributes:
        steps: one record a call, in order.
        state_bytes: of all cache tensors held for this model.
        mac_fraction: MACs executed / MACs of the same calls all computed (1.0 before the first call).
        graphs: how many graphs make up a call of this model (1: no graph break).
        compile_seconds: spent in capturing, rewriting and compiling, by variant name; `kernels`: in waiting for the
            C++ compiler, for all variants of a `warmup` together.
        hoisted_bytes: of values that are kept because they don't depend on the latent.
        uncached: where and why calls ran uncached, and what helps: graph breaks, or a whole graph that isn't cached.
        warnings: what this handle warned of, each text shown once, and how often it came up.
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
        cold = sum(record.cold for record in self.steps)
        none = "" if self.graphs or self.uncached else f"; no call came through this handle. {PAST}"
        totals = (
            f"{len(self.steps)} calls ({', '.join(f'{n} x {v}' for v, n in ran.items()) or 'none'}, {cold} cold), "
            f"{self.mac_fraction:.1%} of the MACs, {self.state_bytes / 2**20:.2f} MiB of state, "
            f"{self.graphs} graph(s){none}"
        )
        return f"{totals}\n{self.uncached}" if self.uncached else totals
