"""Dynamo's own graph, run as plain `torch.compile` would run it: what isn't cached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moeca_compile.options import Options


def lower_as_given(gm: torch.fx.GraphModule, options: Options) -> Callable[..., Any]:
    """It may write to its inputs and have sizes that depend on data: nothing of ours looks at it. It is compiled when
    it first runs, with guards of its own on the sizes that it gets."""
    if options.inner == "eager":
        return gm
    from torch._inductor import list_mode_options

    chosen = {**(list_mode_options(options.mode) if options.mode else {}), **options.inner_options}
    compiled: Callable[..., Any] = torch.compile(gm, options=chosen or None)
    return compiled
