"""granularity='output': the whole model as one column. No graph is needed, and a cheap step calls no part of it."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import moeca_compile as moeca
from moeca_compile.engine.intercept import intercepting
from moeca_compile.engine.step import is_finite
from moeca_compile.errors import MoecaWarning, OptionError, ScheduleError, StateError
from moeca_compile.schedule import Action, Partial, Schedule
from moeca_compile.schedule.output import OutputRule

STEPS = 9


class Model(nn.Module):
    """x + t and a label's row; `calls` counts how often it ran. Its graph breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.labels = nn.Conv2d(2, 2, 1), nn.Embedding(4, 2)
        self.calls = 0

    @torch._dynamo.disable
    def count(self) -> None:
        self.calls += 1

    def forward(self, x: Tensor, t: Any, y: Tensor) -> Tensor:
        self.count()
        time = t if isinstance(t, float) else t.reshape(-1, 1, 1, 1)
        return self.mix(x) * (1 + 0.1 * time) + self.labels(y)[:, :, None, None]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def compiled(model: nn.Module, schedule: Schedule | str) -> Any:
    return moeca.compile(model, schedule=schedule, granularity="output", inner="eager")


def sample(model: Any, numbers: bool = False, steps: int = STEPS, seed: int = 0) -> list[Tensor]:
    """What the model returned at each step of an Euler run."""
    x, outputs = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(seed)), []
    for step in range(steps):
        t = 1.0 - step / steps
        outputs.append(model(x, t if numbers else torch.full((2,), t), torch.tensor([1, 2])))
        x = x - outputs[-1] / steps
    return outputs


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def by_hand(model: Model, steps: int = STEPS) -> list[Tensor]:
    """uniform:3 of order 1: the model's last two outputs, extrapolated."""
    x, outputs, known = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)), [], []
    for step in range(steps):
        if step % 3 == 0:
            known = [(step, model(x, torch.full((2,), 1.0 - step / steps), torch.tensor([1, 2]))), *known[:1]]
            outputs.append(known[0][1])
        else:
            (s0, y0), *rest = known
            slope = (y0 - rest[0][1]) * ((step - s0) / (s0 - rest[0][0])) if rest else torch.zeros(())
            outputs.append(y0 + slope)
        x = x - outputs[-1] / steps
    return outputs


def test_full_is_the_model_bit_by_bit(model: Model) -> None:
    assert same(sample(compiled(model, "full")), sample(copy.deepcopy(model)))


@pytest.mark.parametrize("numbers", [False, True])
def test_cheap_steps_call_no_part_of_the_model(model: Model, numbers: bool) -> None:
    handle = compiled(model, "uniform:3")
    first = sample(handle, numbers)
    model.calls = 0
    assert same(first, sample(handle, numbers))
    assert model.calls == STEPS // 3
    stats = moeca.stats(handle)
    assert [record.variant for record in stats.steps] == ["v0", "v1", "v1"] * 3
    assert stats.mac_fraction == pytest.approx(1 / 3)


def test_a_forecast_is_the_line_through_the_last_outputs(model: Model) -> None:
    torch.testing.assert_close(sample(compiled(model, "uniform:3")), by_hand(copy.deepcopy(model)))


def test_what_the_caller_writes_to_is_not_what_is_kept(model: Model) -> None:
    handle = compiled(model, moeca.Schedule.uniform(3, order=0))
    x, y = torch.zeros(2, 2, 3, 3), torch.tensor([1, 2])
    first = handle(x, torch.ones(2), y)
    kept = first.clone()
    first.zero_()
    second = handle(x, torch.full((2,), 0.9), y)
    assert torch.equal(second, kept)
    second.zero_()
    assert torch.equal(handle(x, torch.full((2,), 0.8), y), kept)


def test_named_streams_and_warmup(model: Model) -> None:
    handle = compiled(model, "uniform:3")
    moeca.warmup(handle, torch.zeros(2, 2, 3, 3), torch.ones(2), torch.tensor([1, 2]))
    with moeca.trajectory(handle, steps=STEPS, stream="a"):
        named = sample(handle)
    assert same(named, sample(handle))


def test_a_changed_weight_is_seen(model: Model) -> None:
    handle = compiled(model, "uniform:9")
    x, y = torch.zeros(2, 2, 3, 3), torch.tensor([1, 2])
    before = handle(x, torch.ones(2), y).clone()
    with torch.no_grad():
        model.labels.weight.add_(1)
    assert not torch.equal(handle(x, torch.full((2,), 0.9), y), before)
    assert [record.cold for record in moeca.stats(handle).steps][-1]


@dataclass
class Output:
    sample: Tensor
    note: str


torch.utils._pytree.register_pytree_node(
    Output, lambda one: ([one.sample, one.note], None), lambda values, _: Output(*values)
)


def test_outputs_of_any_structure(model: Model) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, hidden_states: Tensor, timestep: Tensor, options: dict[str, Tensor]) -> Output:
            return Output(self.inner(hidden_states, timestep, options["y"]), "said")

    handle = compiled(Wrapped().eval(), "uniform:3")
    for step in range(6):
        found = handle(
            torch.zeros(2, 2, 3, 3), timestep=torch.full((2,), 1.0 - step / 9), options={"y": torch.tensor([1, 2])}
        )
        assert isinstance(found, Output)
        assert found.note == "said"
    assert moeca.stats(handle).mac_fraction == pytest.approx(1 / 3)


# -- the output rule --------------------------------------------------------------------------------------------------

C, F = (Action.COMPUTE,), (Action.FORECAST,)
TERMS = ("y0", "y1", "x", "d0")


def ruled(weights: tuple[tuple[float, ...], ...], rows: str = "CFCF", **fields: Any) -> Schedule:
    table = tuple(C if letter == "C" else F for letter in rows)
    return Schedule(table, ("output",), granularity="output", output=OutputRule(TERMS, weights), **fields)


WEIGHTS = ((1.0, 0.0, 0.5, 0.25), (0.5, 0.0, -1.0, 0.0), (2.0, -1.0, 0.0, 1.0), ())


def test_the_rule_weighs_outputs_the_latent_and_the_difference_of_the_halves(model: Model) -> None:
    plain, handle = copy.deepcopy(model), compiled(model, ruled(WEIGHTS))
    y, known = torch.tensor([1, 2]), []
    for step in range(4):
        x, t = torch.randn(2, 2, 3, 3), torch.full((2,), 1.0 - step / 4)
        found = handle(x * 0 + step * 0.1 + 0.5, t, y)
        x = x * 0 + step * 0.1 + 0.5
        if step in (0, 2):
            known = [plain(x, t, y), *known[:1]]
        if step == 3:
            wanted = known[0] + (known[0] - known[1]) / 2  # no weights: the schedule's order
        else:
            y0, y1, latent, d0 = WEIGHTS[step]
            wanted = y0 * known[0] + (y1 * known[1] if y1 else 0) + latent * x
            wanted = wanted + d0 * (known[0][:1] - known[0][1:])
        torch.testing.assert_close(found, wanted)


def test_where_the_rule_was_not_made_for_the_step_the_polynomial_serves_and_it_is_said(model: Model) -> None:
    schedule = ruled(WEIGHTS, timesteps=(1.0, 0.75, 0.5, 0.25))
    handle = compiled(model, schedule)
    x, y = torch.zeros(2, 2, 3, 3), torch.tensor([1, 2])
    with pytest.warns(MoecaWarning) as told:
        found = handle(x, torch.full((2,), 0.9), y)
    assert torch.equal(found, copy.deepcopy(model)(x, torch.full((2,), 0.9), y))
    assert any("output weights aren't used" in str(one.message) for one in told)


UPDATE = (1.0, -1 / STEPS)  # of an Euler step


def euler(model: Any, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
    x = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    for step in range(4):
        x = x - scale * model(x, torch.full((2,), 1.0 - step / 4, dtype=dtype), torch.tensor([1, 2])) / STEPS


def test_another_first_update_of_the_sampler_is_noticed_once(model: Model) -> None:
    rule = OutputRule(TERMS, WEIGHTS, "uncached", UPDATE)
    schedule = Schedule((C, F, C, F), ("output",), granularity="output", output=rule)
    handle = compiled(model, schedule)
    euler(handle)
    moeca.reset(handle)
    euler(handle, scale=1.02)  # within what a fit may leave
    moeca.reset(handle)
    with pytest.warns(MoecaWarning, match=r"first step ends 25% of its length away from where .* guidance, solver"):
        euler(handle, scale=1.25)
    moeca.reset(handle)
    euler(handle, scale=0.5)  # told once
    bfloat16 = compiled(copy.deepcopy(model).bfloat16(), schedule)
    euler(bfloat16, dtype=torch.bfloat16)  # a latent that is rounded is no other sampler


def test_a_rule_is_written_and_read(tmp_path: Any) -> None:
    schedule = ruled(WEIGHTS)
    assert schedule.output is not None
    schedule = replace(schedule, output=replace(schedule.output, update=UPDATE))
    schedule.save(tmp_path / "one.json")
    assert Schedule.load(tmp_path / "one.json") == schedule
    assert '"version": 3' in schedule.to_json()
    assert '"version": 2' in Schedule.uniform(3).to_json()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: OutputRule(("y0", "q"), ((1.0, 0.0),)), "expected y0 to y3"),
        (lambda: OutputRule(("y0", "y0"), ()), "each once"),
        (lambda: OutputRule(("y0",), ((1.0, 2.0),)), "step 0 has 2 weights for 1 terms"),
        (lambda: OutputRule(("y0",), ((float("nan"),),)), "isn't finite"),
        (lambda: OutputRule(("y0",), ((1.0,),), "somewhere"), "truth is 'somewhere'"),
        (lambda: OutputRule(("y0",), ((1.0,),), update=(1.0,)), "expected the factors of the latent"),
        (lambda: OutputRule(("y0",), ((1.0,),), update=(1.0, float("inf"))), "expected the factors of the latent"),
        (lambda: ruled(WEIGHTS, "CF"), "weights of 4 steps for 2 rows"),
        (lambda: ruled(WEIGHTS, period=1), "neither repeats"),
        (lambda: Schedule((C,), ("attn",), granularity="region", output=OutputRule(("y0",), ((1.0,),))), "'output'"),
        (lambda: Schedule.from_json(ruled(WEIGHTS).to_json().replace('"x"', "5")), "expected texts"),
        (lambda: Schedule.from_json(ruled(WEIGHTS).to_json().replace("0.25", '"a"')), "weights"),
    ],
)
def test_rules_that_can_not_be(make: Any, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        make()


# -- bad input --------------------------------------------------------------------------------------------------------


def test_the_backend_alone_says_what_to_write(model: Model) -> None:
    handle = torch.compile(model, backend="moeca", options={"granularity": "output", "inner": "eager"})
    with pytest.raises(OptionError, match=r"moeca_compile\.compile"):
        handle(torch.zeros(2, 2, 3, 3), torch.ones(2), torch.tensor([1, 2]))


def test_gradients_are_refused(model: Model) -> None:
    with pytest.raises(StateError, match="inference"):
        compiled(model.requires_grad_(), "full")(torch.zeros(2, 2, 3, 3), torch.ones(2), torch.tensor([1, 2]))


@pytest.mark.parametrize("schedule", [Schedule((C, (Partial(0.5),)), ("output",)), "adaptive:0.1"])
def test_parts_and_drift_need_a_graph(model: Model, schedule: Any) -> None:
    with pytest.raises(ScheduleError, match="granularity='region'"):
        compiled(model, schedule)(torch.zeros(2, 2, 3, 3), torch.ones(2), torch.tensor([1, 2]))


def test_weights_of_outputs_that_are_not_there_yet_are_refused(model: Model) -> None:
    with pytest.raises(ScheduleError, match="step 1 weighs y1, but the model was computed 1 times"):
        compiled(model, ruled(((), (1.0, 1.0, 0.0, 0.0), (), ())))(
            torch.zeros(2, 2, 3, 3), torch.ones(2), torch.tensor([1, 2])
        )


def test_a_schedule_of_regions_is_refused(model: Model) -> None:
    with pytest.raises(ScheduleError, match="another graph"):
        compiled(model, Schedule((C, F), ("attn",)))(torch.zeros(2, 2, 3, 3), torch.ones(2), torch.tensor([1, 2]))


def test_explain_says_what_is_kept(model: Model) -> None:
    handle, inputs = compiled(model, "uniform:3"), (torch.zeros(2, 2, 3, 3), torch.ones(2), torch.tensor([1, 2]))
    report = moeca.explain(handle, *inputs)
    assert [region.key for region in report.regions] == ["output"]
    assert report.state_bytes == 2 * 2 * 2 * 3 * 3 * 4
    assert (report.timestep, report.latent) == ("t", "x")
    with pytest.raises(OptionError, match="Explain the model itself"):
        moeca.explain(handle, *inputs, schedule="full")
    itself = moeca.explain(Model(), *inputs, schedule="uniform:3", granularity="output")
    assert str(itself) == str(report)


def test_the_first_call_of_a_kind_runs_the_model_once(model: Model) -> None:
    handle = compiled(model, "uniform:3")
    x, y = torch.zeros(2, 2, 3, 3), torch.tensor([1, 2])
    moeca.explain(handle, x, torch.ones(2), y)
    assert model.calls == 1
    handle(x[:1], torch.ones(1), y[:1])
    assert model.calls == 2
    moeca.warmup(handle, x[:, :, :2], torch.ones(2), y)
    assert model.calls == 3


def test_a_program_keeps_no_output_alive(model: Model) -> None:
    handle = compiled(model, "full")
    output = handle(torch.zeros(2, 2, 3, 3), torch.ones(2), torch.tensor([1, 2]))
    storage = weakref.ref(output.untyped_storage())
    del output
    gc.collect()
    assert storage() is None


@pytest.mark.parametrize("option", ["cuda_graphs", "pack_experts"])
def test_options_of_variants_are_refused(model: Model, option: str) -> None:
    with pytest.raises(OptionError, match="calls the model as it is"):
        moeca.compile(model, granularity="output", inner="eager", **{option: True})


def test_inputs_that_require_gradients_are_refused_too(model: Model) -> None:
    with pytest.raises(StateError, match="inference"):
        compiled(model, "full")(torch.zeros(2, 2, 3, 3, requires_grad=True), torch.ones(2), torch.tensor([1, 2]))


def test_an_intercepted_call_has_its_own_arguments(model: Model) -> None:
    """An entry is of one call: another thread may intercept one of another structure meanwhile."""
    entries, handle, y = [], compiled(model, "uniform:3"), torch.tensor([1, 2])

    def intercept(entry: Any, args: Any, runtime: Any) -> tuple[Tensor, ...]:
        entries.append((entry, args))
        return tuple(entry.run_uncached(args, ""))

    with intercepting(intercept, handle.dynamo_ctx):
        first = handle(torch.zeros(2, 2, 3, 3), torch.ones(2), y)
        handle(torch.zeros(2, 2, 3, 3), t=torch.ones(2), y=y)
    entry, args = entries[0]
    assert [one.name for one in entry.inputs] == ["x", "t", "y"]
    assert torch.equal(entry.run_uncached(args, "")[0], first)


def test_a_model_that_returns_no_tensor_runs_uncached_and_says_so() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> int:
            return x.numel()

    handle = compiled(Counting(), "uniform:3")
    with pytest.warns(MoecaWarning, match="returns no tensor"):
        assert [handle(torch.zeros(2, 3)) for _ in range(3)] == [6] * 3


@pytest.mark.parametrize("given", [
    ((1, 2.0), {"y": torch.ones(2)}),
    ((), {"y": 3, "x": None}),
    ((torch.ones(1), [torch.ones(2), "a"]), {}),
    ((torch.float32,), {"y": {"b": 1, "a": torch.ones(3)}}),
    ((), {}),
], ids=["plain", "keywords alone", "a list", "a dict", "nothing"])  # fmt: skip
def test_arguments_are_flattened_as_pytree_does(model: Model, given: tuple[Any, dict[str, Any]]) -> None:
    handle = compiled(model, "uniform:3")
    sample(handle, steps=1)
    path = handle.forward
    args, kwargs = given
    wanted, spec = tree_flatten((args, kwargs))
    for _ in range(2):  # the second time by what the first noted
        leaves, structure = path._flattened(args, kwargs)
        assert [*map(id, leaves)] == [*map(id, wanted)]
        assert structure.spec == spec
        assert len(structure.names) == len(leaves)
    assert path._flattened(args, kwargs)[1] is structure


@pytest.mark.parametrize(("output", "finite"), [
    (torch.ones(2, 3), True),
    (torch.full((4,), 3e38), True),  # their sum overflows
    (torch.full((9,), 60_000.0, dtype=torch.float16), True),
    (torch.zeros(0), True),
    (torch.tensor([1.0, float("nan")]), False),
    (torch.tensor([float("inf"), -float("inf")]), False),
    (torch.tensor([1.0, float("inf")], dtype=torch.bfloat16), False),
    (torch.tensor([1]), True),
])  # fmt: skip
def test_a_finite_output_is_told_from_one_that_is_not(output: Tensor, finite: bool) -> None:
    assert is_finite(output) is finite
