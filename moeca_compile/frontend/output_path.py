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
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._pytree import TreeSpec, tree_flatten, tree_flatten_with_path, tree_unflatten

from moeca_compile.engine.handle_runtime import HandleRuntime
from moeca_compile.engine.intercept import INTERCEPTORS, interceptor_of
from moeca_compile.engine.output_program import OutputCall, OutputProgram, Outputs
from moeca_compile.engine.step import run_step
from moeca_compile.engine.trajectories.blocks import current
from moeca_compile.errors import CaptureError, StateError
from moeca_compile.frontend.calls import gate_of
from moeca_compile.frontend.handles import Read, state_of
from moeca_compile.frontend.owner import parameters_of
from moeca_compile.graph.capture import Input

TIMESTEPS = ("timestep", "timesteps", "t", "time", "sigma", "sigmas")  # names of arguments
LATENTS = ("hidden_states", "sample", "latents", "latent", "x", "img", "z")
_GRAPH = -1  # in place of a graph's number


@dataclass(frozen=True)
class _Arguments:
    """The arguments of calls of one structure: the name of each leaf, "" inside another argument, and the timestep."""

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
        self._arguments: dict[TreeSpec, _Arguments] = {}
        self._results: dict[int, tuple[TreeSpec, list[Any]]] = {}  # by id of a program: where its outputs belong
        self._weights: tuple[Tensor, ...] = parameters_of(handle)
        self._spec: TreeSpec | None = None  # of the call that is intercepted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handle = self.handle()
        assert handle is not None
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self._weights):
            raise StateError(
                "moeca is for inference: grad mode is on and some tensors require grad. Call the model under "
                "torch.no_grad() or torch.inference_mode(), or model.requires_grad_(False)"
            )
        context: Any = handle.dynamo_ctx
        runtime = state_of(context, lambda _: self._read).runtime
        leaves, spec = tree_flatten((args, kwargs))
        if spec not in self._arguments:
            self._arguments[spec] = self._named(args, kwargs)
        timestep = self._arguments[spec].timestep
        if timestep is not None and not isinstance(leaves[timestep], Tensor):
            leaves.append(torch.tensor(leaves[timestep], dtype=torch.float64))  # as the clock reads it
        runtime.invalidate_if_weights_changed(_GRAPH, [*map(str, range(len(self._weights)))], self._weights)
        if INTERCEPTORS.get():
            interceptor = interceptor_of(context)
            if interceptor is not None:
                self._spec = spec
                return self._result(self._program(leaves, spec, runtime), interceptor(self, leaves, runtime))
        try:
            program = self._program(leaves, spec, runtime)
        except CaptureError as error:
            state_of(context, lambda _: self._read).report_uncached(str(error))
            return self.call(*args, **kwargs)
        trajectory = current(runtime.ids, sys._getframe(1))
        running = runtime.running(trajectory)
        if trajectory is not None:
            trajectory.calls += 1
        return self._result(program, run_step(program.compiled_schedule, running, leaves, trajectory))

    # -- what an interceptor asks of it, as of a graph's entry ------------------------------------------------------

    def place(self, args: Sequence[Any], runtime: HandleRuntime) -> tuple[OutputProgram, Sequence[Any]]:
        """The program for such a call, and its arguments.

        Raises:
            CaptureError: the model returns no tensor.
        """
        assert self._spec is not None
        return self._program(args, self._spec, runtime), args

    def run_uncached(self, args: Sequence[Any], reason: str) -> tuple[Any, ...]:
        """Call the model."""
        assert self._spec is not None
        return self._run(self._spec, args)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The leaves of the intercepted call."""
        assert self._spec is not None
        return tuple(Input(name, name, False) for name in self._arguments[self._spec].names)

    # -- calls ------------------------------------------------------------------------------------------------------

    def _program(self, leaves: Sequence[Any], spec: TreeSpec, runtime: HandleRuntime) -> OutputProgram:
        """The program for calls like this one; its first call is made here, to see what the model returns."""
        timestep = self._arguments[spec].timestep
        kinds = [_kind(leaf) for position, leaf in enumerate(leaves) if position != timestep]
        key: Hashable = ("output", spec, tuple(kinds))
        found = runtime.find(key)
        if found is not None:
            assert isinstance(found[0], OutputProgram)
            return found[0]
        args, kwargs = tree_unflatten(list(leaves[: spec.num_leaves]), spec)
        values, structure = tree_flatten(self.call(*args, **kwargs))
        outputs = tuple(value for value in values if isinstance(value, Tensor))
        if not outputs:
            raise CaptureError("the model returns no tensor, so there is no output to cache")
        names = self._arguments[spec].names
        latent = _latent(leaves, names, outputs[0])
        at = len(leaves) - 1 if timestep is not None and len(leaves) > spec.num_leaves else timestep
        roles = names[timestep] if timestep is not None else "", names[latent] if latent is not None else ""
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and i not in (latent, at)]
        call = OutputCall(lambda given: self._run(spec, given), outputs, len(leaves), at, latent, tuple(tensors), roles)
        program = OutputProgram(call, leaves, runtime.options, runtime.schedule, runtime.warned)
        self._results[id(program)] = structure, [None if isinstance(value, Tensor) else value for value in values]
        weakref.finalize(program, self._results.pop, id(program), None)
        runtime.place((key,), program)
        return program

    def _run(self, spec: TreeSpec, leaves: Sequence[Any]) -> Outputs:
        handle = self.handle()
        weights = parameters_of(handle)
        if [*map(id, weights)] != [*map(id, self._weights)]:
            self._weights = weights  # the next call finds that they changed
        args, kwargs = tree_unflatten(list(leaves[: spec.num_leaves]), spec)
        values, _ = tree_flatten(self.call(*args, **kwargs))
        return tuple(value for value in values if isinstance(value, Tensor))

    def _result(self, program: OutputProgram, outputs: Sequence[Any]) -> Any:
        structure, values = self._results[id(program)]
        tensors = iter(outputs)
        return tree_unflatten([next(tensors) if value is None else value for value in values], structure)

    def _named(self, args: Sequence[Any], kwargs: dict[str, Any]) -> _Arguments:
        names = []
        for path, _ in tree_flatten_with_path((args, kwargs))[0]:
            where = getattr(path[1], "idx", getattr(path[1], "key", None))
            plain = len(path) == 2
            if isinstance(where, int):
                where = self._parameters[where] if where < len(self._parameters) else ""
            names.append(str(where) if plain else "")
        timestep = next((names.index(name) for name in TIMESTEPS if name in names), None)
        return _Arguments(tuple(names), timestep)


def _latent(leaves: Sequence[Any], names: Sequence[str], output: Tensor) -> int | None:
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


def install_output_path(handle: nn.Module, read: Read) -> None:
    """Give a compiled handle this way for all its calls."""
    gate_of(handle.dynamo_ctx).covered = True
    handle.forward = OutputPath(handle, handle.forward, read)
