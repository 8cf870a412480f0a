"""Models at their published sizes on the meta device: found and explained without data."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from examples import full_size
from tests.docs.pages import ROOT
from tests.sampling import dit

SHALLOW: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "flux": ({"num_layers": 1, "num_single_layers": 1}, {"attention": 2, "mlp": 2}),
    "hidream": ({"num_layers": 1, "num_single_layers": 1}, {"attention": 2, "experts": 2, "mlp": 1}),
    "wan": ({"num_layers": 1}, {"attention": 2, "mlp": 1}),
    "qwen_image": ({"num_layers": 2}, {"attention": 2, "mlp": 3}),
    "dit_moe_g": ({"depth": 1}, {"attention": 1, "experts": 1}),
}
FAST = ("flux",)

pytestmark = pytest.mark.filterwarnings("ignore:There are modules in")  # diffusers, of a cast that the models bear


@pytest.mark.parametrize(
    ("name", "billions"), [("flux", 11.9), ("hidream", 17.1), ("wan", 14.3), ("qwen_image", 20.4), ("dit_moe_g", 16.5)]
)
def test_published_numbers_of_parameters(name: str, billions: float) -> None:
    model, _ = getattr(full_size, name)()
    assert all(p.is_meta for p in model.parameters())
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == billions


def held_bytes(model: nn.Module) -> int:
    """Of parameters and buffers; a rotary table that a step slices is a buffer."""
    return sum(held.numel() * held.element_size() for held in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in SHALLOW])
@pytest.mark.slow
def test_full_width_at_small_depth_is_found(name: str) -> None:
    sizes, kinds = SHALLOW[name]
    model, inputs = getattr(full_size, name)(**sizes)
    report = moeca.explain(model, keywords=inputs, schedule="uniform:3", inner="eager")
    assert report.graphs == 1
    assert Counter(region.kind for region in report.regions) == kinds
    full, cheap = report.variants
    assert cheap.macs < 0.5 * full.macs
    assert report.hoisted_weight_bytes > 0
    assert 0 < cheap.weight_bytes < full.weight_bytes <= held_bytes(model) - report.hoisted_weight_bytes


def test_without_data_the_report_is_that_of_the_model_with_data() -> None:
    x, t, y = torch.randn(2, 4, 8, 8), torch.full((2,), 900.0), torch.tensor([1, 2])
    real = moeca.explain(dit(), x, t, y, schedule="uniform:3", inner="eager")
    dry = moeca.explain(dit().to("meta"), *(one.to("meta") for one in (x, t, y)), schedule="uniform:3", inner="eager")
    regions = [[(r.key, r.kind, r.shapes, r.macs, r.parameters) for r in report.regions] for report in (dry, real)]
    assert regions[0] == regions[1]
    assert "experts" in {region.kind for region in dry.regions}
    assert (dry.fingerprint, dry.total_macs, dry.state_bytes) == (real.fingerprint, real.total_macs, real.state_bytes)
    sizes = [[(v.macs, v.reads, v.writes, v.weight_bytes) for v in report.variants] for report in (dry, real)]
    assert sizes[0] == sizes[1]
    assert dry.hoisted_weight_bytes == real.hoisted_weight_bytes > 0


class Rotary(nn.Module):
    """Reads a table at every step, another one only for its timestep, and no third one."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.frequencies: Tensor
        self.register_buffer("table", torch.ones(16, 8), persistent=False)
        self.register_buffer("frequencies", torch.arange(4.0))
        self.register_buffer("unused", torch.zeros(1000))
        self.embed, self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        gate = self.embed(torch.cat([angles.sin(), angles.cos()], -1))[:, None]
        x = x + gate * x
        q = self.q(x) * self.table[: x.shape[1]]
        weights = (q @ x.transpose(1, 2)).softmax(-1)
        return x + self.out(weights @ x)


def test_buffers_count_as_weights_where_they_are_read() -> None:
    """Those of a step for the step, those of a prologue alone as hoisted, each once, and what nobody reads nowhere."""
    model = Rotary().requires_grad_(False)
    inputs = torch.randn(2, 4, 8), torch.tensor([900.0, 900.0])
    report = moeca.explain(model, *inputs, schedule="uniform:2", inner="eager")
    full, _ = report.variants
    linear = 4 * (64 + 8)
    assert report.hoisted_weight_bytes == linear + 4 * 4
    assert full.weight_bytes == 2 * linear + 4 * 16 * 8
    assert full.weight_bytes + report.hoisted_weight_bytes == held_bytes(model) - 4 * 1000


@pytest.mark.slow
def test_the_page_has_what_the_command_prints() -> None:
    printed = full_size.row("dit_moe_g")[:-1]  # without the seconds
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "full-size.md").read_text().splitlines()]
    assert printed in [cells[:-1] for cells in rows]
