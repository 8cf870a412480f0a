"""Measures the displacements of pairs (`planner/search/drift.py`) on uncached trajectories.

At step s the model runs once more for each of the last steps a, with every region forecast from its output at a: the
change of the latent is the displacement of the pair. Such a run is cheap, because it computes no region. The outputs of
the regions at the last `lookback` steps are in memory, or on disk beyond `memory` bytes; of each pair a few numbers are
kept.
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

NUMBERS = 64  # of a projected displacement of a sample: norms are within 18 %, and errors are means over samples
MOST_LATENT = 2**18  # numbers of a latent that are projected; of a larger latent every n-th number


class FeatureBuffer:
    """The regions' outputs at some steps: in memory up to `limit` bytes, beyond that in files of `folder`."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit, self.bytes_in_memory, self.files = folder, limit, 0, 0
        self.entries: dict[tuple[str, int], list[torch.Tensor] | Path] = {}  # by stream and step

    def put(self, stream: str, step: int, tensors: list[torch.Tensor]) -> None:
        """Add the outputs of one step."""
        size = _bytes(tensors)
        if self.bytes_in_memory + size <= self.limit:
            self.entries[stream, step] = tensors
            self.bytes_in_memory += size
        else:
            path = self.folder / f"{self.files}.pt"
            self.files += 1
            torch.save(tensors, path)
            self.entries[stream, step] = path

    def get(self, stream: str, step: int) -> list[torch.Tensor] | None:
        """The outputs of one step; None: not here."""
        entry = self.entries.get((stream, step))
        return torch.load(entry) if isinstance(entry, Path) else entry

    def drop(self, stream: str, step: int) -> None:
        """Remove the outputs of one step, if they are here."""
        entry = self.entries.pop((stream, step), None)
        if isinstance(entry, Path):
            entry.unlink()
        elif entry is not None:
            self.bytes_in_memory -= _bytes(entry)


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
    """Measure the drift.

    Args:
        sampled: the model.
        seeds: of the trajectories.
        mixing: the weights of the sampler.
        letters: the row kinds that plans may use; regions with equal actions in all of them are displaced together.
        lookback: the greatest distance of a pair, in steps.
        memory: bytes of region outputs in memory at once; the rest goes to a temporary folder.
        watch: called after each call of the model.

    Returns:
        The drift over these seeds, and the uncached samples of each seed.
    """
    atoms = atoms_of(sampled.kinds, letters)
    pairs = {pair: number for number, pair in enumerate(pairs_of(sampled.steps, lookback))}
    parts: list[np.ndarray] = []
    samples, uncached_runs = {}, len(sampled.uncached)
    for seed in seeds:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moeca_")))
            recorder = _PairRecorder(sampled, mixing, atoms, pairs, lookback, FeatureBuffer(folder, memory))

            def observe(call: Call, recorder: _PairRecorder = recorder) -> None:
                if sampled.is_main(call.program):
                    recorder.observe(call)
                watch(call)

            samples[seed] = sampled.run(seed, watch=observe)
            del sampled.uncached[uncached_runs:]  # a measured run takes longer
            parts.append(recorder.parts())
    return Drift(sampled.steps, pairs, atoms, np.concatenate(parts, axis=2)), samples


class _PairRecorder:
    """Measures the displacements of one trajectory; the arguments are those of `measure`."""

    def __init__(
        self,
        sampled: SampledModel,
        mixing: Mixing,
        atoms: Sequence[Sequence[int]],
        pairs: dict[tuple[int, int], int],
        lookback: int,
        buffer: FeatureBuffer,
    ) -> None:
        self.program, self.mixing, self.atoms, self.pairs = sampled.program, mixing, atoms, pairs
        self.lookback, self.buffer = lookback, buffer
        self.row = row_of(sampled.kinds[NONE], order=1)
        self.slots = [(i, slot.region) for i, slot in enumerate(self.program.layout) if slot.slot == "y0"]
        self.sums: torch.Tensor | None = None  # [atoms, pairs, latents, numbers], over the streams
        self.projection = torch.empty(0)

    def observe(self, call: Call) -> None:
        """Process one call."""
        step, stream, state = call.record.step, call.stream, call.state
        if state is None:
            return
        now = [state.tensors[slot] for slot, _ in self.slots]
        for a in range(max(0, step - self.lookback), step):
            older = self.buffer.get(stream, a)
            if older is None or (a, step) not in self.pairs:
                continue
            for number in range(len(self.atoms)):
                # the last atom's part is the total minus the other parts: one run less, and the parts add up
                columns = set(self.atoms[number]) if number < len(self.atoms) - 1 else None
                self._add(number, self.pairs[a, step], self._displacement(call, now, older, a, columns))
        self.buffer.put(stream, step, now)
        self.buffer.drop(stream, step - self.lookback)

    def _displacement(
        self, call: Call, now: list[torch.Tensor], older: list[torch.Tensor], a: int, columns: set[int] | None
    ) -> torch.Tensor:
        """[latents, numbers]: the displacement if these columns (None: all) have their older outputs, of step a."""
        state = StreamState(self.program.layout, len(self.program.regions))
        state.history = [(a,)] * len(self.program.regions)
        for number, (slot, column) in enumerate(self.slots):
            state.tensors[slot] = (older if columns is None or column in columns else now)[number]
        variant = call.compiled.variants.variant(self.row)
        arguments = call.compiled.arguments(variant, call.args, state, call.record.step)
        output = call.compiled.variants.compile(variant, arguments)(arguments)[0]
        return self._projected(self.mixing.apply(call.record.step, call.stream, output - call.results[0]))

    def _projected(self, change: torch.Tensor) -> torch.Tensor:
        """A random projection of [latents, numbers] to at most `NUMBERS` numbers (Johnson & Lindenstrauss 1984)."""
        change = change[:, :: -(-change.shape[1] // MOST_LATENT)]
        if change.shape[1] <= NUMBERS:
            return change
        if self.projection.shape[0] != change.shape[1]:
            generator = torch.Generator().manual_seed(0)
            self.projection = torch.randn(change.shape[1], NUMBERS, generator=generator) / NUMBERS**0.5
        return change @ self.projection

    def _add(self, atom: int, pair: int, change: torch.Tensor) -> None:
        if self.sums is None:
            self.sums = torch.zeros(len(self.atoms), len(self.pairs), *change.shape)
        self.sums[atom, pair] += change

    def parts(self) -> np.ndarray:
        """The displacements that each atom alone causes, as in `Drift.parts`; call it once."""
        parts = torch.zeros(len(self.atoms), len(self.pairs), 1, 1) if self.sums is None else self.sums
        parts[-1] -= parts[:-1].sum(dim=0)
        return parts.numpy()


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
