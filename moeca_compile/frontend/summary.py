"""Logs the summary of a handle's first call: what is cached, at what share of the MACs, and what to type next."""

from __future__ import annotations

from collections.abc import Sequence

from moeca_compile.engine.output_program import OutputProgram
from moeca_compile.engine.program import Program
from moeca_compile.frontend.handles import HandleState
from moeca_compile.graph import fx
from moeca_compile.inspect.progress import is_hidden, tell
from moeca_compile.inspect.report import Report, VariantReport
from moeca_compile.inspect.summary import summary
from moeca_compile.schedule.output import OutputFacts


def announce(program: Program, state: HandleState, models: Sequence[object]) -> None:
    """Log the summary of a new program at INFO, once for each set of regions and schedule of a handle.

    As long as nobody set up logging or this logger's level, the summary goes to stderr; otherwise the logging decides.

    Args:
        program: whose first call this is.
        state: of the handle.
        models: that the handle runs.
    """
    program.is_announced = True
    if is_hidden():
        return
    subject = program.regions.keys, program.schedule.made_by
    if subject in state.announced:
        return
    state.announced.add(subject)
    names = " and ".join(type(model).__name__ for model in models)
    tell(summary(report_of([program]), names or "the compiled function"))


def report_of(programs: Sequence[Program]) -> Report:
    """The report of the program with the most regions."""
    main = max(programs, key=lambda program: len(program.regions))
    variants = [main.variant(row) for row in main.schedule.distinct_rows()]
    row_counts = {row: main.schedule.rows.count(row) for row in main.schedule.distinct_rows()}
    hoisted = sorted({position for variant in variants for position in variant.hoists})
    weight_bytes = _weight_bytes(main)
    of_variants = [sum(weight_bytes.get(position, 0) for position in variant.takes) for variant in variants]
    taken = {position for variant in variants for position in variant.takes}
    return Report(
        graphs=len(programs),
        nodes=main.nodes,
        regions=main.regions.regions,
        rejected=main.regions.rejected,
        total_macs=main.regions.total_macs,
        fingerprint=main.regions.fingerprint,
        timestep=main.roles[0],
        latent=main.roles[1],
        schedule=main.schedule,
        state_bytes=sum(slot.bytes for slot in main.layout),
        passes=tuple((r.name, r.ms, r.nodes_before, r.nodes_after) for r in main.compiler.records),
        variants=tuple(
            VariantReport(v.name, row_counts[v.row], v.node_count, v.macs, len(v.reads), len(v.writes), size)
            for v, size in zip(variants, of_variants, strict=True)
        ),
        hoisted=tuple(main.prologues.hoisted[position] for position in hoisted),
        hoisted_weight_bytes=sum(size for position, size in weight_bytes.items() if position not in taken),
        output_weights=OutputFacts.of(main.schedule.output, main.schedule.rows),
    )


def _weight_bytes(program: Program) -> dict[int, int]:
    """Bytes of each weight that the graph uses, by its position among the inputs; none where nothing was captured."""
    if isinstance(program, OutputProgram):
        return {}
    inputs = zip(fx.placeholders(program.analysis.gm), program.analysis.facts.inputs, strict=True)
    used = [(i, fx.need(node)) for i, (node, entry) in enumerate(inputs) if entry.is_weight and node.users]
    return {i: tensor.numel() * tensor.element_size() for i, tensor in used}
