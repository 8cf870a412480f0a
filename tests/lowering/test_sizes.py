"""One program for many sizes: whose graphs it serves, that it computes what each of them does, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import moeca_compile as moeca
from moeca_compile.lowering.inductor import lower
from moeca_compile.lowering.inductor.repeat_blocks import has_bodies, repeat_blocks
from moeca_compile.lowering.inductor.sizes.shared import MOST, SharedSizes
from tests.models import DiT
from tests.sampling import TIMES, plain
from tests.tools import capture_module


class Compiler:
    """In place of Inductor: a program is its graph, run as it stands. `seen`: whether each was symbolic."""

    def __init__(self, spoil: Callable[[Sequence[Any]], object] = lambda fakes: None, traces: bool = True) -> None:
        self.seen: list[bool] = []
        self._spoil, self._traces = spoil, traces

    def __call__(self, gm: GraphModule, args: Sequence[Any], mode: Any) -> Any:
        self.seen.append(mode is not None)
        if mode is not None and self._traces:
            with mode:
                gm(*args)  # torch's symbols go through every node
            self._spoil(args)
        return gm


def joint(x: Tensor, text: Tensor, weight: Tensor) -> tuple[Tensor]:
    """Image tokens and text tokens in one stream, split again: [B, N, D], [B, T, D], [D, D]."""
    both = torch.cat([x, text], 1)
    both = both + F.linear(both.reshape(-1, x.shape[2]), weight).view(both.shape)
    return (both[:, : x.shape[1]] * both.flatten(1).sum(1)[:, None, None],)


def patches(x: Tensor) -> tuple[Tensor]:
    """Patches of 2 x 2: [B, C, H, W] -> [B, H W / 4, 4 C]."""
    b, c, h, w = x.shape
    return (x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c),)


def serve(
    function: Callable[..., Any], calls: Sequence[Sequence[Tensor]], sizes: SharedSizes, compiler: Compiler
) -> None:
    """Trace the function at each size, and compare what serves that graph with the function."""
    for args in calls:
        gm = make_fx(function, tracing_mode="fake")(*args)
        results = sizes.lower("v0", gm, args, compiler)(*args)
        torch.testing.assert_close(results, function(*args), rtol=0, atol=0)


def tokens(*lengths: tuple[int, int]) -> list[list[Tensor]]:
    return [[torch.randn(2, n, 4), torch.randn(2, t, 4), torch.eye(4)] for n, t in lengths]


def test_eight_sizes_are_two_programs() -> None:
    sizes, compiler = SharedSizes(), Compiler()
    serve(joint, tokens(*((n, 5) for n in (4, 6, 9, 16, 25, 36, 2, 49))), sizes, compiler)
    assert compiler.seen == [False, True]
    assert (sizes.served, sizes.refused) == (6, {})


def test_a_further_axis_that_changes_costs_one_more() -> None:
    sizes, compiler = SharedSizes(), Compiler()
    serve(joint, tokens((4, 5), (6, 5), (9, 5), (9, 7), (16, 3), (4, 9)), sizes, compiler)
    assert compiler.seen == [False, True, True]
    assert sizes.served == 3


def test_two_edges_and_their_product() -> None:
    sizes, compiler = SharedSizes(), Compiler(traces=False)
    edges = [(8, 8), (8, 12), (16, 12), (4, 20), (20, 4)]
    serve(patches, [[torch.randn(1, 3, h, w)] for h, w in edges], sizes, compiler)
    assert compiler.seen == [False, True, True]  # the first rule, 2 W patches, is wrong at the third size
    assert sizes.served == 2


def test_a_batch_of_one_is_compiled_for_itself() -> None:
    sizes, compiler = SharedSizes(), Compiler()
    serve(joint, [[x[:1], text[:1], weight] for x, text, weight in tokens((4, 5))], sizes, compiler)
    serve(joint, tokens((4, 5)), sizes, compiler)
    assert sizes.served == 0
    serve(joint, [[torch.randn(3, 4, 4), torch.randn(3, 5, 4), torch.eye(4)]], sizes, compiler)
    assert sizes.served == 1  # three samples run where two did; one sample never does
    serve(joint, [[torch.randn(1, 4, 4), torch.randn(1, 5, 4), torch.eye(4)]], sizes, compiler)
    assert sizes.served == 1


def test_a_float_that_depends_on_the_size_is_another_graph() -> None:
    sizes, compiler = SharedSizes(), Compiler()
    serve(lambda x: (x / x.shape[1] ** 0.5,), [[torch.randn(2, n)] for n in (4, 6, 9)], sizes, compiler)
    assert compiler.seen == [False] * 3


def test_a_loop_over_the_size_is_another_graph() -> None:
    def looped(x: Tensor) -> tuple[Tensor]:
        for _ in range(x.shape[1]):
            x = x.sin()
        return (x,)

    sizes, compiler = SharedSizes(), Compiler()
    serve(looped, [[torch.randn(2, n)] for n in (4, 6, 9)], sizes, compiler)
    assert compiler.seen == [False] * 3


def test_a_number_that_follows_from_no_size_is_told() -> None:
    fractions = {4: 3, 6: 1, 9: 2, 16: 5}
    sizes, compiler = SharedSizes(), Compiler()
    calls = [[torch.randn(2, n)] for n in fractions]
    serve(lambda x: (x[:, : fractions[x.shape[1]]].sin(),), calls, sizes, compiler)
    assert "follows from no size" in sizes.refused["v0"]
    assert sizes.served == 0


def test_code_for_one_size_alone_serves_no_other() -> None:
    sizes, compiler = SharedSizes(), Compiler(spoil=lambda fakes: int(fakes[0].shape[1]))
    serve(joint, tokens((4, 5), (6, 5), (9, 5)), sizes, compiler)
    assert sizes.served == 0
    assert compiler.seen == [False, True, True]
    assert "is for sizes with Eq(" in sizes.refused["v0"]


def test_conditions_of_the_compiler_are_looked_at_for_each_size() -> None:
    def even(fakes: Sequence[Any]) -> bool:
        return bool(fakes[0].shape[1] % 2 == 0)

    sizes, compiler = SharedSizes(), Compiler(spoil=even)
    serve(joint, tokens((4, 5), (6, 5), (16, 5), (9, 5), (20, 5)), sizes, compiler)
    assert compiler.seen == [False, True, True]  # the last one for 9
    assert sizes.served == 2


def test_a_refusal_of_the_compiler_costs_nothing_but_time() -> None:
    def refuse(fakes: Sequence[Any]) -> None:
        raise RuntimeError("no symbols here")

    sizes, compiler = SharedSizes(), Compiler(spoil=refuse)
    serve(joint, tokens(*((n, 5) for n in range(4, 12))), sizes, compiler)
    assert sizes.refused == {"v0": "no symbols here"}
    assert sum(compiler.seen) == MOST  # and then no more


def test_a_tensor_subclass_of_several_sizes_is_refused() -> None:
    class Own(Tensor):
        pass

    sizes, compiler = SharedSizes(), Compiler()
    for n in (4, 6):
        x = torch.randn(2, n)
        gm = make_fx(lambda x: (x.sin(),), tracing_mode="fake")(x)
        sizes.lower("v0", gm, [x.as_subclass(Own)], compiler)
    assert sizes.refused["v0"] == "a Own comes in several sizes"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x + gate * self.down(F.gelu(self.up(x.reshape(-1, 4)))).view(x.shape)


class Blocks(nn.Module):
    """Residual MLPs with a gate by the timestep, over as many tokens as come."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.time, self.blocks = nn.Linear(8, 4), nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(4.0))
        gate = self.time(torch.cat([angles.sin(), angles.cos()], -1))[:, None]
        for block in self.blocks:
            x = block(x, gate)
        return x


def blocks(depth: int = 1) -> Blocks:
    torch.manual_seed(0)
    return Blocks(depth).eval().requires_grad_(False)


def trajectory(model: Any, tokens: int, steps: int = 4) -> list[Tensor]:
    x, found = torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(0)), []
    for step in range(steps):
        found.append(model(x, torch.full((2,), 1000.0 - 100 * step)))
        x = x - 0.1 * found[-1]
    return found


@pytest.mark.slow
def test_bodies_of_equal_blocks_take_sizes_from_their_calls() -> None:
    sizes, compiler, model = (
        SharedSizes(),
        Compiler(),
        blocks(depth=5),
    )  # the last one is followed by other nodes, so four are equal
    for count in (5, 6, 9):
        captured, args = capture_module(model, torch.randn(2, count, 4), torch.ones(2))
        gm = repeat_blocks(captured.gm, None)  # type: ignore[arg-type]
        assert has_bodies(gm)
        (found,), (expected,) = sizes.lower("v0", gm, args, compiler)(*args), gm(*args)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert compiler.seen == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "kinds"),
    [(True, [False] * 2 + [True] * 2), (False, [False] * 6)],
)
def test_variants_of_a_compiled_model(share: bool, kinds: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two variants at three sizes: what is compiled, symbolic or not, and that results are those of each size."""
    seen: list[bool] = []

    def as_it_stands(options: Any, gm: GraphModule, args: Any, mode: Any) -> GraphModule:
        seen.append(mode is not None)
        return gm

    monkeypatch.setattr("moeca_compile.lowering.inductor.lower._compiled", as_it_stands)
    model = moeca.compile(blocks(), schedule="uniform:2", share_sizes=share)
    by_itself = moeca.compile(blocks(), schedule="uniform:2", inner="eager")
    for count in (5, 6, 9):
        found, expected = (trajectory(one, count) for one in (model, by_itself))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert seen == kinds
    assert moeca.stats(model).unshared == {}


def test_statistics_tell_what_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(options: Any, gm: GraphModule, args: Any, mode: Any) -> GraphModule:
        if mode is not None:
            raise RuntimeError("no symbols here")
        return gm

    monkeypatch.setattr("moeca_compile.lowering.inductor.lower._compiled", refuse)
    model = moeca.compile(blocks(), schedule="full")
    for count in (5, 6):
        trajectory(model, count, steps=1)
    assert moeca.stats(model).unshared == {"v0": "no symbols here"}
    assert "v0 is compiled for each size: no symbols here" in str(moeca.stats(model))


@pytest.mark.slow
def test_inductor_serves_further_batches() -> None:
    """Inductor's code, with routed experts and a body for equal blocks: what the interpreter gives, compiled twice."""
    with_bodies: list[bool] = []
    compiled = lower._compiled

    def count(options: Any, gm: GraphModule, *rest: Any) -> Any:
        with_bodies.append(has_bodies(gm))
        return compiled(options, gm, *rest)

    torch.manual_seed(0)
    dit = DiT(depth=4, dim=16, heads=2, num_experts=3, top_k=2, hidden=12, shared=False).eval().requires_grad_(False)
    model, by_itself = moeca.compile(dit, schedule="full"), moeca.compile(dit, schedule="full", inner="eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "_compiled", count)
        for batch in (2, 3, 5):
            found, expected = (list(plain(one, batch=batch, times=TIMES[:2])) for one in (model, by_itself))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert with_bodies == [True, True]
    assert moeca.stats(model).unshared == {}
