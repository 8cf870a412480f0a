"""The `torch.compile` entry point: what Dynamo hands over, and the callable that it gets back.

Nothing is compiled here. The callable waits for the first real call: then it can find the model, prepare it, and see
shapes. Errors are raised there too: raised inside a backend they would arrive as torch's BackendCompilerFailed.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch

from moeca_compile import fx
from moeca_compile.autocast import ambient_autocast
from moeca_compile.capture import Input, alone, inputs_of
from moeca_compile.errors import MoecaError, MoecaWarning, OptionError, StateError
from moeca_compile.first_call import out_of_date
from moeca_compile.frozen import Seen, follows_from_call, note, noting
from moeca_compile.options import Options
from moeca_compile.owner import Owner, find_owner, runs_whole
from moeca_compile.packed import Packs
from moeca_compile.program import Program
from moeca_compile.runtime.blocks import current
from moeca_compile.runtime.dispatch import Tracks, run_step
from moeca_compile.runtime.trajectory import Trajectory
from moeca_compile.visit import visitor

ENTRIES: weakref.WeakSet[Entry] = weakref.WeakSet()  # all live graphs; `face.py` finds a model's among them
_BANKS: weakref.WeakValueDictionary[Hashable, Bank] = weakref.WeakValueDictionary()
_books = threading.Lock()  # around banks and the order of programs; short
_version = attrgetter("_version")


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
    """What belongs to one set of weights called through one handle, whichever of Dynamo's graphs runs: the tracks."""

    def __init__(self, owner: Owner | None, weights: Sequence[torch.Tensor]) -> None:
        self.handle = weakref.ref(owner.handle) if owner else None
        self._gone: list[object] = []
        self._weights = [weakref.ref(weight, self._gone.append) for weight in weights]
        self.ids = frozenset(map(id, weights))
        self.stamp: tuple[list[int], list[int]] | None = None
        self.plain = Tracks()  # of calls outside any trajectory
        self.latest = self.plain  # what `stats` shows
        self.all: weakref.WeakSet[Tracks] = weakref.WeakSet((self.plain,))
        self.packs = Packs()

    def lives(self) -> bool:
        """Whether handle and weights still exist (their ids may have been used again)."""
        return not self._gone and (self.handle is None or self.handle() is not None)

    def follow(self, weights: Sequence[torch.Tensor]) -> None:
        """Start cold if a weight was changed in place or its storage swapped."""
        try:  # hundreds, at every step: nothing slower will do
            versions = list(map(_version, weights))
        except RuntimeError:  # inference tensors have none
            versions = [-1 if weight.is_inference() else weight._version for weight in weights]
        stamp = list(map(torch.Tensor.data_ptr, weights)), versions
        if stamp != self.stamp:
            self.stamp = stamp
            self.packs = Packs()
            for tracks in self.all:
                tracks.forget()

    def tracks(self, trajectory: Trajectory | None) -> Tracks:
        """What runs for these weights in `trajectory`."""
        if trajectory is None:
            self.latest = self.plain
        else:
            if self not in trajectory.tracks:
                trajectory.tracks[self] = Tracks(trajectory)
            self.latest = trajectory.tracks[self]
            self.all.add(self.latest)
        return self.latest

    def reset(self) -> None:
        """Forget all state, in every trajectory."""
        for tracks in self.all:
            tracks.reset()


class Entry:
    """The callable for one Dynamo graph: programs by signature, banks by weights."""

    def __init__(self, gm: torch.fx.GraphModule, inputs: tuple[Input, ...], options: Options) -> None:
        self.gm, self.inputs, self.options = gm, inputs, options
        self.programs: OrderedDict[tuple[Any, ...], Program] = OrderedDict()
        self.banks: dict[Hashable, Bank] = {}
        self._weights = [i for i, one in enumerate(inputs) if one.is_weight]
        self._others = [i for i, one in enumerate(inputs) if not one.is_weight]
        self._floats = _floats_of(gm)
        self._follows = {i for i, one in enumerate(fx.placeholders(gm)) if follows_from_call(one)}
        self._kinds: weakref.WeakKeyDictionary[Bank, tuple[Hashable, int]] = weakref.WeakKeyDictionary()
        self._numbers: dict[Hashable, int] = {}  # of the kinds of weights met: hashing one takes long
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
            with alone():
                whole = runs_whole(owner, self.gm)
                if out_of_date(owner, whole):
                    return tuple(self.gm(*args))
                self._whole = whole
        with _books:
            bank = self._bank(owner, [args[i] for i in self._weights])
        visit = visitor()
        if visit is not None:
            return visit(self, args, bank)
        program = self.program(args, bank)
        trajectory = current(bank.ids, owner.frame if owner is not None else None)
        results = self.step(program, bank, args, trajectory)
        if noting() and self.whole:
            others = [i for i in self._others if i not in self._follows or self._number(i, args) is None]
            note(Seen(partial(self.step, program, bank), args, others, results))
        return results

    def step(self, program: Program, bank: Bank, args: Sequence[Any], trajectory: Trajectory | None) -> tuple[Any, ...]:
        """Run a call of `program` for the weights of `bank`."""
        with _books:
            tracks = bank.tracks(trajectory)
        if not program.packs_experts:
            return run_step(program, tracks, args, trajectory)
        packs = bank.packs
        with packs.active():
            return run_step(program, tracks, args, trajectory, packs.doubt)

    def _bank(self, owner: Owner | None, weights: list[torch.Tensor]) -> Bank:
        ids = (id(owner.handle) if owner else None, *map(id, weights))
        bank = self.banks.get(ids)
        if bank is None or not bank.lives():
            for old in [key for key, one in self.banks.items() if not one.lives()]:
                del self.banks[old]
            # graphs of the whole model for other shapes serve the same trajectories; parts of a broken one do not
            key = (ids[0], frozenset(ids[1:]), None if self.whole and weights else id(self))
            bank = _BANKS.get(key)
            if bank is None or not bank.lives():
                bank = _BANKS[key] = Bank(owner, weights)
            self.banks[ids] = bank
        bank.follow(weights)
        return bank

    @property
    def whole(self) -> bool:
        """Whether this graph is the whole model, not a part between two graph breaks."""
        return self._whole is not False

    def program(self, args: Sequence[Any], bank: Bank) -> Program:
        """The program for arguments like these: captured on first use, the least recently used one dropped."""
        numbers = {i: n for i in self._others if (n := self._number(i, args)) is not None}
        tensors = tuple(
            (tuple(a.shape), a.stride(), a.dtype, a.device) for a in (args[i] for i in self._others if i not in numbers)
        )
        if bank not in self._kinds or self._kinds[bank][0] is not bank.stamp:
            kinds = tuple((tuple(w.shape), w.dtype, w.device) for w in (args[i] for i in self._weights))
            self._kinds[bank] = bank.stamp, self._numbers.setdefault(kinds, len(self._numbers))
        key = (tuple(numbers.values()), tensors, self._kinds[bank][1], ambient_autocast())
        with _books:
            program = self.programs.get(key)
            if program is not None:
                self.programs.move_to_end(key)
                return program
        with alone():
            program = self.programs.get(key)
            if program is None:
                self._warn_of_numbers(key, numbers)
                gm = _with_floats(self.gm, {i: numbers[i] for i in self._floats})
                program = Program(gm, args, self.inputs, self.options, self.whole)
                program.settle(args)
                bank.follow([args[i] for i in self._weights])  # some may have been moved
                if not self.whole:
                    _warn_broken(program)
        with _books:
            self.programs[key] = program
            while len(self.programs) > self.options.max_signatures:
                self.programs.popitem(last=False)  # and with it all its tracks: they are held by the program
        return program

    def _number(self, i: int, args: Sequence[Any]) -> Any:
        """Argument `i`, if it is a Python number: programs are made for its value. None: it is a tensor."""
        if i in self._floats:
            return args[i].item()
        return None if isinstance(args[i], torch.Tensor) else args[i]

    def _warn_of_numbers(self, key: tuple[Any, ...], numbers: Mapping[int, Any]) -> None:
        known = [other[0] for other in self.programs if other[1:] == key[1:]]
        if len(known) == 2:  # two may be a setting that was changed; a third is a habit
            moving = [self.inputs[i].label for n, i in enumerate(numbers) if len({v[n] for v in (*known, key[0])}) == 3]
            warnings.warn(
                f"{', '.join(moving) or 'an input'} comes as a Python number that changes from call to call, and a "
                "graph is captured and compiled for each value. Pass it as a tensor",
                MoecaWarning,
                stacklevel=3,
            )


def _floats_of(gm: torch.fx.GraphModule) -> frozenset[int]:
    """Positions of Python floats that Dynamo (with dynamic=True, or after a change) hands over as 0-d tensors."""
    arguments = (node.meta.get("grapharg") for node in fx.placeholders(gm))
    return frozenset(i for i, one in enumerate(arguments) if getattr(one, "pass_arg_as_tensor", False))


def _with_floats(gm: torch.fx.GraphModule, values: Mapping[int, float]) -> torch.fx.GraphModule:
    """The graph for these values: no tensor's value may decide what is traced."""
    if not values:
        return gm
    placeholders = fx.placeholders(gm)
    known = {placeholders[i]: value for i, value in values.items()}
    graph, copies = torch.fx.Graph(), dict[torch.fx.Node, Any]()
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target == "item" and node.args[0] in known:
            copies[node] = known[node.args[0]]
        else:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    return torch.fx.GraphModule(gm, graph)


def _warn_broken(program: Program) -> None:
    what = f"{len(program.regions)} regions" if len(program.regions) else "no region"
    warnings.warn(
        f"the model's graph is broken: this part has {what}, and only regions in one graph with the timestep are "
        "cached. TORCH_LOGS=graph_breaks shows where; an expert dispatch is mended by moeca_compile.prepare(model)",
        MoecaWarning,
        stacklevel=2,
    )
