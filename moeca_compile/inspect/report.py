"""What `explain` returns: data first, text second."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeca_compile.graph.regions import HoistedValue, Region, Rejected
from moeca_compile.inspect.html.data import page_data
from moeca_compile.inspect.html.graphs import PassGraphs
from moeca_compile.inspect.html.images import pairs_of
from moeca_compile.inspect.html.measured import Measured
from moeca_compile.inspect.html.page import write_page
from moeca_compile.inspect.routing import attending, routing
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.made_for import timesteps_line
from moeca_compile.schedule.output import OutputFacts

Rows = list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class VariantReport:
    """One program of a schedule.

    Attributes:
        name: `v0`, `v1`, ... in order of first use.
        rows: how many of the schedule's rows it serves.
        nodes: of its graph.
        macs: multiply-accumulates of one call; 1 or 0 where those of the model aren't known.
        reads: how many state tensors it takes.
        writes: how many state tensors it gives.
        weight_bytes: of all weights that it reads, parameters and buffers.
    """

    name: str
    rows: int
    nodes: int
    macs: int
    reads: int
    writes: int
    weight_bytes: int = 0


@dataclass(frozen=True)
class Report:
    """What was found in a model, and what would be built for it. It prints as a table.

    Attributes:
        graphs: how many graphs Dynamo made of the model (1: no break); the largest is described.
        nodes: in that graph, normalized.
        regions: what can be cached, in graph order.
        rejected: what looked like a region and was left alone, with the reason.
        total_macs: multiply-accumulates of one call, everything computed. 0: not known, as granularity `output`
            captures no graph; regions and variants then count the calls of the model, 1 or 0.
        fingerprint: of regions, kinds and parameter shapes, as a schedule's file records it.
        timestep: the name of the timestep input; "" if none was found.
        latent: the name of the latent input; "" if none was found.
        schedule: bound to the regions.
        state_bytes: of all cache tensors of one stream.
        passes: (name, milliseconds, nodes before, nodes after), in the order in which they ran.
        variants: the programs of the schedule.
        hoisted: values that are computed outside the variants, once for several calls.
        breaks: where and why Dynamo broke the model's graph, and what helps; parts of a broken graph aren't cached.
        model: the name of the model's class.
        calls: of the model's last trajectory, if it ran this schedule: the attributes of each `StepRecord`, and `row`,
            the number of the row that ran, in order of first use; None where that isn't known.
        hoisted_weight_bytes: of the parameters and buffers that no variant reads, only the programs of hoisted values.
        pass_graphs: the graphs before and after each pass that has some; only where `html` was asked for.
        output_weights: what the schedule's output weights were fitted to, where, and what they weigh; None: none.
    """

    graphs: int
    nodes: int
    regions: tuple[Region, ...]
    rejected: tuple[Rejected, ...]
    total_macs: int
    fingerprint: str
    timestep: str
    latent: str
    schedule: Schedule
    state_bytes: int
    passes: tuple[tuple[str, float, int, int], ...]
    variants: tuple[VariantReport, ...]
    hoisted: tuple[HoistedValue, ...] = ()
    breaks: str = ""
    model: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()
    hoisted_weight_bytes: int = 0
    pass_graphs: tuple[PassGraphs, ...] = ()
    output_weights: OutputFacts | None = None

    @classmethod
    def of_parts(cls, parts: int, breaks: str) -> Report:
        """Of a model whose graph breaks: it runs in parts, and nothing is cached."""
        full = Schedule.full()
        return cls(parts, 0, (), (), 0, "", "", "", full, 0, (), (), breaks=breaks)

    @property
    def misses(self) -> tuple[Rejected, ...]:
        """The earlier name of `rejected`."""
        return self.rejected

    @property
    def full_macs(self) -> int:
        """What shares of the MACs are shares of; 1 where those of a call aren't known."""
        return self.total_macs or max((variant.macs for variant in self.variants), default=0)

    def to_json(self) -> str:
        """Write the whole report as JSON.

        Returns:
            The text; its keys are the attributes.
        """
        data = asdict(self)
        data["schedule"] = json.loads(self.schedule.to_json())
        return json.dumps(data, indent=1)

    def to_html(
        self,
        path: str | Path,
        *,
        uncached: Sequence[Any] = (),
        cached: Sequence[Any] = (),
        measured: Measured | None = None,
        others: Sequence[Schedule] = (),
        steps: int | None = None,
    ) -> Path:
        """Write the report as one HTML page that needs no network and no other file.

        Args:
            path: the file to write; an existing one is replaced.
            uncached: images of PIL or paths of image files, sampled with every step computed.
            cached: images of the same prompts and seeds, sampled with the schedule.
            measured: what the calibration of the schedule measured (`moeca_compile.measurements`), for the plots.
            others: schedules of the same model, such as those for other budgets, for the front.
            steps: how many steps to show; default: those of the last trajectory, else those of the schedule; 50 of one
                that repeats.

        Returns:
            The path.

        Raises:
            UserError: the file can't be written; or images that aren't pairs, or no images.
        """
        pairs = pairs_of(uncached, cached)
        return write_page(path, page_data(self, pairs=pairs, measured=measured, others=others, steps=steps), str(self))

    def __str__(self) -> str:
        if self.breaks and not self.nodes:
            return self.breaks
        parts = (self._breaks, self._head, self._regions, self._rejected, self._hoisted, self._variants, self._passes)
        return "\n\n".join("\n".join(section) for part in parts if (section := part()))

    def _breaks(self) -> list[str]:
        return [self.breaks] if self.breaks else []

    def _head(self) -> list[str]:
        unknown = self.full_macs and not self.total_macs
        cost = "MACs unknown (the model is called as it is)" if unknown else f"{self.total_macs / 1e9:.3f} GMACs a call"
        return [
            f"{self.graphs} graph(s), {self.nodes} nodes, {cost}, fingerprint {self.fingerprint}",
            f"timestep input: {self.timestep or 'not found'}, latent input: {self.latent or 'not found'}",
        ]

    def _regions(self) -> list[str]:
        rows: Rows = [("region", "kind", "layer", "shape", "MACs", "bytes", "how")]
        for r in self.regions:
            shapes = " ".join("x".join(map(str, shape)) for shape in r.shapes)
            share = r.macs / self.full_macs if self.full_macs else 0.0
            how = attending(r) or routing(r)
            rows.append((r.key, r.kind, str(r.layer), shapes, f"{share:.1%}", str(r.state_bytes), how))
        return _columns(rows)

    def _rejected(self) -> list[str]:
        return [f"left alone: {miss}" for miss in self.rejected]

    def _hoisted(self) -> list[str]:
        says = {"step": "computed once a timestep", "invariant": "computed once a trajectory"}
        sizes = {level: [value.bytes for value in self.hoisted if value.level == level] for level in says}
        lines = [f"{says[level]}: {len(of)} values, {sum(of)} bytes" for level, of in sizes.items() if of]
        if lines and self.hoisted_weight_bytes:
            lines[-1] += f"; no step reads their {self.hoisted_weight_bytes} bytes of weights"
        return lines

    def _variants(self) -> list[str]:
        rows: Rows = [("variant", "rows", "nodes", "MACs", "reads", "writes")]
        for v in self.variants:
            share = v.macs / self.full_macs if self.full_macs else 0.0
            rows.append((v.name, str(v.rows), str(v.nodes), f"{share:.1%}", str(v.reads), str(v.writes)))
        lines = [f"schedule {self.schedule.made_by}, {self.state_bytes} bytes of state a stream"]
        if line := timesteps_line(self.schedule.timesteps, self.schedule.searched_timesteps):
            lines.append(line)
        if self.output_weights is not None:
            lines.append(str(self.output_weights))
        return [*lines, *_columns(rows)]

    def _passes(self) -> list[str]:
        milliseconds = sum(ms for _, ms, _, _ in self.passes)
        changed = sum(before != after for _, _, before, after in self.passes)
        return [
            f"{len(self.passes)} passes, {milliseconds:.0f} ms, {changed} changed the number of nodes; the attribute "
            "passes and the page (html=) list them"
        ]


def _columns(rows: Rows) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
