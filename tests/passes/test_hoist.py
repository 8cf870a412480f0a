"""Which values are shared by several calls, and programs that take them from outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeca_compile.graph.regions import HoistedValue
from moeca_compile.options import Options
from moeca_compile.passes.analysis.count_macs import node_macs
from moeca_compile.pipeline import Analysis, build_prologue, build_variant
from tests.passes.blocks import DIM, Attention, Mlp, latent, times
from tests.tools import UNHOISTED, analyze_module, ops, row, schedule_of

SEQUENCE = 5


class Prompted(nn.Module):
    """A block with adaLN, self-attention, cross-attention over a prompt with rotated keys, and an mlp."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.ada = nn.Linear(2, DIM), nn.Linear(DIM, 3 * DIM)
        self.attn, self.mlp = Attention(), Mlp()
        self.query, self.key, self.value = nn.Linear(DIM, DIM), nn.Linear(6, DIM), nn.Linear(6, DIM)
        self.text = nn.Linear(6, 6)

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        c = self.time(torch.stack([t.sin(), t.cos()], dim=-1)) + prompt.mean(1)[:, :1]
        shift, scale, gate = self.ada(F.silu(c)).unsqueeze(1).chunk(3, dim=-1)
        x = x + gate * self.attn(x * (1 + scale) + shift)
        prompt = self.text(prompt)
        angles = torch.arange(SEQUENCE, device=x.device).float()[:, None].expand(-1, DIM)
        key = self.key(prompt) * angles.cos() + self.key(prompt).flip(-1) * angles.sin()
        x = x + F.scaled_dot_product_attention(self.query(x), key, self.value(prompt))
        return x + self.mlp(x)


def prompt() -> Tensor:
    return torch.randn(2, SEQUENCE, 6)


@cache
def analysis() -> Analysis:
    torch.manual_seed(0)
    return analyze_module(Prompted().eval(), latent(), times(), prompt())


def built(text: str, disable: tuple[str, ...] = ()) -> Any:
    schedule = schedule_of(analysis(), "CCC", "RRR")
    return build_variant(analysis(), schedule, row(text), Options(inner="eager", disable=disable), "v")[0]


def hoisted_of(forward: Callable[..., Any], *inputs: Tensor) -> tuple[HoistedValue, ...]:
    return analyze_module(forward, *inputs).facts.hoisted


# -- finding ----------------------------------------------------------------------------------------------------------


def test_one_value_stands_for_all_parts_of_an_adaln_and_keys_and_values_for_their_prompt() -> None:
    found = {one.value: (one.level, one.bytes) for one in analysis().facts.hoisted}
    heads = 2 * SEQUENCE * DIM * 4
    assert sorted(found.values()) == [("invariant", heads), ("invariant", heads), ("step", 2 * 3 * DIM * 4)]


def test_what_costs_nothing_stays_where_it_is() -> None:
    embedding, position = nn.Embedding(3, DIM), torch.randn(4, DIM)

    def forward(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        wave = t.sin() + t.cos()
        x = x + embedding(y)[:, None] + position
        return x + (wave[:, None, None] * 2) * F.scaled_dot_product_attention(x, x, x)

    (only,) = hoisted_of(forward, latent(), times(), torch.tensor([0, 1]))
    assert (only.level, only.bytes) == ("step", 2 * 4)  # the wave: not its product with a number, not the label


@pytest.mark.parametrize("case", ["handed out", "a part handed out", "random", "complex"])
def test_what_can_not_be_shared_stays_where_it_is(case: str) -> None:
    time, text = nn.Linear(2, DIM), nn.Linear(6, DIM)

    def forward(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        c = time(torch.stack([t.sin(), t.cos()], dim=-1))
        p = text(y).mean(1)
        if case == "random":
            c, p = c + torch.rand(2, DIM), p + torch.rand(2, DIM)
        if case == "complex":
            c, p = torch.view_as_real(torch.polar(c, c)).sum(-1), torch.polar(p, p)
        x = torch.view_as_real(x * p[:, None]).sum(-1) if case == "complex" else x + p[:, None]
        x = x + c[:, None] * F.scaled_dot_product_attention(x, x, x)
        return (x, *({"handed out": (c, p), "a part handed out": (c[:, :1], p[None])}.get(case, ())))

    found = hoisted_of(forward, latent(), times(), prompt())
    assert [one.level for one in found] == (["step"] if case == "complex" else [])


def test_a_block_over_the_prompt_alone_is_computed_once_a_trajectory() -> None:
    time, refine, key = nn.Linear(2, DIM), Attention(), nn.Linear(DIM, DIM)

    def forward(x: Tensor, t: Tensor, p: Tensor) -> Tensor:
        c = time(torch.stack([t.sin(), t.cos()], dim=-1))
        p = p + refine(p)
        return x + c[:, None] * F.scaled_dot_product_attention(x, key(p), key(p))

    analysis = analyze_module(forward, latent(), times(), torch.randn(2, 3, DIM))
    variant = build_variant(analysis, schedule_of(analysis, "C", "R"), row("C"), Options(inner="eager"), "v")[0]
    assert {one.level for one in analysis.facts.hoisted} == {"step", "invariant"}
    assert ops(variant.gm)["aten.scaled_dot_product_attention.default"] == 1
    assert not ops(variant.gm)["aten.linear.default"]


# -- rewriting --------------------------------------------------------------------------------------------------------


def test_a_schedule_that_keeps_nothing_hoists_nothing() -> None:
    variant = build_variant(analysis(), schedule_of(analysis(), "CCC"), row("CCC"), Options(inner="eager"), "v")[0]
    assert variant.hoists == ()


def test_a_variant_takes_what_it_needs_from_outside_and_keeps_its_macs() -> None:
    for text, waits in (("CCC", (0, 1, 2)), ("RRR", ())):
        plain, lean = built(text, UNHOISTED), built(text)
        names = {analysis().facts.inputs[i].label for i in lean.takes}
        assert lean.macs == plain.macs
        assert lean.hoists == tuple(i for i in (0, 1, 2) if i in waits or (text == "RRR" and i == 0))
        assert not names & {"t", "prompt", "time.weight", "ada.weight", "key.weight", "value.weight", "text.weight"}
    assert ops(built("CCC").gm)["aten.linear.default"] == 2 + 1 + 2
    assert ops(built("RRR").gm)["aten.linear.default"] == 0


@pytest.mark.parametrize("off", UNHOISTED)
def test_each_pass_can_be_left_out(off: str) -> None:
    levels = [one.level for one in analysis().facts.hoisted]
    lean = built("CCC", (off,))
    assert {levels[i] for i in lean.hoists} == ({"invariant"} if off == "hoist_step_only" else {"step"})


@pytest.mark.parametrize("off", [(), ("hoist_invariant",)])
def test_prologues_and_variant_together_are_the_graph(off: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    by_name = {"x": latent(), "t": times(), "prompt": prompt()}
    model = Prompted().eval()
    weights = dict(model.named_parameters())
    args = [by_name.get(one.label, weights.get(one.label)) for one in analysis().facts.inputs]
    variant = built("CCC", off)
    options = Options(inner="eager", disable=off)
    values: dict[int, Tensor] = {}
    for level in ("invariant", "step"):
        gives = tuple(i for i in variant.hoists if analysis().facts.hoisted[i].level == level)
        if gives:
            prologue = build_prologue(analysis(), gives, options, level)[0]
            assert prologue.outputs == len(gives)
            given = [*(args[i] for i in prologue.takes), *(values[i] for i in prologue.hoists)]
            values |= dict(zip(gives, torch.fx.Interpreter(prologue.gm).run(*given), strict=True))
            assert prologue.macs == sum(map(node_macs, prologue.gm.graph.nodes)) > 0
    with torch.no_grad():
        out, *_ = torch.fx.Interpreter(variant.gm).run(
            *(args[i] for i in variant.takes), *(values[i] for i in variant.hoists)
        )
        whole, *_ = torch.fx.Interpreter(analysis().gm).run(*args)
    assert torch.equal(out, whole)
