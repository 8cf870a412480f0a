"""Prompts in place of a sample function, and which modules of a pipeline are its denoisers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning, OptionError, StateError
from moeca_compile.frontend.denoisers import parts_of
from moeca_compile.frontend.prompts import sampler_of, samples_of
from tests.docs import world


class Denoiser(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample


class Steered(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor, controlnet_cond: Tensor) -> Tensor:
        return sample


class Decoder(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        return sample


class Recording(world.Pipeline):
    """Remembers the keywords of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __call__(self, prompt: str = "", output_type: str = "pil", generator: Any = None, size: int = 4) -> Any:
        self.calls.append({"prompt": prompt, "output_type": output_type, "size": size})
        return super().__call__(prompt, generator=generator)


# -- denoisers --------------------------------------------------------------------------------------------------------


def test_components_that_take_a_latent_and_a_timestep_are_denoisers() -> None:
    unet, prior = Denoiser(), Denoiser()
    components = {"vae": Decoder(), "unet": unet, "prior": prior, "controlnet": Steered(), "scheduler": object()}
    pipe = SimpleNamespace(components=components, **components)
    assert parts_of(pipe) == {"unet": unet, "prior": prior}
    transformer = Denoiser()
    assert parts_of(SimpleNamespace(transformer=transformer, transformer_2=None, components=components)) == {
        "transformer": transformer
    }
    assert parts_of(unet) == parts_of(world.sample) == parts_of(3) == parts_of(world.Pipeline) == {}


@pytest.mark.parametrize("function", [moeca.compile, moeca.prepare, moeca.unprepare])
def test_a_pipeline_without_a_denoiser_is_refused(function: Any) -> None:
    pipe = SimpleNamespace(components={"vae": Decoder(), "tokenizer": object()})
    with pytest.raises(StateError, match="none of whose components takes a latent and a timestep: vae, tokenizer"):
        function(pipe)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_a_seed_draws_one_prompt() -> None:
    pipe = Recording()
    sample = sampler_of(pipe, None, ["a fox", {"prompt": "a hare", "size": 8}], {"size": 6}, "compare")
    first, _, third = (sample(None, seed) for seed in (0, 1, 2))
    assert pipe.calls == [
        {"prompt": "a fox", "output_type": "pt", "size": 6},
        {"prompt": "a hare", "output_type": "pt", "size": 8},
        {"prompt": "a fox", "output_type": "pt", "size": 6},
    ]
    assert torch.equal(first, world.sample(pipe.transformer, 0))
    assert first.shape == (3, 2, 4, 4)
    assert not torch.equal(first, third)


@pytest.mark.slow
def test_calibrate_takes_prompts() -> None:
    pipe = world.Pipeline()
    schedule = moeca.calibrate(
        pipe, prompts=["a fox"], call={"num_inference_steps": 4}, budget="macs:0.8", seeds=2, holdout=0, order=0,
        granularity="region", inner="eager", progress=False,
    )  # fmt: skip
    assert len(schedule.rows) == 4
    assert not hasattr(pipe.transformer, "_orig_mod")
    assert schedule.latent == (2, 4, 4)
    assert moeca.Schedule.from_json(schedule.to_json()) == schedule
    moeca.compile(pipe, schedule=schedule, inner="eager")
    pipe("a fox", num_inference_steps=4)  # a warning is an error here


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["region", "output"])
def test_an_image_size_that_was_not_calibrated_is_warned_of(granularity: str) -> None:
    schedule = replace(moeca.Schedule.uniform(2), latent=(2, 8, 8))
    model = moeca.compile(world.model(), schedule=schedule, granularity=granularity, inner="eager")
    with pytest.warns(MoecaWarning, match=r"a latent of \[2, 8, 8\] for each sample, this call's is \[2, 4, 4\]"):
        world.sample(model)


def test_converged_asks_the_pipeline_for_more_steps() -> None:
    pipe = world.Pipeline()
    sample = sampler_of(pipe, None, ["a fox"], {"num_inference_steps": 4}, "compare")
    assert torch.equal(sample(None, 3, steps=8), world.sample(pipe.transformer, 3, 8))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prompts": "a fox"}, r"prompts is str, expected a list of texts"),
        ({"prompts": {"prompt": "a fox"}}, "prompts is dict, expected a list"),
        ({"prompts": 3}, "prompts is int, expected a list"),
        ({"prompts": []}, "expected at least one, each a text"),
        ({"prompts": ["a fox", 3]}, "expected at least one, each a text"),
        ({"prompts": ["a fox"], "sample": world.sample}, "give a sample function, or prompts and call"),
        ({"call": {}, "sample": world.sample}, "give a sample function, or prompts and call"),
        ({}, "give sample, a function of"),
        ({"prompts": ["a fox"], "call": {"height": 4}}, "the call of Pipeline doesn't take height; it takes prompt, "),
        ({"prompts": [{"prompt_embeds": 1}]}, "doesn't take prompt_embeds"),
        ({"prompts": ["a fox"] * 3, "seeds": 2}, "3 prompts, but 2 seeds.*seeds=3 or more"),
    ],
)
def test_prompts_that_are_none(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        moeca.calibrate(world.Pipeline(), budget="macs:0.5", progress=False, **arguments)


class Encoding(world.Pipeline):
    """Encodes texts, with parts that may be missing, as diffusers' pipelines do."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.components = {"transformer": self.transformer, "text_encoder": None, "tokenizer": None, **parts}

    def __call__(self, prompt: str = "", prompt_embeds: Any = None, generator: Any = None) -> Any:
        if prompt_embeds is None:
            self.components["tokenizer"].encode(prompt)
        return super().__call__(generator=generator)


@pytest.mark.slow
def test_a_text_for_a_pipeline_without_text_encoder_is_refused() -> None:
    pipe = Encoding()
    moeca.compile(pipe, schedule="uniform:3", inner="eager")
    text = r"Encoding has no text_encoder, tokenizer; without, the text 'a fox' can't be .*prompts=\[\{'prompt_embeds'"
    with pytest.raises(OptionError, match=text):
        moeca.compare(pipe, prompts=["a fox"], seeds=1)
    embeddings = [{"prompt_embeds": torch.zeros(1, 2)}]
    assert moeca.compare(pipe, prompts=embeddings, seeds=1).mac_fraction < 1
    with pytest.raises(AttributeError):  # nothing is missing: the pipeline's own error
        sampler_of(Encoding(text_encoder=1, tokenizer=2), None, ["a fox"], None, "compare")(None, 0)


def test_prompts_are_for_pipelines() -> None:
    with pytest.raises(OptionError, match="compare: prompts are for a pipeline, and this is DiT"):
        moeca.compare(moeca.compile(world.model(), inner="eager"), prompts=["a fox"])


def test_what_pipelines_return() -> None:
    drawn = torch.rand(2, 3, 4, 4)
    forms: list[Any] = [drawn, drawn.numpy(), list(drawn), [np.asarray(each) for each in drawn]]
    for form in forms:
        assert torch.equal(samples_of(SimpleNamespace(images=form)), drawn)
        assert torch.equal(samples_of((form,)), drawn)
    assert torch.equal(samples_of(SimpleNamespace(frames=drawn)), drawn)
    with pytest.raises(OptionError, match="the pipeline returned str, in which no images were found"):
        samples_of("nothing")


def test_diffusers_enable_cache_takes_its_own_configurations_only() -> None:
    """Why there is no configuration of ours for it; the page on pipelines says so."""
    mixin = pytest.importorskip("diffusers").models.cache_utils.CacheMixin
    with pytest.raises(ValueError, match="is not supported"):
        mixin().enable_cache(SimpleNamespace())
