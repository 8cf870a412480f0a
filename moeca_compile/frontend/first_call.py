"""The first call of `torch.compile(model, backend="moeca")`: the model is prepared when its first graph runs.

Dynamo traces a model before the backend sees it. The graph may break at the expert dispatch, at a number that is read
from a tensor, or at a table that the model builds in its first call. So on the first call we prepare the model and call
it again, so that Dynamo captures one graph. That second call counts as step 0. The original, graph-broken call then
finishes, and its result is returned. If the second call breaks too, a third is made, because the model may have built
its tables by then. If the third breaks, the model runs in parts.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from types import CodeType
from typing import Any

from torch._dynamo import config
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.eval_frame import remove_from_cache

from moeca_compile.errors import MoecaError
from moeca_compile.expert_dispatch import prepare
from moeca_compile.expert_dispatch.isolate import isolate
from moeca_compile.expert_dispatch.proof.anatomy import hooks
from moeca_compile.frontend.calls import Call, Owner
from moeca_compile.frontend.handles import FirstCalls, HandleState
from moeca_compile.frontend.owner import codes_of
from moeca_compile.graph.regions import Rejected

_EVERY_EXPERT_RUNS = (
    "in {} MoE modules every expert runs on every token, by its own forward: {}. To run only the chosen experts, "
    "merge the adapter into the weights and unload it, or load the experts in a floating-point dtype"
)


def is_outdated(owner: Owner | None, state: HandleState, is_full_model: bool, call: Call | None) -> bool:
    """Prepare the model on a graph's first run for a handle.

    Of several threads' first calls, the first one prepares the model. Those whose graph breaks after that are called
    again too.

    Args:
        owner: the handle that is calling.
        state: of that handle.
        is_full_model: whether the graph is the full model.
        call: None: the call began before the handle had a gate.

    Returns:
        Whether the graph is of the unprepared model, so that it only has to finish its call.
    """
    if owner is None:
        return False
    first = state.first
    if first.trial is not None:
        first.trial |= is_full_model
        return not is_full_model
    call_id = threading.get_ident(), id(owner.frame)
    if call_id in first.outdated if call is None else call.is_outdated:
        return True
    if call is None and not is_full_model and first.retraced:
        first.outdated.add(call_id)
        if not _has_hooks(owner):
            _call_again(owner)
        return True
    state.runtime.freed.models.update(owner.modules)
    reports = [prepare(module) for module in owner.modules]
    first.rejected = tuple(rejected for report in reports for rejected in report.rejected)
    _warn_of_followed(state, [dispatch for report in reports for dispatch in report.followed])
    hooked = next((module.get_submodule(path) for module in owner.modules for path, _ in hooks(module)), None)
    if hooked is not None:
        first.hooked = weakref.ref(hooked)
    if not any(report.changed for report in reports) and (is_full_model or first.retraced):
        return False
    first.retraced = True
    _retrace(owner, scalars=True)
    if hooked is None and not _becomes_one_graph(owner, first):  # hooks may not bear a second call
        _retrace(owner, scalars=False)
    if call is None:
        first.outdated.add(call_id)
    else:
        call.is_outdated = True
    return True


def retrace_without_hooks(owner: Owner | None, first: FirstCalls) -> None:
    """Let the next call be traced again if the hooks that broke the model's graph were removed. The graphs that Dynamo
    made around the hooks still pass their guards, so Dynamo wouldn't trace by itself."""
    if owner is None or first.hooked is None:
        return
    hooked = first.hooked()
    if hooked is None or not any(True for _ in hooks(hooked)):
        first.hooked = None
        _retrace(owner, scalars=True)


def _warn_of_followed(state: HandleState, followed: Sequence[Rejected]) -> None:
    """Warn once for each set of reasons; each part of a broken graph finds all of them again."""
    if followed:
        by_reason = {dispatch.reason: str(dispatch) for dispatch in reversed(followed)}
        examples = "; ".join(list(by_reason.values())[:3])
        state.warned.once(_EVERY_EXPERT_RUNS.format(len(followed), examples), f"followed: {sorted(by_reason)}")


def _becomes_one_graph(owner: Owner, first: FirstCalls) -> bool:
    """Call the model again, at most twice. True: a call ran as one graph; its step counts."""
    traced: list[CodeType] = []
    with register_bytecode_hook(lambda code, _: traced.append(code)):
        for _ in range(2):
            first.trial = False
            try:
                with config.patch(capture_scalar_outputs=True):
                    _call_again(owner)
            except MoecaError:
                raise
            except Exception:  # Dynamo raises many types for numbers that it can't trace
                break
            finally:
                is_one_graph, first.trial = first.trial, None
            if is_one_graph:
                return True
            _retrace(owner, scalars=True)
    for code in traced:  # parts of a broken graph, with numbers that can't be captured
        remove_from_cache(code)
    return False


def _call_again(owner: Owner) -> None:
    variables = owner.frame.f_locals
    owner.handle(owner.function)(*variables["args"], **variables["kwargs"])


def _has_hooks(owner: Owner) -> bool:
    return any(True for module in owner.modules for _ in hooks(module))


def _retrace(owner: Owner, scalars: bool) -> None:
    """Let Dynamo trace the model again at its next call. `scalars`: also through numbers that are read from tensors."""
    call_hooks: list[Any] = owner.handle.enter_exit_hooks
    call_hooks[:] = [hook for hook in call_hooks if hook is not _with_scalars] + [_with_scalars] * scalars
    isolated = [isolate(module) for module in owner.modules]
    if not all(isolated) or getattr(owner.function, "__name__", "") not in ("_wrapped_call_impl", "_call_impl"):
        for code in codes_of(owner):
            remove_from_cache(code)


_capture_scalars = config._make_closure_patcher(capture_scalar_outputs=True)


def _with_scalars() -> Any:
    """A hook around each call: Dynamo traces through `item()`. Capture resolves the number, or raises CaptureError."""
    return _capture_scalars()
