"""What is done when a model of one's own code is gone: the collector may do it at any time."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeca_compile.expert_dispatch.isolate import isolate


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin `gc")
@pytest.mark.filterwarnings("error:.*reset_code")
def test_a_model_collected_inside_a_compiled_function_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", failures.append)
    held = [Net()]
    assert isolate(held[0])

    def drop() -> None:
        held.clear()
        gc.collect()

    @torch.compile(backend="eager")
    def compiled(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        drop()
        return x + 1

    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    assert not failures
