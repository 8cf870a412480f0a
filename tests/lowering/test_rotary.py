"""Rotary embeddings as one operator: every form that models write them in, and near misses, which stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.lowering.onnx.lower import SEGMENTS
from moeca_compile.lowering.onnx.request import OnnxRequest
from moeca_compile.lowering.onnx.rotary.forms import turned
from moeca_compile.lowering.onnx.rotary.rewrite import write_rotary
from tests.graphs import Code, applied, assert_unchanged, graph_of

BATCH, TOKENS, HEADS, WIDTH = 2, 5, 3, 8
HALF = WIDTH // 2


def request_of(gm: GraphModule, opset: int = 23, hoisted: dict[str, fx.Node] | None = None) -> OnnxRequest:
    return OnnxRequest((gm,), (BATCH,), {}, SEGMENTS, opset=opset, hoisted=hoisted or {})


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


X, ANGLES = numbers(BATCH, TOKENS, HEADS, WIDTH), numbers(TOKENS, HALF)  # heads after tokens


def twice(half: Tensor) -> Tensor:
    """[tokens, D / 2] -> [tokens, 1, D] for neighbors."""
    return half.repeat_interleave(2, -1)[:, None]


def behind(half: Tensor) -> Tensor:
    """The same for halves."""
    return torch.cat([half, half], dim=-1)[:, None]


def of_heads(half: Tensor) -> Tensor:
    """For neighbors, another row for each head."""
    return torch.stack([half.roll(head, 0) for head in range(HEADS)], dim=1).repeat_interleave(2, -1)


def neighbors(x: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-b, a], dim=-1).flatten(-2)


def halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def flux(x: Tensor, angles: Tensor) -> Tensor:
    return x * twice(angles.cos()) + neighbors(x) * twice(angles.sin())


def heads_first(x: Tensor, angles: Tensor) -> Tensor:
    x, table = x.transpose(1, 2), torch.cat([angles, angles], dim=-1)
    return x * table.cos() + halves(x) * table.sin()


def chunks(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def written_slices(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = twice(angles.cos())[..., 0::2], twice(angles.sin())[..., 1::2]
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    for first, part in enumerate((a * cos - b * sin, a * sin + b * cos)):
        out = torch.slice_scatter(out, aten.copy(out[..., first::2], part), -1, first, None, 2)
    return out.type_as(x)


def complex_numbers(x: Tensor, angles: Tensor) -> Tensor:
    table = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table[:, None]).flatten(3)


def pairs(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def matrices(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([cos, -sin, sin, cos], dim=-1).view(TOKENS, 1, HALF, 2, 2)
    of_pairs = x.reshape(*x.shape[:-1], HALF, 1, 2)
    return (table[..., 0] * of_pairs[..., 0] + table[..., 1] * of_pairs[..., 1]).reshape(x.shape)


def back(x: Tensor, angles: Tensor) -> Tensor:
    return x * behind(angles.cos()) - halves(x) * behind(angles.sin())


def some_channels(x: Tensor, angles: Tensor) -> Tensor:
    return torch.cat([flux(x[..., :4], angles[:, :2]), x[..., 4:]], dim=-1)


def read_twice(x: Tensor, angles: Tensor) -> Tensor:
    cos = twice(angles.cos())
    return (x * cos + neighbors(x) * twice(angles.sin())) * cos + x


def scaled(x: Tensor, angles: Tensor) -> Tensor:
    freqs = torch.cat([angles, angles], dim=-1)[:, None]
    return x * (freqs.cos() * 1.5) + halves(x) * (freqs.sin() * 1.5)


def of_each_sample(x: Tensor, angles: Tensor) -> Tensor:
    own = angles[None] * x[:, :1, 0, :1]
    return (
        x * own.cos().repeat_interleave(2, -1)[:, :, None]
        + neighbors(x) * own.sin().repeat_interleave(2, -1)[:, :, None]
    )


def one_head(x: Tensor, angles: Tensor) -> Tensor:
    x, table = x[:, :, 0], torch.cat([angles, angles], dim=-1)
    return x * table.cos() + halves(x) * table.sin()


def two_at_once(x: Tensor, angles: Tensor) -> Tensor:
    other, cos, sin = x.relu(), twice(angles.cos()), twice(angles.sin())
    return (x * cos + neighbors(x) * sin) * (other * cos + neighbors(other) * sin)


FORMS = [
    flux, heads_first, chunks, written_slices, complex_numbers, pairs, matrices, back, some_channels, read_twice,
    scaled, of_each_sample, one_head, two_at_once,
]  # fmt: skip


def rotations(gm: GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is turned]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_one_operator(form: Code) -> None:
    gm = graph_of(form, X, ANGLES)
    found, _ = applied(write_rotary, gm, request_of(gm))
    assert len(rotations(found)) == 1 + (form is two_at_once)
    torch.testing.assert_close(found(X, ANGLES)[0], form(X, ANGLES), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_computed_in_float32(dtype: torch.dtype) -> None:
    """As models with weights of 16 bits do."""

    def form(x: Tensor, angles: Tensor) -> Tensor:
        turned = x.float() * twice(angles.cos()) + neighbors(x).float() * twice(angles.sin())
        return turned.to(x.dtype)

    gm = graph_of(form, X.to(dtype), ANGLES)
    found, _ = applied(write_rotary, gm, request_of(gm))
    assert len(rotations(found)) == 1
    torch.testing.assert_close(found(X.to(dtype), ANGLES)[0], form(X.to(dtype), ANGLES))


def with_rounded(table: Tensor) -> Tensor:
    """Each number [B, N, D / 2] and the same in 16 bits, side by side."""
    rounded = torch.ops.aten.copy.default(torch.empty_like(table, dtype=torch.float16), table)
    return torch.stack([table, rounded.float()], -1).flatten(-2)[:, None]


MISSES: dict[str, Code] = {
    "neighbors with the angles of halves": lambda x, angles: (
        x * behind(angles.cos()) + neighbors(x) * behind(angles.sin())
    ),
    "another cosine for the second member": lambda x, angles: (
        x * torch.stack([angles.cos(), angles.sin()], -1).flatten(-2)[:, None] + neighbors(x) * twice(angles.sin())
    ),
    "a cosine that a copy rounds": lambda x, angles: (
        x * with_rounded(angles.cos()) + neighbors(x) * twice(angles.sin())
    ),
    "another sine": lambda x, angles: (
        x * twice(angles.cos()) + neighbors(x) * torch.stack([angles.cos(), angles.sin()], -1).flatten(-2)[:, None]
    ),
    "sines that aren't opposite": lambda x, angles: x * twice(angles.cos()) + neighbors(x).abs() * twice(angles.sin()),
    "no sign": lambda x, angles: (
        x * twice(angles.cos()) + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * twice(angles.sin())
    ),
    "partners that are no pairs": lambda x, angles: x * twice(angles.cos()) + x.roll(1, -1) * twice(angles.sin()),
    "halves of a part": lambda x, angles: (
        x * behind(angles.cos()) + halves(x.unflatten(-1, (2, -1))).flatten(-2) * behind(angles.sin())
    ),
    "the partners of another value": lambda x, angles: (
        x * twice(angles.cos()) + neighbors(x.relu()) * twice(angles.sin())
    ),
    "a partner from another token": lambda x, angles: (
        x * twice(angles.cos()) + neighbors(x.flip(1)) * twice(angles.sin())
    ),
    "angles of each head": lambda x, angles: x * of_heads(angles.cos()) + neighbors(x) * of_heads(angles.sin()),
    "a product that is read": lambda x, angles: (
        x * (cos := twice(angles.cos())) + (product := neighbors(x) * twice(angles.sin())),
        product * cos,
    ),
    "a sum with a factor": lambda x, angles: torch.add(
        x * twice(angles.cos()), neighbors(x) * twice(angles.sin()), alpha=2
    ),
    "float64": lambda x, angles: flux(x.double(), angles.double()),
    "float16": lambda x, angles: flux(x.half(), angles.half()),
}


@pytest.mark.parametrize("miss", MISSES)
def test_a_near_miss_stays(miss: str) -> None:
    gm = graph_of(MISSES[miss], X, ANGLES)
    assert_unchanged(write_rotary, gm, request_of(gm))


def test_tables_that_come_in_stay() -> None:
    """Whoever calls may give any."""

    def form(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + neighbors(x) * sin

    gm = graph_of(form, X, twice(ANGLES), twice(ANGLES))
    assert_unchanged(write_rotary, gm, request_of(gm))


def test_below_opset_23_it_stays() -> None:
    gm = graph_of(flux, X, ANGLES)
    assert_unchanged(write_rotary, gm, request_of(gm, opset=22))


@pytest.mark.parametrize(("pairing", "is_proven"), [(twice, True), (behind, False)])
def test_a_prologue_proves_what_comes_out_of_it(pairing: Callable[[Tensor], Tensor], is_proven: bool) -> None:
    def prologue(angles: Tensor) -> Any:
        return pairing(angles.cos()), pairing(angles.sin())

    def variant(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + neighbors(x) * sin

    before, gm = graph_of(prologue, ANGLES), graph_of(variant, X, *prologue(ANGLES))
    names = [node.name for node in fx.placeholders(gm)[1:]]
    hoisted = dict(zip(names, fx.nodes_of(fx.output_node(before).args[0]), strict=True))
    found, _ = applied(write_rotary, gm, request_of(gm, hoisted=hoisted))
    assert len(rotations(found)) == is_proven
    tables = prologue(ANGLES)
    torch.testing.assert_close(found(X, *tables)[0], variant(X, *tables), rtol=0, atol=1e-6)


def test_equal_angles_are_one_table() -> None:
    gm = graph_of(two_at_once, X, ANGLES)
    found, _ = applied(write_rotary, gm, request_of(gm))
    first, second = rotations(found)
    assert first.args[1:3] == second.args[1:3]
