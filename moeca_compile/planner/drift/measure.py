"""The pairs' displacements (`planner/search/drift.py`), measured on uncached trajectories.

At step s the model is run once more for each of the last steps a, all regions forecast, with the outputs that they had
at a: what that changes is a drift. Such a run costs next to nothing, for it computes no region. In memory are the
regions' outputs of the last `lookback` steps, on disk where they are more than `memory` allows, and a few numbers a
pair.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from moeca_compile.planner.drift.mixing import Mixing
from moeca_compile.planner.rollout import Call, SampledModel
from moeca_compile.planner.search.drift import Drift, pairs_of
from moeca_compile.planner.search.rows import NONE, atoms_of, row_of
from moeca_compile.runtime.state import StreamState

NUMBERS = 64  # a sample's displacement is projected to so many: norms within 18 %, and errors are means over samples
MOST_LATENT = 2**18  # numbers of a latent that are looked at; of larger ones every n-th


class FeatureBuffer:
    """The regions' outputs of some steps: in memory up to `limit` bytes, else in files of `folder`."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit, self.held, self.files = folder, limit, 0, 0
        self.kept: dict[tuple[str, int], list[torch.Tensor] | Path] = {}

    def put(self, stream: str, step: int, tensors: list[torch.Tensor]) -> None:
        size = _bytes(tensors)
        if self.held + size <= self.limit:
            self.kept[stream, step] = tensors
            self.held += size
        else:
            path = self.folder / f"{self.files}.pt"
            self.files += 1
            torch.save(tensors, path)
            self.kept[stream, step] = path

    def get(self, stream: str, step: int) -> list[torch.Tensor] | None:
        found = self.kept.get((stream, step))
        return torch.load(found) if isinstance(found, Path) else found

    def drop(self, stream: str, step: int) -> None:
        found = self.kept.pop((stream, step), None)
        if isinstance(found, Path):
            found.unlink()
        elif found is not None:
            self.held -= _bytes(found)


def measure(
    sampled: SampledModel,
    seeds: Sequence[int],
    mixing: Mixing,
    *,
    letters: str,
    lookback: int,
    memory: int,
    watch: Callable[[Call], None] = lambda call: None,
) -> tuple[Drift, dict[int, torch.Tensor]]:
    """The drift over these seeds, and their uncached samples.

    letters: the row kinds that plans may use; regions which all of them treat alike are displaced together.
    memory: bytes of region outputs held at once; more go to a temporary folder.
    watch: sees every call as well.
    """
    program = sampled.program
    atoms = atoms_of(sampled.kinds, letters)
    pairs = {pair: number for number, pair in enumerate(pairs_of(sampled.steps, lookback))}
    parts: list[np.ndarray] = []
    samples, typical = {}, len(sampled.uncached)
    for seed in seeds:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moeca_")))
            walker = _Walker(sampled, mixing, atoms, pairs, lookback, FeatureBuffer(folder, memory))

            def see(call: Call, walker: _Walker = walker) -> None:
                if call.program is program:
                    walker.see(call)
                watch(call)

            samples[seed] = sampled.run(seed, watch=see)
            del sampled.uncached[typical:]  # this one isn't typical
            parts.append(walker.parts())
    return Drift(sampled.steps, pairs, atoms, np.concatenate(parts, axis=2)), samples


class _Walker:
    """Goes along one trajectory."""

    def __init__(
        self,
        sampled: SampledModel,
        mixing: Mixing,
        atoms: Sequence[Sequence[int]],
        pairs: dict[tuple[int, int], int],
        lookback: int,
        spool: FeatureBuffer,
    ) -> None:
        self.program, self.mixing, self.atoms, self.pairs = sampled.program, mixing, atoms, pairs
        self.lookback, self.spool = lookback, spool
        self.row = row_of(sampled.kinds[NONE], order=1)
        self.slots = [(i, slot.region) for i, slot in enumerate(self.program.layout) if slot.slot == "y0"]
        self.found: torch.Tensor | None = None
        self.projection = torch.empty(0)

    def see(self, call: Call) -> None:
        step, stream, state = call.record.step, call.stream, call.state
        if state is None:
            return
        now = [state.tensors[slot] for slot, _ in self.slots]
        for a in range(max(0, step - self.lookback), step):
            then = self.spool.get(stream, a)
            if then is None or (a, step) not in self.pairs:
                continue
            for number in range(len(self.atoms)):
                # the last group's part is what the others leave of the whole: one run less, and the parts add up
                columns = set(self.atoms[number]) if number < len(self.atoms) - 1 else None
                self._add(number, self.pairs[a, step], self._displaced(call, now, then, a, columns))
        self.spool.put(stream, step, now)
        self.spool.drop(stream, step - self.lookback)

    def _displaced(
        self, call: Call, now: list[torch.Tensor], then: list[torch.Tensor], a: int, columns: set[int] | None
    ) -> torch.Tensor:
        """[latents, numbers]: what outputs of step a make of them, in place of these columns' own (None: of all)."""
        state = StreamState(self.program.layout, len(self.program.regions))
        state.history = [(a,)] * len(self.program.regions)
        for number, (slot, column) in enumerate(self.slots):
            state.tensors[slot] = (then if columns is None or column in columns else now)[number]
        variant = call.compiled.variants.variant(self.row)
        arguments = call.compiled.arguments(variant, call.args, state, call.record.step)
        output = call.compiled.variants.compile(variant, arguments)(arguments)[0]
        return self._short(self.mixing.apply(call.record.step, call.stream, output - call.results[0]))

    def _short(self, change: torch.Tensor) -> torch.Tensor:
        change = change[:, :: -(-change.shape[1] // MOST_LATENT)]
        if change.shape[1] <= NUMBERS:
            return change
        if self.projection.shape[0] != change.shape[1]:
            dice = torch.Generator().manual_seed(0)
            self.projection = torch.randn(change.shape[1], NUMBERS, generator=dice) / NUMBERS**0.5
        return change @ self.projection

    def _add(self, atom: int, pair: int, change: torch.Tensor) -> None:
        if self.found is None:
            self.found = torch.zeros(len(self.atoms), len(self.pairs), *change.shape)
        self.found[atom, pair] += change

    def parts(self) -> np.ndarray:
        found = torch.zeros(len(self.atoms), len(self.pairs), 1, 1) if self.found is None else self.found
        found[-1] -= found[:-1].sum(dim=0)
        return found.numpy()


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)
