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
from torch._dynamo.eval_frame import remove_from_cache
from torch.nn import Module

from moeca_compile.canonical import prepare
from moeca_compile.canonical.anatomy import hooks
from moeca_compile.canonical.isolate import isolate
from moeca_compile.errors import MoecaError, MoecaWarning
from moeca_compile.gate import Call
from moeca_compile.owner import Owner, codes_of
from moeca_compile.regions import Miss

_trials: dict[int, bool] = {}  # by id of a handle that is being called once more: whether its graph was whole
# what is known of a handle, by its compile context
_finishing: weakref.WeakKeyDictionary[Any, set[tuple[int, int]]] = weakref.WeakKeyDictionary()  # first calls during
# which the model was prepared, by thread and frame; later calls have a gate
_told: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()  # reasons it warned of
_left: weakref.WeakKeyDictionary[Any, tuple[Miss, ...]] = weakref.WeakKeyDictionary()  # dispatches left alone
_hooked: weakref.WeakKeyDictionary[Any, weakref.ref[Module]] = weakref.WeakKeyDictionary()  # a module with a hook
_renewed: weakref.WeakSet[Any] = weakref.WeakSet()  # those that were called once more; if they break, so be it


def out_of_date(owner: Owner | None, whole: bool, call: Call | None) -> bool:
    """On a graph's first run: prepare the model. True: this graph belongs to a call that only has to finish. `call`:
    None for one that began before the handle had a gate: of several threads' first calls, the first one prepares the
    model, and those that come broken after it are made once more too."""
    if owner is None:
        return False
    if id(owner.handle) in _trials:
        _trials[id(owner.handle)] |= whole
        return not whole
    this, finishing = (threading.get_ident(), id(owner.frame)), _finishing.setdefault(owner.handle, set())
    if this in finishing if call is None else call.finishes:
        return True
    if call is None and not whole and owner.handle in _renewed:
        finishing.add(this)
        if not _has_hooks(owner):
            _call_again(owner)
        return True
    reports = [prepare(module) for module in owner.modules]
    _left[owner.handle] = tuple(miss for report in reports for miss in report.misses)
    _warn_once(
        _told.setdefault(owner.handle, set()),
        [miss for report in reports for miss in report.followed],
        "in {} MoE modules every expert runs on every token, by its own forward: {}. To run only the chosen experts, "
        "merge the adapter into the weights and unload it, or load the experts in a floating-point dtype",
    )
    hooked = next((module.get_submodule(path) for module in owner.modules for path, _ in hooks(module)), None)
    if hooked is not None:
        _hooked[owner.handle] = weakref.ref(hooked)
    if not any(report.changed for report in reports) and (whole or owner.handle in _renewed):
        return False
    _renewed.add(owner.handle)
    _renew(owner, scalars=True)
    if hooked is None and not _comes_whole(owner):  # hooks may not bear being run twice: next time, then
        _renew(owner, scalars=False)
    if call is None:
        finishing.add(this)
    else:
        call.finishes = True
    return True


def left_alone(owner: Owner) -> tuple[Miss, ...]:
    """The expert dispatches that preparing this handle's models left as they are."""
    return _left.get(owner.handle, ())


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
    traced: list[CodeType] = []
    with register_bytecode_hook(lambda code, _: traced.append(code)):
        for _ in range(2):
            _trials[id(owner.handle)] = False
            try:
                with config.patch(capture_scalar_outputs=True):
                    _call_again(owner)
            except MoecaError:
                raise
            except Exception:  # whatever Dynamo raises of numbers that it can't trace through
                break
            finally:
                whole = _trials.pop(id(owner.handle))
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


def _scalars_too() -> Any:
    """Around each call: Dynamo traces through `item()` (capture knows what it gives, or says that it can't)."""
    patched = config.patch(capture_scalar_outputs=True)
    patched.__enter__()
    return lambda: patched.__exit__(None, None, None)
