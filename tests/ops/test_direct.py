"""Inductor's code calls the operators of kept branches without torch's dispatcher, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeca_compile.ops import direct
from moeca_compile.ops.branches import KERNELS
from moeca_compile.ops.top_k import TOP_K


def test_each_name_is_an_operator_s() -> None:
    for name in KERNELS:
        packet, overload = name.split(".")
        assert isinstance(getattr(getattr(torch.ops.moeca, packet), overload), torch._ops.OpOverload)


@pytest.mark.slow  # Inductor compiles
def test_compiled_code_calls_the_function_and_gives_the_same() -> None:
    from torch._inductor.utils import run_and_get_code

    def choose(x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = TOP_K(x * 2, 3)
        return values + 1, indices

    direct.call_directly()
    x = torch.randn(5, 16)
    found, (code,) = run_and_get_code(torch.compile(choose, fullgraph=True), x)
    assert "= moeca_top_k.top_k(" in code
    assert "= torch.ops.moeca" not in code
    for one, wanted in zip(found, choose(x), strict=True):
        torch.testing.assert_close(one, wanted)
