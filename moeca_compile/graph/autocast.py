"""Autocast isn't in a traced graph: it happens in the dispatcher. Here its casts become nodes.

Which op casts which argument is asked of the dispatcher itself, op by op, on fake tensors: no list of ops to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._ops import OpOverload
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from moeca_compile.errors import CaptureError
from moeca_compile.graph import fx

DEVICES = ("cpu", "cuda")

Casts = tuple[tuple[str, torch.dtype], ...]  # (device type, dtype) of each enabled autocast


def ambient_autocast() -> Casts:
    """The autocasts that are on now; part of a call's signature."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in DEVICES if torch.is_autocast_enabled(d))


@contextmanager
def autocast_is(casts: Casts) -> Iterator[None]:
    """Run with exactly these autocasts on."""
    wanted = dict(casts)
    with ExitStack() as stack:
        for device in DEVICES:
            on = device in wanted
            if on or torch.is_autocast_enabled(device):
                context = torch.autocast(device, dtype=wanted.get(device), enabled=on, cache_enabled=False)
                stack.enter_context(context)
        yield


def without_autocast(run: Callable[..., Any], unpack: bool = False) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """The ambient casts are in the graph: applied again while it runs, they would change what must not be cast.
    `unpack`: `run` takes its arguments one by one."""

    def runs(args: Sequence[Any]) -> Sequence[Any]:
        if not torch._C._is_any_autocast_enabled():
            return run(*args) if unpack else run(args)  # type: ignore[no-any-return]
        with autocast_is(()):
            return run(*args) if unpack else run(args)  # type: ignore[no-any-return]

    return runs


def materialize_casts(gm: GraphModule, ambient: Casts) -> None:
    """Write the conversions of the ambient autocast, and of autocast regions inside the model, into the graph."""
    if not ambient and not any(node.target is _enter_autocast for node in gm.graph.nodes):
        return
    current = dict(ambient)
    outer: dict[Node, dict[str, torch.dtype]] = {}
    for node in list(gm.graph.nodes):
        if node.target is _enter_autocast:
            outer[node] = dict(current)
            device, dtype, enabled, *_ = node.args
            if enabled:
                current[device] = dtype or torch.get_autocast_dtype(device)
            else:
                current.pop(device, None)
        elif node.target is _exit_autocast:
            current = outer.pop(node.args[0])
        elif node.op == "call_function":
            if current and isinstance(node.target, OpOverload):
                _cast_inputs(gm, node, tuple(current.items()))
            fx.refresh(node)
    for node in reversed(gm.graph.nodes):
        if node.target in (_enter_autocast, _exit_autocast):
            gm.graph.erase_node(node)
    gm.recompile()


def _cast_inputs(gm: GraphModule, node: Node, casts: Casts) -> None:
    wanted = _casts_of(node, casts)
    for source in node.all_input_nodes:
        dtype = wanted.get(id(fx.value(source)))
        if dtype is not None:
            with gm.graph.inserting_before(node):
                node.replace_input_with(
                    source, fx.call(gm, torch.ops.aten._to_copy.default, (source,), {"dtype": dtype}, like=node)
                )


class _Watch(TorchDispatchMode):
    """Notes the first dtype that each of some tensors is converted to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and "dtype" in kwargs:
            self.seen.setdefault(id(args[0]), kwargs["dtype"])
        return func(*args, **kwargs)


Conversions = dict[int, torch.dtype]  # by id of a fake value


def _casts_of(node: Node, casts: Casts) -> Conversions:
    """Which of `node`'s arguments these autocasts convert before the op, and to what.

    The dispatcher is watched; but an op's own code converts too (SDPA and rms_norm compute in float32), and a composite
    op (einsum) is converted inside. So a reading counts only if the op, without autocast, gives the dtypes that it
    gave with it.

    Raises:
        CaptureError: no reading does.
    """
    if node.target is torch.ops.aten._to_copy.default:
        return {}
    expected = _dtypes(fx.value(node))
    readings: tuple[Callable[[Node, Casts], Conversions], ...] = (_watched, lambda *_: {}, _casts_of_linears)
    for read in readings:
        found = read(node, casts)
        if _result_dtypes(node, found) == expected:
            return found
    raise CaptureError(
        f"{node.name} ({node.target}, {fx.where(node)}): what autocast converts inside it can't be told. Put it under "
        "`with torch.autocast(device_type, enabled=False)`, or convert the model and leave autocast off"
    )


def _watched(node: Node, casts: Casts) -> Conversions:
    args, kwargs = _arguments(node)
    with fx.fake_mode_of((args, kwargs)), autocast_is(casts), _Watch() as watch:
        node.target(*args, **kwargs)  # type: ignore[operator]
    found: Conversions = watch.seen
    return found


def _casts_of_linears(node: Node, casts: Casts) -> Conversions:
    values = [value for value in map(fx.tensor, node.all_input_nodes) if value is not None]
    dtype = dict(casts).get(values[0].device.type) if values else None
    wide = (dtype, torch.float64)  # autocast never touches float64
    return {id(v): dtype for v in values if dtype is not None and v.is_floating_point() and v.dtype not in wide}


def _result_dtypes(node: Node, found: Conversions) -> list[torch.dtype] | None:
    """What the op gives with these conversions made; None where it refuses."""

    def converted(source: Node) -> Any:
        value = fx.value(source)
        return value.to(found[id(value)]) if id(value) in found else value

    tree = (node.args, node.kwargs)
    with fx.fake_mode_of(tree_map_only(Node, fx.value, tree)):
        args, kwargs = tree_map_only(Node, converted, tree)
        try:
            return _dtypes(node.target(*args, **kwargs))  # type: ignore[operator]
        except RuntimeError:  # dtypes that don't go together
            return None


def _dtypes(value: Any) -> list[torch.dtype]:
    return [leaf.dtype for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _arguments(node: Node) -> Any:
    return tree_map_only(Node, fx.value, (node.args, node.kwargs))
