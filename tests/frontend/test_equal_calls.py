"""Dry runs and exports copy calls of equal modules, and Dynamo's graph is that of a whole trace."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from moeca_compile.exporting import request
from moeca_compile.frontend.reporting import equal_calls
from moeca_compile.frontend.reporting.dry_run import traced_dry
from moeca_compile.graph.capture import inputs_of
from moeca_compile.options import Options

DIM, DEPTH = 8, 4
X = torch.empty(2, 4, DIM, device="meta")
COUNT = {"calls": 0}


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM)
        self.factors = [1.0, 2.0]

    def forward(self, x: Tensor, *more: Any) -> Any:
        value, gate = self.linear(self.norm(x)).chunk(2, dim=-1)
        return x + value * F.silu(gate) * self.factors[1]


class Model(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Any], block: type[Block] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(index) for index in range(DEPTH))
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self.blocks, x + 0)


class Indexed(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index

    def forward(self, x: Tensor, *more: Any) -> Any:
        return super().forward(x) if self.index % 2 else super().forward(x) * 2


class ReturnsInput(Block):
    def forward(self, x: Tensor, *more: Any) -> Any:
        return super().forward(x), x


class ReturnsViews(Block):
    def forward(self, x: Tensor, *more: Any) -> Any:
        return torch.cat([super().forward(x), x], dim=1).chunk(2, dim=1)


class Noise(Block):
    def forward(self, x: Tensor, *more: Any) -> Any:
        return super().forward(x) + F.dropout(torch.rand_like(x), 0.5, training=True)


class Counts(Block):
    def forward(self, x: Tensor, *more: Any) -> Any:
        COUNT["calls"] += 1
        return super().forward(x) * COUNT["calls"]


class Appends(Block):
    def forward(self, x: Tensor, *more: Any) -> Any:
        more[0].append(x)
        return super().forward(x) * len(more[0])


class Remembers(Block):
    def forward(self, x: Tensor, *more: Any) -> Any:
        self.last = x
        return super().forward(x)


class Holds(Block):
    """An attribute that isn't plain data."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.__dict__["other"] = nn.Linear(DIM, DIM).to("meta") if index else nn.Identity()

    def forward(self, x: Tensor, *more: Any) -> Any:
        return super().forward(x) * (2 if isinstance(self.other, nn.Linear) else 3)


def in_turn(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def first_of(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x, other = block(x)
        x = x + other
    return x


def every_second(blocks: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(blocks):
        x = block(x * 2 if i % 2 else x)
    return x


def kinds_of_inputs(blocks: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(blocks):
        x = block(x[:, :2] if i == 1 else x.double() if i == 2 else x).float()
    return x


def numbers(blocks: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(blocks):
        x = block(x, [i % 2])
    return x


def one_block(blocks: Any, x: Tensor) -> Tensor:
    return blocks[1](blocks[1](blocks[0](x)))  # type: ignore[no-any-return]


def one_list(blocks: Any, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    for block in blocks:
        x = block(x, seen)
    return x


def hooked() -> Model:
    model = Model(in_turn)
    model.blocks[1].register_forward_hook(lambda module, args, result: result * 2)
    return model


def shared() -> Model:
    model = Model(in_turn).to("meta")
    model.blocks[2].linear.weight = model.blocks[1].linear.weight
    return model


def patched() -> Model:
    model = Model(in_turn)
    model.blocks[1].forward = lambda x: x * 2
    return model


class Calls(Block):
    """As a prepared expert layer is: it has a function that was bound to it."""

    def forward(self, x: Tensor, *more: Any) -> Any:
        return self.inner(super().forward(x))


def doubled(block: Any, x: Tensor) -> Tensor:
    return x * block.factors[1] + block.norm.weight  # type: ignore[no-any-return]


def bound(to: int = 0) -> Model:
    """`to`: 0: the block itself, 1: the one after it."""
    model = Model(in_turn, Calls)
    for i, block in enumerate(model.blocks):
        block.__dict__["inner"] = types.MethodType(doubled, model.blocks[(i + to) % DEPTH])
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many calls are copied
    "a chain": (lambda: Model(in_turn), DEPTH - 1),
    "the parent branches on the index": (lambda: Model(every_second), DEPTH - 1),
    "a block branches on its index": (lambda: Model(in_turn, Indexed), 0),
    "hooks": (hooked, DEPTH - 2),
    "a method of its own": (patched, DEPTH - 2),
    "one function bound to all": (bound, DEPTH - 1),
    "a function bound to others": (lambda: bound(1), 0),
    "weights of two": (shared, 1),
    "one block twice": (lambda: Model(one_block), 0),  # from other places
    "kinds of inputs": (lambda: Model(kinds_of_inputs), 0),
    "numbers": (lambda: Model(numbers), 2),
    "an input is returned": (lambda: Model(first_of, ReturnsInput), DEPTH - 1),
    "views are returned": (lambda: Model(first_of, ReturnsViews), DEPTH - 1),
    "noise": (lambda: Model(in_turn, Noise), DEPTH - 1),
    "a global is changed": (lambda: Model(in_turn, Counts), 0),
    "a list is changed": (lambda: Model(one_list, Appends), 0),
    "an attribute is set": (lambda: Model(in_turn, Remembers), 0),
    "an attribute that is no data": (lambda: Model(in_turn, Holds), 0),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (i % 2)) for i, name in enumerate(CASES)]
)
def test_the_graph_is_that_of_a_whole_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, expected = CASES[name]
    made: list[Any] = []

    class Noted(equal_calls._Copying):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            made.append(self)

    monkeypatch.setattr(equal_calls, "_Copying", Noted)
    copied = trace(build())
    monkeypatch.setattr(equal_calls, "kinds_of_modules", lambda model: {})
    assert copied == trace(build())
    assert [each.copies for each in made] == [expected, 0]


def test_a_model_with_data_is_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_calls, "kinds_of_modules", lambda model: pytest.fail("a copy would lack guards"))
    assert trace(Model(in_turn), "cpu")


def test_an_export_copies_the_calls_of_a_model_with_data(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    graphs: list[Any] = []

    class Noted(equal_calls._Copying):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            made.append(self)

    def noted(gm: GraphModule, args: Any, inputs: Any, *rest: Any, **keywords: Any) -> None:
        graphs.append([gm.code, inputs])
        raise LookupError

    monkeypatch.setattr(equal_calls, "_Copying", Noted)
    monkeypatch.setattr(request, "Program", noted)
    for _ in range(2):
        with pytest.raises(LookupError):
            request.capture(Model(in_turn).eval(), (torch.zeros(X.shape),), Options(inner="eager"))
        monkeypatch.setattr(equal_calls, "kinds_of_modules", lambda model: {})
    assert graphs[0] == graphs[1]
    assert [each.copies for each in made] == [DEPTH - 1, 0]


def test_what_was_copied_is_traced_again_in_the_next_run() -> None:
    model = Model(in_turn)
    before = trace(model)
    model.blocks[2].factors = [1.0, 3.0]
    after = trace(model, is_fresh=False)
    assert after
    assert after != before


def trace(model: nn.Module, device: str = "meta", is_fresh: bool = True) -> list[Any]:
    """Dynamo's graph: what is called on what, the weights' labels and the notes."""
    COUNT["calls"] = 0
    if is_fresh:
        torch._dynamo.reset()
    graphs: list[list[Any]] = []

    def backend(gm: GraphModule, inputs: Any) -> Any:
        graphs.append(told(gm, inputs))
        return gm

    model = model.to(device).eval()
    with torch.no_grad(), traced_dry(model):
        torch.compile(model, backend=backend, fullgraph=True)(
            X.to(device) if device == "meta" else torch.zeros(X.shape)
        )
    return graphs


def told(gm: GraphModule, inputs: Any) -> list[Any]:
    numbers = {node: f"%{i}" for i, node in enumerate(gm.graph.nodes)}

    def notes(node: Any) -> list[Any]:
        value = node.meta.get("example_value")
        stack = [(path, cls) for path, cls in node.meta.get("nn_module_stack", {}).values()]
        place = None if node.op == "placeholder" else node.meta.get("stack_trace")  # where a weight was read first
        return [[] if node.op == "placeholder" else stack, place, str(value)]

    nodes = [
        (
            node.op,
            node.op == "placeholder" or node.target,
            str(torch.fx.node.map_arg((node.args, node.kwargs), lambda n: numbers[n])),
            *notes(node),
        )
        for node in gm.graph.nodes
    ]
    return [*nodes, [(entry.label, entry.is_weight) for entry in inputs_of(gm, inputs)]]
