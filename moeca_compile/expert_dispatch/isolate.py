"""Give a model's `forward` a code object of its own.

Dynamo keeps its compiled graphs, its recompile count and its decision to skip a function on the code object, which all
instances of a class share. So a plain `torch.compile` of another instance, whose expert loop breaks the graph, would
make Dynamo skip `forward` for ours too; and clearing that by hand would throw away the other's graphs.
"""

from __future__ import annotations

import itertools
import types
import weakref

import torch
from torch import nn
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo import bytecode_transformation

_numbers = itertools.count()


def isolate(model: nn.Module) -> bool:
    """Replace `model.forward` by a copy with its own code; False where the instance has a forward of its own."""
    if isolated(model) and model.__dict__["forward"].isolated() is not model:  # of a deep copy: it is the original's
        share_again(model)
    shared = type(model).forward
    if "forward" in model.__dict__ or not isinstance(shared, types.FunctionType):
        return False
    mark = f"moeca {next(_numbers)}"  # one constant more, so that the copies aren't equal either
    code = shared.__code__.replace(co_consts=(*shared.__code__.co_consts, mark))
    copied = types.FunctionType(code, shared.__globals__, shared.__name__, shared.__defaults__, shared.__closure__)
    weakref.finalize(copied, _let_go, code).atexit = False
    copied.__dict__.update(shared.__dict__, isolated=weakref.ref(model))
    copied.__kwdefaults__ = shared.__kwdefaults__
    copied.__annotations__ = dict(shared.__annotations__)
    copied.__qualname__, copied.__doc__, copied.__module__ = shared.__qualname__, shared.__doc__, shared.__module__
    model.__dict__["forward"] = types.MethodType(copied, model)
    return True


@torch._dynamo.disable  # type: ignore[untyped-decorator] # the collector may call it in the middle of a compiled function
def _let_go(code: types.CodeType) -> None:
    """The model is gone, and all that was compiled of its code may go. So may graphs of functions that called it: torch
    drops those when the code goes that guards them, but it keeps the codes that it disassembled last."""
    reset_code(code)
    cache = getattr(bytecode_transformation, "_cached_cleaned_instructions", None)
    if cache is not None:
        cache.cache_clear()


def isolated(model: nn.Module) -> bool:
    """Whether `isolate` made this model's forward."""
    forward = model.__dict__.get("forward")
    code = getattr(forward, "__code__", None)
    return code is not None and any(isinstance(c, str) and c.startswith("moeca ") for c in code.co_consts)


def share_again(model: nn.Module) -> None:
    """Undo `isolate`."""
    if isolated(model):
        del model.__dict__["forward"]
