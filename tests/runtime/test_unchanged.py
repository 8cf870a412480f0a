"""Inputs and weights that are written to in every way there is: the same results as from tensors of their own."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning
from tests.passes.blocks import DIM, Attention, Mlp
from tests.sampling import same

TEXT, SMALL, LARGE = 256, 2, 300  # channels of a prompt; tokens: 512 elements, and more than 65536
TIMES = (900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0)


class Prompted(nn.Module):
    """adaLN from the timestep, attention, cross-attention over a prompt, and an mlp: all that can be hoisted."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.ada = nn.Linear(2, DIM), nn.Linear(DIM, 3 * DIM)
        self.attn, self.mlp = Attention(), Mlp()
        self.query, self.key, self.value = nn.Linear(DIM, DIM), nn.Linear(TEXT, DIM), nn.Linear(TEXT, DIM)

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        c = self.time(torch.stack([(t / 100).sin(), (t / 100).cos()], dim=-1))
        shift, scale, gate = self.ada(F.silu(c)).unsqueeze(1).chunk(3, dim=-1)
        x = x + gate * self.attn(x * (1 + scale) + shift)
        x = x + F.scaled_dot_product_attention(self.query(x), self.key(prompt), self.value(prompt))
        return x + self.mlp(x)


def model() -> Prompted:
    torch.manual_seed(0)
    return Prompted().eval().requires_grad_(False)


@cache
def compiled(schedule: str, tokens: int) -> nn.Module:
    """One a size: Dynamo would take a second size of prompts for one that changes."""
    return torch.compile(model(), backend="moeca", options={"schedule": schedule, "inner": "eager"})


@cache
def prompts(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, tokens, TEXT, generator=generator), torch.randn(1, tokens, TEXT, generator=generator)


def by_numpy(to: Tensor, of: Tensor) -> None:
    to.numpy()[...] = of.numpy()


def by_address(to: Tensor, of: Tensor) -> None:
    ctypes.memmove(to.data_ptr(), of.data_ptr(), of.numel() * of.element_size())


WRITERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "copy_": Tensor.copy_,
    ".data": lambda to, of: to.data.copy_(of),
    "numpy": by_numpy,
    "dlpack": lambda to, of: torch.from_dlpack(to).copy_(of),
    "address": by_address,
}


def sample(
    call: Any, tokens: int, write: Callable[[Tensor, Tensor], Any] | None, order: str = "pn",
    enter: Callable[[str], AbstractContextManager[Any]] = lambda stream: nullcontext(), inference: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Guidance in calls of their own for the prompt (p) and the negative one (n), from one buffer, which `write` fills;
    None: from a tensor each."""
    with torch.inference_mode(inference), torch.no_grad():
        buffer, texts = torch.zeros(1, tokens, TEXT), dict(zip("pn", prompts(tokens), strict=True))
        x, outputs = torch.randn(1, 4, DIM, generator=torch.Generator().manual_seed(2)), []
        for t in TIMES:
            found = {}
            for one in order:
                given = texts[one].clone() if write is None else buffer
                if write is not None:
                    write(buffer, texts[one])
                with enter(one):
                    found[one] = call(x, torch.tensor([t]), given)
                outputs.append(found[one].clone())
            x = x - 0.1 * sum(found.values())
        return outputs


@pytest.mark.slow
@settings(max_examples=24, deadline=None)
@given(
    st.sampled_from(sorted(WRITERS)), st.sampled_from([SMALL, LARGE]), st.sampled_from(["full", "uniform:3"]),
    st.sampled_from(["pn", "np", "p"]), st.sampled_from(["clock", "trajectory", "streams"]), st.booleans(),
)  # fmt: skip
def test_one_buffer_gives_what_a_tensor_each_gives(
    writer: str, tokens: int, schedule: str, order: str, way: str, inference: bool
) -> None:
    handle = compiled(schedule, tokens)

    def run(write: Callable[[Tensor, Tensor], Any] | None) -> list[Tensor]:
        moeca.reset(handle)
        whole = moeca.trajectory(handle) if way == "trajectory" else nullcontext()
        streams = {one: moeca.trajectory(handle, stream=one) if way == "streams" else nullcontext() for one in "pn"}
        with whole:
            return sample(handle, tokens, write, order, streams.__getitem__, inference)

    truth, found = run(None), run(WRITERS[writer])
    assert same(found, truth)
    assert {record.variant for record in moeca.stats(handle).steps} >= ({"v0"} if schedule == "full" else {"v0", "v1"})
    if schedule == "full":
        assert same(found, sample(handle._orig_mod, tokens, None, order))


def steps(call: Any) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Inputs and result of each call."""
    x = torch.randn(1, 4, DIM, generator=torch.Generator().manual_seed(2))
    for t in TIMES:
        inputs = x, torch.tensor([t]), prompts(SMALL)[0]
        with torch.no_grad():
            result = call(*inputs)
        yield inputs, result
        x = x - 0.1 * result


@pytest.mark.parametrize("writer", WRITERS)
def test_full_follows_weights_that_are_written_to_in_the_middle(writer: str) -> None:
    module = model()
    for i, (inputs, result) in enumerate(steps(torch.compile(
        module, backend="moeca", options={"schedule": "full", "inner": "eager"}
    ))):  # fmt: skip
        assert torch.equal(result, module(*inputs))
        for weight in list(module.parameters())[i % 3 :: 3]:
            WRITERS[writer](weight, weight * -1.5)


def test_full_follows_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        module = model()
        handle = torch.compile(module, backend="moeca", options={"schedule": "full", "inner": "eager"})
        for inputs, result in steps(handle):
            assert torch.equal(result, module(*inputs))
            module.key.weight.mul_(-1.5)


@pytest.mark.parametrize("way", ["clock", "stream"])
@pytest.mark.parametrize("writer", [".data", "numpy"])
def test_a_cached_trajectory_starts_cold_at_the_next_computed_step(writer: str, way: str) -> None:
    """From there on it is what a model with these weights gives that starts there."""
    module = model()
    handle = torch.compile(module, backend="moeca", options={"schedule": "uniform:3", "inner": "eager"})
    with moeca.trajectory(handle, stream="s") if way == "stream" else nullcontext():
        loop = steps(handle)
        for _ in range(2):
            next(loop)
        WRITERS[writer](module.key.weight, module.key.weight * -1.5)
        next(loop)
        rest = list(loop)
    other = torch.compile(copy.deepcopy(module), backend="moeca", options={"schedule": "uniform:3", "inner": "eager"})
    with torch.no_grad():
        assert same([result for _, result in rest], [other(*inputs) for inputs, _ in rest])
        assert torch.equal(rest[0][1], module(*rest[0][0]))


def test_a_frozen_trajectory_looks_at_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = compiled("uniform:3", SMALL)
    with moeca.trajectory(handle, frozen=True):
        loop = steps(handle)
        next(loop)
        monkeypatch.setattr("moeca_compile.engine.hoisted.Hoisted.weights_changed", None)
        assert len(list(loop)) == len(TIMES) - 1


def test_nothing_is_hoisted_where_nothing_is_cached() -> None:
    handle = compiled("full", SMALL)
    list(steps(handle))
    assert moeca.stats(handle).hoisted_bytes == 0


def test_on_an_accelerator_a_named_stream_tells_late_and_starts_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = torch.compile(model(), backend="moeca", options={"schedule": "uniform:4", "inner": "eager"})
    buffer, changed = prompts(SMALL)[0].clone(), prompts(SMALL)[1]
    x = torch.randn(1, 4, DIM)
    monkeypatch.setattr("moeca_compile.graph.content.needs_device_sync", lambda value: isinstance(value, Tensor))
    with torch.no_grad(), moeca.trajectory(handle, stream="s"):
        for t in TIMES[:2]:
            handle(x, torch.tensor([t]), buffer)
        buffer.data.copy_(changed)
        handle(x, torch.tensor([TIMES[2]]), buffer)
        with pytest.warns(MoecaWarning, match="written to past its version counter"):
            found = handle(x, torch.tensor([TIMES[3]]), buffer)
        assert torch.equal(found, handle._orig_mod(x, torch.tensor([TIMES[3]]), changed))
    assert [record.cold for record in moeca.stats(handle).steps] == [False, False, False, True]
