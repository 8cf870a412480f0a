"""The fast path of a frozen trajectory: its calls skip Dynamo's guards, which may take longer than a reused step.

At every call Dynamo checks that the model is still the one it traced, weight by weight, and collects the weights again.
If the caller guarantees that the model doesn't change until the trajectory ends, the first call of each kind is
recorded: which of the graph's arguments came from the call, and which of the call's results came from the graph. Later
calls of that kind run the graph directly. Any other call goes through Dynamo.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.source import LocalSource
from torch.fx import Node
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from moeca_compile.engine.intercept import INTERCEPTORS
from moeca_compile.engine.trajectories.blocks import innermost
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.errors import StateError
from moeca_compile.graph.autocast import ambient_autocast

Step = Callable[[Sequence[Any], Trajectory | None], tuple[Any, ...]]

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class GraphRun:
    """One run of a full model's graph.

    Attributes:
        step: runs the graph again, for arguments and a trajectory.
        args: of the graph.
        others: positions of the arguments that are no weights and aren't determined by the kind of call.
        results: of the graph.
    """

    step: Step
    args: Sequence[Any]
    others: Sequence[int]
    results: tuple[Any, ...]


class _Observed(threading.local):
    runs: list[GraphRun] | None = None  # graphs that ran in this thread; None: nothing is recorded


OBSERVED = _Observed()


def follows_from_call(placeholder: Node) -> bool:
    """Whether a number that Dynamo passes is an argument of the call, an attribute of the model, or a size of one of
    their tensors. Such a number is equal for all calls of one kind."""
    source: Any = getattr(placeholder, "_dynamo_source", None)
    while getattr(source, "base", None) is not None:
        source = source.base
    return isinstance(source, LocalSource)


class FastPath:
    """Replaces a handle's entry into Dynamo. Calls that can't use the fast path go on to Dynamo as before.

    Attributes:
        handle: the compiled module (a weak reference).
        call: the handle's own entry into Dynamo.
    """

    def __init__(self, handle: torch.nn.Module, call: Callable[..., Any]) -> None:
        self.handle, self.call = weakref.ref(handle), call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trajectory = innermost()
        if trajectory is None or trajectory.frozen is None or trajectory.frozen is not self.handle():
            return self.call(*args, **kwargs)
        leaves: Sequence[Any] = args
        spec: Hashable = len(args)
        kind = None if kwargs else _kind(args)
        if kind is None:  # an argument is a container
            leaves, spec = tree_flatten((args, kwargs))
            kind = _kind(leaves)
        if kind is None or OBSERVED.runs is not None or INTERCEPTORS.get():
            return self.call(*args, **kwargs)
        fast_call: _FastCall | None = trajectory.fast_calls.get((spec, kind))
        if fast_call is not None:
            return fast_call.run(leaves, trajectory)
        runs: list[GraphRun] = []
        OBSERVED.runs = runs
        try:
            result = self.call(*args, **kwargs)
        finally:
            OBSERVED.runs = None
        recorded = _record(runs[0], leaves, result) if len(runs) == 1 else None
        if recorded is not None:
            trajectory.fast_calls[spec, kind] = recorded
        return result


@dataclass(frozen=True)
class _FastCall:
    """The recorded path from a call's leaves to its result.

    Attributes:
        step: runs the graph.
        args: of the graph, with None at the positions that `takes` fills.
        takes: pairs of a position among `args` and a position among the call's leaves.
        gives: for each leaf of the call's result, its position among the graph's results, or None and a constant.
        spec: of the call's result.
    """

    step: Step
    args: list[Any]
    takes: tuple[tuple[int, int], ...]
    gives: tuple[tuple[int | None, Any], ...]
    spec: TreeSpec

    def run(self, leaves: Sequence[Any], trajectory: Trajectory) -> Any:
        args = list(self.args)
        for position, leaf in self.takes:
            args[position] = leaves[leaf]
        results = self.step(args, trajectory)
        return tree_unflatten([value if i is None else results[i] for i, value in self.gives], self.spec)


def _record(run: GraphRun, leaves: Sequence[Any], result: Any) -> _FastCall | None:
    """The path of a call that ran one graph. None: an argument of the graph that isn't one of the call's leaves, or a
    result of the call that isn't one of the graph's."""
    if not all(output is None or isinstance(output, Tensor) for output in run.results):
        return None  # a number may change from call to call
    leaf_of = {id(leaf): i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    result_of = {id(output): i for i, output in enumerate(run.results) if isinstance(output, Tensor)}
    args, takes = list(run.args), []
    for position in run.others:
        leaf = leaf_of.get(id(args[position]))
        if leaf is None:
            return None
        takes.append((position, leaf))
    for position in run.others:
        args[position] = None  # no reference to an input is kept
    gives: list[tuple[int | None, Any]] = []
    result_leaves, spec = tree_flatten(result)
    for value in result_leaves:
        if id(value) in result_of:
            gives.append((result_of[id(value)], None))
        elif isinstance(value, _PLAIN):
            gives.append((None, value))
        else:
            return None
    return _FastCall(run.step, args, tuple(takes), tuple(gives), spec)


def _kind(leaves: Sequence[Any]) -> Hashable | None:
    """Everything about a call's leaves and the current modes that Dynamo may guard on; None: a leaf of another type."""
    kind: list[Hashable] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), ambient_autocast()]
    first: dict[int, int] = {}  # by id of a tensor, its first position: a tensor passed twice has another graph
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            kind.append(
                (first.setdefault(id(leaf), i), type(leaf), leaf.shape, leaf.stride(), leaf.dtype, leaf.device,
                 leaf.requires_grad, leaf.is_inference())
            )  # fmt: skip
        elif isinstance(leaf, _PLAIN):
            kind.append((type(leaf), leaf))
        else:
            return None
    return tuple(kind)


def install_fast_path(model: object) -> None:
    """Install the fast path in a compiled module.

    Raises:
        StateError: the model isn't a compiled module.
    """
    name = "forward" if isinstance(model, OptimizedModule) else "_compiled_call_impl"
    call = getattr(model, name, None)
    if call is None or not isinstance(model, torch.nn.Module):
        raise StateError(
            f"trajectory(frozen=True) wants the compiled module itself, and got {type(model).__name__}: pass what "
            "torch.compile gave for a module, or leave frozen out"
        )
    if not isinstance(call, FastPath):
        setattr(model, name, FastPath(model, call))
