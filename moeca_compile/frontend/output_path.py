"""Calls of a model whose output is cached as a whole: at a cheap step the model isn't called at all.

A compiled handle gets this in place of its way into Dynamo. A computed step takes that way; so the model may come as
one graph, in parts, or as no graph.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from types import FrameType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._pytree import TreeSpec, tree_flatten, tree_flatten_with_path, tree_unflatten

from moeca_compile.engine.handle_runtime import HandleRuntime
from moeca_compile.engine.intercept import INTERCEPTORS, interceptor_of
from moeca_compile.engine.output_program import OutputCall, OutputProgram, Outputs, output_regions
from moeca_compile.engine.step import refuse_gradients, run_step
from moeca_compile.engine.trajectories.agreement import agreement_of_weights
from moeca_compile.engine.trajectories.blocks import current
from moeca_compile.errors import CaptureError
from moeca_compile.frontend.calls import gate_of
from moeca_compile.frontend.handles import HandleState, Read, state_of
from moeca_compile.frontend.owner import WeightsSeen, modules_of
from moeca_compile.frontend.summary import announce
from moeca_compile.graph.capture import Input
from moeca_compile.passes.analysis.find_inputs import has_word_of_time

TIMESTEPS = ("timestep", "timesteps", "t", "time", "sigma", "sigmas")  # names of arguments
LATENTS = ("hidden_states", "sample", "latents", "latent", "x", "img", "z")
_GRAPH = -1  # in place of a graph's number


_PLAIN = {Tensor, nn.Parameter, bool, int, float, str, NoneType}  # what pytree takes for leaves


@dataclass(frozen=True, eq=False)
class CallStructure:
    """How the arguments of calls are nested.

    Attributes:
        spec: of positional and keyword arguments.
        names: of each leaf; "" inside another argument.
        timestep: position of its leaf.
    """

    spec: TreeSpec
    names: tuple[str, ...]
    timestep: int | None


class OutputPath:
    """In place of a handle's way into Dynamo.

    Args:
        handle: what torch.compile gave for a module.
        call: the handle's own way.
        read: the handle's options and schedule.
    """

    def __init__(self, handle: nn.Module, call: Callable[..., Any], read: Read) -> None:
        self.handle, self.call, self._read = weakref.ref(handle), call, read
        model = handle._orig_mod if isinstance(handle, OptimizedModule) else handle
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._structures: dict[Hashable, CallStructure] = {}
        self._results: dict[int, tuple[TreeSpec, list[Any]]] = {}  # by id of a program: where its outputs belong
        self._first: dict[int, tuple[list[Any], TreeSpec]] = {}  # by id of a call's leaves: what the model gave already
        self._models = frozenset(map(id, modules_of(handle)))
        self._bind(WeightsSeen(handle))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handle = self.handle()
        assert handle is not None
        if torch.is_grad_enabled():
            refuse_gradients((*tree_flatten((args, kwargs))[0], *self._weights))
        context: Any = handle.dynamo_ctx
        state = state_of(context, lambda _: self._read)
        runtime = state.runtime
        leaves, structure = self._flattened(args, kwargs)
        timestep = structure.timestep
        if timestep is not None and not isinstance(leaves[timestep], Tensor):
            leaves.append(torch.tensor(leaves[timestep], dtype=torch.float64))  # as the clock reads it
        runtime.models = self._models
        runtime.invalidate_if_weights_changed(_GRAPH, self._labels, self._weights)
        try:
            return self._run(leaves, structure, state, sys._getframe(1))
        finally:
            self._first.pop(id(leaves), None)

    def program(self, leaves: Sequence[Any], structure: CallStructure, runtime: HandleRuntime) -> OutputProgram:
        """The program for calls like this one. The first such call runs the model here, to see what it returns; that is
        handed on when the same call is computed."""
        timestep = structure.timestep
        kinds = [_kind(leaf) for position, leaf in enumerate(leaves) if position != timestep]
        key: Hashable = ("output", structure, tuple(kinds))
        found = runtime.find(key)
        if found is None:
            handle = self.handle()
            assert handle is not None
            with gate_of(handle.dynamo_ctx).lock:  # another thread's first call may be making it
                found = runtime.find(key) or (self._make(key, leaves, structure, runtime), None)
        assert isinstance(found[0], OutputProgram)
        return found[0]

    def _make(
        self, key: Hashable, leaves: Sequence[Any], structure: CallStructure, runtime: HandleRuntime
    ) -> OutputProgram:
        timestep = structure.timestep
        values, nested = self._first[id(leaves)] = self._called(structure, leaves)
        outputs = _tensors(values)
        if not outputs:
            raise CaptureError("the model returns no tensor, so there is no output to cache")
        names = structure.names
        latent = latent_of(leaves, names, outputs[0])
        at = len(leaves) - 1 if timestep is not None and len(leaves) > len(names) else timestep
        roles = names[timestep] if timestep is not None else "", names[latent] if latent is not None else ""
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and i not in (latent, at)]
        more = tuple(i for i in tensors if at is not None and i < len(names) and has_word_of_time(names[i]))
        condition = tuple(i for i in tensors if i not in more)
        regions = output_regions(outputs)
        call = OutputCall(lambda given: self.run(structure, given), regions, at, latent, condition, roles, more)
        weights = chain.from_iterable(module.parameters() for module in modules_of(self.handle()))
        ranks = agreement_of_weights(weights)
        program = OutputProgram(call, leaves, runtime.options, runtime.schedule, runtime.warned, key, ranks)
        self._results[id(program)] = nested, [None if isinstance(value, Tensor) else value for value in values]
        weakref.finalize(program, self._results.pop, id(program), None)
        runtime.place((key,), program)
        return program

    def run(self, structure: CallStructure, leaves: Sequence[Any]) -> Outputs:
        """Call the model."""
        return _tensors(self._called(structure, leaves)[0])

    def _bind(self, seen: WeightsSeen) -> None:
        self._seen, self._weights, self._labels = seen, seen.tensors, [*map(str, range(len(seen.tensors)))]

    def _run(self, leaves: Sequence[Any], structure: CallStructure, state: HandleState, frame: FrameType) -> Any:
        context, runtime = self.handle().dynamo_ctx, state.runtime  # type: ignore[union-attr]
        try:
            program = self.program(leaves, structure, runtime)
        except CaptureError as error:
            state.report_uncached(str(error))
            return tree_unflatten(*self._called(structure, leaves))
        interceptor = interceptor_of(context) if INTERCEPTORS.get() else None
        if interceptor is not None:
            return self._result(program, interceptor(OutputEntry(self, structure), leaves, runtime))
        if not program.is_announced:
            announce(program, state, modules_of(self.handle()))
        trajectory = current(runtime.ids, frame)
        running = runtime.running(trajectory)
        if trajectory is not None:
            trajectory.calls += 1
        return self._result(program, run_step(program.compiled_schedule, running, leaves, trajectory))

    def _called(self, structure: CallStructure, leaves: Sequence[Any]) -> tuple[list[Any], TreeSpec]:
        """What the model gives for these leaves, flattened."""
        first = self._first.pop(id(leaves), None)
        if first is not None:
            return first
        args, kwargs = tree_unflatten(list(leaves[: len(structure.names)]), structure.spec)
        handle = self.handle()
        was_replaced = not self._seen.hold(handle)
        result = tree_flatten(self.call(*args, **kwargs))
        if was_replaced or not self._seen.hold(handle):
            self._bind(WeightsSeen(handle))
        if not was_replaced:  # else the next call finds that they changed
            # FSDP, offloading and casts put other tensors there while the model runs: it is the same model
            runtime = state_of(handle.dynamo_ctx, lambda _: self._read).runtime  # type: ignore[union-attr]
            runtime.accept_weights(_GRAPH, self._labels, self._weights)
        return result

    def _result(self, program: OutputProgram, outputs: Sequence[Any]) -> Any:
        structure, values = self._results[id(program)]
        tensors = iter(outputs)
        return tree_unflatten([next(tensors) if value is None else value for value in values], structure)

    def _flattened(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], CallStructure]:
        """The leaves of a call, and their structure. Plain arguments are flattened by hand: it is ten times as fast."""
        leaves, key = [*args, *kwargs.values()], (len(args), *kwargs)
        is_plain = _PLAIN.issuperset(map(type, leaves))
        structure = self._structures.get(key) if is_plain else None
        if structure is None:
            leaves, spec = tree_flatten((args, kwargs))
            if spec not in self._structures:
                self._structures[spec] = _structure_of(spec, self._names(args, kwargs))
            structure = self._structures[spec]
            if is_plain:
                self._structures[key] = structure
        return leaves, structure

    def _names(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[str, ...]:
        names = []
        for path, _ in tree_flatten_with_path((args, kwargs))[0]:
            where = getattr(path[1], "idx", getattr(path[1], "key", None))
            plain = len(path) == 2
            if isinstance(where, int):
                where = self._parameters[where] if where < len(self._parameters) else ""
            names.append(str(where) if plain else "")
        return tuple(names)


@cache
def _structure_of(spec: TreeSpec, names: tuple[str, ...]) -> CallStructure:
    """One object for the calls of all models: programs are found by it, and state is handed over between equal ones."""
    return CallStructure(spec, names, timestep_of(names))


@dataclass(frozen=True)
class OutputEntry:
    """One intercepted call of a handle: what an interceptor asks of it, as of a graph's entry."""

    path: OutputPath
    structure: CallStructure

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The leaves of the call."""
        return tuple(Input(name, name, False) for name in self.structure.names)

    def place(self, args: Sequence[Any], runtime: HandleRuntime) -> tuple[OutputProgram, Sequence[Any]]:
        """The program for the call, and its arguments."""
        return self.path.program(args, self.structure, runtime), args

    def run_uncached(self, args: Sequence[Any], reason: str) -> Outputs:
        """Call the model."""
        return self.path.run(self.structure, args)


def _tensors(values: Sequence[Any]) -> Outputs:
    return tuple(value for value in values if isinstance(value, Tensor))


def timestep_of(names: Sequence[str]) -> int | None:
    """The argument that is the timestep, by the arguments' names."""
    return next((names.index(name) for name in TIMESTEPS if name in names), None)


def latent_of(leaves: Sequence[Any], names: Sequence[str], output: Tensor) -> int | None:
    """The argument that the output is a change of: one with such a name, or any; it has the output's shape, but for its
    channels."""
    fits = [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor)
        and leaf.is_floating_point()
        and leaf.dim() == output.dim() >= 2
        and leaf.shape[0] == output.shape[0]
        and leaf.shape[2:] == output.shape[2:]
        and leaf.shape[1] <= output.shape[1]
    ]
    named = [i for name in LATENTS for i in fits if i < len(names) and names[i] == name]
    return next(iter((*named, *fits)), None)


def _kind(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    if leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
        return type(leaf), leaf
    return type(leaf), id(leaf)
