"""`torch.compile(model, backend="moeca")` alone: the model is prepared when its first graph runs for the first time.

A backend isn't told the model, and by the time it is asked Dynamo has traced the model as it was shipped, and broken
the graph at its expert dispatch, at a number that it reads out of a tensor, or at a table that it builds when first
called. So the first graph's first run prepares the model, calls it once more, now traced whole, and then lets the
broken call finish as it is: the second call did the trajectory's first step, the first gives its result. A model that
breaks in the second call too gets a third, by when it has built its tables; if that doesn't help, it runs in parts.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Sequence
from types import CodeType
from typing import Any

from torch._dynamo import config
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.eval_frame import OptimizedModule, remove_from_cache
from torch.nn import Module

from moeca_compile.canonical import prepare
from moeca_compile.canonical.anatomy import hooks
from moeca_compile.canonical.isolate import isolate
from moeca_compile.errors import CaptureError, MoecaWarning
from moeca_compile.gate import Call
from moeca_compile.owner import Owner
from moeca_compile.regions import Miss

_finishing: set[tuple[int, int]] = set()  # thread and frame of first calls during which their model was prepared
_trials: dict[int, bool] = {}  # by id of a model that is being called once more: whether its graph was whole
_told: weakref.WeakKeyDictionary[Module, set[str]] = weakref.WeakKeyDictionary()  # by handle: reasons it warned of
_hooked: weakref.WeakKeyDictionary[Module, weakref.ref[Module]] = weakref.WeakKeyDictionary()  # one with a hook each
_renewed: weakref.WeakSet[Module] = weakref.WeakSet()  # handles that were called once more; if they break, so be it


def out_of_date(owner: Owner | None, whole: bool, call: Call | None) -> bool:
    """On a graph's first run: prepare the model. True: this graph belongs to a call that only has to finish. `call`:
    None for one that began before the handle had a gate: of several threads' first calls, the first one prepares the
    model, and those that come broken after it are made once more too."""
    if owner is None:
        return False
    if id(owner.module) in _trials:
        _trials[id(owner.module)] |= whole
        return not whole
    this = threading.get_ident(), id(owner.frame)
    if this in _finishing if call is None else call.finishes:
        return True
    if call is None and not whole and owner.handle in _renewed:
        _finishing.add(this)
        if next(iter(hooks(owner.module)), None) is None:
            owner.handle(*owner.frame.f_locals["args"], **owner.frame.f_locals["kwargs"])
        return True
    report = prepare(owner.module)
    told = _told.setdefault(owner.handle, set())
    _warn_once(told, report.misses, "{} expert dispatches are left as they are: {}")
    _warn_once(
        told,
        report.followed,
        "in {} MoE modules every expert runs on every token, by its own forward: {}. To run only the chosen experts, "
        "merge the adapter into the weights and unload it, or load the experts in a floating-point dtype",
    )
    hooked = next((owner.module.get_submodule(path) for path, _ in hooks(owner.module)), None)
    if hooked is not None:
        _hooked[owner.handle] = weakref.ref(hooked)
    if not report.changed and (whole or owner.handle in _renewed):
        return False
    _renewed.add(owner.handle)
    _renew(owner, scalars=True)
    if hooked is None and not _comes_whole(owner):  # hooks may not bear being run twice: next time, then
        _renew(owner, scalars=False)
    if call is None:
        _finishing.add(this)
    else:
        call.finishes = True
    return True


def renew_without_hooks(owner: Owner | None) -> None:
    """When a part of a model runs: if the hooks that broke it are gone, let the next call be traced afresh. What Dynamo
    made around them still fits, so it would go on running parts."""
    known = _hooked.get(owner.handle) if owner is not None and _hooked else None
    hooked = known() if known is not None else None
    if owner is not None and known is not None and (hooked is None or not any(True for _ in hooks(hooked))):
        del _hooked[owner.handle]
        _renew(owner, scalars=True)


def _warn_once(told: set[str], misses: Sequence[Miss], text: str) -> None:
    """Warn of those whose reason is a new one; a part of a broken graph finds them all again."""
    new = [miss for miss in misses if miss.reason not in told]
    if new:
        told.update(miss.reason for miss in new)
        one_each = {miss.reason: str(miss) for miss in reversed(new)}
        some = "; ".join(list(one_each.values())[:3])
        warnings.warn(text.format(len(new), some), MoecaWarning, stacklevel=5)


def _comes_whole(owner: Owner) -> bool:
    """Call the model once more, and then again; True as soon as it comes as one graph, whose step counts."""
    given = owner.frame.f_locals
    traced: list[CodeType] = []
    with register_bytecode_hook(lambda code, _: traced.append(code)):
        for _ in range(2):
            _trials[id(owner.module)] = False
            try:
                with config.patch(capture_scalar_outputs=True):
                    owner.handle(*given["args"], **given["kwargs"])
            except CaptureError as error:
                warnings.warn(f"the model can't be captured in one graph: {error}", MoecaWarning, stacklevel=5)
                break
            finally:
                whole = _trials.pop(id(owner.module))
            if whole:
                return True
            _renew(owner, scalars=True)
    for code in traced:  # parts of a broken graph, with numbers that can't be captured
        remove_from_cache(code)
    return False


def _renew(owner: Owner, scalars: bool) -> None:
    """Let Dynamo trace the model afresh; with `scalars`, through numbers that are read out of tensors too."""
    if isinstance(owner.handle, OptimizedModule):
        hooks: list[Any] = owner.handle.dynamo_ctx.enter_exit_hooks
        hooks[:] = [hook for hook in hooks if hook is not _scalars_too] + [_scalars_too] * scalars
    if not isolate(owner.module):
        remove_from_cache(owner.module.forward)


def _scalars_too() -> Any:
    """Around each call: Dynamo traces through `item()` (capture knows what it gives, or says that it can't)."""
    patched = config.patch(capture_scalar_outputs=True)
    patched.__enter__()
    return lambda: patched.__exit__(None, None, None)
