"""A compiled variant recorded as a CUDA graph: one launch a step instead of one a kernel.

A recording reads and writes fixed addresses. Weights and state are read where they lie; a call whose weights or state
lie elsewhere (another stream, a replaced weight) has a recording of its own. All other arguments are copied into
buffers of the recording before it runs, and its results are copied out, so that nobody holds what the next run
overwrites; but for those that are lent, which the caller copies away itself.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moeca_compile.errors import UserError, warn
from moeca_compile.lowering.inductor.buffers import copy_all

MOST = 8  # recordings of a variant: as many streams and sets of weights

Run = Callable[[Sequence[Any]], Sequence[Any]]
Record = Callable[[Run, Sequence[Any]], tuple[Callable[[], None], Sequence[Any]]]


def record_cuda_graph(run: Run, args: Sequence[Any]) -> tuple[Callable[[], None], Sequence[Any]]:
    """Record `run(args)`; what replays it, and the results that each replay writes anew.

    Raises:
        RuntimeError, UserError: it can't be recorded, for it waits for the GPU on its way (experts in float32 do).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is allocated or chosen at a first run must not be recorded
        run(args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(args)
    return graph.replay, results


RECORDERS: dict[str, Record] = {"cuda": record_cuda_graph}  # by type of device


@dataclass(frozen=True)
class _Recording:
    replay: Callable[[], None]
    args: Sequence[Any]
    results: Sequence[Any]


class Replayed:
    """Calls like those of `run`, each a replay; recorded where a call's weights and state weren't met before.

    Args:
        name: of the variant, for messages.
        moving: positions of the arguments that are copied in; all other tensors are read where they lie.
        own: so many results are the caller's; those behind them are lent until the next call. None: all are.
    """

    def __init__(self, run: Run, name: str, moving: Collection[int], record: Record, own: int | None = None) -> None:
        self.run, self.name, self.moving, self.record, self.own = run, name, frozenset(moving), record, own
        self.recordings: OrderedDict[tuple[Any, ...], _Recording] = OrderedDict()
        self.gave_up = False
        self._copied: list[int] = []  # positions of tensors that are copied in
        self._still: list[int] = []  # of those that are read where they lie
        self._values: list[int] = []  # of what isn't a tensor
        self._lock = threading.Lock()  # from copying in to copying out

    def __call__(self, args: Sequence[Any]) -> Sequence[Any]:
        with self._lock:
            recording = None if self.gave_up else self._recording(args)
            if recording is None:
                return self.run(args)
            copy_all([recording.args[position] for position in self._copied], [args[i] for i in self._copied])
            recording.replay()
            given = recording.results[: self.own]
            return [*_copies(given), *recording.results[len(given) :]]

    def _recording(self, args: Sequence[Any]) -> _Recording | None:
        if not self.recordings:
            self._sort(args)
        key = (*map(torch.Tensor.data_ptr, map(args.__getitem__, self._still)), *map(args.__getitem__, self._values))
        if key not in self.recordings:
            try:
                self.recordings[key] = self._recorded(args)
            except (RuntimeError, UserError) as error:
                self.gave_up = True
                warn(
                    f"variant {self.name} can't be recorded as a CUDA graph ({str(error).splitlines()[0]}): it runs "
                    "without one. Leave cuda_graphs out, or give the experts a dispatch that never waits for the GPU"
                )
                return None
            if len(self.recordings) > MOST:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        return self.recordings[key]

    def _sort(self, args: Sequence[Any]) -> None:
        """Positions by what a recording has in it of an argument, which all calls have in common."""
        tensors = [position for position, one in enumerate(args) if isinstance(one, torch.Tensor)]
        self._copied = [position for position in tensors if position in self.moving]
        self._still = [position for position in tensors if position not in self.moving]
        self._values = [position for position, one in enumerate(args) if not isinstance(one, torch.Tensor)]

    def _recorded(self, args: Sequence[Any]) -> _Recording:
        with torch.inference_mode(False), torch.no_grad():
            own = [
                one.detach().clone() if position in self.moving and isinstance(one, torch.Tensor) else one
                for position, one in enumerate(args)
            ]
            replay, results = self.record(self.run, own)
        return _Recording(replay, own, results)


def _copies(values: Sequence[Any]) -> list[Any]:
    """One launch for them all."""
    if len(values) == 1 and isinstance(values[0], torch.Tensor):
        return [values[0].clone()]
    copies = [torch.empty_like(one) if isinstance(one, torch.Tensor) else one for one in values]
    copy_all(_tensors(copies), _tensors(values))
    return copies


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    return [one for one in values if isinstance(one, torch.Tensor)]
