"""With `dynamic=True` Dynamo makes symbols of whatever may change. Here: of sizes alone, and of each size its own."""

from __future__ import annotations

from collections.abc import Callable

from torch._dynamo import config
from torch.fx.experimental import _config as symbols

_constant_floats = config._make_closure_patcher(specialize_float=True)
_symbols_apart = symbols._make_closure_patcher(use_duck_shape=False)  # type: ignore[attr-defined]


def sizes_alone() -> Callable[[], None]:
    """A hook around each call of a handle.

    Floats stay constants. Dynamo would hand over each epsilon of a norm as a tensor at each call, and capture makes a
    graph for each of their values anyway. Sizes that are equal by chance stay apart: a square image, or a prompt of as
    many tokens as the image has channels, would else be taken for a rule, and the first call that breaks it traced
    anew.
    """
    restore_floats, restore_symbols = _constant_floats(), _symbols_apart()

    def restore() -> None:
        restore_symbols()
        restore_floats()

    return restore
