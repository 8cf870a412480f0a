"""Two transformers of one sampling loop, one for high and one for low noise, are one trajectory."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import OptionError, StateError
from moeca_compile.schedule import Action, Schedule
from tests.engine.test_output import Model
from tests.models import DiT

TIMES = tuple(950.0 - 100 * step for step in range(9))
SWITCH = 4  # the first step of the second model
EAGER: dict[str, Any] = {"schedule": "uniform:3", "inner": "eager"}
C, F = Action.COMPUTE, Action.FORECAST


class Pipeline:
    def __init__(self, high: nn.Module, low: nn.Module) -> None:
        self.transformer, self.transformer_2 = high, low

    def __call__(self) -> list[Tensor]:
        return sample([self.transformer, self.transformer_2])


def models(difference: float = 1.0) -> list[nn.Module]:
    """Two models of one architecture; 0: with equal weights, 1: with independent ones."""
    pair = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        pair.append(DiT("numpy", depth=1, num_experts=3, shared=False).eval().requires_grad_(False))
    for first, second in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        second.lerp_(first, 1 - difference)
    return list(pair)


def sample(pair: Any, seed: int = 0, switch: int = SWITCH, calls: int = 1) -> list[Tensor]:
    """What the models return. `calls`: guidance streams of a step."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    outputs = []
    with torch.no_grad():
        for step, time in enumerate(TIMES):
            model = pair[step >= switch]
            found = [model(x, torch.full((2,), time), torch.tensor([1, 2]) + stream) for stream in range(calls)]
            outputs += found
            x = x - 0.05 * found[0]
    return outputs


def compiled(difference: float = 1.0, **options: Any) -> Any:
    torch._dynamo.reset()
    return moeca.compile(models(difference), **{**EAGER, **options})


def steps_of(model: Any) -> tuple[str, list[int]]:
    """The variants of a whole trajectory, and its cold steps."""
    steps = moeca.stats(model).steps
    assert [record.step for record in steps] == list(range(len(TIMES)))
    return "".join(record.variant[1] for record in steps), [record.step for record in steps if record.cold]


@pytest.fixture(scope="module")
def shared() -> Any:
    """For the tests that come first: compiling other models makes Dynamo forget these."""
    return compiled()


@pytest.fixture
def pair(shared: Any) -> Any:
    moeca.reset(shared)
    return shared


def test_steps_count_over_both_models_and_the_second_one_starts_cold(pair: Any) -> None:
    for _ in range(2):
        sample(pair)
        for model in (*pair, pair):
            assert steps_of(model) == ("011001011", [SWITCH])
    assert not moeca.stats(pair).warnings


def test_the_first_model_s_state_is_released(pair: Any) -> None:
    sample(pair, switch=len(TIMES))
    alone = moeca.stats(pair).state_bytes
    sample(pair, seed=1)
    assert moeca.stats(pair).state_bytes == alone > 0


def test_a_named_stream_counts_over_both_models(pair: Any) -> None:
    with moeca.trajectory(pair, steps=len(TIMES), stream="a"):
        sample(pair)
    assert steps_of(pair)[1] == [SWITCH]


def test_models_that_are_called_at_every_step_keep_a_state_each(pair: Any) -> None:
    """Guidance by a weaker model."""
    high, low = pair
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        for time in TIMES:
            x = x - 0.02 * (high(x, torch.full((2,), time), y) + low(x, torch.full((2,), time), y))
    steps = moeca.stats(pair).steps
    assert [(record.step, record.stream) for record in steps] == [(s, n) for s in range(len(TIMES)) for n in "01"]
    assert not any(record.cold for record in steps)


@pytest.mark.parametrize("hand_over", [pytest.param(False, marks=pytest.mark.slow), True])
def test_guidance_streams_go_on_in_the_second_model(hand_over: bool, pair: Any) -> None:
    if hand_over:
        pair = compiled(hand_over=True)
    sample(pair, calls=2)
    steps = moeca.stats(pair).steps
    assert [record.step for record in steps] == [step for step in range(len(TIMES)) for _ in range(2)]
    assert [record.step for record in steps if record.cold] == ([] if hand_over else [SWITCH, SWITCH])


def test_a_pipeline_with_two_transformers_is_one_trajectory() -> None:
    torch._dynamo.reset()
    pipe = moeca.compile(Pipeline(*models()), **EAGER)
    traced = []
    for _ in range(2):
        with moeca.trajectory(pipe, steps=len(TIMES)):
            pipe()
        traced.append(torch._dynamo.utils.counters["frames"]["ok"])
        assert steps_of(pipe)[1] == [SWITCH]
    assert traced[0] == traced[1]


@pytest.mark.slow
def test_computed_in_full_both_are_eager() -> None:
    truth = sample(models())
    for left, right in zip(sample(compiled(schedule="full")), truth, strict=True):
        assert (left - right).abs().max() <= 1e-5


@pytest.mark.slow
def test_each_model_is_cached_as_it_is_alone() -> None:
    """By the schedule whose rows are its own."""
    rows = tuple([(action,) for action in (C, C, F, F, C, F, F, C, F)])
    found = sample(compiled(schedule=Schedule(rows)))
    torch._dynamo.reset()
    high, low = models()
    high = moeca.compile(high, schedule=Schedule(rows[:SWITCH]), inner="eager")
    low = moeca.compile(low, schedule=Schedule(rows[SWITCH:]), inner="eager")
    for left, right in zip(found, sample([high, low]), strict=True):
        assert (left - right).abs().max() <= 1e-5


@pytest.mark.slow
def test_rows_go_by_timestep_in_both_models() -> None:
    rows = tuple([(action,) for action in (C, C, F, C, F, F, C, F, F)])
    pair = compiled(schedule=Schedule(rows, timesteps=TIMES))
    sample(pair)
    assert steps_of(pair) == ("001001011", [SWITCH])


@pytest.mark.parametrize("granularity", ["region", pytest.param("output", marks=pytest.mark.slow)])
def test_what_is_handed_over_is_right(granularity: str) -> None:
    """With equal weights the change of model can't be seen."""
    pair = compiled(difference=0.0, hand_over=True, granularity=granularity)
    alone = moeca.compile(models()[0], granularity=granularity, **EAGER)
    for seed in range(2):
        found = sample(pair, seed)
        assert steps_of(pair)[1] == []
        for left, right in zip(found, sample([alone, alone], seed), strict=True):
            assert (left - right).abs().max() <= 1e-6


def test_an_output_is_handed_over_though_the_models_have_no_graph() -> None:
    models = [Model().eval().requires_grad_(False) for _ in range(2)]
    pair = moeca.compile(models, **EAGER, granularity="output", hand_over=True)
    with torch.no_grad():
        for step, time in enumerate(TIMES):
            pair[step >= SWITCH](torch.ones(2, 2, 3, 3), torch.full((2,), time), torch.tensor([1, 2]))
    steps = moeca.stats(pair).steps
    assert [record.step for record in steps] == list(range(len(TIMES)))
    assert not any(record.cold for record in steps)


@pytest.mark.slow
def test_handing_over_costs_the_more_the_more_the_weights_differ() -> None:
    errors = {}
    for difference in (0.0, 0.01, 1.0):
        truth = sample(models(difference))[SWITCH]
        found = sample(compiled(difference, hand_over=True))[SWITCH]
        errors[difference] = float((found - truth).norm() / truth.norm())
    assert errors[0.0] < errors[0.01] < errors[1.0]


def test_disabled_they_are_the_plain_models() -> None:
    pair = models()
    assert moeca.disable(moeca.compile(list(pair), **EAGER)) == pair


@pytest.mark.slow
def test_a_warmup_of_two_compiles_both() -> None:
    inputs = torch.randn(2, 4, 8, 8), torch.full((2,), 950.0), torch.tensor([1, 2])
    pair = compiled()
    expected = [part(*inputs) for part in models()]
    assert all(map(torch.equal, moeca.warmup(pair, *inputs), expected))
    pipe = Pipeline(*models())
    moeca.compile(pipe, **EAGER)
    assert all(map(torch.equal, moeca.warmup(pipe, *inputs), expected))
    assert torch.equal(moeca.warmup([pair[0]], *inputs), expected[0])
    assert moeca.stats(pair).compile_seconds.keys() >= {"v0", "v1"}


def test_bad_lists_are_refused() -> None:
    pair = models()
    with pytest.raises(StateError, match=r"one model is given twice"):
        moeca.compile([pair[0], pair[0]], **EAGER)
    with pytest.raises(StateError, match=r"expected a torch.nn.Module.* got list"):
        moeca.compile([], **EAGER)
    bad: list[Any] = [pair[0], 3]
    with pytest.raises(StateError, match=r"expected a torch.nn.Module.* got int"):
        moeca.compile(bad, **EAGER)
    text = r"expected one model, and got 2 in a list. Pass one of them: {}\(models\[0\], ...\)"
    with pytest.raises(StateError, match=text.format("explain")):
        moeca.explain(pair)
    with pytest.raises(StateError, match=text.format("export")):
        moeca.export(cast(Any, pair), (), "full", "bundle")
    with pytest.raises(StateError, match=text.format("trajectory")):
        moeca.trajectory(pair, frozen=True)
    with pytest.raises(OptionError, match=r"granularity='output' fits what one model returns, and there are 2 here"):
        moeca.calibrate(
            pair, lambda called, seed: torch.zeros(1), budget="macs:0.5", granularity="output", progress=False
        )  # fmt: skip
    with pytest.raises(OptionError, match="hand_over moves state"):
        moeca.compile(pair, hand_over=True, cuda_graphs=True)
