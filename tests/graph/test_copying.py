"""Equal blocks are copied, and nobody can tell: text, notes and results are those of a whole trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from moeca_compile.graph import capture as capturing
from moeca_compile.graph.capture import Capture, capture
from moeca_compile.graph.copying import Copying
from tests.tools import run_graph, trace_module, with_casts

DIM, DEPTH = 8, 3
X = torch.linspace(-1, 1, 2 * 4 * DIM).view(2, 4, DIM)


class Block(nn.Module):
    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.index = index
        self.norm, self.linear = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM)

    def forward(self, x: Tensor, *more: Any) -> Any:
        value, gate = self.linear(self.norm(x)).chunk(2, dim=-1)
        return x + value * F.silu(gate)


class Chain(nn.Module):
    """Blocks one after the other, by `run` of all of them and the input."""

    def __init__(self, run: Callable[[Any, Tensor], Any], block: type[Block] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block(index) for index in range(DEPTH))
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self.blocks, x)


def in_turn(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def first_of(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x, _ = block(x)
    return x


class Scaled(Block):
    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return super().forward(x) * (1.0 + self.index)


class ReturnsInput(Block):
    def forward(self, x: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class ReturnsViews(Block):
    def forward(self, x: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        both = torch.cat([super().forward(x), x], dim=1)
        return both[:, : x.shape[1]], both[:, x.shape[1] :]


class WritesInput(Block):
    def forward(self, x: Tensor, *more: Any) -> Tensor:
        x.add_(1.0)
        return super().forward(x)


class WritesInside(Block):
    def forward(self, x: Tensor, *more: Any) -> Tensor:
        y = super().forward(x)
        y[:, 1:].relu_()
        return y * 2


class Noise(Block):
    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return super().forward(x) + F.dropout(torch.rand_like(x), 0.5, training=True)


class Cast(Block):
    def forward(self, x: Tensor, *more: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = super().forward(x)
        return y.float()


class Constant(Block):
    def forward(self, x: Tensor, *more: Any) -> Tensor:
        size = int(torch.tensor([2, 4]).prod())
        return super().forward(x).reshape(size, DIM).view_as(x) + torch.tensor([0.5])


class Adds(Block):
    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return super().forward(x) + sum(more)


def every_second(blocks: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(blocks):
        x = block(x * 2 if i % 2 else x)
    return x


def same_block(blocks: Any, x: Tensor) -> Tensor:
    return blocks[0](blocks[0](blocks[1](x)))  # type: ignore[no-any-return]


def two_sizes(blocks: Any, x: Tensor) -> Tensor:
    x = blocks[1](blocks[0](x))
    return blocks[0](blocks[2](x[:, :2]))  # type: ignore[no-any-return]


def two_dtypes(blocks: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        low = blocks[2](blocks[0](x))
    return blocks[1](blocks[0](x)) + low  # type: ignore[no-any-return]


def two_layouts(blocks: Any, x: Tensor) -> Tensor:
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    return blocks[0](x) + blocks[1](turned)  # type: ignore[no-any-return]


def twice_the_same(blocks: Any, x: Tensor) -> Tensor:
    y, z = x * 2, x * 3
    return blocks[0](x, y, z) + blocks[1](x, y, y) + blocks[2](x, z, y)  # type: ignore[no-any-return]


def numbers(blocks: Any, x: Tensor) -> Tensor:
    return blocks[0](x, 1.0) + blocks[1](x, 0.5) + blocks[2](x, 1.0)  # type: ignore[no-any-return]


def writes_result(blocks: Any, x: Tensor) -> Tensor:
    total = x
    for block in blocks:
        x, rest = block(x)
        total = total + rest
    rest.mul_(3.0)
    return total + x + rest


def writes_input_afterwards(blocks: Any, x: Tensor) -> Tensor:
    x = blocks[0](x)[0]
    y, same = blocks[1](x)
    x.mul_(2.0)
    return y + same + blocks[2](x)[0]  # type: ignore[no-any-return]


# How many blocks are copied; "again": a write was met, and nothing was copied in a second capture.
CASES: dict[str, tuple[nn.Module, int | str]] = {
    "a chain": (Chain(in_turn), 2),
    "the parent branches on the index": (Chain(every_second), 2),
    "a block branches on its index": (Chain(in_turn, Scaled), 0),
    "shared weights": (Chain(same_block), 2),
    "two sizes": (Chain(two_sizes), 1),
    "two dtypes": (Chain(two_dtypes), 2),
    "two layouts": (Chain(two_layouts), 0),
    "one tensor for two": (Chain(twice_the_same, Adds), 1),
    "two numbers": (Chain(numbers, Adds), 1),
    "an input is returned": (Chain(first_of, ReturnsInput), 2),
    "views are returned": (Chain(first_of, ReturnsViews), 1),  # the first block's input has other strides
    "a returned input is written": (Chain(writes_result, ReturnsInput), "again"),
    "a returned view is written": (Chain(writes_result, ReturnsViews), "again"),
    "an input is written afterwards": (Chain(writes_input_afterwards, ReturnsInput), "again"),
    "an input is written": (Chain(lambda blocks, x: in_turn(blocks, x * 1), WritesInput), 0),
    "a value of its own is written": (Chain(in_turn, WritesInside), 2),
    "noise": (Chain(in_turn, Noise), 2),
    "autocast": (Chain(in_turn, Cast), 2),
    "constants": (Chain(in_turn, Constant), 0),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (i % 2)) for i, name in enumerate(CASES)]
)
def test_the_graph_is_that_of_a_whole_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = CASES[name]
    traced = trace_module(model.eval(), X)
    captures: list[Counting] = []

    class Counting(Copying):
        copies = 0

        def __init__(self, blocks: Any) -> None:
            super().__init__(blocks)
            captures.append(self)

        def begin(self, node: Node, env: dict[Node, Any]) -> bool:
            is_copied = super().begin(node, env)
            self.copies += is_copied
            return is_copied

    monkeypatch.setattr(capturing, "Copying", Counting)
    captured = capture(traced.gm, traced.args, traced.inputs)
    assert ("again" if len(captures) > 1 else captures[0].copies) == expected
    monkeypatch.setattr(capturing, "repeated_blocks", lambda *_: {})
    whole = capture(traced.gm, traced.args, traced.inputs)

    assert told(captured) == told(whole)
    torch.manual_seed(1)
    (result,) = run_graph(with_casts(captured).gm, traced.args)
    torch.manual_seed(1)
    assert torch.equal(result, model(X.clone()))


def told(captured: Capture) -> list[Any]:
    """All that a pass may read of a graph."""
    return [
        (node.op, node.name, str(node.target), str(node.args), str(node.kwargs), *map(str, map(node.meta.get, NOTES)))
        for node in captured.gm.graph.nodes
    ]


NOTES = ("val", "tensor_meta", "nn_module_stack", "stack_trace", "source_fn_stack", "original_aten")
