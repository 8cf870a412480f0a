"""The variants and prologues of one size, compiled to native code."""

from __future__ import annotations

from pathlib import Path

from moeca_compile.engine.hoisted import Hoisted
from moeca_compile.exporting.request import Captured
from moeca_compile.graph.autocast import autocast_is
from moeca_compile.graph.capture import under_compile_lock
from moeca_compile.graph.variant import Variant
from moeca_compile.inspect.progress import ProgressCallback
from moeca_compile.lowering.inductor.native import SUFFIX
from moeca_compile.options import Options
from moeca_compile.pipeline import lower_native
from moeca_compile.runtime.packages.manifest import ProgramSpec

Programs = tuple[list[ProgramSpec], list[ProgramSpec]]  # variants, in the order of the distinct rows; prologues


def write_programs(folder: Path, captured: Captured, options: Options, size: int, tick: ProgressCallback) -> Programs:
    """Compile every distinct row, and the prologues that their variants need.

    Args:
        folder: to write the files to.
        captured: the graph.
        options: for AOTInductor.
        size: number of the size, from 0.
        tick: is told of each program.

    Raises:
        LoweringError: AOTInductor refused one.
    """
    compiled, hoisted = captured.program.compiled_schedule, Hoisted()
    variants = [variant for _, variant in captured.variants]
    everything = [*variants, *(prologue.variant for prologue in captured.prologues)]
    for number, variant in enumerate(everything):
        tick(f"compiling {variant.name}", 0.1 + 0.8 * number / len(everything))
        examples = compiled.examples(variant, captured.args, hoisted)
        with under_compile_lock(), autocast_is(()):
            lower_native(variant, examples, options, folder / _file(variant, size))
    return (
        [_spec(variant, _file(variant, size)) for variant in variants],
        [_spec(prologue.variant, _file(prologue.variant, size), prologue.gives) for prologue in captured.prologues],
    )


def _file(variant: Variant, size: int) -> str:
    return f"{variant.name}{SUFFIX}" if not size else f"size_{size}_{variant.name}{SUFFIX}"


def _spec(variant: Variant, file: str, gives: tuple[int, ...] = ()) -> ProgramSpec:
    return ProgramSpec(
        variant.name, file, variant.takes, variant.reads, variant.writes, variant.wants_coefficients, variant.wants_now,
        variant.outputs, variant.hoists, variant.macs, gives,
    )  # fmt: skip
