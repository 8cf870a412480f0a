"""The only generic FX helpers: who feeds whom, what a node's value looks like, the one mark we put on nodes."""

from __future__ import annotations

import copy
import heapq
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils._pytree import tree_leaves

from moeca_compile.errors import InvariantError
from moeca_compile.schedule import Act

aten = torch.ops.aten
MARK = "moeca"  # the entry of a node's meta that holds our mark
NOTED_SHAPE = "moeca_shape"  # and the one that holds the sizes, where they depend on data

# Ops that only rename, reshape or recast a value: what lies behind them is still the same data.
VIEWS = frozenset(
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
        aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.flatten.using_ints, aten.unflatten.int,
        aten.transpose.int, aten.permute.default, aten.t.default, aten.expand.default, aten.clone.default,
        aten.contiguous.default, aten._to_copy.default, aten.to.dtype, aten.alias.default, aten.detach.default,
    }
)  # fmt: skip
CASTS = frozenset({aten._to_copy.default, aten.to.dtype})
# Ops that take a part of a value; with views, what a packed weight goes through on its way to a matmul.
PARTS = frozenset(
    {
        aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
        aten.unbind.int, aten.narrow.default, operator.getitem,
    }
)  # fmt: skip
MATMULS = frozenset(
    {
        aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default,
        aten.baddbmm.default, aten.einsum.default, aten._grouped_mm.default,
    }
)  # fmt: skip
SDPA = aten.scaled_dot_product_attention.default


class Cone:
    """Ancestor sets of every node of a graph, as bit masks: O(1) questions after one pass."""

    def __init__(self, gm: GraphModule) -> None:
        self.nodes: list[Node] = list(gm.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self._up: list[int] = []
        for node in self.nodes:
            mask = 0
            for source in node.all_input_nodes:
                i = self.index[source]
                mask |= self._up[i] | (1 << i)
            self._up.append(mask)

    def feeds(self, above: Node, below: Node) -> bool:
        """Whether `above` is a proper ancestor of `below`."""
        return bool(self._up[self.index[below]] >> self.index[above] & 1)

    def ancestors(self, node: Node) -> int:
        return self._up[self.index[node]]

    def between(self, above: Node, below: Node) -> list[Node]:
        """The nodes on any path from `above` (left out) to `below` (included), in graph order."""
        low, high = self.index[above], self.index[below]
        up = self._up[high]
        inner = [i for i in range(low + 1, high) if up >> i & 1 and self._up[i] >> low & 1]
        return [self.nodes[i] for i in inner] + [below]


def value(node: Node) -> Any:
    """The fake tensor (or tuple, or number) that the tracer saw at `node`."""
    return node.meta.get("val")


def arg(node: Node, position: int) -> Node:
    """An argument that must be a node."""
    argument = node.args[position]
    if not isinstance(argument, Node):
        raise InvariantError(f"{node.name}: argument {position} is {argument!r}, expected a node")
    return argument


def need(node: Node) -> torch.Tensor:
    """The fake tensor at a node that must have one."""
    val = tensor(node)
    if val is None:
        raise InvariantError(f"{node.name} has no tensor value")
    return val


def tensor(node: Node) -> torch.Tensor | None:
    val = node.meta.get("val")
    return val if isinstance(val, torch.Tensor) else None


def shape(node: Node) -> tuple[int, ...]:
    """The sizes at `node`; those that depend on data as they were when the graph was captured."""
    noted: tuple[int, ...] | None = node.meta.get(NOTED_SHAPE)
    if noted:
        return noted
    val = node.meta.get("val")
    return tuple(map(int, val.shape)) if isinstance(val, torch.Tensor) else ()


def copy_noted_shape(source: Node, node: Node) -> None:
    """Note at `node` the sizes that were noted at `source`, if any: both have the same shape."""
    if NOTED_SHAPE in source.meta:
        node.meta[NOTED_SHAPE] = source.meta[NOTED_SHAPE]


def fills(part: Node, full: Node) -> bool:
    """Whether `part` has the shape of `full`, or holds one sample for its whole batch, broadcast."""
    part_shape, full_shape = shape(part), shape(full)
    one_sample = len(part_shape) == len(full_shape) > 1 and part_shape[0] == 1
    return part_shape == full_shape or (one_sample and part_shape[1:] == full_shape[1:])


def has_unknown_size(node: Node) -> bool:
    """Whether a size of the tensor at `node` depends on data."""
    val = tensor(node)
    return val is not None and not all(isinstance(size, int) for size in val.shape)


def nodes_of(argument: object) -> Iterator[Node]:
    """The nodes in a nested argument of a node."""
    if isinstance(argument, Node):
        yield argument
    elif isinstance(argument, (tuple, list)):
        for item in argument:
            yield from nodes_of(item)


def strip(node: Node, through: Callable[[Node], bool]) -> Node:
    """Walk up first arguments while `through` holds."""
    while through(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def is_view(node: Node) -> bool:
    return node.op == "call_function" and node.target in VIEWS


def is_experts(node: Node) -> bool:
    """Whether the node is our `moeca::experts` call."""
    return isinstance(node.target, OpOverload) and node.target.name() == "moeca::experts"


def is_collective(node: Node) -> bool:
    """Whether ranks exchange something here: a functional collective, with or without autograd, or the wait for one."""
    return getattr(node.target, "namespace", "").startswith("_c10d_functional")


def is_view_or_part(node: Node) -> bool:
    return node.op == "call_function" and (node.target in VIEWS or node.target in PARTS)


def copied(gm: GraphModule) -> GraphModule:
    """A copy of the graph over the same tensors; names stay, each node has a meta dict of its own.

    Its Python code is generated when it first runs, not after each pass.
    """
    twin = _LazyGraphModule(gm, copy.deepcopy(gm.graph))
    twin.meta = dict(gm.meta)
    return twin


def code_of(gm: GraphModule) -> Callable[..., Any]:
    """The graph's own Python code, generated now if it wasn't yet."""
    _LazyGraphModule.force_recompile(gm)
    return gm.forward


def placeholders(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def has_effect(node: Node) -> bool:
    """Whether a dead node must stay. FX also keeps what may draw random numbers (SDPA's dropout); we don't."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)


def output_node(gm: GraphModule) -> Node:
    output: Node = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    return output


def resolve(gm: GraphModule, names: Iterable[str]) -> list[Node]:
    """Nodes by name.

    Raises:
        InvariantError: a name that the graph doesn't have.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    requested = list(names)
    missing = [name for name in requested if name not in nodes]
    if missing:
        raise InvariantError(f"the graph has no node named {missing}")
    return [nodes[name] for name in requested]


def resort(gm: GraphModule) -> None:
    """Put every node behind what it reads, and change the order no more than that."""
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    waiting = {node: len(node.all_input_nodes) for node in place}
    ready = [place[node] for node, count in waiting.items() if not count]
    heapq.heapify(ready)
    nodes, last = list(place), gm.graph._root
    while ready:
        node = nodes[heapq.heappop(ready)]
        last.append(node)
        last = node
        for user in node.users:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, place[user])


def where(node: Node) -> str:
    """`file.py:12` of the model's own line that made `node`, or ''."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{lines[-1][0].rsplit('/', 1)[-1]}:{lines[-1][1]}" if lines else ""


def code(node: Node) -> str:
    """The text of the model's own line that made `node`, or ''."""
    lines = re.findall(r'File "[^"]+", line \d+.*\n +(\S.*)', node.meta.get("stack_trace") or "")
    return str(lines[-1]).rstrip() if lines and not lines[-1].startswith('File "') else ""


def module_path(node: Node) -> str:
    """Dotted path of the innermost module that made `node`, or ''; a label, never evidence."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return dotted(path)


def dotted(source: str) -> str:
    """Turn Dynamo's `L['self']._modules['blocks']._modules['0']._parameters['weight']` into `blocks.0.weight`."""
    # from the model on: a local, a global, the cell of a function that closes over it, or whose method one of them is
    begin = r"^(.*\.cell_contents|[LG]\['[^']+'\])((\.\w+)*\.__self__)?(?=\.(_modules|_parameters|_buffers|__dict__))"
    inside = re.sub(begin, "", source)
    parts = re.findall(r"\['?([^'\]]+)'?\]|\.?(\w+)", inside)
    skip = {"_modules", "_parameters", "_buffers", "__dict__", "L", "G", "self", "_orig_mod"}
    return ".".join(word for word in (a or b for a, b in parts) if word not in skip)


@dataclass(frozen=True, slots=True)
class Mark:
    """Our one mark on a node: this is output `output` of region `region` (a column), which does `action` here."""

    region: int
    output: int
    action: Act


def set_mark(node: Node, mark: Mark) -> None:
    node.meta[MARK] = mark


def marked(gm: GraphModule) -> list[tuple[Node, Mark]]:
    """Marked nodes in graph order.

    Raises:
        InvariantError: two nodes carry the same mark (some pass copied our meta).
    """
    marks = [(node, node.meta[MARK]) for node in gm.graph.nodes if MARK in node.meta]
    roles = [(mark.region, mark.output) for _, mark in marks]
    if len(set(roles)) != len(roles):
        raise InvariantError(f"marks appear twice: {sorted(r for r in roles if roles.count(r) > 1)}")
    return marks


def call(
    gm: GraphModule, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None, like: Node | None = None
) -> Node:
    """Add a call at the insertion point, with its fake value computed and the origin of `like` copied."""
    node = gm.graph.call_function(target, tuple(args), kwargs or {})
    unwrapped: Any = torch.fx.node.map_arg((node.args, node.kwargs), value)
    with fake_mode_of(unwrapped):
        node.meta["val"] = target(*unwrapped[0], **unwrapped[1])
    for name in ("stack_trace", "nn_module_stack"):
        if like is not None and name in like.meta:
            node.meta[name] = like.meta[name]
    return node


def arguments_of(node: Node) -> dict[str, Any]:
    """The arguments of an operator's call by name, for those that were given."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def refresh(node: Node) -> None:
    """Recompute the fake value of a call: those of its inputs may have changed."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
    with fake_mode_of((args, kwargs)):
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def fake_mode_of(tree: object) -> AbstractContextManager[Any]:
    """The mode of the fake tensors in `tree`; nothing at all where there are none."""
    return fake_mode(tree) or nullcontext()


def fake_mode(tree: object) -> FakeTensorMode | None:
    """The mode of the first fake tensor in `tree`."""
    return next((leaf.fake_mode for leaf in tree_leaves(tree) if isinstance(leaf, FakeTensor)), None)
