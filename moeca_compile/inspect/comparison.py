"""What `compare` returns: times, speedups and distances from the truth. Data first, text second."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PLAIN, COMPUTED, CACHED = "plain", "computed", "cached"


@dataclass(frozen=True)
class Contender:
    """One way of running the model.

    Attributes:
        name: `plain`: the model's own code in eager mode. `computed`: the compiled model, every step computed.
            `cached`: the compiled model with its schedule.
        seconds: wall-clock seconds of a run of the sampler, one for each seed.
        first_seconds: of the run before those, compiling included.
        quality: by truth (`uncached`, and the one that was asked for), by metric, one value for each sample; empty for
            the run that is the truth.
    """

    name: str
    seconds: tuple[float, ...]
    first_seconds: float
    quality: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)

    @property
    def median_seconds(self) -> float:
        """The median of `seconds`."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """Speed and quality of a cached model. It prints as a table.

    Attributes:
        model: name of the model, pipeline or bundle.
        seeds: that were sampled.
        schedule: how the schedule was made.
        contenders: in the order in which they took turns.
        mac_fraction: MACs of the cached run / MACs with every step computed.
        state_bytes: of all cached state.
        data_range: of the samples, for PSNR and SSIM.
        notes: what was left out, and why.
        samples: by contender and by truth, the samples of all seeds, [N, ...] float32.
    """

    model: str
    seeds: tuple[int, ...]
    schedule: str
    contenders: tuple[Contender, ...]
    mac_fraction: float
    state_bytes: int
    data_range: float
    notes: tuple[str, ...] = ()
    samples: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def speedup(self) -> float:
        """Median seconds of the first contender / of the cached one."""
        return self._ratio(self.contenders[0].name, CACHED)

    @property
    def graph_speedup(self) -> float | None:
        """Median seconds of `plain` / of `computed`: what preparing and compiling the graph gives without a cache.
        None: a bundle has no plain model."""
        return self._ratio(PLAIN, COMPUTED) if self.contenders[0].name == PLAIN else None

    @property
    def caching_speedup(self) -> float:
        """Median seconds of `computed` / of `cached`: what caching alone gives."""
        return self._ratio(COMPUTED, CACHED)

    @property
    def psnr_db(self) -> float:
        """Mean over the samples of the PSNR in dB between the cached samples and the uncached ones."""
        return self.mean("psnr_db")

    def mean(self, metric: str, truth: str = "uncached", contender: str = CACHED) -> float:
        """The mean of a metric over all samples.

        Args:
            metric: its name, such as `psnr_db`.
            truth: which samples they are compared with.
            contender: whose samples.

        Returns:
            The mean, in the metric's unit.
        """
        return statistics.fmean(self._named(contender).quality[truth][metric])

    def _named(self, name: str) -> Contender:
        return next(contender for contender in self.contenders if contender.name == name)

    def _ratio(self, slow: str, fast: str) -> float:
        return self._named(slow).median_seconds / max(self._named(fast).median_seconds, 1e-12)

    def to_dict(self) -> dict[str, Any]:
        """Give the figures as plain values, without the samples.

        Returns:
            The keys are the attributes, and `speedup`, `graph_speedup`, `caching_speedup`.
        """
        contenders = []
        for contender in self.contenders:
            quality = {
                truth: {name: {"mean": statistics.fmean(values), "each": list(values)} for name, values in of.items()}
                for truth, of in contender.quality.items()
            }
            contenders.append(
                {
                    "name": contender.name,
                    "median_seconds": contender.median_seconds,
                    "seconds": list(contender.seconds),
                    "first_seconds": contender.first_seconds,
                    "quality": quality,
                }
            )
        return {
            "model": self.model,
            "seeds": list(self.seeds),
            "schedule": self.schedule,
            "speedup": self.speedup,
            "graph_speedup": self.graph_speedup,
            "caching_speedup": self.caching_speedup,
            "mac_fraction": self.mac_fraction,
            "state_bytes": self.state_bytes,
            "data_range": self.data_range,
            "contenders": contenders,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Write `to_dict` as JSON.

        Returns:
            The text.
        """
        return json.dumps(self.to_dict(), indent=1)

    def save_picture(self, path: str | Path) -> Path:
        """Draw pairs of the first samples: uncached, cached, and a map of their difference.

        Args:
            path: a .png or .svg; an existing one is replaced.

        Returns:
            The path.

        Raises:
            UserError: another ending, samples that are no images or videos, or matplotlib is missing.
        """
        from moeca_compile.inspect.pairs import pairs
        from moeca_compile.inspect.plots import save

        return save(pairs(self.samples[self.contenders[0].name], self.samples[CACHED]), path)

    def __str__(self) -> str:
        truths = list(self._named(CACHED).quality)
        metrics = list(self._named(CACHED).quality[truths[0]])
        columns = [(truth, metric) for truth in truths for metric in metrics]
        head = ["", "seconds", "speedup", "MACs"]
        head += [metric if len(truths) == 1 else f"{metric} to {truth}" for truth, metric in columns]
        rows = [head]
        for contender in self.contenders:
            share = f"{self.mac_fraction:.1%}" if contender.name == CACHED else "100.0%"
            ratio = self._ratio(self.contenders[0].name, contender.name)
            cells = [contender.name, f"{contender.median_seconds:.3f}", f"{ratio:.2f}", share]
            for truth, metric in columns:
                values = contender.quality.get(truth, {}).get(metric)
                cells.append("" if values is None else f"{statistics.fmean(values):.4g}")
            rows.append(cells)
        title = f"{self.model}, schedule {self.schedule}, {len(self.seeds)} seeds"
        how = "seconds: medians of interleaved runs; speedup: the ratio of these medians"
        return "\n".join([title, *_columns(rows), how, "", *self._conclusion(), *self.notes])

    def _conclusion(self) -> list[str]:
        graph = self.graph_speedup
        parts = "" if graph is None else f" (graph {graph:.2f}, caching {self.caching_speedup:.2f})"
        each = self._named(CACHED).quality["uncached"]["psnr_db"]
        return [
            f"{self.speedup:.2f} times as fast{parts}, {self.psnr_db:.1f} dB from uncached, worst {min(each):.1f} dB"
        ]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
