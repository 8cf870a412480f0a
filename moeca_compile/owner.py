"""Which compiled model is calling? A backend is never told; but it is on the Python stack while its graph runs."""

from __future__ import annotations

import sys
from types import FrameType
from typing import NamedTuple

import torch
from torch._dynamo.eval_frame import OptimizedModule
from torch.fx import GraphModule

from moeca_compile.desugar import plain_parts

_OPTIMIZED = OptimizedModule.__call__.__code__
_CALL = torch.nn.Module._call_impl.__code__
_MODULE = torch.nn.Module._wrapped_call_impl.__code__  # the way in after `module.compile(backend=...)`


class Owner(NamedTuple):
    """`handle` is what the user calls; `module` is the model itself; `frame` is the call in progress."""

    handle: torch.nn.Module
    module: torch.nn.Module
    frame: FrameType


def find_owner() -> Owner | None:
    """The innermost compiled module on the stack; None for a compiled function."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _OPTIMIZED:
            handle = frame.f_locals["self"]
            return Owner(handle, handle._orig_mod, frame)
        if frame.f_code is _MODULE:
            module = frame.f_locals["self"]
            if module._compiled_call_impl is not None:
                return Owner(module, module, frame)
        frame = frame.f_back
    return None


def runs_whole(owner: Owner | None, graph: GraphModule) -> bool:
    """Whether the graph that runs now is the model's own forward in one piece: not a part that Dynamo broke off, nor
    one that goes on in (or is) a resume function, nor a submodule's, as when Dynamo gave up on the model's forward and
    took what it calls."""
    frame: FrameType | None = sys._getframe(1)
    reason = getattr(graph, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        return False
    module = None
    while frame is not None and (owner is None or frame is not owner.frame):
        code = frame.f_code
        if "torch_dynamo_resume_in" in code.co_name or any("__resume_at" in name for name in code.co_names):
            return False
        if code is _CALL and module is None:
            module = frame.f_locals["self"]
        frame = frame.f_back
    return owner is None or module in (None, owner.module, owner.handle)  # the handle: Dynamo inlined the model's call


def parameters_of(model: object) -> tuple[torch.Tensor, ...]:
    """All parameters and buffers of a module, compiled or not, quantised ones in parts; none for a function."""
    if not isinstance(model, torch.nn.Module):
        return ()
    return tuple(part for one in (*model.parameters(), *model.buffers()) for part in plain_parts(one))
