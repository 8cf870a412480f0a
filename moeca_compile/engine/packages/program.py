"""A program out of a package: variants and prologues as native code, in place of those of a captured graph."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moeca_compile.engine.compiled_schedule import CompiledSchedule, Run
from moeca_compile.engine.freeing.plan import WeightFreeing
from moeca_compile.engine.freeing.weights import FreedWeights
from moeca_compile.engine.trajectories.agreement import Agreement
from moeca_compile.errors import BundleError, InvariantError, LoweringError
from moeca_compile.graph.autocast import without_autocast
from moeca_compile.graph.regions import HoistedValue
from moeca_compile.graph.variant import StateSlot, Variant
from moeca_compile.lowering.inductor.buffers import Buffers
from moeca_compile.runtime.packages.manifest import SizeSpec
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Row, Schedule


def native_code(file: Path) -> Run:
    """The program in a file that `lowering/inductor/native.py` wrote.

    torch's public `aoti_load_package` loads the same way, but imports Dynamo and Inductor first, which takes seconds.

    Raises:
        BundleError: torch can't load it.
    """
    try:
        loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", False, 1, -1)
    except RuntimeError as error:
        raise BundleError(f"{file.name} can't be loaded: {error}") from error
    loaded = [loader]
    turn = threading.Lock()  # torch waits for its turn with Python's lock held, which `moeca::experts` needs meanwhile

    def run(args: Sequence[Any]) -> Sequence[Any]:
        with turn:
            results: list[Any] = loaded[0].boxed_run(list(args))
        return results

    weakref.finalize(run, loaded.clear)  # torch unpacked the file into a temporary folder, which goes with the loader
    return without_autocast(run)


class LoadedVariants:
    """The variants of one size, by row.

    Attributes:
        layout: slots of the state.
        built: the variants, without graphs.
        executables: their native code.
    """

    def __init__(self, folder: Path, size: SizeSpec, schedule: Schedule) -> None:
        self.layout: tuple[StateSlot, ...] = tuple(slot.slot_of_layout() for slot in size.state)
        self.built: dict[Row, Variant] = {}
        self.executables: dict[Row, Run] = {}
        for row, program in zip(schedule.distinct_rows(), size.variants, strict=True):
            self.built[row] = program.variant(row)
            self.executables[row] = native_code(folder / program.file)

    def variant(self, row: Row) -> Variant:
        """The variant of a row of the schedule."""
        return self.built[row]

    def compile(self, variant: Variant, args: Sequence[Any]) -> Run:
        """The native code of a variant."""
        return self.executables[variant.row]

    def compile_together(self, variants: Iterable[tuple[Variant, Sequence[Any]]]) -> None:
        """Nothing: all are compiled."""


class LoadedPrologues:
    """The prologues of one size: one for the values of a trajectory, one for those of a step.

    Attributes:
        hoisted, of_step, step_bytes, timesteps, condition, ready, by_step, freed: as in `engine/prologues.py`.
    """

    def __init__(self, folder: Path, size: SizeSpec) -> None:
        self.hoisted = tuple(HoistedValue("", value.level, value.bytes) for value in size.hoisted)
        self.of_step = tuple(i for i, value in enumerate(self.hoisted) if value.level == "step")
        self.step_bytes = sum(self.hoisted[position].bytes for position in self.of_step)
        self.timesteps, self.condition = size.timesteps, size.condition
        self.ready: dict[tuple[int, ...], tuple[Variant, Run]] = {}
        self.by_step = True  # native code has fixed sizes
        self.freed: FreedWeights | None = None
        self._programs = [(spec, native_code(folder / spec.file)) for spec in size.prologues]

    def prologue(self, gives: tuple[int, ...], args: Sequence[Any]) -> tuple[Variant, Run]:
        """The program of some hoisted values, which computes all values of their level.

        Args:
            gives: positions of the values, all of one level.
            args: of a call; not used.
        """
        if gives not in self.ready:
            self.ready[gives] = self._selected(gives)
        return self.ready[gives]

    def _selected(self, gives: tuple[int, ...]) -> tuple[Variant, Run]:
        for spec, run in self._programs:
            if set(gives) <= set(spec.gives):
                places = [spec.gives.index(position) for position in gives]
                return spec.variant(()), _selecting(run, places)
        raise InvariantError(f"the package has no prologue for the values {gives}")

    def over_steps(self, gives: tuple[int, ...]) -> tuple[Variant, Run] | None:
        """None: values are computed for each step by itself."""
        return None

    def give_up_steps(self, error: LoweringError) -> None:
        """Nothing: values are computed for each step by itself."""


def _selecting(run: Run, places: Sequence[int]) -> Run:
    def selected(args: Sequence[Any]) -> Sequence[Any]:
        values = run(args)
        return [values[place] for place in places]

    return selected


@dataclass
class _Compiled:
    """Stands for a compiler where nothing is left to compile."""

    spent: float = 0.0
    replaying: AbstractContextManager[Any] = field(default_factory=nullcontext)


class LoadedProgram:
    """One size of a package, as `run_step` takes it.

    Args:
        folder: of the package.
        size: what the manifest says of the size.
        schedule: of the package.
        weights: by name.
        warned: counts the warnings of the loaded model.

    Attributes:
        size: what the manifest says of the size.
        compiled_schedule: what `run_step` runs.
        warned, prologues, compiler, timestep, more_timesteps, latent, condition, caches, buffers, key, freeing,
            agreement: as in `engine/program.py`.
    """

    def __init__(
        self, folder: Path, size: SizeSpec, schedule: Schedule, weights: dict[str, torch.Tensor], warned: Warned
    ) -> None:
        self.size, self.warned = size, warned
        self.compiler, self.prologues = _Compiled(), LoadedPrologues(folder, size)
        self.timestep = next(iter(size.timesteps), None)
        self.more_timesteps, self.condition = size.timesteps[1:], size.condition
        self.latent = size.latent
        self.caches: tuple[int, ...] = ()
        self.buffers: Buffers | None = None
        self.key: Hashable = object()
        self.freeing: WeightFreeing | None = None
        self.agreement: Agreement | None = None
        self.compiled_schedule = CompiledSchedule(self, schedule, LoadedVariants(folder, size, schedule))
        self._args = [weights[entry.weight] if entry.weight else None for entry in size.arguments]
        self._takes = [(i, entry.leaf) for i, entry in enumerate(size.arguments) if entry.leaf is not None]

    def arguments(self, leaves: Sequence[Any]) -> list[Any]:
        """The arguments of the graph, for the leaves of a call."""
        args: list[Any] = list(self._args)
        for position, leaf in self._takes:
            args[position] = leaves[leaf].contiguous()
        return args
