"""Equal blocks are traced once: while `capture` runs Dynamo's graph, the nodes of a block that was met before, with
inputs of the same kinds, are copied.

A block is copied only where this can't be seen afterwards. What it reads and gives must be functional tensors and plain
numbers, its nodes may read nothing else, and nobody may write into one of these tensors in place, before or after: a
copy's result isn't a view of what the original's result is a view of.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import Node, Proxy
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, track_tensor_tree
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from moeca_compile.graph import fx
from moeca_compile.graph.autocast import ambient_autocast
from moeca_compile.graph.blocks import Block

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class WrittenInPlace(Exception):
    """A tensor that a copied block read or gave was written in place later on: the copy may be wrong."""


@dataclass(frozen=True)
class _Made:
    """What a block gave: the tensor of a captured node."""

    node: Node
    tensor: torch.Tensor


@dataclass(frozen=True)
class _Read:
    """What a block gave: the number of a tensor that it read."""

    number: int


@dataclass(frozen=True)
class _Template:
    """A traced block: the captured nodes that it read and, for each of its own nodes, made; and what it gave."""

    read: Sequence[Node]
    made: Sequence[Sequence[Node]]
    gave: Mapping[int, Any]


@dataclass
class _Recording:
    block: Block
    key: Hashable
    state: Hashable
    tensors: Sequence[FunctionalTensor]
    read: Sequence[Node]


class NotAlone(Exception):
    """A block, or a call, can't be told by what it reads and gives."""


class Copying:
    """The blocks of one run of Dynamo's graph.

    Attributes:
        blocks: those that occur more than once, under their first nodes.
    """

    def __init__(self, blocks: Mapping[Node, Sequence[Block]]) -> None:
        self.blocks = blocks
        self._templates: dict[Hashable, _Template | None] = {}  # None: a block that must be traced each time
        self._open: list[_Recording] = []
        self._made: dict[Node, list[Node]] = {}
        self._touched: list[FunctionalTensor] = []

    def begin(self, node: Node, env: dict[Node, Any]) -> bool:
        """Before Dynamo's `node` is traced: copy a block that begins there.

        Returns:
            Whether that was done; `env` has the values of its nodes then.
        """
        for block in self.blocks.get(node, ()):
            try:
                recording = self._recording(block, [env[read] for read in block.reads])
            except NotAlone:
                continue
            template = self._templates.get(recording.key)
            if template is not None:
                self._copy(recording, template, env)
                return True
            if recording.key not in self._templates:
                self._open.append(recording)
        return False

    @contextmanager
    def noting(self, node: Node, env: Mapping[Node, Any]) -> Iterator[None]:
        """While Dynamo's `node` is traced: note what it makes, for the blocks that it is in."""
        if not self._open:
            yield
            return
        last = _tracer().graph._root.prev
        yield
        self._made[node] = made = []
        while (last := last.next).op != "root":
            made.append(last)

    def end(self, node: Node, env: Mapping[Node, Any]) -> None:
        """After Dynamo's `node` was traced, and its value is in `env`: keep the blocks that end there."""
        while self._open and self._open[-1].block.nodes[-1] is node:
            recording = self._open.pop()
            try:
                self._templates[recording.key] = self._template(recording, env)
            except NotAlone:
                self._templates[recording.key] = None

    def check(self) -> None:
        """After the last node: nobody wrote into what the copied blocks read and gave.

        Raises:
            WrittenInPlace: somebody did.
        """
        if any(_is_written(tensor) for tensor in self._touched):
            raise WrittenInPlace

    def _recording(self, block: Block, values: Sequence[Any]) -> _Recording:
        tensors: list[FunctionalTensor] = []
        nodes: list[Node] = []

        def kind(value: Any) -> Hashable:
            if not isinstance(value, torch.Tensor):
                return plain_key(value)
            node, inner = _captured(value)
            tensors.append(value)  # type: ignore[arg-type]  # _captured refuses others
            nodes.append(node)
            return tensor_key(inner), value.requires_grad, nodes.index(node)

        kinds = []
        for value in values:
            leaves, structure = tree_flatten(value)
            kinds.append((repr(structure), *map(kind, leaves)))
        state = modes_key()
        return _Recording(block, (block.key, tuple(kinds), state), state, tensors, nodes)

    def _template(self, recording: _Recording, env: Mapping[Node, Any]) -> _Template:
        block = recording.block
        made = [self._made[node] for node in block.nodes]
        known = {*recording.read, *(node for nodes in made for node in nodes)}
        for node in (node for nodes in made for node in nodes):
            if node.op != "call_function" or fx.has_unknown_size(node) or not known.issuperset(node.all_input_nodes):
                raise NotAlone
        if modes_key() != recording.state or any(_is_written(tensor) for tensor in recording.tensors):
            raise NotAlone
        read = {node: i for i, node in reversed([*enumerate(recording.read)])}

        def given(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                plain_key(value)
                return value
            node, inner = _captured(value)
            if node not in known:
                raise NotAlone
            return _Read(read[node]) if node in read else _Made(node, inner)

        return _Template(recording.read, made, {i: tree_map(given, env[block.nodes[i]]) for i in block.gives})

    def _copy(self, recording: _Recording, template: _Template, env: dict[Node, Any]) -> None:
        tracer, block = _tracer(), recording.block
        copies = {old: Proxy(new, tracer) for old, new in zip(template.read, recording.read, strict=True)}
        for node, originals in zip(block.nodes, template.made, strict=True):
            if originals:
                with fx_traceback.set_current_meta(node, "Interpreter_Eager"):
                    for original in originals:
                        copies[original] = _copied(original, copies, tracer)
            self._made[node] = [copies[original].node for original in originals]
        self._touched += recording.tensors

        def given(value: Any) -> Any:
            if isinstance(value, _Read):
                return recording.tensors[value.number]
            return self._tensor(value, copies[value.node], tracer) if isinstance(value, _Made) else value

        for i, node in enumerate(block.nodes):
            env[node] = tree_map(given, template.gave[i]) if i in template.gave else None
        self.end(block.nodes[-1], env)

    def _tensor(self, made: _Made, proxy: Proxy, tracer: Any) -> FunctionalTensor:
        with _disable_current_modes():
            fresh = made.tensor.detach()
            track_tensor_tree(fresh, proxy, constant=None, tracer=tracer)
        functional = FunctionalTensor.to_functional(fresh)
        self._touched.append(functional)
        return functional


def _copied(original: Node, copies: Mapping[Node, Proxy], tracer: Any) -> Proxy:
    args, keywords = map_arg((original.args, original.kwargs), copies.__getitem__)  # type: ignore[arg-type]
    packet = getattr(original.target, "overloadpacket", None)
    name = None if packet is None else tracer.graph._target_to_str(packet.__name__)
    proxy: Proxy = tracer.create_proxy("call_function", original.target, args, keywords, name=name)
    for key, value in original.meta.items():
        proxy.node.meta.setdefault(key, value)
    return proxy


def _tracer() -> Any:
    mode = get_proxy_mode()
    assert mode is not None
    return mode.tracer


def _captured(tensor: torch.Tensor) -> tuple[Node, torch.Tensor]:
    """The captured node of a tensor that nobody has written into, and the tensor below."""
    if type(tensor) is not FunctionalTensor or _is_written(tensor):
        raise NotAlone
    inner = torch._from_functional_tensor(tensor.elem)
    slot = get_proxy_slot(inner, _tracer(), None)
    if slot is None or slot.constant is not None:
        raise NotAlone
    return slot.proxy.node, inner


def _is_written(tensor: FunctionalTensor) -> bool:
    return bool(torch._functionalize_has_data_mutation(tensor.elem))  # type: ignore[attr-defined]


def tensor_key(tensor: Any) -> Hashable:
    """What a trace may read of a tensor but its values.

    Raises:
        NotAlone: it is no tensor, or one of unknown sizes or another layout than strides.
    """
    if not isinstance(tensor, torch.Tensor) or not all(isinstance(size, int) for size in tensor.shape):
        raise NotAlone
    if tensor.layout is not torch.strided:
        raise NotAlone
    return (
        type(tensor), tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device,
        tensor.requires_grad, tensor.is_conj(), tensor.is_neg(),
    )  # fmt: skip


def plain_key(value: Any) -> tuple[type, str]:
    """Equal for equal plain values of one type alone.

    Raises:
        NotAlone: the value isn't plain.
    """
    if type(value) not in _PLAIN:
        raise NotAlone
    return type(value), repr(value)


def modes_key() -> Hashable:
    """What else decides how an operator is traced.

    Raises:
        NotAlone: a function of functorch is being traced.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotAlone
    return ambient_autocast(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
