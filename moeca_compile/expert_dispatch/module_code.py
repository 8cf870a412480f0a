"""What there is to read of a module: its methods, the containers of its experts, the expert loops in its methods."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import nn

from moeca_compile.expert_dispatch.proof.anatomy import leaves
from moeca_compile.expert_dispatch.proof.packed_experts import packed_weights
from moeca_compile.expert_dispatch.source.flatten import READS, flatten
from moeca_compile.expert_dispatch.source.loop import GUARDED, Loop
from moeca_compile.expert_dispatch.source.method_source import Source, methods_of, read
from moeca_compile.expert_dispatch.source.reader import Path, Reader
from moeca_compile.expert_dispatch.source.straighten import guards, straighten

_MAX_LEAVES = 16  # more parts than this, and it's a block rather than an expert
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


class ModuleCode:
    """A module as dispatch families look at it. What takes time is done once, when it is first asked for."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.methods = methods_of(type(module))

    @cached_property
    def stacks(self) -> tuple[Path, ...]:
        """Paths of the containers with two or more expert-sized members: the module itself, its children, theirs."""
        module = self.module
        levels: list[tuple[Path, nn.Module]] = [((), module)] if isinstance(module, _CONTAINERS) else []
        for name, child in module._modules.items():
            if child is not None:
                levels.append(((name,), child))
                levels.extend(((name, inner), m) for inner, m in child._modules.items() if m is not None)
        return tuple(path for path, container in levels if _is_stack(container))

    @cached_property
    def packed(self) -> tuple[Path, ...]:
        """Paths of the module's own parameters that can hold one matrix per expert, [E, ., .]."""
        return tuple((name,) for name in packed_weights(self.module))

    @cached_property
    def loops(self) -> list[Loop]:
        """The data-dependent expert loops in the methods, each as its author wrote it."""
        loops: list[Loop] = []
        for name, source in self.sources(self.stacks + self.packed):
            loops += self._loops_in(name, source)
        return loops

    @cached_property
    def combined(self) -> list[Loop]:
        """What only shows once helpers are put into `forward`: branches on empty masks straightened, loops that get
        their sizes from a router of its own."""
        readable = self.stacks or self.packed
        plain = read(self.methods["forward"]) if readable and "forward" in self.methods else None
        if plain is None or not plain.parameters:
            return []
        flat = flatten(plain, self.module)
        lines = guards(flat)
        if flat is plain and not lines:
            return []
        source = straighten(flat)
        loops = self._loops_in("forward", source)
        mark = frozenset({GUARDED}) if lines else frozenset[str]()
        if loops:
            return [replace(loop, evidence=loop.evidence | mark) for loop in loops]
        named = {n.attr for n in ast.walk(source.tree) if isinstance(n, ast.Attribute)}
        stack = next((path for path in self.stacks if path and path[0] in named), None)
        if not lines or stack is None:
            return []
        return [Loop("forward", source, stack, (), lines[0], mark)]

    def sources(self, paths: Sequence[Path]) -> Iterator[tuple[str, Source]]:
        """The methods with readable code that name something on one of the paths.

        Args:
            paths: those of containers or parameters, as in `stacks` and `packed`.

        Returns:
            (name, source) of each.
        """
        for name, function in self._naming(paths).items():
            source = read(function)
            if source is not None and source.parameters:
                yield name, source

    def hidden(self) -> Iterator[tuple[str, str, str]]:
        """(method, function, place) where packed weights go into an autograd function that reads sizes out of
        tensors."""
        weights = {path[0] for path in self.packed}
        for name, source in self.sources(self.packed):
            for call in ast.walk(source.tree):
                if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                    continue
                holder = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
                called = source.function.__globals__.get(holder) if call.func.attr == "apply" else None
                passed = {a.attr for a in call.args if isinstance(a, ast.Attribute)}
                if not isinstance(called, type) or not issubclass(called, torch.autograd.Function):
                    continue
                if passed & weights and _reads_back(called):
                    yield name, called.__name__, f"{source.file.rsplit('/', 1)[-1]}:{call.lineno}"

    def unreadable(self) -> dict[str, Path]:
        """Methods that name a stack of experts but have no source to look into, and that stack."""
        methods: dict[str, Path] = {}
        for path in self.stacks:
            if path:
                methods.update({name: path for name, f in self._naming([path]).items() if read(f) is None})
        return methods

    def _loops_in(self, name: str, source: Source) -> list[Loop]:
        return list(Reader(self.methods, name, source, self.stacks, self.packed).loops())

    def _naming(self, paths: Sequence[Path]) -> dict[str, types.FunctionType]:
        words = {word for path in paths for word in path}
        methods = {name: f for name, f in self.methods.items() if name != "__init__"} if paths else {}
        return {name: f for name, f in methods.items() if () in paths or words & _words(f)}


def _is_stack(container: nn.Module) -> bool:
    members = list(container._modules.values())
    if len(members) < 2 or not hasattr(type(container), "__getitem__"):
        return False
    return all(member is not None and leaves(member) <= _MAX_LEAVES for member in members)


def _reads_back(cls: type) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return True
    return any(isinstance(node, ast.Attribute) and node.attr in READS for node in ast.walk(tree))


def _words(function: types.FunctionType) -> set[str]:
    """Attribute names in the function that its decorators wrap, and in the functions inside it."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    words: set[str] = set()
    todo = [function.__code__]
    while todo:
        code = todo.pop()
        words.update(code.co_names)
        todo.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    return words
