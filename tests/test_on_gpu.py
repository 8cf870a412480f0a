"""What only a GPU can show: grouped experts in bfloat16, recordings, and steps that nobody waits for."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning, StateError
from tests.models import DiT
from tests.sampling import compiled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # torch's words on its own ways
    pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]
STEPS = 9
TIMES = [900.0 * (1 - step / STEPS) for step in range(STEPS)]


def model(dtype: torch.dtype = torch.bfloat16) -> DiT:
    torch.manual_seed(0)
    return DiT(depth=5).cuda().to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def walk(
    called: Any, named: bool = False, dtype: torch.dtype = torch.bfloat16, strict: bool = False,
    told: Sequence[float] = (),
) -> list[Tensor]:  # fmt: skip
    """What each call gave. `named`: in a trajectory with a stream, which is `told` these timesteps; `strict`: waiting
    for the GPU is an error."""
    torch.manual_seed(1)
    x, labels, found = torch.randn(2, 4, 8, 8, device="cuda"), torch.tensor([1, 2], device="cuda"), list[Tensor]()
    with moeca.trajectory(called, STEPS, "only", timesteps=told) if named else nullcontext():
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            for timestep in TIMES:
                found.append(called(x.to(dtype), torch.full((2,), timestep, device="cuda"), labels))
                x = x - found[-1].float() / STEPS
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def same(some: list[Tensor], others: list[Tensor], **how: Any) -> None:
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one, other, **how)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_computed_is_the_prepared_model(dtype: torch.dtype) -> None:
    network = model(dtype)
    moeca.prepare(network)
    same(walk(compiled(network, schedule="full"), dtype=dtype), walk(network, dtype=dtype), rtol=0, atol=0)


@pytest.mark.parametrize("schedule", ["uniform:3", "adaptive:0.05"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_cuda_graphs_give_what_calls_give(inner: str, schedule: str) -> None:
    called = compiled(model(), inner=inner, schedule=schedule)
    replayed = compiled(model(), inner=inner, schedule=schedule, cuda_graphs=True)
    for _ in range(3):
        same(walk(replayed), walk(called), rtol=0, atol=0)
        same(walk(replayed, named=True), walk(called, named=True), rtol=0, atol=0)


def test_experts_that_wait_for_the_gpu_run_without_a_recording() -> None:
    replayed, called = compiled(model(torch.float32), cuda_graphs=True), compiled(model(torch.float32))
    with pytest.warns(MoecaWarning, match="can't be recorded as a CUDA graph .moeca::experts reads token counts back"):
        found = walk(replayed, dtype=torch.float32)
    same(found, walk(called, dtype=torch.float32), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}, {"inner": "eager"}])
def test_nobody_waits_for_the_gpu_in_a_named_stream(options: dict[str, Any]) -> None:
    called = compiled(model(), **{"inner": "inductor", "pack_experts": True} | options)
    for _ in range(2):
        walk(called, named=True)
    walk(called, named=True, strict=True)


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}])
def test_timesteps_that_were_told_are_computed_together_and_nobody_waits(options: dict[str, Any]) -> None:
    called = compiled(model(), **{"inner": "inductor", "pack_experts": True} | options)
    by_step = walk(called, named=True)
    kept = moeca.stats(called).hoisted_bytes
    for strict in (False, True):
        together = walk(called, named=True, told=TIMES, strict=strict)
        for one, other in zip(together, by_step, strict=True):  # rounded elsewhere, which may turn a token's choice
            assert (one - other).float().norm() < 0.02 * other.float().norm()
    assert moeca.stats(called).hoisted_bytes > kept


def test_other_timesteps_than_those_that_were_told_are_an_error() -> None:
    called = compiled(model(), inner="inductor")
    with pytest.raises(StateError, match=f"call 3 came with timestep {TIMES[2]:g}, but the trajectory declared 1 "):
        walk(called, named=True, told=[*TIMES[:2], 1.0, *TIMES[3:]])


def test_experts_lie_side_by_side_after_packing() -> None:
    network = model()
    truth = walk(compiled(copy.deepcopy(network)))
    found = walk(compiled(network, pack_experts=True))
    same(found, truth, rtol=0, atol=0)
    weights = [one for name, one in network.named_parameters() if ".experts." in name]
    assert len({one.untyped_storage().data_ptr() for one in weights}) * 4 == len(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_gives_what_the_cpu_gives(dtype: torch.dtype) -> None:
    network: nn.Module = model(dtype)
    on_gpu = walk(compiled(network, inner="inductor"), dtype=dtype)
    with torch.no_grad():
        reference = network.cpu().float()
        x = torch.randn(2, 4, 8, 8)
        expected = reference(x, torch.full((2,), 500.0), torch.tensor([1, 2]))
        network.cuda().to(dtype)
        first = compiled(network, inner="inductor")(
            x.cuda().to(dtype), torch.full((2,), 500.0).cuda(), torch.tensor([1, 2]).cuda()
        )
    close = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(first.cpu().float(), expected, rtol=close, atol=close)
    assert all(one.isfinite().all() for one in on_gpu)
