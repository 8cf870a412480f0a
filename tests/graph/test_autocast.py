"""Which autocasts are on, and running with exactly those."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moeca_compile.graph.autocast import ambient_autocast, autocast_is

BF16, F16 = torch.bfloat16, torch.float16


def test_the_signature_tells_autocasts_apart() -> None:
    assert ambient_autocast() == ()
    with torch.autocast("cpu", BF16):
        assert ambient_autocast() == (("cpu", BF16),)
        with torch.autocast("cpu", F16):
            assert ambient_autocast() == (("cpu", F16),)
        with torch.autocast("cpu", enabled=False):
            assert ambient_autocast() == ()


@pytest.mark.parametrize("outer", [(), (("cpu", BF16),), (("cpu", F16),)])
@pytest.mark.parametrize("inner", [(), (("cpu", BF16),), (("cpu", F16),)])
def test_autocast_is_sets_and_restores(outer: Any, inner: Any) -> None:
    with autocast_is(outer):
        assert ambient_autocast() == outer
        with autocast_is(inner):
            assert ambient_autocast() == inner
        assert ambient_autocast() == outer
        with pytest.raises(ZeroDivisionError), autocast_is(inner):
            raise ZeroDivisionError
        assert ambient_autocast() == outer
    assert ambient_autocast() == ()
