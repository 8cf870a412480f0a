"""Which input is what, and what depends on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeca_compile.passes.facts import Roles
from moeca_compile.pipeline import FIND
from tests.passes.blocks import DIM, Block, Timed, latent, times
from tests.tools import analyze_module


class Model(nn.Module):
    """Latent, timestep, label and prompt, each used as such models use it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.label = nn.Conv2d(3, DIM, 2, 2), nn.Embedding(5, DIM)
        self.time, self.text, self.out = nn.Linear(4, DIM), nn.Linear(6, DIM), nn.Linear(DIM, 12)
        self.pos = nn.Parameter(torch.randn(4, DIM))
        self.register_buffer("freqs", torch.tensor([1.0, 2.0]))

    def forward(self, prompt: Tensor, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = t[:, None] * self.freqs
        c = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1)) + self.label(y)
        rotary = self.pos.sin() + self.pos.cos()
        h = self.patch(x).flatten(2).transpose(1, 2) + self.pos
        h = h + F.scaled_dot_product_attention(h, self.text(prompt), self.text(prompt)) * c.unsqueeze(1) * rotary
        return self.out(h).view(-1, 3, 4, 4)


@pytest.fixture(scope="module")
def roles_and_dependence() -> tuple[Roles, dict[str, str]]:
    inputs = (torch.randn(2, 7, 6), torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([1, 2]))
    context = analyze_module(Model(), *inputs).facts
    return context.roles, dict(context.dependence)


def test_timestep_latent_and_conditions_are_told_apart(roles_and_dependence: tuple[Roles, dict[str, str]]) -> None:
    roles, _ = roles_and_dependence
    assert (roles.timestep, roles.latent) == ("t", "x")
    assert set(roles.condition) == {"prompt", "y"}


class Fourier(Model):
    """Frequencies by a matmul of one column and one row, as Gaussian Fourier features are written."""

    def forward(self, prompt: Tensor, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(prompt, x, (t[:, None] @ self.freqs[None, :1])[:, 0], y)


def test_frequencies_may_be_multiplied_by_a_matmul() -> None:
    inputs = (torch.randn(2, 7, 6), torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([1, 2]))
    assert analyze_module(Fourier(), *inputs).facts.roles.timestep == "t"


def test_every_node_is_const_condition_step_or_latent(roles_and_dependence: tuple[Roles, dict[str, str]]) -> None:
    _, depends = roles_and_dependence
    wanted = {
        "pos": "const", "freqs": "const", "time_weight": "const", "t": "step", "y": "condition",
        "prompt": "condition", "embedding": "condition", "linear": "step", "linear_1": "condition", "x": "latent",
        "conv2d": "latent",
        "scaled_dot_product_attention": "latent", "output": "latent",
    }  # fmt: skip
    assert {name: depends[name] for name in wanted} == wanted
    assert {depends["sin"], depends["sin_1"]} == {"step", "const"}  # of the timestep, of a table of positions


def roles(function: Any, *inputs: Any) -> Roles:
    return analyze_module(function, *inputs).facts.roles


def sinusoid(t: Tensor) -> Tensor:
    angles = t.reshape(-1, 1) * torch.tensor([1.0, 2.0])
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@pytest.mark.parametrize("t", [torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([3, 3]), torch.tensor(7)])
def test_a_timestep_may_be_a_scalar_a_vector_a_float_or_an_integer(t: Tensor) -> None:
    assert roles(lambda x, t: x + sinusoid(t).sum(), latent(), t).timestep == "t"


def test_a_complex_exponential_is_not_needed_sine_and_cosine_are() -> None:
    assert roles(lambda x, t: x + t.sin().sum(), latent(), times()).timestep == ""
    assert roles(lambda x, t: x + t.cos().sum() * t.sin().sum(), latent(), times()).timestep == "t"


def test_a_position_of_two_dimensions_is_no_timestep() -> None:
    found = roles(lambda x, ids: x * ids.sin() + x * ids.cos(), latent(), torch.rand(4, DIM))
    assert found.timestep == ""
    assert found.condition == ("ids",)


def test_a_vector_that_meets_a_matmul_before_the_sine_is_no_timestep() -> None:
    def model(x: Tensor, v: Tensor) -> Tensor:
        h = v @ torch.ones(DIM, DIM)
        return x * h.sin() + h.cos()

    assert roles(model, latent(), torch.rand(DIM)).timestep == ""


def test_a_weight_is_never_the_timestep() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.rand(DIM))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.phase.sin() + self.phase.cos()

    assert roles(Learned(), latent()) == Roles("", "x", ())


def test_the_latent_is_the_input_that_looks_like_an_output_not_the_largest() -> None:
    found = roles(lambda prompt, x: x + prompt.mean((0, 1)), torch.randn(2, 50, DIM), latent())
    assert (found.latent, found.condition) == ("x", ("prompt",))


def test_a_latent_that_was_cut_into_patches_is_told_from_a_larger_prompt_of_the_outputs_dimensions() -> None:
    def model(layers: Tensor, x: Tensor) -> Tensor:
        return (x + layers.mean((0, 2))[:, None, :DIM]).view(2, 2, 2, DIM)

    found = roles(model, torch.randn(9, 2, 2, 2 * DIM), latent())
    assert (found.latent, found.condition) == ("x", ("layers",))


def test_between_inputs_that_look_alike_the_larger_is_the_latent() -> None:
    found = roles(lambda small, x: (x * small).sum((1, 2)), torch.randn(2, 4, 1), latent())
    assert found.latent == "x"


def test_an_integer_image_is_no_latent() -> None:
    found = roles(lambda ids, x: x + ids.float(), torch.ones(2, 4, DIM, dtype=torch.int64), latent())
    assert (found.latent, found.condition) == ("x", ("ids",))


def test_a_model_without_a_timestep_has_none() -> None:
    assert roles(lambda x: x * 2, latent()) == Roles("", "x", ())


def test_without_a_latent_everything_is_condition_or_const() -> None:
    context = analyze_module(lambda y: y * 2, torch.tensor([1, 2])).facts
    assert context.roles == Roles("", "", ("y",))
    assert set(dict(context.dependence).values()) == {"condition"}


def test_what_the_prompt_and_the_timestep_make_together_is_step() -> None:
    context = analyze_module(lambda x, t, y: x + (y * 2 + sinusoid(t).sum()), latent(), times(), torch.rand(4, DIM))
    depends = dict(context.facts.dependence)
    assert [depends[name] for name in ("mul", "sum_1", "add", "add_1")] == ["condition", "step", "step", "latent"]


def test_of_two_that_reach_waves_the_first_is_the_timestep_the_other_a_condition() -> None:
    found = roles(lambda x, t, r: x + sinusoid(t).sum() + sinusoid(r).sum(), latent(), times(), times() * 2)
    assert (found.timestep, found.condition) == ("t", ("r",))


@pytest.mark.parametrize("name", ["t", "timestep", "timesteps", "time", "sigma"])
def test_of_two_that_reach_waves_the_one_with_the_name_is_the_timestep(name: str) -> None:
    """A guidance scale or a frame rate may be embedded before it."""
    code = f"lambda x, guidance, {name}: x + sinusoid(guidance).sum() + sinusoid({name}).sum()"
    found = roles(eval(code, {"sinusoid": sinusoid}), latent(), times() * 2, times())
    assert (found.timestep, found.condition) == (name, ("guidance",))


def embedding(t: Tensor) -> Tensor:
    """[..., DIM], as a timestep's embedding: waves, then a matmul."""
    angles = t[..., None] * torch.tensor([1.0, 2.0])
    return torch.cat([angles.sin(), angles.cos()], dim=-1) @ torch.ones(4, DIM)


def test_a_timestep_for_each_token_is_one() -> None:
    found = roles(lambda x, noise_level: x + embedding(noise_level), latent(), torch.rand(2, 4))
    assert (found.timestep, found.latent, found.condition) == ("noise_level", "x", ())


def test_positions_in_a_sequence_are_no_timesteps_beside_one() -> None:
    found = roles(lambda x, t, size: x + embedding(t)[:, None] + embedding(size), latent(), times(), torch.rand(2, 4))
    assert (found.timesteps, found.condition) == (("t",), ("size",))


@pytest.mark.parametrize("name", ["audio_timestep", "t_audio", "audio_sigma", "text_time", "noise_of_audio"])
def test_a_second_timestep_is_one_if_its_name_says_so_and_it_is_embedded(name: str) -> None:
    code = f"lambda x, {name}, t: x + embedding({name})[:, None] + embedding(t)[:, None]"
    found = roles(eval(code, {"embedding": embedding}), latent(), times(), times() * 2)
    assert (found.timesteps, found.condition) == (("t", name), ())


def test_a_model_with_two_outputs_has_a_latent_for_each() -> None:
    def model(video: Tensor, audio: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        return video + prompt.mean(), audio + video.mean()

    context = analyze_module(model, latent(), torch.rand(2, 3, DIM), torch.rand(2, 5, DIM)).facts
    assert (context.roles.latent, context.roles.condition) == ("video", ("prompt",))
    assert context.dependence["audio"] == "latent"


def test_a_list_of_latents_is_given_back_as_a_list() -> None:
    """The clock watches the first; the others are no conditioning."""

    def model(images: list[Tensor], t: Tensor, prompts: list[Tensor]) -> list[Tensor]:
        return [x * p.mean() + sinusoid(t).sum() for x, p in zip(images, prompts, strict=True)]

    images = [torch.randn(4, DIM), torch.randn(4, DIM)]
    context = analyze_module(model, images, times(), [torch.randn(6, DIM), torch.randn(6, DIM)]).facts
    assert context.roles == Roles("t", "images_0", ("prompts_0", "prompts_1"))
    assert dict(context.dependence)["images_1"] == "latent"


def test_one_output_means_one_latent_however_many_inputs_look_like_it() -> None:
    found = roles(lambda x, picture: x + picture * 2, latent(), latent())  # the picture is used first
    assert (found.latent, found.condition) == ("x", ("picture",))
    assert roles(lambda a, b: a + b * 2, latent(), latent()).latent == "b"


def test_no_finder_changes_the_graph() -> None:
    analysis = analyze_module(Timed(Block("gate left")), latent(), times())
    before = [(n.name, n.target, n.args) for n in analysis.gm.graph.nodes]
    context = analysis.facts
    for finder in FIND:
        context = finder(analysis.gm, context)
    assert [(n.name, n.target, n.args) for n in analysis.gm.graph.nodes] == before
