"""`torch.compile(model, backend="moeca")` as people use it: ways in, refusals, statistics, signatures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import moeca_compile as moeca
from moeca_compile.errors import CaptureError, MoecaWarning, OptionError, ScheduleError, StateError
from moeca_compile.frontend.entry import ENTRIES
from moeca_compile.frontend.owner import handle_of
from moeca_compile.schedule import Action, Schedule
from tests.sampling import (
    TIMES,
    Model,
    cfg_calls,
    compiled,
    dit,
    noise,
    plain,
    run,
    same,
    take_turns,
    uncached,
    under_compile_lock,
)

EAGER = {"schedule": "uniform:3", "inner": "eager"}
INPUTS = noise(99, 2), torch.full((2,), 500.0), torch.tensor([1, 2])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def moeca_compiled(model: Any, **keywords: Any) -> Any:
    """Nothing is prepared by hand."""
    return torch.compile(model, backend="moeca", options=EAGER, **keywords)


@torch.no_grad()
def close(model: Model, module: nn.Module) -> bool:
    return torch.allclose(model(*INPUTS), module(*INPUTS), rtol=1e-5, atol=1e-6)


# -- ways in ----------------------------------------------------------------------------------------------------------


def test_the_first_call_prepares_the_model_and_is_the_first_step() -> None:
    module = dit()
    model = moeca_compiled(module)
    first = run(plain(model))
    assert [record.step for record in moeca.stats(model).steps] == list(range(len(TIMES)))
    assert not any(record.cold for record in moeca.stats(model).steps)
    for one, again in zip(first, run(plain(model)), strict=True):
        assert torch.allclose(one, again, rtol=1e-5, atol=1e-6)
    assert close(uncached(module), module)


def test_a_model_with_hooks_is_not_called_twice_for_its_first_call() -> None:
    module, calls = dit(), []
    module.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    model = moeca_compiled(module)
    assert close(model, module)
    assert moeca.stats(model).steps == ()  # that call ran eagerly in parts; the next is the first to be cached
    assert len(calls) == 2


def test_a_schedule_made_for_other_timesteps_makes_up_what_is_passed_and_says_so() -> None:
    rows = ((Action.COMPUTE,), (Action.FORECAST,), (Action.COMPUTE,))
    made_for = Schedule(rows, order=1, timesteps=(1000.0, 960.0, 920.0))
    model = moeca.compile(dit(), schedule=made_for, inner="eager")
    with pytest.warns(MoecaWarning, match="step 1 is at timestep 990, but the schedule has 960") as warned:
        run(plain(model, times=(1000.0, 990.0, 970.0, 500.0)))
    assert [record.variant for record in moeca.stats(model).steps] == ["v0", "v1", "v1", "v0"]
    assert len(warned) == 1


@pytest.mark.slow
def test_three_instances_that_prepare_on_their_first_run_in_turns_are_all_right() -> None:
    modules = [dit(seed) for seed in range(3)]
    models = [moeca_compiled(module) for module in modules]
    take_turns([plain(model, seed=9) for model in models], turns=(0, 0, 0, 1, 0, 1, 2, 2, 0))
    assert [moeca.stats(model).graphs for model in models] == [1, 1, 1]
    for model, outputs in zip(models, take_turns([plain(model) for model in models]), strict=True):
        assert same(outputs, under_compile_lock(model, plain))
    for module, model in zip(modules, models, strict=True):
        moeca.reset(model)
        assert close(model, module)


def test_three_trajectories_bring_no_recompile_and_no_graph_break() -> None:
    model = compiled(dit())
    run(cfg_calls(model), 1)
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            run(cfg_calls(model, seed=seed))
    assert before == counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    stats = moeca.stats(model)
    assert stats.graphs == 1
    assert set(stats.compile_seconds) == {"capture", "prologue0", "v0", "v1"}


def test_fullgraph_works_through_compile() -> None:
    module = dit()
    model = moeca.compile(module, fullgraph=True, **EAGER)
    assert close(model, module)
    assert same(run(plain(model)), run(plain(model)))


@pytest.mark.slow
def test_module_compile_in_place() -> None:
    module, eager = dit(), dit()
    module.compile(backend="moeca", options=EAGER)
    assert close(module, eager)
    first = run(plain(module))
    assert same(run(plain(module)), first)
    assert [record.variant for record in moeca.stats(module).steps][:4] == ["v0", "v1", "v1", "v0"]
    moeca.reset(module)
    assert moeca.stats(module).steps == ()


@pytest.mark.slow
def test_dynamic_shapes_are_accepted() -> None:
    module = dit()
    model = compiled(module)
    dynamic = torch.compile(module, backend="moeca", options=EAGER, dynamic=True)
    for batch in (2, 3, 5):
        assert same(
            run(plain(dynamic, batch=batch)), under_compile_lock(model, lambda m, batch=batch: plain(m, batch=batch))
        )
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.slow
def test_keyword_arguments_are_the_same_call() -> None:
    model = compiled(dit())
    by_name = compiled(dit())
    assert same(run(plain(lambda x, t, y: by_name(x, y=y, t=t))), run(plain(model)))
    assert moeca.warmup(by_name, INPUTS[0], y=INPUTS[2], t=INPUTS[1]).shape == INPUTS[0].shape


@dataclasses.dataclass
class Output:
    sample: Tensor
    hidden: Tensor


SHAPES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda out: (out, out.mean()), lambda found: found[0]),
    "dict": (lambda out: {"mean": out.mean(), "sample": out}, lambda found: found["sample"]),
    "dataclass": (lambda out: Output(out, out.mean()), lambda found: found.sample),
    "with a number and None": (lambda out: (None, 3, out), lambda found: found[2]),
}


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = dit(), wrap

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        return self.wrap(self.inner(x, t, y))


@functools.cache
def unwrapped() -> list[Tensor]:
    return run(plain(compiled(dit())))


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_of_any_structure_come_back_as_they_were(shape: str) -> None:
    wrap, unwrap = SHAPES[shape]
    module = Wrapped(wrap).eval().requires_grad_(False)
    model = compiled(module)
    with torch.no_grad():
        assert type(model(*INPUTS)) is type(module(*INPUTS))
    assert same(under_compile_lock(model, lambda m: plain(lambda *a: unwrap(m(*a)))), unwrapped())


# -- refusals: at the call, as our own errors -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shedule": "full"}, OptionError, "did you mean 'schedule'"),
        ({"order": 7}, OptionError, "order=7"),
        ({"inner": "eager", "mode": "max-autotune"}, OptionError, "takes no mode"),
        ({"inner": "eager", "schedule": "uniform:often"}, ScheduleError, "'uniform:often' is not understood"),
        ({"inner": "eager", "schedule": "nowhere.json"}, ScheduleError, "can't be read"),
        ({"inner": "eager", "disable": ["insert_state"]}, OptionError, "only"),
    ],
)
def test_a_wrong_option_arrives_as_our_error(options: dict[str, Any], error: type[Exception], message: str) -> None:
    module = dit(style="dense")
    model = torch.compile(module, backend="moeca", options=options)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(error, match=message):
            model(*INPUTS)


def test_a_wrong_option_is_refused_at_once_by_compile() -> None:
    with pytest.raises(OptionError, match="did you mean 'schedule'"):
        moeca.compile(dit(), shedule="full")
    with pytest.raises(ScheduleError):
        moeca.compile(dit(), schedule="uniform:often")


@pytest.mark.slow
def test_a_schedule_for_another_model_shows_the_difference() -> None:
    other = moeca.explain(dit(depth=2), *INPUTS, inner="eager").schedule
    model = compiled(dit(), schedule=other)
    with torch.no_grad(), pytest.raises(ScheduleError, match="not in the model: "):
        model(*INPUTS)


def test_a_model_without_anything_to_cache_runs_uncached_and_says_so_once() -> None:
    module, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).requires_grad_(False), torch.randn(2, 4)
    model = moeca_compiled(module)
    with pytest.warns(MoecaWarning, match="runs uncached.*nothing to cache was found") as seen:
        assert all(torch.equal(model(x + i), module(x + i)) for i in range(3))
    assert len(seen) == 1
    assert "nothing to cache was found" in str(moeca.stats(model))
    with pytest.raises(CaptureError, match="nothing to cache was found"):
        moeca.explain(model, x)
    full = torch.compile(nn.Linear(4, 4).requires_grad_(False), backend="moeca", options={**EAGER, "schedule": "full"})
    assert full(torch.randn(2, 4)).shape == (2, 4)


class Numbered(nn.Module):
    """Takes its timestep as a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dit()

    def forward(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        return self.inner(x, torch.full((x.shape[0],), t), y)


@pytest.mark.parametrize("kind", [float, pytest.param(int, marks=pytest.mark.slow)])
def test_a_timestep_that_is_a_number_is_exact_and_says_what_is_better(kind: type) -> None:
    module = Numbered().eval().requires_grad_(False)
    model = compiled(module)
    x, _, y = INPUTS
    times = [kind(t) for t in TIMES[:5]]
    with torch.no_grad(), pytest.warns(MoecaWarning) as seen:
        outputs = [model(x, t, y) for t in times]
    torch.testing.assert_close(outputs, [module(x, t, y) for t in times])
    texts = [str(one.message) for one in seen]
    assert sum("t comes as a Python number" in text for text in texts) == 1
    assert any("no timestep input" in text for text in texts)


class Odd(nn.Module):
    """An expert loop like no other: it draws the order of its experts."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.router, self.experts, self.top_k = moe.router, moe.experts, moe.top_k

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, ids = self.router(tokens).softmax(-1).topk(self.top_k)
        out = torch.zeros_like(tokens)
        for e in sorted(range(len(self.experts)), key=lambda e: -int((ids == e).sum())):
            token, slot = torch.where(ids == e)
            out[token] = torch.maximum(out[token], weights[token, slot, None] * self.experts[e](tokens[token]))
        return out.view_as(x)


def test_an_unknown_dispatch_is_left_alone_with_its_reason_and_right() -> None:
    module = dit()
    module.blocks[0].moe = Odd(module.blocks[0].moe)
    model = moeca_compiled(module)
    with pytest.warns(MoecaWarning) as seen:
        outputs = run(plain(model))
    (text,) = [str(one.message) for one in seen]
    assert "graph break: 9 parts" in text
    assert "Odd.forward" in text
    assert same(outputs, run(plain(module)))


# -- warm-up, statistics ----------------------------------------------------------------------------------------------


def test_warmup_compiles_every_variant_and_keeps_no_state() -> None:
    model, full = compiled(dit()), uncached(dit())
    with torch.no_grad():
        assert torch.equal(moeca.warmup(model, *INPUTS), full(*INPUTS))
    stats = moeca.stats(model)
    assert set(stats.compile_seconds) == {"capture", "prologue0", "v0", "v1"}
    assert (stats.steps, stats.state_bytes, stats.mac_fraction) == ((), 0, 1.0)
    truth = under_compile_lock(model, plain)
    loop = plain(model)
    head = run(loop, 4)
    moeca.warmup(model, *INPUTS)  # nor does it disturb
    assert same(head + run(loop), truth)
    spent = moeca.stats(model).compile_seconds
    assert spent == stats.compile_seconds


def test_warmup_of_an_unprepared_model_prepares_it() -> None:
    model = moeca_compiled(dit())
    moeca.warmup(model, *INPUTS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(plain(model))
    assert len(moeca.stats(model).steps) == len(TIMES)


def test_warmup_of_another_backend_is_refused() -> None:
    with pytest.raises(StateError, match='backend="moeca"'):
        moeca.warmup(torch.compile(dit(style="dense"), backend="eager"), *INPUTS)


def test_stats_tell_what_ran() -> None:
    model = compiled(dit())
    run(cfg_calls(model))
    stats = moeca.stats(model)
    assert [record.step for record in stats.steps] == [step for step in range(10) for _ in range(2)]
    assert [record.variant for record in stats.steps[::2]] == ["v0", "v1", "v1"] * 3 + ["v0"]
    assert {record.stream for record in stats.steps} == {"0", "1"}
    assert all(record.ms > 0 and record.overhead_ms >= 0 for record in stats.steps)
    v0, v1 = stats.steps[0].macs, stats.steps[2].macs
    assert stats.mac_fraction == pytest.approx((4 * v0 + 6 * v1) / (10 * v0))
    report = moeca.explain(model, *INPUTS)
    assert stats.state_bytes == 2 * report.state_bytes  # two streams
    assert "43" in str(stats) or "%" in str(stats)


# -- signatures -------------------------------------------------------------------------------------------------------


def programs_of(model: nn.Module) -> int:
    owned = (
        entry
        for entry in ENTRIES
        if any(runtime.handle and runtime.handle() is handle_of(model) for runtime in entry.runtimes.values())
    )
    return sum(len(entry.programs) for entry in owned)


@pytest.mark.slow
def test_the_oldest_signatures_are_dropped_and_come_back_right() -> None:
    module = dit()
    model = torch.compile(module, backend="moeca", options={**EAGER, "max_signatures": 2}, dynamic=True)
    moeca.prepare(module)
    truths = {}
    for batch in (2, 3, 4, 5, 2, 3):
        outputs = run(plain(model, batch=batch))
        assert same(outputs, truths.setdefault(batch, outputs))
        assert programs_of(model) <= 2
    held = moeca.stats(model).state_bytes
    moeca.reset(model)
    run(plain(model, batch=3))
    assert moeca.stats(model).state_bytes == held  # of the last trajectory alone


@pytest.mark.slow
def test_a_dropped_signature_takes_its_state_along_within_a_trajectory() -> None:
    module = dit()
    moeca.prepare(module)
    model = torch.compile(module, backend="moeca", options={**EAGER, "max_signatures": 1}, dynamic=True)
    with moeca.trajectory(model, stream="only"):
        for batch in (2, 3, 2):
            run(plain(model, batch=batch), 2)
            assert programs_of(model) == 1
        assert [record.cold for record in moeca.stats(model).steps] == [False, False, True, False, True, False]
