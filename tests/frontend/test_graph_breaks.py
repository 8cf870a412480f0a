"""Graphs that Dynamo breaks: they run as plain torch.compile runs them, and one message says where and what helps."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning
from tests.sampling import dit

DIM = 8


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


class Body(nn.Module):
    """A residual block with a timestep around whatever `odd` does."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.up, self.down = nn.Linear(8, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.norm = nn.LayerNorm(DIM)

    def odd(self, h: Tensor) -> Tensor:
        return h

    def end(self, h: Tensor) -> Tensor:
        return h.unflatten(1, (2, -1)).mT

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        wave = t[:, None] * torch.exp(-torch.arange(4) / 2.0)
        h = x + self.time(torch.cat([wave.cos(), wave.sin()], -1))[:, None]
        h = self.odd(h)
        return self.end(h + self.down(F.gelu(self.up(self.norm(h)))))


class Branches(Body):
    def odd(self, h: Tensor) -> Tensor:
        if bool(h.abs().amax() > 1e9):
            h = h * 0
        return h


class WritesToALocal(Body):
    """What is behind the break writes into a tensor from before it."""

    def odd(self, h: Tensor) -> Tensor:
        out, mask = torch.zeros_like(h), h > 0
        if mask.any():
            out[mask] = h[mask] - h[mask].mean()
        return out


class CutsByAValue(Body):
    def odd(self, h: Tensor) -> Tensor:
        count = int((h[0, :, 0] > 0).sum())
        numbers = torch.arange(h.shape[1]).cumsum(0)[:count].tolist()
        return h + sum(1 for a, b in pairwise(numbers) if a != b)


class Prints(Body):
    def odd(self, h: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return h


@torch.jit.script
def scripted(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """An expert dispatch that nothing can look into."""
    out = torch.zeros_like(x)
    for e in range(up.shape[0]):
        rows = torch.where(ids == e)[0]
        if rows.numel() > 0:
            out[rows] = F.gelu(x[rows] @ up[e]) @ down[e] * weights[rows, None]
    return out


class Scripted(Body):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, 4)
        self.ups, self.downs = nn.Parameter(torch.randn(4, DIM, 16)), nn.Parameter(torch.randn(4, 16, DIM))

    def odd(self, h: Tensor) -> Tensor:
        flat = h.reshape(-1, DIM)
        weights, ids = self.router(flat).softmax(-1).max(-1)
        return h + scripted(flat, ids, weights, self.ups, self.downs).view_as(h)


class ReadsLater(Body):
    """Numbers are read out of tensors; long sequences branch on one that depends on the data."""

    def odd(self, h: Tensor) -> Tensor:
        most = int(torch.tensor([3, h.shape[1]]).max().item())
        count = int((h[0, :, 0] > 0).sum().item())
        if h.shape[1] > 5 and count > 2:
            h = h * 2
        return h * most


BROKEN = [Branches, WritesToALocal, CutsByAValue, Prints, Scripted]
X = torch.randn(2, 4, DIM, generator=torch.Generator().manual_seed(0))


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


def made_of(kind: type[nn.Module], *parts: nn.Module) -> nn.Module:
    return kind(*parts).eval().requires_grad_(False)


def steps(model: Any, count: int = 4) -> list[Tensor]:
    with torch.no_grad():
        return [model(X * (1 - 0.1 * i), torch.full((2,), 900.0 - 80 * i)) for i in range(count)]


def equal(found: list[Tensor], truth: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize(
    ("by_hand", "schedule"),
    [
        (False, "uniform:3"),
        pytest.param(True, "full", marks=pytest.mark.slow),
        pytest.param(True, "uniform:3", marks=pytest.mark.slow),
        pytest.param(False, "full", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_model_whose_graph_breaks_runs_in_parts_and_says_so_once(
    kind: type[nn.Module], by_hand: bool, schedule: str
) -> None:
    module = made(kind)
    options = {"schedule": schedule, "inner": "eager"}
    model = moeca.compile(module, **options) if by_hand else torch.compile(module, backend="moeca", options=options)
    with pytest.warns(MoecaWarning) as seen:
        assert equal(steps(model), steps(module))
    (text,) = [str(one.message) for one in seen]
    assert f"{__file__}:" in text
    parts = int(text.removeprefix("graph break: ").partition(" ")[0])
    stats = moeca.stats(model)
    assert (stats.steps, stats.graphs) == ((), parts)
    assert str(stats).endswith(text)
    report = moeca.explain(model, X, torch.full((2,), 900.0))
    assert (str(report), report.graphs, report.regions) == (text, parts, ())


def test_a_length_at_which_a_number_decides() -> None:
    module = made(ReadsLater)
    model = torch.compile(module, backend="moeca", options={"schedule": "uniform:3", "inner": "eager"})
    steps(model)
    assert len(moeca.stats(model).steps) == 4
    x = torch.randn(2, 8, DIM)
    with torch.no_grad(), warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(model(x, torch.full((2,), 900.0)), module(x, torch.full((2,), 900.0)))


@pytest.mark.parametrize(
    ("kind", "line", "remedy"),
    [
        (Branches, "if bool(h.abs().amax() > 1e9):", "torch.where"),
        (WritesToALocal, "if mask.any():", "torch.where"),
        (Prints, "torch._dynamo.graph_break()", "TORCH_LOGS=graph_breaks"),
    ],
)
def test_the_message_names_the_line_and_what_helps(kind: type[nn.Module], line: str, remedy: str) -> None:
    model = moeca.compile(made(kind), schedule="uniform:3", inner="eager")
    with pytest.warns(MoecaWarning) as seen:
        steps(model)
    text = str(seen[0].message)
    assert line in text
    assert remedy in text
    assert "prepare(" not in text


def test_an_unprepared_model_whose_graph_breaks_is_explained() -> None:
    with pytest.warns(MoecaWarning, match="graph break"):
        report = moeca.explain(made(Branches), X, torch.full((2,), 900.0), inner="eager")
    assert "if bool(h.abs().amax() > 1e9):" in str(report)
    assert "another backend" not in str(report)


@pytest.mark.slow
def test_each_model_has_its_own_message_stats_and_report() -> None:
    """Also where they share a class, so that Dynamo runs the first one's graphs for the second."""
    handles = []
    for _ in range(3):
        handles.append(torch.compile(made(Branches), backend="moeca", options={"inner": "eager"}))
        with pytest.warns(MoecaWarning, match="graph break") as seen:
            steps(handles[-1])
        assert len(seen) == 1
    assert len({str(moeca.stats(one)) for one in handles}) == 1
    assert len({moeca.stats(one).graphs for one in handles} | {0}) == 2
    with pytest.warns(MoecaWarning, match="graph break"):
        report = moeca.explain(made(Branches), X, torch.full((2,), 900.0), inner="eager")
    assert "if bool(h.abs().amax() > 1e9):" in str(report)


def test_a_part_that_is_a_model_of_its_own_too() -> None:
    """One of Dynamo's graphs may be the whole of one handle's model, and a part of another's."""

    class Outer(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        @torch.compiler.disable
        def call(self, x: Tensor, t: Tensor) -> Tensor:
            return self.body(x, t)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.call(x * 1.5, t) + x.mT.reshape(2, 2, -1, 2).mean(-1, keepdim=True)

    body = made(Body)
    alone = torch.compile(body, backend="moeca", options={"schedule": "uniform:3", "inner": "eager"})
    steps(alone)
    outer = made_of(Outer, body)
    both = torch.compile(outer, backend="moeca", options={"schedule": "uniform:3", "inner": "eager"})
    with pytest.warns(MoecaWarning, match="graph break"):
        assert equal(steps(both), steps(outer))
    assert len(moeca.stats(alone).steps) == 4


def decorated(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapper


class Table:
    """As some rotary embeddings are: what they hold is made at the first call, where Dynamo can't follow."""

    values: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.values is None:
            with torch.device("cpu"):
                self.values = torch.ones(DIM)
        return x * self.values


class MakesItsTableLate(Body):
    def __init__(self) -> None:
        super().__init__()
        self.table = Table()

    def scaled(self, samples: list[Tensor]) -> list[Tensor]:
        results = []
        for sample in samples:  # Dynamo can't resume in the middle of a loop
            results.append(self.table(sample))  # noqa: PERF401
        return results

    @decorated
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(torch.stack(self.scaled(list(x))), t)


def test_a_break_in_the_first_call_alone_leaves_the_model_cached() -> None:
    """The rest of a decorated forward is no wrapper that runs the entire model."""
    model = moeca.compile(MakesItsTableLate().eval(), schedule="uniform:2", order=0, inner="eager")
    x = torch.randn(1, 4, DIM)
    with torch.no_grad():
        for step in range(5):
            model(x, torch.full((1,), 1.0 - 0.1 * step))
    stats = moeca.stats(model)
    assert stats.graphs == 1
    assert [record.step for record in stats.steps] == list(range(5))
    assert "v1" in [record.variant for record in stats.steps]


def test_a_broken_model_is_warmed_up() -> None:
    module = made(Branches)
    model = moeca.compile(module, schedule="uniform:3", inner="eager")
    with pytest.warns(MoecaWarning, match="graph break"):
        found = moeca.warmup(model, X, torch.full((2,), 900.0))
    assert torch.equal(found, steps(module, 1)[0])


@pytest.mark.slow
def test_parts_are_compiled_by_inductor() -> None:
    module = made(Branches)
    model = torch.compile(module, backend="moeca", options={"schedule": "uniform:3"})
    with pytest.warns(MoecaWarning, match="graph break"):
        found = steps(model, 3)
    torch.testing.assert_close(found, steps(module, 3))


def test_a_cache_that_the_model_writes_in_place_outside_regions_is_written_at_every_step() -> None:
    class Writes(Body):
        def forward(self, x: Tensor, t: Tensor, keys: Tensor) -> Tensor:  # type: ignore[override]
            keys[:, 1:] = x
            return super().forward(x + keys.mean(1, keepdim=True), t)

    def run(model: Any) -> tuple[list[Tensor], list[Tensor]]:
        keys, outputs, caches = torch.zeros(2, 5, DIM), [], []
        with torch.no_grad():
            for i in range(4):
                outputs.append(model(X * (1 - 0.1 * i), torch.full((2,), 900.0 - 80 * i), keys))
                caches.append(keys.clone())
        return outputs, caches

    module = made(Writes)
    wanted, wanted_caches = run(module)
    model = moeca.compile(module, schedule="uniform:3", inner="eager")
    outputs, caches = run(model)
    assert equal(caches, wanted_caches)
    assert equal(outputs[::3], wanted[::3])  # the computed steps
    assert not torch.equal(outputs[1], wanted[1])
    assert moeca.stats(model).mac_fraction < 0.6


@pytest.mark.slow
@pytest.mark.usefixtures("own_garbage")
def test_the_first_call_keeps_nothing_alive() -> None:
    """Neither the model nor what it was called with, nor what its callers hold."""

    class Image:
        pass

    def sample(model: Any) -> list[weakref.ref[Any]]:
        image, x = Image(), torch.randn(2, 4, 8, 8)
        with torch.no_grad():
            for i in range(3):
                model(x * (1 - 0.1 * i), torch.full((2,), 900.0 - 80 * i), torch.tensor([1, 2]))
        return [weakref.ref(image), weakref.ref(x)]

    def use() -> weakref.ref[nn.Module]:
        module = dit()
        kept = sample(torch.compile(module, backend="moeca", options={"schedule": "uniform:3", "inner": "eager"}))
        gc.collect()
        assert [one() for one in kept] == [None, None]
        return weakref.ref(module.blocks[0])

    block = use()
    gc.collect()
    assert block() is None
