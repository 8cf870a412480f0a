"""`torch.compile(model, backend="moeca")` alone: the model is prepared when its first graph runs for the first time.

A backend isn't told the model, and by the time it is asked Dynamo has traced the model as it was shipped, and broken
the graph at its expert dispatch, at a number that it reads out of a tensor, or at a table that it builds when first
called. So the first graph's first run prepares the model, calls it once more, now traced whole, and then lets the
broken call finish as it is: the second call did the trajectory's first step, the first gives its result. A model that
breaks in the second call too gets a third, by when it has built its tables; if that doesn't help, it runs in parts.
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

_RAN_BY_THEIR_OWN = (
    "in {} MoE modules every expert runs on every token, by its own forward: {}. To run only the chosen experts, "
    "merge the adapter into the weights and unload it, or load the experts in a floating-point dtype"
)


def out_of_date(owner: Owner | None, state: HandleState, whole: bool, call: Call | None) -> bool:
    """On a graph's first run for a handle: prepare the model. True: this graph belongs to a call that only has to
    finish. `call`: None for one that began before the handle had a gate: of several threads' first calls, the first one
    prepares the model, and those that come broken after it are made once more too."""
    if owner is None:
        return False
    first = state.first
    if first.trial is not None:
        first.trial |= whole
        return not whole
    this = threading.get_ident(), id(owner.frame)
    if this in first.finishing if call is None else call.finishes:
        return True
    if call is None and not whole and first.renewed:
        first.finishing.add(this)
        if not _has_hooks(owner):
            _call_again(owner)
        return True
    reports = [prepare(module) for module in owner.modules]
    first.left = tuple(miss for report in reports for miss in report.rejected)
    _tell_followed(state, [miss for report in reports for miss in report.followed])
    hooked = next((module.get_submodule(path) for module in owner.modules for path, _ in hooks(module)), None)
    if hooked is not None:
        first.hooked = weakref.ref(hooked)
    if not any(report.changed for report in reports) and (whole or first.renewed):
        return False
    first.renewed = True
    _renew(owner, scalars=True)
    if hooked is None and not _comes_whole(owner, first):  # hooks may not bear being run twice: next time, then
        _renew(owner, scalars=False)
    if call is None:
        first.finishing.add(this)
    else:
        call.finishes = True
    return True


def renew_without_hooks(owner: Owner | None, first: FirstCalls) -> None:
    """When a part of a model runs: if the hooks that broke it are gone, let the next call be traced afresh. What Dynamo
    made around them still fits, so it would go on running parts."""
    if owner is None or first.hooked is None:
        return
    hooked = first.hooked()
    if hooked is None or not any(True for _ in hooks(hooked)):
        first.hooked = None
        _renew(owner, scalars=True)


def _tell_followed(state: HandleState, followed: Sequence[Rejected]) -> None:
    """Warn once for each set of reasons; a part of a broken graph finds them all again."""
    if followed:
        one_each = {miss.reason: str(miss) for miss in reversed(followed)}
        some = "; ".join(list(one_each.values())[:3])
        state.warned.once(_RAN_BY_THEIR_OWN.format(len(followed), some), f"followed: {sorted(one_each)}")


def _comes_whole(owner: Owner, first: FirstCalls) -> bool:
    """Call the model once more, and then again; True as soon as it comes as one graph, whose step counts."""
    traced: list[CodeType] = []
    with register_bytecode_hook(lambda code, _: traced.append(code)):
        for _ in range(2):
            first.trial = False
            try:
                with config.patch(capture_scalar_outputs=True):
                    _call_again(owner)
            except MoecaError:
                raise
            except Exception:  # whatever Dynamo raises of numbers that it can't trace through
                break
            finally:
                whole, first.trial = first.trial, None
            if whole:
                return True
            _renew(owner, scalars=True)
    for code in traced:  # parts of a broken graph, with numbers that can't be captured
        remove_from_cache(code)
    return False


def _call_again(owner: Owner) -> None:
    given = owner.frame.f_locals
    owner.handle(owner.function)(*given["args"], **given["kwargs"])


def _has_hooks(owner: Owner) -> bool:
    return any(True for module in owner.modules for _ in hooks(module))


def _renew(owner: Owner, scalars: bool) -> None:
    """Let Dynamo trace the model afresh; with `scalars`, through numbers that are read out of tensors too."""
    around: list[Any] = owner.handle.enter_exit_hooks
    around[:] = [hook for hook in around if hook is not _scalars_too] + [_scalars_too] * scalars
    isolated = [isolate(module) for module in owner.modules]
    if not all(isolated) or getattr(owner.function, "__name__", "") not in ("_wrapped_call_impl", "_call_impl"):
        for code in codes_of(owner):
            remove_from_cache(code)


_capture_scalars = config._make_closure_patcher(capture_scalar_outputs=True)


def _scalars_too() -> Any:
    """Around each call: Dynamo traces through `item()` (capture knows what it gives, or says that it can't)."""
    return _capture_scalars()
