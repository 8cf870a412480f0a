"""The `torch.compile` entry point: what Dynamo hands over, and the callable that it gets back.

Nothing is compiled here. The callable waits for the first real call: then it can find the model, prepare it, and see
shapes. Errors are raised there too: raised inside a backend they would arrive as torch's BackendCompilerFailed.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch._dynamo.eval_frame import remove_from_cache

from moeca_compile.autocast import ambient_autocast
from moeca_compile.canonical import prepare
from moeca_compile.canonical.isolate import isolate
from moeca_compile.capture import Input, inputs_of
from moeca_compile.errors import MoecaError, MoecaWarning, OptionError, StateError
from moeca_compile.options import Options
from moeca_compile.owner import Owner, find_owner, runs_whole
from moeca_compile.program import Program
from moeca_compile.runtime.clock import Clock, Counter
from moeca_compile.runtime.dispatch import Track, run_step
from moeca_compile.runtime.trajectory import Trajectory, current

ENTRIES: weakref.WeakSet[Entry] = weakref.WeakSet()  # all live graphs; `face.py` finds a model's among them
_visiting = threading.local()


def moeca(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **unknown: Any,
) -> Callable[..., tuple[Any, ...]]:
    """The backend: `torch.compile(model, backend="moeca", options={...})`. See `moeca_compile.Options`."""
    try:
        if unknown:
            raise OptionError(f"torch.compile handed over {sorted(unknown)}, which this backend doesn't know")
        parsed = Options.from_backend_options(options, mode)
    except MoecaError as error:
        refusal = error

        def refuse(*args: Any) -> tuple[Any, ...]:
            raise refusal

        return refuse
    return Entry(gm, inputs_of(gm, example_inputs), parsed)


class Bank:
    """What belongs to one set of weights called through one handle: the tracks, by program."""

    def __init__(self, owner: Owner | None, weights: Sequence[torch.Tensor]) -> None:
        self.handle = weakref.ref(owner.handle) if owner else None
        self.weights = [weakref.ref(weight) for weight in weights]
        self.ids = frozenset(map(id, weights))
        self.kinds = tuple((tuple(w.shape), w.dtype, w.device) for w in weights)
        self.stamp: Hashable = None
        self.tracks: dict[int, Track] = {}

    def holds(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether these are still the very tensors (an id may have been used again)."""
        return all(ref() is weight for ref, weight in zip(self.weights, weights, strict=True))

    def follow(self, weights: Sequence[torch.Tensor]) -> None:
        """Start cold if a weight was changed in place or its storage swapped."""
        stamp = tuple(w.data_ptr() for w in weights), tuple(w._version for w in weights if not w.is_inference())
        if stamp != self.stamp:
            self.stamp = stamp
            self.kinds = tuple((tuple(w.shape), w.dtype, w.device) for w in weights)
            self.tracks.clear()


class Entry:
    """The callable for one Dynamo graph: programs by signature, banks by weights."""

    def __init__(self, gm: torch.fx.GraphModule, inputs: tuple[Input, ...], options: Options) -> None:
        self.gm, self.inputs, self.options = gm, inputs, options
        self.programs: OrderedDict[Hashable, Program] = OrderedDict()
        self.banks: dict[Hashable, Bank] = {}
        self._weights = [i for i, one in enumerate(inputs) if one.is_weight]
        self._others = [i for i, one in enumerate(inputs) if not one.is_weight]
        self._whole: bool | None = None
        ENTRIES.add(self)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            raise StateError(
                "moeca is for inference: grad mode is on and some tensors require grad. Call the model under "
                "torch.no_grad() or torch.inference_mode(), or model.requires_grad_(False)"
            )
        owner = find_owner()
        if self._whole is None:
            whole = runs_whole(owner)
            if _out_of_date(owner, whole):
                return tuple(self.gm(*args))
            self._whole = whole
        weights = [args[i] for i in self._weights]
        bank = self._bank(owner, weights)
        visitor: Visitor | None = getattr(_visiting, "visitor", None)
        if visitor is not None:
            return visitor(self, args, bank)
        program = self.program(args, bank)
        trajectory = current(bank.ids)
        return run_step(program, self._track(program, bank, trajectory), args, trajectory)

    def _bank(self, owner: Owner | None, weights: list[torch.Tensor]) -> Bank:
        key = (id(owner.handle) if owner else None, *map(id, weights))
        bank = self.banks.get(key)
        if bank is None or not bank.holds(weights):
            for old in [k for k, b in self.banks.items() if any(ref() is None for ref in b.weights)]:
                del self.banks[old]
            bank = self.banks[key] = Bank(owner, weights)
        bank.follow(weights)
        return bank

    @property
    def whole(self) -> bool:
        """Whether this graph is the whole model, not a part between two graph breaks."""
        return self._whole is not False

    def program(self, args: Sequence[Any], bank: Bank) -> Program:
        """The program for arguments like these: captured on first use, the least recently used one dropped."""
        others = tuple(
            (tuple(a.shape), a.stride(), a.dtype, a.device) if isinstance(a, torch.Tensor) else a
            for a in (args[i] for i in self._others)
        )
        key = (others, bank.kinds, ambient_autocast())
        program = self.programs.get(key)
        if program is None:
            program = Program(self.gm, args, self.inputs, self.options, self.whole)
            self.programs[key] = program
            if not self.whole:
                _warn_broken(program)
            while len(self.programs) > self.options.max_signatures:
                _, oldest = self.programs.popitem(last=False)
                for other in self.banks.values():
                    other.tracks.pop(id(oldest), None)
        self.programs.move_to_end(key)
        return program

    def _track(self, program: Program, bank: Bank, trajectory: Trajectory | None) -> Track:
        tracks = bank.tracks if trajectory is None else trajectory.tracks.setdefault(id(bank), {})
        track: Track | None = tracks.get(id(program))
        if track is None:
            exact = trajectory is not None and (trajectory.stream is not None or program.timestep is None)
            limit = float("inf") if trajectory is not None else program.latent_jump
            track = tracks[id(program)] = Track(Counter() if exact else Clock(limit))
        if trajectory is not None:
            bank.tracks[id(program)] = track  # what `stats` shows
        return track


Visitor = Callable[[Entry, Sequence[Any], Bank], tuple[Any, ...]]


@contextmanager
def visiting(visitor: Visitor) -> Iterator[None]:
    """In this thread, hand every call of a graph to `visitor` in place of running it."""
    _visiting.visitor = visitor
    try:
        yield
    finally:
        _visiting.visitor = None


_first_call: list[FrameType] = []  # the call during which a model was prepared; its other fragments run as they are


def _out_of_date(owner: Owner | None, whole: bool) -> bool:
    """On a graph's first run: prepare the model. True: run this graph as it is, the next call brings a better one."""
    if owner is None:
        return False
    if _first_call and _first_call[0] is owner.frame:
        return True
    _first_call.clear()
    report = prepare(owner.module)
    if report.misses:
        some = "; ".join(str(miss) for miss in report.misses[:3])
        text = f"{len(report.misses)} expert dispatches are left as they are: {some}"
        warnings.warn(text, MoecaWarning, stacklevel=3)
    if whole and not report.changed:
        return False
    if not isolate(owner.module):
        if not report.changed:
            return False  # it has been traced afresh already, and breaks by itself
        remove_from_cache(owner.module.forward)
    _first_call.append(owner.frame)
    return True


def _warn_broken(program: Program) -> None:
    what = f"{len(program.regions)} regions" if len(program.regions) else "no region"
    warnings.warn(
        f"the model's graph is broken: this part has {what}, and only regions in one graph with the timestep are "
        "cached. TORCH_LOGS=graph_breaks shows where; an expert dispatch is mended by moeca_compile.prepare(model)",
        MoecaWarning,
        stacklevel=2,
    )
