"""What must hold between a manifest's entries, and between a manifest and its schedule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle.manifest import (  # fmt: skip
    COEFFICIENTS,
    DROPPED,
    FUSED,
    MANIFEST,
    NOW,
    PARAMETERS,
    SCHEDULE,
    STEP,
    EngineSpec,
    FusedSpec,
    Manifest,
    VariantSpec,
    golden_file,
)
from moeca_compile.runtime.bundle.output_misfit import output_misfit
from moeca_compile.runtime.bundle.prologue_misfit import prologue_misfit
from moeca_compile.runtime.bundle.state_misfit import readable, state_misfit, written
from moeca_compile.schedule import Action, Row, Schedule
from moeca_compile.schedule.action import format_row, legend_of


def check_consistency(manifest: Manifest, schedule: Schedule) -> None:
    """Check that the tables of a manifest and the schedule agree.

    Raises:
        BundleError: they don't.
    """
    sizes = [manifest, *manifest.further_sizes()]
    for size in sizes:
        _check_tables(size, schedule)
        _demand(_names(size) == _names(manifest), "a further size has other names or dtypes")
    shapes = {tuple(spec.shape for spec in size.inputs) for size in sizes}
    _demand(len(shapes) == len(sizes), "two sizes are the same")
    _distinct(manifest.targets, "target")
    _demand(manifest.batch is None or manifest.batch[0] <= manifest.batch[1], "the range of batches is none")
    _check_engines(manifest)
    _demand(len(sizes) == 1 or not manifest.engines, "engines are of one size, and there are several")
    if manifest.fused is not None:
        steps = None if schedule.period else len(schedule.rows)
        is_counted = schedule.adaptive is None and manifest.fused == FusedSpec(FUSED, steps)
        _demand(is_counted, "the fused graph is of another schedule")
        _demand(len(sizes) == 1, "a fused graph is of one size, and there are several")
    _check_files(manifest, sizes)


def _check_files(manifest: Manifest, sizes: Sequence[Manifest]) -> None:
    files = [SCHEDULE, *manifest.weight_files, *(engine.file for engine in manifest.engines)]
    for i, size in enumerate(sizes):
        files += [golden_file(i), *(spec.file for spec in size.variants), *(spec.file for spec in size.prologues)]
    if manifest.fused is not None:
        files.append(FUSED)
    if PARAMETERS in manifest.files:  # bundles of older versions have none
        files.append(PARAMETERS)
    differing = set(manifest.files) ^ set(files)
    _demand(not differing, f"files: {sorted(differing)} are missing or too many")
    _demand(len(set(files)) == len(files), "two variants have the same file")


def _check_tables(manifest: Manifest, schedule: Schedule) -> None:
    _demand(schedule.regions == manifest.model.regions, "the schedule is for other regions")
    _demand(schedule.fingerprint == manifest.model.fingerprint, "the schedule is of another graph")
    _distinct(manifest.model.regions, "region")
    legend = legend_of(schedule.rows)
    rows = [format_row(row, legend) for row in schedule.rows]
    variant_rows = [variant.row for variant in manifest.variants]
    with_graph = {row for row in rows if not manifest.caches_output or row == Action.COMPUTE.value}
    _demand(len(set(variant_rows)) == len(variant_rows), "two variants have the same row")
    _demand(sorted(variant_rows) == sorted(with_graph), "the variants aren't the schedule's rows")
    steps = [variant_rows.index(row) if row in with_graph else None for row in rows]
    _demand(steps == list(manifest.steps), "steps and schedule differ")
    inputs = [spec.name for spec in manifest.inputs]
    states = [STEP, *(spec.name for spec in (*manifest.state, *manifest.hoisted))]
    _distinct([*inputs, *(f"{name}_in" for name in states), COEFFICIENTS, NOW], "input")
    _distinct([*(spec.name for spec in manifest.outputs), *(f"{name}_out" for name in states), DROPPED], "output")
    timestep = manifest.timestep
    _demand(timestep is None or timestep in inputs, f"the timestep {timestep!r} is no input")
    _demand(not schedule.timesteps or timestep is not None, "a schedule with timesteps needs a timestep input")
    for misfit in (state_misfit(manifest, schedule), output_misfit(manifest, schedule), prologue_misfit(manifest)):
        _demand(not misfit, misfit)
    by_letters = dict(zip(rows, schedule.rows, strict=True))
    for variant in manifest.variants:
        _check_variant(variant, manifest, schedule, by_letters[variant.row])


def _names(manifest: Manifest) -> list[tuple[str, str]]:
    every = (*manifest.inputs, *manifest.outputs, *manifest.state, *manifest.hoisted)
    return [(spec.name, spec.dtype) for spec in every]


def _check_engines(manifest: Manifest) -> None:
    """Every set of engines, which has a folder of its own, is one engine for each variant."""
    sets: dict[str, list[EngineSpec]] = {}
    for engine in manifest.engines:
        sets.setdefault(engine.folder, []).append(engine)
        _distinct(engine.arch, f"architecture of {engine.file}")
    names = sorted(variant.name for variant in manifest.variants)
    for folder, engines in sets.items():
        _demand(sorted(engine.variant for engine in engines) == names, f"{folder} isn't one engine for each variant")
        kinds = {(engine.library, engine.version, engine.arch) for engine in engines}
        _demand(len(kinds) == 1, f"{folder} has engines of several kinds")


def _check_variant(variant: VariantSpec, manifest: Manifest, schedule: Schedule, row: Row) -> None:
    # where the output is cached, the session keeps the outputs themselves
    writes = () if manifest.caches_output else written(manifest, schedule, row)
    inputs = {spec.name for spec in manifest.inputs}
    _demand(variant.writes == writes, f"variant {variant.name} doesn't write what its row computes")
    may_read = readable(manifest, schedule, row)
    _demand(may_read.issuperset(variant.reads), f"variant {variant.name} reads state that its row computes")
    _demand(inputs.issuperset(variant.takes), f"variant {variant.name} takes unknown inputs")
    _distinct([*variant.takes, *variant.reads], f"variant {variant.name}: an input")


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BundleError(f"{MANIFEST}: {otherwise}. Export again")


def _distinct(names: Iterable[str], what: str) -> None:
    listed = list(names)
    _demand(len(set(listed)) == len(listed), f"{what}: a name appears twice")
