"""Which compiled model is calling? A backend is never told; but it is on the Python stack while its graph runs.

Every way in (`torch.compile` of a module, a bound method or a function, `module.compile`) goes through one wrapper of
torch's, and each call of `torch.compile` makes one context for its wrappers. That context stands for the handle: it is
there as long as what the user calls, and no two handles share it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
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
_RESUMED = "torch_dynamo_resume_in_"
_TORCH = (eval_frame.__file__, torch.nn.modules.module.__file__)  # code of theirs is never a graph's


def handle_of(compiled: object) -> Any:
    """The compile context of what `torch.compile` gave, or of a module compiled in place; None: it isn't compiled."""
    if isinstance(compiled, OptimizedModule):
        return compiled.dynamo_ctx
    if isinstance(compiled, Module):
        return handle_of(getattr(compiled._compiled_call_impl, "call", compiled._compiled_call_impl))
    if isinstance(compiled, FunctionType) and compiled.__code__ is WRAPPER:
        return _free(compiled, "self")
    return None


def modules_of(function: object) -> tuple[Module, ...]:
    """The models that a callable runs: itself, what it is a method of, what it closes over, globals that it names."""
    if isinstance(function, OptimizedModule):
        return (function._orig_mod,)
    if isinstance(function, Module):
        return (function,)
    if isinstance(function, partial):
        return tuple(dict.fromkeys(m for one in (function.func, *function.args) for m in modules_of(one)))
    if isinstance(getattr(function, "__self__", None), Module):
        return modules_of(function.__self__)  # type: ignore[attr-defined]
    if not isinstance(function, FunctionType):
        return ()
    if hasattr(function, "__wrapped__"):
        return modules_of(function.__wrapped__)
    cells = [_content(cell) for cell in function.__closure__ or ()]
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    held = [one for one in (*cells, *named) if isinstance(one, Module) or handle_of(one) is not None]
    return tuple(dict.fromkeys(m for one in held for m in modules_of(one)))


def codes_of(owner: Owner) -> Iterator[CodeType]:
    """The code that Dynamo starts from: of what was compiled, and of the models' forward with all that wraps it."""
    for function in (owner.function, *(module.forward for module in owner.modules)):
        yield from _codes(function)


def _codes(function: Any) -> Iterator[CodeType]:
    if function is None:
        return
    code = getattr(function, "__code__", None)
    if isinstance(code, CodeType) and code.co_filename not in _TORCH:
        yield code
    if isinstance(function, partial):  # accelerate and diffusers put one around a hooked forward, and call it wrapped
        yield from _codes(function.func)
    yield from _codes(getattr(function, "__wrapped__", None))


def runs_whole(owner: Owner | None, graph: GraphModule, earlier: int = 0) -> bool:
    """Whether the graph that runs now is the model's own forward (or the function that was compiled) in one piece: not
    a part that Dynamo broke off, nor one that goes on in (or is) a resume function, nor any other function: Dynamo
    compiles one by itself where it gave up on its caller. A hook on the whole model breaks the graph before the model
    begins: then what wraps the model's forward is resumed, and runs all of it, if this call ran no graph `earlier`."""
    reason = getattr(graph, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        return False
    frame: FrameType | None = sys._getframe(1)
    ours = frame.f_code.co_filename if frame is not None else ""  # the graph's callable, which may have a wrapper
    while frame is not None and frame.f_code.co_filename in (ours, eval_frame.__file__):
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
    """Code around the models' own forward."""
    for module in owner.modules:
        own = getattr(type(module).forward, "__code__", None)
        yield from (code for code in _codes(module.forward) if own is None or _place(code) != _place(own))


def _resumes(code: CodeType, of: CodeType) -> bool:
    return code.co_filename == of.co_filename and code.co_name.startswith(f"{_RESUMED}{of.co_name}_at_")


def parameters_of(model: object) -> tuple[torch.Tensor, ...]:
    """All parameters and buffers of a module, compiled or not, or of the modules that a function runs; the parts of
    quantised ones."""
    modules = (model,) if isinstance(model, Module) else modules_of(model)
    tensors = (one for module in modules for one in (*module.parameters(), *module.buffers()))
    return tuple(part for one in tensors for part in plain_parts(one))


def _place(code: CodeType) -> tuple[str, str, int]:
    """Dynamo's code for a function, and a model's own copy of its forward, keep these of the original."""
    return code.co_name, code.co_filename, code.co_firstlineno


def _free(function: FunctionType, name: str) -> Any:
    assert function.__closure__ is not None
    return _content(function.__closure__[function.__code__.co_freevars.index(name)])


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None
