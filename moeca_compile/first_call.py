"""`torch.compile(model, backend="moeca")` alone: the model is prepared when its first graph runs for the first time.

A backend isn't told the model, and by the time it is asked Dynamo has traced the model as it was shipped, and broken
the graph at its expert dispatch, at a number that it reads out of a tensor, or at a table that it builds when first
called. So the first graph's first run prepares the model, calls it once more, now traced whole, and then lets the
broken call finish as it is: the second call did the trajectory's first step, the first gives its result. A model that
breaks in the second call too gets a third, by when it has built its tables; if that doesn't help, it runs in parts.
"""

from __future__ import annotations

import warnings
import weakref
from types import CodeType, FrameType
from typing import Any

from torch._dynamo import config
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.eval_frame import OptimizedModule, remove_from_cache
from torch.nn import Module

from moeca_compile.canonical import prepare
from moeca_compile.canonical.isolate import isolate
from moeca_compile.errors import CaptureError, MoecaWarning
from moeca_compile.owner import Owner

_broken: list[FrameType] = []  # the call during which a model was prepared
_trials: dict[int, bool] = {}  # by id of a model that is being called once more: whether its graph was whole
_renewed: weakref.WeakSet[Module] = weakref.WeakSet()  # handles that were called once more; if they break, so be it


def out_of_date(owner: Owner | None, whole: bool) -> bool:
    """On a graph's first run: prepare the model. True: this graph belongs to a call that only has to finish."""
    if owner is None:
        return False
    if id(owner.module) in _trials:
        _trials[id(owner.module)] |= whole
        return not whole
    if _broken and _broken[0] is owner.frame:
        return True
    _broken.clear()
    report = prepare(owner.module)
    if report.misses:
        some = "; ".join(str(miss) for miss in report.misses[:3])
        text = f"{len(report.misses)} expert dispatches are left as they are: {some}"
        warnings.warn(text, MoecaWarning, stacklevel=4)
    if not report.changed and (whole or owner.handle in _renewed):
        return False
    _renewed.add(owner.handle)
    _renew(owner, scalars=True)
    if not _has_hooks(owner) and not _comes_whole(owner):  # hooks may not bear being run twice: next time, then
        _renew(owner, scalars=False)
    _broken[:] = [owner.frame]
    return True


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


def _has_hooks(owner: Owner) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in owner.module.modules())
