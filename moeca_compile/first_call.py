"""`torch.compile(model, backend="moeca")` alone: the model is prepared when its first graph runs for the first time.

A backend isn't told the model, and by the time it is asked Dynamo has traced the expert dispatch as it was shipped and
broken the graph there. So the first graph's first run prepares the model, calls it once more, now traced whole, and
then lets the broken call finish as it is: the second call did the trajectory's first step, the first gives its result.
"""

from __future__ import annotations

import warnings
from types import FrameType

from torch._dynamo.eval_frame import remove_from_cache

from moeca_compile.canonical import prepare
from moeca_compile.canonical.isolate import isolate
from moeca_compile.errors import MoecaWarning
from moeca_compile.owner import Owner

_broken: list[FrameType] = []  # the call during which a model was prepared


def out_of_date(owner: Owner | None, whole: bool) -> bool:
    """On a graph's first run: prepare the model. True: this graph belongs to a call that only has to finish."""
    if owner is None:
        return False
    if _broken and _broken[0] is owner.frame:
        return True
    _broken.clear()
    report = prepare(owner.module)
    if report.misses:
        some = "; ".join(str(miss) for miss in report.misses[:3])
        text = f"{len(report.misses)} expert dispatches are left as they are: {some}"
        warnings.warn(text, MoecaWarning, stacklevel=4)
    if whole and not report.changed:
        return False
    if not isolate(owner.module):
        if not report.changed:
            return False  # it has been traced afresh already, and breaks by itself
        remove_from_cache(owner.module.forward)
    if not _has_hooks(owner):  # else the next call is the first to be cached: hooks may not bear being run twice
        given = owner.frame.f_locals
        owner.handle(*given["args"], **given["kwargs"])
    _broken[:] = [owner.frame]
    return True


def _has_hooks(owner: Owner) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in owner.module.modules())
