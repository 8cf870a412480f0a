"""The variants and prologues of one size, compiled to native code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeca_compile.engine.hoisted import Hoisted
from moeca_compile.engine.program import Program
from moeca_compile.graph.autocast import autocast_is
from moeca_compile.graph.capture import under_compile_lock
from moeca_compile.graph.variant import Variant
from moeca_compile.inspect.progress import ProgressCallback
from moeca_compile.lowering.inductor.native import SUFFIX
from moeca_compile.options import Options
from moeca_compile.pipeline import build_prologue, lower_native
from moeca_compile.runtime.packages.manifest import ProgramSpec

Programs = tuple[list[ProgramSpec], list[ProgramSpec]]  # variants, in the order of the distinct rows; prologues


def write_programs(
    folder: Path, program: Program, args: Sequence[Any], options: Options, size: int, tick: ProgressCallback
) -> Programs:
    """Compile every distinct row, and a prologue for each level of hoisted values.

    Args:
        folder: to write the files to.
        program: of the graph.
        args: of a call of it.
        options: for AOTInductor.
        size: number of the size, from 0.
        tick: is told of each program.

    Raises:
        LoweringError: AOTInductor refused one.
    """
    compiled = program.compiled_schedule
    rows = compiled.schedule.distinct_rows()
    variants = [compiled.variants.variant(row) for row in rows]
    used = {position for variant in variants for position in variant.hoists}
    of_step = tuple(sorted(used & set(program.prologues.of_step)))
    prologues: list[tuple[tuple[int, ...], Variant]] = []
    if of_step:
        prologues.append((of_step, _prologue(program, of_step, options, "prologue_step")))
        used |= set(prologues[0][1].hoists)
    invariant = tuple(sorted(used - set(of_step)))
    if invariant:
        prologues.append((invariant, _prologue(program, invariant, options, "prologue_trajectory")))
    hoisted, everything = Hoisted(), [*variants, *(variant for _, variant in prologues)]
    for number, variant in enumerate(everything):
        tick(f"compiling {variant.name}", 0.1 + 0.8 * number / len(everything))
        examples = compiled.examples(variant, args, hoisted)
        with under_compile_lock(), autocast_is(()):
            lower_native(variant, examples, options, folder / _file(variant, size))
    return (
        [_spec(variant, _file(variant, size)) for variant in variants],
        [_spec(variant, _file(variant, size), gives) for gives, variant in prologues],
    )


def _prologue(program: Program, gives: tuple[int, ...], options: Options, name: str) -> Variant:
    variant, _ = build_prologue(program.analysis, gives, options, name)
    return variant


def _file(variant: Variant, size: int) -> str:
    return f"{variant.name}{SUFFIX}" if not size else f"size_{size}_{variant.name}{SUFFIX}"


def _spec(variant: Variant, file: str, gives: tuple[int, ...] = ()) -> ProgramSpec:
    return ProgramSpec(
        variant.name, file, variant.takes, variant.reads, variant.writes, variant.wants_coefficients, variant.wants_now,
        variant.outputs, variant.hoists, variant.macs, gives,
    )  # fmt: skip
