"""Where a module's experts are, and which of its methods dispatch tokens to them."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from moeca_compile.expert_dispatch.proof.anatomy import leaves
from moeca_compile.expert_dispatch.source.flatten import READS, flatten
from moeca_compile.expert_dispatch.source.loop import GUARDED, Loop
from moeca_compile.expert_dispatch.source.method_source import Source, read
from moeca_compile.expert_dispatch.source.reader import Path, Reader
from moeca_compile.expert_dispatch.source.straighten import guards, straighten

_MAX_LEAVES = 16  # more parts than this, and it's a block rather than an expert
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def stacks(module: nn.Module) -> Iterator[Path]:
    """Paths of the containers with two or more expert-sized members: the module itself, its children, theirs."""
    levels: list[tuple[Path, nn.Module]] = [((), module)] if isinstance(module, _CONTAINERS) else []
    for name, child in module._modules.items():
        if child is not None:
            levels.append(((name,), child))
            levels.extend(((name, inner), m) for inner, m in child._modules.items() if m is not None)
    for path, container in levels:
        members = list(container._modules.values())
        if len(members) > 1 and hasattr(type(container), "__getitem__") and all(map(_expert_sized, members)):
            yield path


def packed_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters that can hold one matrix per expert: [E, ., .]."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    return {name: p for name, p in own.items() if p.dim() == 3 and p.shape[0] > 1}


def _expert_sized(member: nn.Module | None) -> bool:
    if member is None:
        return False
    return leaves(member) <= _MAX_LEAVES


def find_loops(module: nn.Module) -> list[Loop]:
    """The data-dependent expert loops in the methods of `module`'s class."""
    known = set(stacks(module))
    packed: set[Path] = {(name,) for name in packed_weights(module)}
    found: list[Loop] = []
    for name, function in _naming(module, known | packed).items():
        source = read(function)
        if source is not None and source.parameters:
            found.extend(Reader(methods(module), name, source, known, packed).loops())
    return found


def find_whole(module: nn.Module) -> list[Loop]:
    """What only shows once helpers are put into `forward`: branches on empty masks straightened, loops that get their
    sizes from a router of its own."""
    known = set(stacks(module))
    packed: set[Path] = {(name,) for name in packed_weights(module)}
    own = methods(module) if known or packed else {}
    plain = read(own["forward"]) if "forward" in own else None
    if plain is None or not plain.parameters:
        return []
    flat = flatten(plain, module)
    lines = guards(flat)
    if flat is plain and not lines:
        return []
    source = straighten(flat)
    loops = list(Reader(methods(module), "forward", source, known, packed).loops())
    mark = frozenset({GUARDED}) if lines else frozenset[str]()
    if loops:
        return [replace(loop, evidence=loop.evidence | mark) for loop in loops]
    stack = next((path for path in known if path and path[0] in _attributes(source)), None)
    if not lines or stack is None:
        return []
    return [Loop("forward", source, stack, (), lines[0], mark)]


def _attributes(source: Source) -> set[str]:
    return {n.attr for n in ast.walk(source.tree) if isinstance(n, ast.Attribute)}


def hidden(module: nn.Module) -> Iterator[tuple[str, str, str]]:
    """(method, function, place) where packed weights go into an autograd function that reads sizes out of tensors."""
    packed = packed_weights(module)
    for name, function in _naming(module, {(weight,) for weight in packed}).items():
        source = read(function)
        for call in ast.walk(source.tree) if source is not None else ():
            if source is None or not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            holder = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
            made = function.__globals__.get(holder) if call.func.attr == "apply" else None
            given = {a.attr for a in call.args if isinstance(a, ast.Attribute)}
            if not isinstance(made, type) or not issubclass(made, torch.autograd.Function):
                continue
            if given & packed.keys() and _reads_back(made):
                yield name, made.__name__, f"{source.file.rsplit('/', 1)[-1]}:{call.lineno}"


def _reads_back(cls: type) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return True
    return any(isinstance(node, ast.Attribute) and node.attr in READS for node in ast.walk(tree))


def unreadable(module: nn.Module) -> dict[str, Path]:
    """Methods that name a stack of experts but have no source to look into, and that stack."""
    found: dict[str, Path] = {}
    for path in stacks(module):
        found.update({name: path for name, f in _naming(module, {path}).items() if path and read(f) is None})
    return found


def _naming(module: nn.Module, paths: set[Path]) -> dict[str, types.FunctionType]:
    """The methods worth reading: those that name something on one of the paths."""
    words = {word for path in paths for word in path}
    own = methods(module) if paths else {}
    return {name: f for name, f in own.items() if name != "__init__" and (() in paths or words & _words(f))}


def methods(module: nn.Module) -> dict[str, types.FunctionType]:
    """The plain methods of the module's class that its author wrote, by name."""
    found: dict[str, types.FunctionType] = {}
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn"):
            break
        for name, value in vars(cls).items():
            if isinstance(value, types.FunctionType):
                found.setdefault(name, value)
    return found


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
