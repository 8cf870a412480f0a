"""What is asked of Inductor beyond its defaults."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor import config
from torch._subclasses.fake_tensor import FakeTensorMode

from moeca_compile.lower.inductor import IN_ONE_KERNEL, MANY_STATES, _for_device


def variant(states: int) -> Any:
    return SimpleNamespace(reads=tuple(range(states)))


def tensors(device: str) -> list[Any]:
    with FakeTensorMode():
        return [torch.empty(2, device="cpu"), torch.empty(2, device=device), 3]


@pytest.mark.parametrize(
    ("device", "states", "found"),
    [
        ("cuda", MANY_STATES + 1, {"max_fusion_size": IN_ONE_KERNEL}),
        ("cuda", MANY_STATES, {}),
        ("cpu", MANY_STATES + 1, {}),
    ],
)
def test_many_states_are_not_read_in_one_kernel_on_a_gpu(device: str, states: int, found: dict[str, int]) -> None:
    assert _for_device(variant(states), tensors(device)) == found
    assert set(found) <= set(config.get_config_copy()), "Inductor knows the option"
