"""Equal modules are looked through once; one that differs among them is looked through by itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import moeca_compile as moeca
from moeca_compile.expert_dispatch import search
from tests.models import DiT, NumpyMoE, SwiGLU


def blocks(depth: int) -> Any:
    """Blocks without experts."""
    model = DiT("dense", depth=depth, dim=16, heads=2, num_experts=2, hidden=12, size=4, channels=2).eval()
    for block in model.blocks:
        block.moe = SwiGLU(16, 12)
    return model


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Classes of the modules that families were asked about."""
    counts = Counter[str]()
    claimed = search._claimed

    def watched(code: Any) -> Any:
        counts[type(code.module).__name__] += 1
        return claimed(code)

    monkeypatch.setattr(search, "_claimed", watched)
    return counts


def test_the_time_does_not_grow_with_equal_blocks(looked: Counter[str]) -> None:
    moeca.prepare(blocks(2))
    few = looked.copy()
    looked.clear()
    moeca.prepare(blocks(6))
    assert looked == few


def test_an_odd_block_among_equal_ones_is_found() -> None:
    model = blocks(6)
    assert not moeca.prepare(model).changed
    model.blocks[4].moe = NumpyMoE(16, 12, 4, 2, False)
    report = moeca.prepare(model)
    assert [prepared.path for prepared in report.changed] == ["blocks.4.moe"]


def test_a_setting_makes_another_structure() -> None:
    model = blocks(3)
    model.blocks[1].some_setting = 3
    assert search._structure(model.blocks[0]) == search._structure(model.blocks[2])
    assert search._structure(model.blocks[0]) != search._structure(model.blocks[1])
