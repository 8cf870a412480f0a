"""Finds the compiled model that is calling, from the Python stack; torch doesn't tell a backend.

Each entry (`torch.compile` of a module, a bound method or a function, `module.compile`) goes through one wrapper of
torch, and each call of `torch.compile` makes one context for its wrappers. That context identifies the handle: it lives
as long as the handle, and no two handles share it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from operator import attrgetter, is_, methodcaller
from types import CodeType, FrameType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo import eval_frame
from torch._dynamo.eval_frame import OptimizedModule
from torch.fx import GraphModule
from torch.nn import Module

from moeca_compile.graph.desugar import plain_parts

if TYPE_CHECKING:
    from moeca_compile.frontend.calls import Owner

WRAPPER: CodeType = next(
    code
    for code in eval_frame._TorchDynamoContext.__call__.__code__.co_consts
    if isinstance(code, CodeType) and code.co_name in ("compile_wrapper", "_fn")
)
_PLAIN = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
_own = attrgetter("_parameters", "_buffers", "_modules")
_values = methodcaller("values")
_RESUMED = "torch_dynamo_resume_in_"
_TORCH = (eval_frame.__file__, torch.nn.modules.module.__file__)  # no code of these files becomes a graph


def handle_of(compiled: object) -> Any:
    """The compile context of what `torch.compile` returned, or of a module compiled in place; None: not compiled."""
    if isinstance(compiled, OptimizedModule):
        return compiled.dynamo_ctx
    if isinstance(compiled, Module):
        return handle_of(getattr(compiled._compiled_call_impl, "call", compiled._compiled_call_impl))
    if isinstance(compiled, FunctionType) and compiled.__code__ is WRAPPER:
        return _free(compiled, "self")
    return None


def modules_of(function: object) -> tuple[Module, ...]:
    """The models that a callable runs: itself, the object of a bound method, and the closure variables and globals of a
    function."""
    if isinstance(function, OptimizedModule):
        return (function._orig_mod,)
    if isinstance(function, Module):
        return (function,)
    if isinstance(function, partial):
        return _modules_of_all((function.func, *function.args))
    if isinstance(getattr(function, "__self__", None), Module):
        return modules_of(function.__self__)  # type: ignore[attr-defined]
    if not isinstance(function, FunctionType):
        return ()
    if hasattr(function, "__wrapped__"):
        return modules_of(function.__wrapped__)
    variables = [_content(cell) for cell in function.__closure__ or ()]
    variables += [function.__globals__.get(name) for name in function.__code__.co_names]
    return _modules_of_all(value for value in variables if isinstance(value, Module) or handle_of(value) is not None)


def _modules_of_all(values: Iterable[object]) -> tuple[Module, ...]:
    return tuple(dict.fromkeys(module for value in values for module in modules_of(value)))


def codes_of(owner: Owner) -> Iterator[CodeType]:
    """The code objects that Dynamo starts from: of the compiled function, and of each model's forward with its
    wrappers."""
    for function in (owner.function, *(module.forward for module in owner.modules)):
        yield from _codes(function)


def _codes(function: Any) -> Iterator[CodeType]:
    if function is None:
        return
    code = getattr(function, "__code__", None)
    if isinstance(code, CodeType) and code.co_filename not in _TORCH:
        yield code
    if isinstance(function, partial):  # accelerate and diffusers put a partial around a hooked forward
        yield from _codes(function.func)
    yield from _codes(getattr(function, "__wrapped__", None))


def is_full_model(owner: Owner | None, graph: GraphModule, earlier: int = 0) -> bool:
    """Whether the running graph is the model's entire forward, or the entire compiled function.

    It isn't after a graph break, in a resume function, or in a submodule that Dynamo compiled separately because it
    gave up on the caller. Exception: a hook on the full model breaks the graph before the model begins; the wrapper of
    the forward is then resumed, and runs the entire model if the call ran no other graph.

    Args:
        owner: the handle that is calling.
        graph: that runs.
        earlier: number of graphs that the call has run before.
    """
    reason = getattr(graph, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        return False
    frame: FrameType | None = sys._getframe(1)
    entry_file = frame.f_code.co_filename if frame is not None else ""  # of the graph's callable and its wrapper
    while frame is not None and frame.f_code.co_filename in (entry_file, eval_frame.__file__):
        frame = frame.f_back
    if frame is None or owner is None:
        return True
    code = frame.f_code
    if any("__resume_at" in name for name in code.co_names):
        return False
    if code.co_name.startswith(_RESUMED):
        return not earlier and any(_resumes(code, wrapper) for wrapper in _wrappers(owner))
    return _place(code) in map(_place, codes_of(owner))


def _wrappers(owner: Owner) -> Iterator[CodeType]:
    """Code objects of the wrappers around the models' forward. A decorated forward is the innermost function."""
    for module in owner.modules:
        *_, innermost = (None, *map(_place, _codes(type(module).forward)))
        yield from (code for code in _codes(module.forward) if _place(code) != innermost)


def _resumes(code: CodeType, of: CodeType) -> bool:
    return code.co_filename == of.co_filename and code.co_name.startswith(f"{_RESUMED}{of.co_name}_at_")


def parameters_of(model: object) -> tuple[torch.Tensor, ...]:
    """All parameters and buffers of a module, compiled or not, or of the modules that a function runs. For a quantized
    tensor: the plain tensors that it consists of."""
    own = (values for module in _all_modules(modules_of(model)) for values in _own(module)[:2])
    found = {id(tensor): tensor for values in own for tensor in values.values() if tensor is not None}
    if _PLAIN.issuperset(map(type, found.values())):
        return tuple(found.values())
    parts: Iterator[object] = (part for tensor in found.values() for part in plain_parts(tensor))
    return tuple(part for part in parts if isinstance(part, torch.Tensor))  # a DTensor has a device mesh too


def _all_modules(roots: Iterable[Module]) -> list[Module]:
    """The modules and all below them, each once."""
    found: dict[int, Module] = {}
    todo: list[Module | None] = [*roots]
    while todo:
        module = todo.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            todo += module._modules.values()
    return [*found.values()]


class WeightsSeen:
    """The weights of a model, and whether it has others now. Cached outputs ask at each computed step, and to collect
    them anew takes several times as long."""

    def __init__(self, model: object) -> None:
        self.tensors = parameters_of(model)
        self._roots = [weakref.ref(root) for root in modules_of(model)]  # who holds this may be held by a root
        roots = {id(ref()) for ref in self._roots}
        self._below = [module for module in _all_modules(modules_of(model)) if id(module) not in roots]
        self._own = [*self._dictionaries()]
        self._filled, self._empty = [own for own in self._own if own], [own for own in self._own if not own]
        self._values = [*chain.from_iterable(map(_values, self._filled))]
        # a quantized tensor may stay, and have its parts replaced; TorchScript makes its dictionaries anew
        self._is_plain = all(isinstance(own, dict) for own in self._own) and all(
            type(value) in _PLAIN for value in self._values if isinstance(value, torch.Tensor)
        )

    def hold(self, model: object) -> bool:
        """Whether the model still has these weights."""
        if (  # `map` and `is`: hundreds of modules at every step
            self._is_plain
            and not any(self._empty)
            and sum(map(len, self._filled)) == len(self._values)
            and all(map(is_, chain.from_iterable(map(_values, self._filled)), self._values))
            and all(map(is_, self._dictionaries(), self._own))
        ):
            return True
        return [*map(id, parameters_of(model))] == [*map(id, self.tensors)]

    def _dictionaries(self) -> Iterator[dict[str, Any]]:
        """Of all modules: parameters, buffers, submodules."""
        roots = (root for ref in self._roots if (root := ref()) is not None)
        return chain.from_iterable(map(_own, chain(roots, self._below)))


def _place(code: CodeType) -> tuple[str, str, int]:
    """Name, file and line of a function. Dynamo's code for the function, and a model's copy of it, have the same."""
    return code.co_name, code.co_filename, code.co_firstlineno


def _free(function: FunctionType, name: str) -> Any:
    assert function.__closure__ is not None
    return _content(function.__closure__[function.__code__.co_freevars.index(name)])


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable isn't bound yet
        return None
