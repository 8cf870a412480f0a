"""What the logs tell of a captured graph: `TORCH_LOGS="+moeca_compile"`, and TORCH_TRACE.

`tlparse` shows the artifacts of TORCH_TRACE beside the compile that they are of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext

from torch._guards import CompileContext, CompileId, compile_context
from torch._logging._internal import trace_structured

from moeca_compile.graph.regions import RegionMap
from moeca_compile.schedule import Schedule

log = logging.getLogger(__name__)


def current_compile() -> CompileId | None:
    """The compile of Dynamo's that is running in this thread."""
    return CompileContext.current_compile_id()


def artifact(name: str, text: Callable[[], str], compile_id: CompileId | None) -> None:
    """Add a text to the structured log. It is made only if somebody listens.

    Args:
        name: of the text; tlparse lists it as a file.
        text: makes it.
        compile_id: the compile under which tlparse shows it; None: beside all of them.
    """
    known = nullcontext() if compile_id is None else compile_context(CompileContext(compile_id))
    with known:
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": name, "encoding": "string"},
            payload_fn=text,
            expect_trace_id=False,
        )


def log_capture(
    regions: RegionMap, roles: tuple[str, str], schedule: Schedule, graph: Callable[[], str],
    compile_id: CompileId | None,
) -> None:  # fmt: skip
    """Log a captured graph: INFO in one line, DEBUG with each region and each rejected candidate.

    Args:
        regions: of the graph.
        roles: names of the timestep and of the latent; "" where none was found.
        schedule: fitted to the graph.
        graph: makes its text.
        compile_id: the compile that the graph came from.
    """
    timestep, latent = (name or "not found" for name in roles)
    log.info(
        "captured a graph: %d regions, %d rejected candidates, timestep %s, latent %s, schedule %s",
        len(regions), len(regions.rejected), timestep, latent, schedule.made_by,
    )  # fmt: skip
    if log.isEnabledFor(logging.DEBUG):
        for line in _lines(regions):
            log.debug("%s", line)
    artifact("moeca_regions", lambda: "\n".join(_lines(regions)), compile_id)
    artifact("moeca_schedule", lambda: str(schedule), compile_id)
    artifact("moeca_graph", graph, compile_id)


def _lines(regions: RegionMap) -> list[str]:
    """A line for each region, and for each rejected candidate with its reason."""
    total = regions.total_macs or 1
    lines = [f"region {region.key}: {region.kind}, {region.macs / total:.1%} of the MACs" for region in regions]
    return lines + [f"rejected {candidate}" for candidate in regions.rejected]
