"""Variants that are compiled together: their kernels are waited for at the end, and an error names its variant."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering

import moeca_compile as moeca
from moeca_compile.errors import LoweringError
from moeca_compile.frontend.entry import ENTRIES
from moeca_compile.lowering.inductor.kernels import kernels_later
from tests.sampling import compiled

INPUTS = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(9)), torch.full((2,), 500.0)
SCHEDULE = "uniform:2"


class Small(nn.Module):
    """One MLP that depends on the timestep: few kernels to compile."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        gate = (t.sin() + t.cos())[:, None, None]
        return x + gate * self.down(self.up(x).relu())


def small() -> Small:
    return Small().eval().requires_grad_(False)


pytestmark = pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """When a graph was lowered, and when its kernels were waited for."""
    found: list[str] = []
    codegen, wait = GraphLowering.codegen, AsyncCompile.wait

    def lowers(self: GraphLowering) -> Any:
        found.append("lowered")
        return codegen(self)

    def waits(self: AsyncCompile, scope: dict[str, Any]) -> None:
        found.append("waited")
        wait(self, scope)

    monkeypatch.setattr(GraphLowering, "codegen", lowers)
    monkeypatch.setattr(AsyncCompile, "wait", waits)
    torch._dynamo.reset()
    with config.patch(force_disable_caches=True):  # of graphs; that of kernels stays
        yield found


@pytest.mark.slow
@torch.no_grad()
def test_all_variants_are_lowered_before_any_kernel_is_waited_for(events: list[str]) -> None:
    model = compiled(small(), inner="inductor", schedule=SCHEDULE)
    result = moeca.warmup(model, *INPUTS)
    assert events[:2] == ["lowered"] * 2
    assert set(events[2:]) == {"waited"}
    assert torch.allclose(result, small()(*INPUTS), atol=1e-5)
    assert moeca.stats(model).compile_seconds["kernels"] > 0


@pytest.mark.slow
@torch.no_grad()
def test_other_threads_find_no_variant_whose_kernels_are_missing(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, found, others = AsyncCompile.wait, list[object](), set(ENTRIES)

    def looks(self: AsyncCompile, scope: dict[str, Any]) -> None:
        programs = [program for entry in set(ENTRIES) - others for program in entry.programs.values()]
        caches = [(program.compiled_schedule.variants, program.schedule) for program in programs]
        found.extend(cache.executables.get(row) for cache, schedule in caches for row in schedule.distinct_rows())
        wait(self, scope)

    monkeypatch.setattr(AsyncCompile, "wait", looks)
    model = compiled(small(), inner="inductor", schedule=SCHEDULE)
    moeca.warmup(model, *INPUTS)
    assert found
    assert set(found) == {None}


@pytest.mark.slow
@torch.no_grad()
def test_what_is_refused_is_compiled_again_by_itself(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wait, failures = AsyncCompile.wait, [RuntimeError("no space left on device")]

    def fail_once(self: AsyncCompile, scope: dict[str, Any]) -> None:
        if failures:
            raise failures.pop()
        wait(self, scope)

    monkeypatch.setattr(AsyncCompile, "wait", fail_once)
    model = compiled(small(), inner="inductor", schedule=SCHEDULE)
    result = moeca.warmup(model, *INPUTS)
    assert not failures
    assert events[:2] == ["lowered"] * 2
    assert torch.allclose(result, small()(*INPUTS), atol=1e-5)


@torch.no_grad()
def test_what_is_refused_again_is_an_error_that_names_the_variant(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: AsyncCompile, scope: dict[str, Any]) -> None:
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(AsyncCompile, "wait", fail)
    with pytest.raises(LoweringError, match=r"refused variant v0 .*no space left on device"):
        moeca.warmup(compiled(small(), inner="inductor", schedule=SCHEDULE, disable=("repeat_blocks",)), *INPUTS)


def test_other_threads_wait_as_they_did(events: list[str]) -> None:
    with kernels_later() as wait:
        AsyncCompile().wait({})
        assert events == []
        other = threading.Thread(target=AsyncCompile().wait, args=({},))
        other.start()
        other.join()
        assert events == ["waited"]
        wait()
        assert events == ["waited", "waited"]
        wait()  # nothing is left
    AsyncCompile().wait({})
    assert events == ["waited"] * 3
