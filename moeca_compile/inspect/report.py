"""What `explain` returns: data first, text second."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from moeca_compile.graph.regions import HoistedValue, Region, Rejected
from moeca_compile.schedule import Schedule

Rows = list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class VariantReport:
    """One program of a schedule.

    Attributes:
        name: `v0`, `v1`, ... in order of first use.
        rows: how many of the schedule's rows it serves.
        nodes: of its graph.
        macs: multiply-accumulates of one call.
        reads: how many state tensors it takes.
        writes: how many state tensors it gives.
    """

    name: str
    rows: int
    nodes: int
    macs: int
    reads: int
    writes: int


@dataclass(frozen=True)
class Report:
    """What was found in a model, and what would be built for it. It prints as a table.

    Attributes:
        graphs: how many graphs Dynamo made of the model (1: no break); the largest is described.
        nodes: in that graph, normalized.
        regions: what can be cached, in graph order.
        rejected: what looked like a region and was left alone, with the reason.
        total_macs: multiply-accumulates of one call, everything computed.
        fingerprint: of regions, kinds and parameter shapes, as a schedule's file records it.
        timestep: the name of the timestep input; "" if none was found.
        latent: the name of the latent input; "" if none was found.
        schedule: bound to the regions.
        state_bytes: of all cache tensors of one stream.
        passes: (name, milliseconds, nodes before, nodes after), in the order in which they ran.
        variants: the programs of the schedule.
        hoisted: values that are computed outside the variants, once for several calls.
        breaks: where and why Dynamo broke the model's graph, and what helps; parts of a broken graph aren't cached.
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

    @classmethod
    def of_parts(cls, parts: int, breaks: str) -> Report:
        """Of a model whose graph breaks: it runs in parts, and nothing is cached."""
        full = Schedule.full()
        return cls(parts, 0, (), (), 0, "", "", "", full, 0, (), (), breaks=breaks)

    @property
    def misses(self) -> tuple[Rejected, ...]:
        """The earlier name of `rejected`."""
        return self.rejected

    def to_json(self) -> str:
        """Write the whole report as JSON.

        Returns:
            The text; its keys are the attributes.
        """
        data = asdict(self)
        data["schedule"] = json.loads(self.schedule.to_json())
        return json.dumps(data, indent=1)

    def __str__(self) -> str:
        if self.breaks and not self.nodes:
            return self.breaks
        parts = (self._breaks, self._head, self._regions, self._rejected, self._hoisted, self._variants, self._passes)
        return "\n\n".join("\n".join(section) for part in parts if (section := part()))

    def _breaks(self) -> list[str]:
        return [self.breaks] if self.breaks else []

    def _head(self) -> list[str]:
        return [
            f"{self.graphs} graph(s), {self.nodes} nodes, {self.total_macs / 1e9:.3f} GMACs a call, "
            f"fingerprint {self.fingerprint}",
            f"timestep input: {self.timestep or 'not found'}, latent input: {self.latent or 'not found'}",
        ]

    def _regions(self) -> list[str]:
        rows: Rows = [("region", "kind", "layer", "shape", "MACs", "bytes", "how")]
        for r in self.regions:
            shapes = " ".join("x".join(map(str, shape)) for shape in r.shapes)
            share = r.macs / self.total_macs if self.total_macs else 0.0
            how = _attending(r) or _routing(r)
            rows.append((r.key, r.kind, str(r.layer), shapes, f"{share:.1%}", str(r.state_bytes), how))
        return _columns(rows)

    def _rejected(self) -> list[str]:
        return [f"left alone: {miss}" for miss in self.rejected]

    def _hoisted(self) -> list[str]:
        says = {"step": "computed once a timestep", "invariant": "computed once a trajectory"}
        sizes = {level: [value.bytes for value in self.hoisted if value.level == level] for level in says}
        return [f"{says[level]}: {len(of)} values, {sum(of)} bytes" for level, of in sizes.items() if of]

    def _variants(self) -> list[str]:
        rows: Rows = [("variant", "rows", "nodes", "MACs", "reads", "writes")]
        for v in self.variants:
            share = v.macs / self.total_macs if self.total_macs else 0.0
            rows.append((v.name, str(v.rows), str(v.nodes), f"{share:.1%}", str(v.reads), str(v.writes)))
        return [f"schedule {self.schedule.made_by}, {self.state_bytes} bytes of state a stream", *_columns(rows)]

    def _passes(self) -> list[str]:
        rows: Rows = [("pass", "ms", "nodes", "after")]
        rows += [(name, f"{ms:.1f}", str(before), str(after)) for name, ms, before, after in self.passes]
        return _columns(rows)


def _attending(region: Region) -> str:
    """What a region's attention attends to; `fixed keys` depend on the prompt alone."""
    if region.kind != "attention":
        return ""
    return "; ".join(attention.kind + (", fixed keys" if attention.invariant else "") for attention in region.attention)


def _routing(region: Region) -> str:
    """How a region's experts are chosen, and whether its branches can be told apart."""
    if region.kind == "span":
        return ""
    routers = {experts.router for experts in region.experts}
    texts = []
    for router in region.routers:
        k, n = router.top_k, router.num_experts
        says = {
            "token": f"{k} of {n} experts a token",
            "expert": f"{k} tokens a sample for each of {n} experts",
            "step": f"{k} of {n} experts, the same at a step whatever the latent",
            "batch": f"{n} experts choose over the whole batch: samples depend on their neighbours",
            "head": f"{k} of {n} heads",
        }[router.choice]
        texts.append(says if router in routers else f"{says}, cached as a whole")
    return "; ".join(texts)


def _columns(rows: Rows) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
