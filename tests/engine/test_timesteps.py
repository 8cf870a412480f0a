"""Several timesteps in a call: one a token, one a sample, two inputs. Cached without a named stream, and exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.engine.intercept import intercepting
from moeca_compile.engine.program import Program
from moeca_compile.errors import MoecaWarning
from moeca_compile.passes.analysis import find_hoisted
from moeca_compile.schedule import Action, Schedule
from tests.following import gathered
from tests.reference import Reference

WIDTH, STEPS = 32, 7
TIMES = [1000.0 - 100 * step for step in range(STEPS)]
Inputs = tuple[Tensor, ...]
Call = Callable[[float], Inputs]


class Block(nn.Module):
    """Attention and an MLP, modulated by one embedding for the sample or by one for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.modulation, self.norm = nn.Linear(WIDTH, 4 * WIDTH), nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        c = c if c.dim() == 3 else c[:, None]
        scale, gate, scale_mlp, gate_mlp = self.modulation(F.silu(c)).chunk(4, -1)
        q, k, v = self.qkv(self.norm(x) * (1 + scale)).chunk(3, -1)
        x = x + gate * self.out(F.scaled_dot_product_attention(q, k, v))
        return x + gate_mlp * self.mlp(self.norm(x) * (1 + scale_mlp))


class Video(nn.Module):
    """A timestep for each sample, or for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.time = nn.Sequential(nn.Linear(32, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def embedding(self, t: Tensor) -> Tensor:
        angles = t[..., None] * torch.exp(-torch.arange(16) * 0.5)
        return self.time(torch.cat([angles.cos(), angles.sin()], -1))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c, h = self.embedding(t), self.into(x)
        for block in self.blocks:
            h = block(h, c)
        return self.out(h)  # type: ignore[no-any-return]


class VideoAndAudio(Video):
    """Two latents, each at a timestep of its own."""

    def forward(self, x: Tensor, audio: Tensor, t: Tensor, t_audio: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        parts = [(x, t), (audio, t_audio)]
        h = torch.cat([self.into(part) for part, _ in parts], 1)
        c = torch.cat([self.embedding(time)[:, None].expand(-1, part.shape[1], -1) for part, time in parts], 1)
        for block in self.blocks:
            h = block(h, c)
        h = self.out(h)
        return h[:, : x.shape[1]], h[:, x.shape[1] :]


def moved(t: float, *shape: int) -> Tensor:
    """A latent that moves a little with the timestep."""
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return noise[0] + t / 1000 * noise[1]


def latent(t: float) -> Tensor:
    return moved(t, 2, 8, 8)


def per_token(t: float) -> Inputs:
    """The first frame is clean."""
    return latent(t), torch.cat([torch.zeros(2, 3), torch.full((2, 5), t)], dim=1)


CALLS: dict[str, tuple[type[nn.Module], Call]] = {
    "one a token, all equal": (Video, lambda t: (latent(t), torch.full((2, 8), t))),
    "one a token, the first frame clean": (Video, per_token),
    "one a sample": (Video, lambda t: (latent(t), torch.tensor([t, t / 2]))),
    "one a sample, one constant": (Video, lambda t: (latent(t), torch.tensor([t, 7.0]))),
    "two inputs": (
        VideoAndAudio,
        lambda t: (latent(t), moved(t, 2, 3, 8), torch.full((2,), t), torch.full((2,), t / 2)),
    ),
    "two inputs, the leading one constant": (
        VideoAndAudio,
        lambda t: (latent(t), moved(t, 2, 3, 8), torch.full((2,), 7.0), torch.full((2,), t / 2)),
    ),
}


@pytest.fixture(params=CALLS)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Call]]:
    cls, call = CALLS[request.param]
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.no_grad():
        yield cls().eval().requires_grad_(False), call


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def arguments(compiled: nn.Module, calls: Sequence[Inputs]) -> tuple[Program, list[Sequence[Any]]]:
    """The program of some calls, and its arguments for each of them."""
    seen: list[tuple[Program, Sequence[Any]]] = []

    def look(entry: Any, args: Sequence[Any], runtime: Any) -> tuple[Any, ...]:
        seen.append(entry.place(args, runtime))
        return tuple(entry.gm(*args))

    with intercepting(look):
        for inputs in calls:
            compiled(*inputs)
    return seen[0][0], [args for _, args in seen]


def test_computed_in_full_it_is_eager(case: tuple[nn.Module, Call]) -> None:
    model, call = case
    wanted = [tensors(model(*call(t))) for t in TIMES]
    compiled = moeca.compile(model, schedule="full", inner="eager")
    found = [tensors(compiled(*call(t))) for t in TIMES]
    for left, right in zip(found, wanted, strict=True):
        assert all((a - b).abs().max() <= 1e-5 for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("disable", [(), ("hoist_step_only", "hoist_invariant")], ids=["hoisted", "not hoisted"])
def test_a_uniform_schedule_is_what_the_oracle_says(case: tuple[nn.Module, Call], disable: tuple[str, ...]) -> None:
    """Without a named stream, in two trajectories, and Dynamo traces nothing in the second."""
    model, call = case
    compiled = moeca.compile(model, schedule="uniform:3", inner="eager", disable=disable)
    outputs, traced = [], []
    for _ in range(2):
        outputs.append([tensors(compiled(*call(t))) for t in TIMES])
        traced.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert traced[0] == traced[1]
    program, args = arguments(compiled, [call(t) for t in TIMES])
    for trajectory in outputs:
        oracle = Reference(program.analysis.gm, program.regions, program.schedule, gathered)
        for step, found in enumerate(trajectory):
            row = program.schedule.rows[program.schedule.row_index(step) or 0]
            assert equal(oracle(row, args[step]), found), f"step {step}"
    steps = moeca.stats(compiled).steps
    assert [record.step for record in steps] == list(range(STEPS))
    assert not any(record.cold for record in steps[1:])
    assert not moeca.stats(compiled).warnings


def test_timesteps_up_and_down_at_once_run_in_full_and_say_so() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Video().eval().requires_grad_(False)
    times = [[900.0, 500.0], [800.0, 600.0], [700.0, 700.0], [650.0, 600.0]]
    calls = [(latent(sum(pair) / 2), torch.tensor(pair)) for pair in times]
    with torch.no_grad():
        wanted = [model(*inputs) for inputs in calls]
        compiled = moeca.compile(model, schedule="uniform:4", inner="eager")
        with pytest.warns(MoecaWarning, match="up and down at once"):
            found = [compiled(*inputs) for inputs in calls]
    assert equal(found[:3], wanted[:3])
    assert [record.stream for record in moeca.stats(compiled).steps] == ["0", "None", "None", "0"]
    assert equal(found[3:], wanted[3:])  # its state was dropped


def test_a_schedule_with_timesteps_goes_by_the_middle_one_of_the_tokens() -> None:
    """Whatever part of the tokens is clean."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    rows = tuple([(Action.COMPUTE if step in (0, 1, 4) else Action.FORECAST,) for step in range(STEPS)])
    schedule = Schedule(rows, timesteps=tuple(TIMES))
    compiled = moeca.compile(Video().eval().requires_grad_(False), schedule=schedule, inner="eager")
    with torch.no_grad():
        for t in TIMES:
            compiled(*per_token(t))
    steps = moeca.stats(compiled).steps
    assert [record.timestep for record in steps] == TIMES
    assert [record.variant for record in steps] == ["v0", "v0", "v1", "v1", "v0", "v1", "v1"]
    assert not moeca.stats(compiled).warnings


def test_two_steps_of_one_timestep_in_bfloat16_are_two() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = moeca.compile(Video().eval().requires_grad_(False), schedule="uniform:3", inner="eager")
    times = [1000.0 - 3 * step for step in range(STEPS)]
    assert len(set(torch.tensor(times).bfloat16().tolist())) < STEPS
    with torch.no_grad():
        for t in times:
            compiled(latent(t), torch.full((2,), t, dtype=torch.bfloat16))
    steps = moeca.stats(compiled).steps
    assert [record.step for record in steps] == list(range(STEPS))
    assert [record.variant for record in steps] == ["v0", "v1", "v1", "v0", "v1", "v1", "v0"]


def test_values_of_a_step_that_take_too_much_memory_are_not_hoisted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a timestep for each token they are as large as activations."""
    levels = {}
    for limit in (find_hoisted.STEP_BYTES, 0):
        monkeypatch.setattr(find_hoisted, "STEP_BYTES", limit)
        torch.manual_seed(0)
        torch._dynamo.reset()
        compiled = moeca.compile(Video().eval().requires_grad_(False), schedule="uniform:3", inner="eager")
        with torch.no_grad():
            program, _ = arguments(compiled, [per_token(t) for t in TIMES[:1]])
        levels[limit] = [value.level for value in program.prologues.hoisted]
    assert [set(found) for found in levels.values()] == [{"step"}, set()]
