"""Calls of a frozen trajectory: past Dynamo, whose guards and argument lists take longer than many a reused step.

Dynamo proves at every call that the model is still the one it traced, weight by weight, and gathers the weights again.
Where the caller promises that nothing touches the model until the trajectory ends, the first call of each kind shows
all there is to know: which of the graph's arguments came from the call, and which of its results the call gave. The
next ones of that kind go from there. A call of another kind, or one that can't be traced back so, takes Dynamo's way.
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
    """One run of a whole model's graph. `others`: positions of the arguments that neither are weights nor follow from
    the kind of call."""

    step: Step
    args: Sequence[Any]
    others: Sequence[int]
    results: tuple[Any, ...]


class _Observed(threading.local):
    runs: list[GraphRun] | None = None  # graphs that ran in this thread, where someone wants to know


OBSERVED = _Observed()


def follows_from_call(placeholder: Node) -> bool:
    """Of a number that Dynamo hands over: whether it is one of the call's, or of the model's, or the size of a tensor
    of theirs. Calls of one kind have the same."""
    source: Any = getattr(placeholder, "_dynamo_source", None)
    while getattr(source, "base", None) is not None:
        source = source.base
    return isinstance(source, LocalSource)


class FastPath:
    """In place of a handle's way into Dynamo, which all other calls take as before."""

    def __init__(self, handle: torch.nn.Module, call: Callable[..., Any]) -> None:
        self.handle, self.call = weakref.ref(handle), call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trajectory = innermost()
        if trajectory is None or trajectory.frozen is None or trajectory.frozen is not self.handle():
            return self.call(*args, **kwargs)
        leaves: Sequence[Any] = args
        spec: Hashable = len(args)
        kind = None if kwargs else _kind(args)
        if kind is None:  # something among them has leaves of its own
            leaves, spec = tree_flatten((args, kwargs))
            kind = _kind(leaves)
        if kind is None or OBSERVED.runs is not None or INTERCEPTORS.get():
            return self.call(*args, **kwargs)
        way: _Way | None = trajectory.ways.get((spec, kind))
        if way is not None:
            return way.go(leaves, trajectory)
        runs: list[GraphRun] = []
        OBSERVED.runs = runs
        try:
            result = self.call(*args, **kwargs)
        finally:
            OBSERVED.runs = None
        found = _way(runs[0], leaves, result) if len(runs) == 1 else None
        if found is not None:
            trajectory.ways[spec, kind] = found
        return result


@dataclass(frozen=True)
class _Way:
    """From a call's leaves to its result. `takes`: positions among the graph's arguments, and of the leaf there."""

    step: Step
    args: list[Any]
    takes: tuple[tuple[int, int], ...]
    gives: tuple[tuple[int | None, Any], ...]  # which of the results; None: a constant
    spec: TreeSpec

    def go(self, leaves: Sequence[Any], trajectory: Trajectory) -> Any:
        args = list(self.args)
        for position, leaf in self.takes:
            args[position] = leaves[leaf]
        results = self.step(args, trajectory)
        return tree_unflatten([value if i is None else results[i] for i, value in self.gives], self.spec)


def _way(seen: GraphRun, leaves: Sequence[Any], result: Any) -> _Way | None:
    """None: an argument that isn't the call's, or a result that isn't the graph's."""
    leaf_of = {id(one): i for i, one in enumerate(leaves) if isinstance(one, Tensor)}
    result_of = {id(one): i for i, one in enumerate(seen.results) if isinstance(one, Tensor)}
    given, spec = tree_flatten(result)
    if not all(one is None or isinstance(one, Tensor) for one in seen.results):  # a number may change from call to call
        return None
    if any(id(seen.args[position]) not in leaf_of for position in seen.others):
        return None
    if any(id(one) not in result_of and not isinstance(one, _PLAIN) for one in given):
        return None
    args = list(seen.args)
    for position in seen.others:
        args[position] = None  # nobody's input is kept
    return _Way(
        seen.step,
        args,
        tuple((position, leaf_of[id(seen.args[position])]) for position in seen.others),
        tuple((result_of.get(id(one)), None if id(one) in result_of else one) for one in given),
        spec,
    )


def _kind(leaves: Sequence[Any]) -> Hashable | None:
    """What Dynamo may have built a graph for, and the modes that it runs in; None: something that can't be told."""
    found: list[Hashable] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), ambient_autocast()]
    first: dict[int, int] = {}  # where a tensor comes first: one given twice has a graph of its own
    for i, one in enumerate(leaves):
        if isinstance(one, Tensor):
            found.append(
                (first.setdefault(id(one), i), type(one), one.shape, one.stride(), one.dtype, one.device,
                 one.requires_grad, one.is_inference())
            )  # fmt: skip
        elif isinstance(one, _PLAIN):
            found.append((type(one), one))
        else:
            return None
    return tuple(found)


def install_fast_path(model: object) -> None:
    """Give a compiled model its shortcut, for frozen trajectories of it.

    Raises:
        StateError: it is no compiled module.
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
