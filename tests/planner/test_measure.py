"""What is measured against what it means: the sampler's weights, a pair's displacement, an expert's part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moeca_compile.planner.drift.experts import ExpertWatch
from moeca_compile.planner.drift.measure import FeatureBuffer, measure
from moeca_compile.planner.drift.mixing import CallRecording, find_mixing
from moeca_compile.planner.rollout import Call, SampledModel
from moeca_compile.planner.search.rows import Plan
from tests.models import DiT

STEPS, GUIDANCE = 8, 1.5
Sampler = Callable[[Any, int], Tensor]


def start(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def two_calls(model: Any, seed: int) -> Tensor:
    x = start(seed)
    for step in range(STEPS):
        t = torch.full((2,), 1000.0 * (1 - step / STEPS))
        cond, uncond = model(x, t, torch.tensor([1, 2])), model(x, t, torch.tensor([10, 10]))
        x = x - (uncond + GUIDANCE * (cond - uncond)) / STEPS
    return x


def one_call(model: Any, seed: int) -> Tensor:
    x = start(seed)
    for step in range(STEPS):
        t = torch.full((4,), 1000.0 * (1 - step / STEPS))
        uncond, cond = model(torch.cat([x, x]), t, torch.tensor([10, 10, 1, 2])).chunk(2)
        x = 0.99 * x - (uncond + GUIDANCE * (cond - uncond)) / STEPS
    return x


def clamped(model: Any, seed: int) -> Tensor:
    """Not linear in what the model gives."""
    x = start(seed)
    for step in range(STEPS):
        v = model(x, torch.full((2,), 1000.0 * (1 - step / STEPS)), torch.tensor([1, 2]))
        x = x - v.sign() * v.abs().sqrt() / STEPS
    return x


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return DiT(depth=2).eval()


def taped(model: nn.Module, sampler: Sampler) -> tuple[SampledModel, CallRecording]:
    sampled, tape = SampledModel(model, sampler, "region", "eager"), CallRecording()
    sampled.run(0)
    sampled.run(0, watch=tape.record)
    return sampled, tape


def test_the_samplers_weights_are_found(model: nn.Module) -> None:
    sampled, tape = taped(model, two_calls)
    mixing = find_mixing(sampled, 0, tape)
    assert mixing.is_linear
    cond, uncond = (mixing.weights[3][stream] for stream in dict.fromkeys(tape.streams))
    torch.testing.assert_close(cond, -GUIDANCE / STEPS * torch.eye(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(uncond, (GUIDANCE - 1) / STEPS * torch.eye(2), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_guidance_in_one_call_is_seen_through(model: nn.Module) -> None:
    sampled, tape = taped(model, one_call)
    mixing = find_mixing(sampled, 0, tape)
    (weights,) = mixing.weights[STEPS - 1].values()
    expected = torch.cat([(GUIDANCE - 1) * torch.eye(2), -GUIDANCE * torch.eye(2)], dim=1) / STEPS
    torch.testing.assert_close(weights, expected, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_where_the_sampler_is_not_linear_outputs_are_compared(model: nn.Module) -> None:
    sampled, tape = taped(model, clamped)
    mixing = find_mixing(sampled, 0, tape)
    assert not mixing.is_linear
    assert torch.equal(mixing.weights[0][tape.streams[0]], torch.eye(2))


@pytest.mark.parametrize("memory", [2**30, pytest.param(0, marks=pytest.mark.slow)], ids=["memory", "disk"])
def test_a_pair_is_the_next_latents_displacement(model: nn.Module, memory: int) -> None:
    """Reuse of step 3's outputs at step 4 alone, as the sampler itself would feel it."""
    sampled, tape = taped(model, two_calls)
    mixing = find_mixing(sampled, 0, tape)
    drift, samples = measure(sampled, [0], mixing, letters="CFA", lookback=3, memory=memory)
    assert torch.equal(samples[0], sampled.run(0))
    assert drift.atoms == ((0, 2), (1, 3))
    latents: dict[int, Tensor] = {}

    def watch(call: Call) -> None:
        assert call.latent is not None
        latents.setdefault(call.record.step, call.latent.clone())

    sampled.run(0, Plan("CCCCF" + "C" * (STEPS - 5), "order-0"), watch=watch)
    moved = (latents[5] - tape.latents[5]).flatten(1).norm(dim=1)
    found = torch.from_numpy(drift.parts[:, drift.pairs[3, 4]].sum(axis=0)).norm(dim=1)
    torch.testing.assert_close(found, moved, rtol=0.4, atol=0)  # 64 numbers stand for 256
    both = [np.linalg.norm(drift.parts[:, drift.pairs[a, 4]].sum(axis=0)) for a in (3, 2, 1)]
    assert both == sorted(both), "older outputs are farther off"


def test_what_does_not_fit_goes_to_disk(tmp_path: Path) -> None:
    spool, one = FeatureBuffer(tmp_path, limit=100), [torch.arange(20.0)]
    spool.put("a", 0, one)
    spool.put("a", 1, [torch.ones(20)])
    assert len(list(tmp_path.iterdir())) == 1
    assert spool.get("a", 0) is one
    kept = spool.get("a", 1)
    assert kept is not None
    assert torch.equal(kept[0], torch.ones(20))
    assert spool.get("b", 0) is None
    spool.drop("a", 1)
    spool.drop("a", 0)
    assert not list(tmp_path.iterdir())
    assert spool.bytes_in_memory == 0


@pytest.mark.slow
def test_experts_parts_are_those_of_the_layer(model: nn.Module) -> None:
    """By hand, from the layer's own router and experts: what each expert adds at steps 0, 1, 2, and how it drifts."""
    sampled, _ = taped(model, two_calls)
    watch = ExpertWatch(sampled.program)
    plain = DiT(depth=2).eval()
    plain.load_state_dict(model.state_dict())
    sampled.run(0, watch=watch.observe)
    found = watch.drifts()
    assert [(one.layer, one.expert) for one in found] == [(layer, e) for layer in (0, 1) for e in range(4)]
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for layer, block in enumerate(plain.blocks):

        def look(moe: Any, args: Any, layer: int = layer) -> None:
            tokens = args[0].reshape(-1, args[0].shape[-1])
            ids, weights = moe.route(tokens)
            parts = [
                ((ids == e) * weights).sum(dim=1, keepdim=True) * expert(tokens) for e, expert in enumerate(moe.experts)
            ]
            seen[layer].append(torch.stack(parts))

        block.moe.register_forward_pre_hook(look)
    with torch.no_grad():
        two_calls(plain, 0)
    for layer in (0, 1):
        runs = [seen[layer][stream::2] for stream in (0, 1)]  # conditional, unconditional
        at = [2] if STEPS < 9 else [2, 8]
        for e in range(4):
            one = next(drift for drift in found if (drift.layer, drift.expert) == (layer, e))
            reuse = [(run[s][e] - run[s - 1][e]).square().mean() for run in runs for s in at]
            bend = [(run[s][e] - 2 * run[s - 1][e] + run[s - 2][e]).square().mean() for run in runs for s in at]
            assert one.reuse == pytest.approx(float(torch.stack(reuse).mean().sqrt()), rel=1e-3)
            assert one.forecast == pytest.approx(float(torch.stack(bend).mean().sqrt()), rel=1e-3)
    assert sum(one.load for one in found if one.layer == 0) == pytest.approx(1)
    assert watch.as_json()[0]["region"].endswith("moe")
