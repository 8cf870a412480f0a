"""Text and image tokens in one buffer, as mixtures of transformers pack them: the text tower is computed once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning
from tests.sampling import records

TEXT, IMAGE, DIM = 5, 16, 16


class Tower(nn.Module):
    """Text tokens see text, image tokens see all."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image, self.out = (nn.Linear(DIM, 3 * DIM) for _ in range(3))
        self.mix = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(DIM, 32), nn.GELU(), nn.Linear(32, DIM)) for _ in range(2))

    def forward(self, text: Tensor, image: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        tq, tk, tv = self.text(F.layer_norm(text, (DIM,))).chunk(3, -1)
        iq, ik, iv = self.image(F.layer_norm(image, (DIM,)) * scale).chunk(3, -1)
        text = text + self.mix[0](F.scaled_dot_product_attention(tq[None], tk[None], tv[None], is_causal=True)[0])
        keys, values = torch.cat([tk, ik])[None], torch.cat([tv, iv])[None]
        image = image + scale * self.mix[1](F.scaled_dot_product_attention(iq[None], keys, values)[0])
        text = text + self.mlp[0](F.layer_norm(text, (DIM,)))
        return text, image + scale * self.mlp[1](F.layer_norm(image, (DIM,)))


class Packed(nn.Module):
    """The indices of both kinds of tokens are arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.words = nn.Linear(8, DIM), nn.Linear(DIM, DIM)
        self.towers = nn.ModuleList(Tower() for _ in range(2))
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, t: Tensor, words: Tensor, text_rows: Tensor, image_rows: Tensor) -> Tensor:
        wave = t[:, None] * torch.exp(-torch.arange(4) / 2.0)
        scale = 1 + self.time(torch.cat([wave.cos(), wave.sin()], -1))
        h = torch.zeros(TEXT + IMAGE, DIM)
        h[text_rows] = self.words(words)
        h[image_rows] = x
        text, image = h[:TEXT], h[TEXT:]
        for tower in self.towers:
            text, image = tower(text, image, scale)
        return self.out(image)


def packed() -> Packed:
    torch.manual_seed(0)
    return Packed().eval().requires_grad_(False)


def inputs(kind: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randn(TEXT, DIM, generator=generator)
    if kind == "mask":
        mask = torch.arange(TEXT + IMAGE) < TEXT
        return words, mask, ~mask
    rows = torch.arange(TEXT + IMAGE)
    image = rows[TEXT:] - (TEXT + IMAGE) if kind == "from the end" else rows[TEXT:]
    return words, rows[:TEXT], image - TEXT if kind == "overlapping" else image


def steps(model: nn.Module, kind: str, count: int = 6) -> list[Tensor]:
    x = torch.randn(IMAGE, DIM, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return [model(x * (1 - 0.1 * i), torch.full((1,), 900.0 - 80 * i), *inputs(kind)) for i in range(count)]


@pytest.mark.parametrize("kind", ["index", "from the end", "mask"])
def test_the_text_tower_is_hoisted(kind: str) -> None:
    model = moeca.compile(packed(), schedule="uniform:3", inner="eager")
    found = steps(model, kind)
    assert [record.variant for record in records(model)] == ["v0", "v1", "v1"] * 2
    truth = steps(packed(), kind)
    assert torch.allclose(found[0], truth[0], rtol=0, atol=1e-6)
    report = moeca.explain(model, torch.zeros(IMAGE, DIM), torch.full((1,), 900.0), *inputs(kind))
    invariant = [one for one in report.hoisted if one.level == "invariant"]
    assert len(invariant) >= 2  # the keys and values of both towers


def test_full_is_exact() -> None:
    model = moeca.compile(packed(), schedule="full", inner="eager")
    assert all(torch.equal(a, b) for a, b in zip(steps(model, "index"), steps(packed(), "index"), strict=True))


def test_image_tokens_among_the_text_run_uncached_and_are_told() -> None:
    """Which rows an index points at is known at run time only."""
    module = packed()
    model = moeca.compile(module, schedule="uniform:3", inner="eager")
    steps(model, "index")
    with pytest.warns(MoecaWarning, match="writes tokens of the latent into rows 0 to 4") as told:
        found = steps(model, "overlapping")
    assert len(told) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, steps(module, "overlapping"), strict=True))


class EverySecond(Packed):
    def forward(self, x: Tensor, t: Tensor, words: Tensor, text_rows: Tensor, image_rows: Tensor) -> Tensor:
        wave = t[:, None] * torch.exp(-torch.arange(4) / 2.0)
        scale = 1 + self.time(torch.cat([wave.cos(), wave.sin()], -1))
        h = torch.zeros(TEXT + IMAGE, DIM)
        h[text_rows] = self.words(words)
        h[image_rows] = x
        text, image = h[0:TEXT:2], h[TEXT:]
        for tower in self.towers:
            text, image = tower(text, image, scale)
        return self.out(image)


def test_a_slice_with_a_step_stays() -> None:
    torch.manual_seed(0)
    module = EverySecond().eval().requires_grad_(False)
    model = moeca.compile(module, schedule="full", inner="eager")
    assert all(torch.equal(a, b) for a, b in zip(steps(model, "index"), steps(module, "index"), strict=True))


def test_it_can_be_left_out() -> None:
    model = moeca.compile(packed(), schedule="uniform:3", inner="eager", disable=("separate_rows",))
    steps(model, "overlapping")
    assert [record.variant for record in records(model)] == ["v0", "v1", "v1"] * 2
