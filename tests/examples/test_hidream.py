"""diffusers' own pipeline class, and a loop like a pipeline's with two calls a step, run cached."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_compile as moeca
from tests.real.tiny import normal
from tests.real.zoo import pixart

hidream = importlib.import_module("examples.02_diffusers_hidream")


@pytest.mark.slow
def test_the_pipeline_runs_cached_and_computed_in_full_gives_the_same_image() -> None:
    """No word to the pipeline but its transformer; two images, one after the other, and their steps."""
    torch._dynamo.reset()
    plain, full, cached = hidream.contenders("eager").values()
    unlike = hidream.psnr([hidream.draw(plain, 0, steps=8)], [hidream.draw(plain, 1, steps=8)])
    for seed in (0, 1):
        truth, exact, image = (hidream.draw(pipeline, seed, steps=8) for pipeline in (plain, full, cached))
        assert (exact - truth).abs().max() < 1e-3  # 8 steps of a random model enlarge what rounding differs by
        assert not torch.equal(image, truth)
        assert hidream.psnr([image], [truth]) > unlike + 3
        stats = moeca.stats(cached.transformer)
        assert stats.graphs == moeca.stats(full.transformer).graphs == 1
        assert [record.step for record in stats.steps] == list(range(8))
        computed = [record.step for record in stats.steps if record.variant == stats.steps[0].variant]
        assert computed == [0, 3, 6]


@pytest.mark.slow
def test_the_figures_are_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    hidream.main(["--json", "--runs", "1", "--steps", "8"])
    (line,) = capsys.readouterr().out.splitlines()
    plain, full, cached = json.loads(line)
    assert (plain["graphs"], full["graphs"], cached["graphs"]) == (0, 1, 1)
    assert plain["mac_fraction"] == full["mac_fraction"] == 1
    assert 3 / 8 < cached["mac_fraction"] < 0.45
    assert full["psnr_db"] is None or full["psnr_db"] > 80
    assert 10 < cached["psnr_db"] < 80
    assert full["state_bytes"] == 0 < cached["state_bytes"]


# -- two calls a step -------------------------------------------------------------------------------------------------


def guided(model: Any, steps: int = 8) -> list[Tensor]:
    """As pipelines with two calls a step do it; what each call gave."""
    prompts = {"cond": normal(1, 6, 12, seed=4), "uncond": normal(1, 6, 12, seed=5)}
    latent, given = normal(1, 4, 8, 8), []
    for timestep in torch.linspace(900, 200, steps):
        pair = [
            model(
                latent, encoder_hidden_states=prompt, encoder_attention_mask=torch.ones(1, 6),
                timestep=timestep.expand(1), added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0]
            for prompt in prompts.values()
        ]  # fmt: skip
        given += pair
        cond, uncond = (one.chunk(2, dim=1)[0] for one in pair)
        latent = latent - 0.05 * (uncond + 2 * (cond - uncond))
    return given


@pytest.mark.slow
def test_two_calls_a_step_are_two_streams_that_keep_apart() -> None:
    """Cached, each stream goes on from its own past: the same as two trajectories that are told apart by name."""
    torch._dynamo.reset()
    model = moeca.compile(pixart(), schedule="uniform:2", order=1, inner="eager")
    named = {name: moeca.trajectory(model, steps=8, stream=name) for name in ("cond", "uncond")}
    turns = iter([*named] * 8)

    def by_name(*args: Any, **keywords: Any) -> Any:
        with named[next(turns)]:
            return model(*args, **keywords)

    with torch.no_grad():
        watched = guided(model)
        records = moeca.stats(model).steps
        told, truth = guided(by_name), guided(pixart())
    assert moeca.stats(model).graphs == 1
    assert [record.step for record in records] == [step for step in range(8) for _ in range(2)]
    assert len({record.stream for record in records}) == 2
    assert all(torch.equal(left, right) for left, right in zip(watched, told, strict=True))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(watched, truth, strict=True)]
    assert max(errors[:2]) < 1e-5 < min(errors[2:4])  # step 0 is computed, step 1 is not
    assert max(errors) < 0.2
