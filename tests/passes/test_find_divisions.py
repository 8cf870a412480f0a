"""Which regions can be taken apart by tokens, and why others can't; and that the parts compute what the whole does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeca_compile.graph.regions import Divisible, Indivisible, Region
from moeca_compile.schedule import Partial
from tests.following import Runner, Subject, subject_of
from tests.passes.blocks import Block, TwoStreams
from tests.passes.blocks import Timed as Clocked
from tests.reference import Reference
from tests.tools import schedule_of

BATCH, TOKENS, HEADS, DIM = 2, 6, 2, 8
Part = Callable[[Tensor], Tensor]

_generator = torch.Generator().manual_seed(5)
W = [torch.randn(DIM, DIM, generator=_generator, dtype=torch.float64) / 3 for _ in range(5)]
TABLE = torch.randn(TOKENS, DIM // HEADS, generator=_generator, dtype=torch.float64)


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


def attention(
    x: Tensor, turn: Part = lambda q: q, mask: Tensor | None = None, causal: bool = False, keys: Tensor | None = None
) -> Tensor:
    source = x if keys is None else keys
    q, k, v = turn(heads(x @ W[0])), turn(heads(source @ W[1])), heads(source @ W[2])
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    return y.transpose(1, 2).reshape(x.shape) @ W[3]


def by_rows(x: Tensor) -> Tensor:
    """A feed-forward on the tokens of all samples in one axis."""
    flat = F.layer_norm(x, (DIM,)).reshape(-1, DIM)
    return (F.silu(flat @ W[0]) @ W[1]).view_as(x)


def subject(part: Part) -> Subject:
    def model(x: Tensor, t: Tensor) -> Tensor:
        x = x + part(x) * t.cos()[:, None, None]
        return x * t.sin()[:, None, None]

    def inputs(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, TOKENS, DIM, generator=generator, dtype=torch.float64)
        return {"x": x, "t": torch.full((BATCH,), 9.0 - step, dtype=torch.float64)}

    return subject_of(model, inputs)


def only(one: Subject) -> Region:
    (region,) = one.facts.regions
    return region


WORKS: dict[str, Part] = {
    "attention": attention,
    "a table of positions": lambda x: attention(x, lambda q: q * TABLE.cos() + q.flip(-1) * TABLE.sin()),
    "a table with a batch of one": lambda x: attention(x, lambda q: q * TABLE[None, None]),
    "keys from elsewhere": lambda x: attention(x, keys=W[4][None].expand(BATCH, -1, -1)),
    "a mask of keys": lambda x: attention(x, mask=torch.arange(TOKENS)[None, None, None] != 2),
    "tokens of all samples in one axis": by_rows,
    "halves joined again": lambda x: torch.cat((x @ W[0]).tanh().chunk(2, dim=-1)[::-1], dim=-1) @ W[1],
}


@pytest.mark.parametrize("name", WORKS)
def test_a_part_is_what_the_whole_gives_for_these_tokens(name: str) -> None:
    one = subject(WORKS[name])
    assert isinstance(only(one).division, Divisible), only(one).division
    legend = {"a": Partial(0.5), "b": Partial(0.2)}
    schedule = schedule_of(one.analysis, "C", "a", "F", "b", "C", "a", "a", legend=legend)
    runner, oracle = Runner(one, schedule), Reference(one.captured.gm, one.facts.regions, schedule)
    runner.start()
    for step, row in enumerate(schedule.rows):
        args = one.call(step)
        torch.testing.assert_close(runner(row, args), oracle(row, args), rtol=1e-6, atol=1e-7)


REFUSED: dict[str, tuple[Part, str]] = {
    "a causal attention": (lambda x: attention(x, causal=True), "a causal attention"),
    "a mask of queries": (
        lambda x: attention(x, mask=torch.ones(TOKENS, TOKENS).tril().bool()[None, None]),
        "its mask differs from query to query",
    ),
    "a mean over tokens": (lambda x: (x - x.mean(1, keepdim=True)) @ W[0], "mean.dim works along the tokens"),
    "a product over tokens": (lambda x: (TABLE @ TABLE.mT) @ (x @ W[0]), "a product over tokens"),
    "a convolution along tokens": (
        lambda x: F.conv1d((x @ W[0]).mT, W[1][:, :, None].expand(-1, -1, 3), padding=1).mT,
        "conv1d.padding isn't understood|conv1d.default isn't understood",
    ),
    "tokens that are shifted": (lambda x: torch.roll(x @ W[0], 1, dims=1), "roll.default isn't understood"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_tokens_says_so(name: str) -> None:
    part, reason = REFUSED[name]
    region = only(subject(part))
    assert isinstance(region.division, Indivisible)
    assert any(text in region.division.reason for text in reason.split("|")), region.division.reason


def test_two_streams_in_one_region() -> None:
    def inputs(step: int) -> dict[str, Tensor]:
        return {"x": torch.ones(2, 6, DIM), "t": torch.full((2,), 9.0 - step)}

    one = subject_of(Clocked(TwoStreams()), inputs)
    assert Indivisible("it serves several streams at once") in [region.division for region in one.facts.regions]
    one = subject_of(Clocked(Block("gate left")), inputs)
    assert all(isinstance(region.division, Divisible) for region in one.facts.regions)
