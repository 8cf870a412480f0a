"""What `moeca_compile.compile` gives for a module: torch's compiled module, whose methods run compiled too.

torch looks up a method such as `forward_with_cfg` on the original model, whose `self.forward` isn't compiled. So the
compiled module gets such methods itself. They run as written, with the compiled module as `self`.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import sys
import weakref
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from moeca_compile import expert_dispatch
from moeca_compile.engine.freeing.state_dict import refuse_dropped
from moeca_compile.expert_dispatch import PrepareReport
from moeca_compile.expert_dispatch.isolate import isolate
from moeca_compile.frontend.backend import Backend
from moeca_compile.frontend.calls import gate_of
from moeca_compile.frontend.output_path import OutputPath
from moeca_compile.frontend.symbols.sizes_alone import sizes_alone
from moeca_compile.graph.capture import isolate_recompiles_kwargs
from moeca_compile.schedule.granularity import OUTPUT


class CompiledModule(OptimizedModule):
    """A compiled module. Each copy, a pickled one too, is compiled anew as the original was, and has its own state. A
    copy as torch makes it would run the model's methods uncompiled, and a shallow one would share the original's state.
    """

    def __copy__(self) -> CompiledModule:
        return compile_module(self._orig_mod, *copy.deepcopy(self.__dict__["_compiled_by"]))

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:  # else the model's own __deepcopy__ would be found
        return compile_module(*copy.deepcopy((self._orig_mod, *self.__dict__["_compiled_by"]), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return compile_module, (self._orig_mod, *self.__dict__["_compiled_by"])


def compile_module(module: nn.Module, compiler: Backend, fullgraph: bool, dynamic: bool | None) -> CompiledModule:
    """Prepare a module and compile it with torch, for all its ways in.

    Args:
        module: without a compilation of its own.
        compiler: the backend, with its options.
        fullgraph, dynamic: as `torch.compile` takes them.
    """
    prepare_module(module)
    handle: Any = torch.compile(
        module, backend=compiler, fullgraph=fullgraph, dynamic=dynamic, **isolate_recompiles_kwargs()
    )
    handle.__class__ = CompiledModule
    handle.__dict__["_compiled_by"] = compiler, fullgraph, dynamic
    gate = gate_of(handle.dynamo_ctx)
    if dynamic:
        handle.dynamo_ctx.enter_exit_hooks.append(sizes_alone)
    if compiler.options.granularity == OUTPUT:
        gate.covered = True
        handle.forward = OutputPath(handle, handle.forward, (compiler.options, compiler.schedule))
    route_methods(handle)
    return handle  # type: ignore[no-any-return]


def prepare_module(module: nn.Module) -> PrepareReport:
    """Prepare a plain module in place, and give its forward a code of its own.

    Raises:
        StateError: `free_hoisted` dropped weights of it.
    """
    refuse_dropped(module)
    isolate(module)
    return expert_dispatch.prepare(module)


def route_methods(handle: OptimizedModule) -> None:
    """Give the handle the methods of its model's class that call the model."""
    methods: dict[str, FunctionType] = {}
    for cls in reversed(type(handle._orig_mod).__mro__):
        if cls not in nn.Module.__mro__:
            methods |= {name: value for name, value in vars(cls).items() if isinstance(value, FunctionType)}
    handle.__dict__.update({name: _bound(methods[name], handle) for name in _callers(methods)})


def _callers(methods: dict[str, FunctionType]) -> set[str]:
    """Names of the methods that call `self.forward(...)`, `self(...)` or another such method. A method with `super()`
    is left out, for it needs the original model as `self`."""
    calls: dict[str, set[str]] = {}
    for name, method in methods.items():
        if name != "forward" and not name.startswith("__") and "__class__" not in _code(method).co_freevars:
            calls[name] = called_on_self(method)
    callers: set[str] = set()
    while True:
        more = {name for name, called in calls.items() if called & (callers | {"forward", "__call__"})} - callers
        if not more:
            return callers
        callers |= more


def called_on_self(method: FunctionType) -> set[str]:
    """Names that a method loads from its first argument, with `__call__` if it calls that argument itself."""
    code = _code(method)
    if not code.co_argcount:
        return set()
    self_name = code.co_varnames[0]
    pairs = list(pairwise(dis.get_instructions(code)))
    names = {b.argval for a, b in pairs if _loads(a, self_name) and b.opname in ("LOAD_ATTR", "LOAD_METHOD")}
    if sys.version_info >= (3, 13):  # PUSH_NULL comes after the callable
        calls_self = any(_loads(a, self_name) and b.opname == "PUSH_NULL" for a, b in pairs)
    else:
        calls_self = any(a.opname == "PUSH_NULL" and _loads(b, self_name) for a, b in pairs)
    return names | {"__call__"} if calls_self else names


def _loads(instruction: dis.Instruction, name: str) -> bool:
    if not instruction.opname.startswith("LOAD_FAST"):  # a constant may be any tuple, () too
        return False
    value = instruction.argval
    return bool((value[-1] if isinstance(value, tuple) else value) == name)  # some instructions load two variables


def _code(method: FunctionType) -> Any:
    return inspect.unwrap(method).__code__


def _bound(method: FunctionType, handle: OptimizedModule) -> Any:
    """A bound method that holds its handle by a weak reference, so that the handle can be collected."""
    handle_ref = weakref.ref(handle)

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        return method(handle_ref(), *args, **kwargs)

    return run
