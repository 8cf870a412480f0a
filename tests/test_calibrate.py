"""`calibrate` end to end on a toy model: keeps its budget, tells the truth about its error, refuses bad requests."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import ScheduleError
from moeca_compile.schedule import Action, Schedule
from tests.models import DiT

STEPS = 9
QUICK: dict[str, Any] = {
    "inner": "eager", "progress": False, "granularity": "region", "seeds": (0, 1), "effort": 6, "data_range": 4.0,
}  # fmt: skip


def sample(model: nn.Module, seed: int) -> Tensor:
    """Two calls a step, as with classifier-free guidance."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        t = torch.full((2,), 1000.0 * (1 - step / STEPS))
        cond, uncond = model(x, t, torch.tensor([1, 2])), model(x, t, torch.tensor([10, 10]))
        x = x - (uncond + 1.5 * (cond - uncond)) / STEPS
    return x


def mean_psnr(cached: list[Tensor], truth: list[Tensor], data_range: float = 4.0) -> float:
    errors = (torch.cat(cached) - torch.cat(truth)).square().flatten(1).mean(dim=1)
    return float((10 * torch.log10(data_range**2 / errors)).mean())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return DiT(depth=1).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibration")


@pytest.fixture(scope="module")
def found(model: nn.Module, folder: Path) -> Schedule:
    return moeca.calibrate(model, sample, budget="macs:0.5", resume=folder, **QUICK)


def test_the_schedule_keeps_its_budget_and_fits_the_steps(found: Schedule) -> None:
    assert len(found.rows) == STEPS
    assert found.period == 0
    assert found.predicted["mac_fraction"] <= 0.5
    assert found.timesteps == tuple(pytest.approx(1000.0 * (1 - step / STEPS)) for step in range(STEPS))
    assert Schedule.from_json(found.to_json()) == found
    assert set(found.rows[0]) == {Action.COMPUTE}
    assert len(found.distinct_rows()) <= 4


def test_a_run_with_it_has_the_predicted_error_and_cost(model: nn.Module, found: Schedule) -> None:
    compiled = moeca.compile(model, schedule=found, inner="eager")
    with torch.no_grad():
        for seeds, key in (((0, 1), "psnr_db"), ((1000, 1001), "psnr_db_holdout")):
            truth, cached = [sample(model, seed) for seed in seeds], [sample(compiled, seed) for seed in seeds]
            assert mean_psnr(cached, truth) == pytest.approx(found.predicted[key], abs=0.02)
    stats = moeca.stats(compiled)
    assert stats.mac_fraction == pytest.approx(found.predicted["mac_fraction"], abs=1e-6)
    assert stats.state_bytes == 2 * found.predicted["state_bytes"], "two streams"
    assert not any(record.cold for record in stats.steps)


@pytest.mark.parametrize("order", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_it_is_never_worse_than_a_uniform_schedule_of_that_cost(model: nn.Module, folder: Path, order: int) -> None:
    compiled = moeca.compile(model, schedule="uniform:2", order=order, inner="eager")
    with torch.no_grad():
        uniform = mean_psnr([sample(compiled, s) for s in (0, 1)], [sample(model, s) for s in (0, 1)])
    budget = f"macs:{moeca.stats(compiled).mac_fraction + 1e-6}"
    found = moeca.calibrate(model, sample, budget=budget, order=order, resume=folder, **QUICK)
    assert found.order in (0, order)
    assert uniform <= found.predicted["psnr_db"] + 1e-3


@pytest.mark.slow
def test_a_quality_budget_gives_the_cheapest_schedule_that_holds_it(model: nn.Module, folder: Path) -> None:
    found = moeca.calibrate(model, sample, budget="psnr:45", resume=folder, **QUICK)
    assert found.predicted["psnr_db"] >= 45
    assert found.predicted["mac_fraction"] < 0.6


@pytest.mark.slow
def test_a_latency_budget_is_measured(model: nn.Module, folder: Path) -> None:
    found = moeca.calibrate(model, sample, budget="latency:0.8", resume=folder, **QUICK)
    assert found.predicted["latency_fraction"] <= 0.8
    assert len(found.distinct_rows()) >= 2


def test_budgets_that_cannot_be_kept_say_what_can(model: nn.Module, folder: Path) -> None:
    with pytest.raises(ScheduleError, match=r"nearest that can is macs:0\.\d+ with state:\d+ bytes"):
        moeca.calibrate(model, sample, budget="macs:0.01", resume=folder, **QUICK)
    with pytest.raises(ScheduleError, match="state:"):
        moeca.calibrate(model, sample, budget="macs:0.5,state:10B", resume=folder, **QUICK)


@pytest.mark.slow
def test_where_the_state_is_short_the_whole_stack_is_one_column(model: nn.Module, folder: Path) -> None:
    stack = {**QUICK, "granularity": "auto"}
    every = 2 * 2 * 16 * 32 * 4  # regions, samples, tokens, channels, float32
    found = moeca.calibrate(model, sample, budget=f"macs:0.5,state:{every - 1}B", resume=folder, **stack)
    assert len(found.rows[0]) == 1
    assert found.granularity == "stack"
    with pytest.raises(ScheduleError, match="for granularity='stack'"), torch.no_grad():
        sample(moeca.compile(model, schedule=found, inner="eager"), 0)
    compiled = moeca.compile(model, schedule=found, inner="eager", granularity="stack")
    with torch.no_grad():
        sample(compiled, 0)
    assert moeca.stats(compiled).mac_fraction <= 0.5


def test_an_interrupted_calibration_goes_on(model: nn.Module, tmp_path: Path) -> None:
    calls = count()
    stop_at: list[int] = []

    def stopping(net: nn.Module, seed: int) -> Tensor:
        if stop_at and next(calls) == stop_at[0]:
            raise KeyboardInterrupt
        return sample(net, seed)

    stop_at.append(
        23
    )  # in the middle of the search: 4 first calls, 5 uncached samples, 8 steps tried, 2 seeds measured
    with pytest.raises(KeyboardInterrupt) as stopped:
        moeca.calibrate(model, stopping, budget="macs:0.5", resume=tmp_path, **QUICK)
    assert "the same call goes on" in "".join(stopped.value.__notes__)
    kept = [tmp_path / "region" / name for name in ("rollouts.jsonl", "fitted.jsonl")]
    done = kept[0].read_text().splitlines()
    assert done
    stop_at.clear()
    ran: list[int] = []

    def counting(net: nn.Module, seed: int) -> Tensor:
        samples = sample(net, seed)
        ran.append(seed)  # it wasn't ended at its first call
        return samples

    first = moeca.calibrate(model, counting, budget="macs:0.5", resume=tmp_path, **QUICK)
    after = kept[0].read_text().splitlines()
    assert after[: len(done)] == done
    after += kept[1].read_text().splitlines()
    assert len(after) == len(set(after)), "nothing was rolled out twice"
    # the first seed is sampled twice for the check; drift and the other samples are read
    assert len(ran) == 2 + len(after) - len(done)
    ran.clear()
    again = moeca.calibrate(model, counting, budget="macs:0.5", resume=tmp_path, **QUICK)
    assert len(ran) == 2
    assert again.rows == first.rows


@pytest.mark.slow
def test_a_folder_of_something_else_is_refused(model: nn.Module, folder: Path, found: Schedule) -> None:
    torch.manual_seed(5)
    other = DiT(depth=1).eval()
    with pytest.raises(ScheduleError, match="other samples for seed 0"):
        moeca.calibrate(other, sample, budget="macs:0.5", resume=folder, **QUICK)
    torch.manual_seed(0)
    with pytest.raises(ScheduleError, match="holds the calibration of something else: graph is"):
        moeca.calibrate(DiT(depth=2).eval(), sample, budget="macs:0.5", resume=folder, **QUICK)


@pytest.mark.slow
def test_other_prompts_than_the_kept_ones_are_noticed(model: nn.Module, folder: Path, found: Schedule) -> None:
    """Of any seed, the ones that only the final check sees too."""

    def prompted(label: int, changed: int) -> Any:
        def inner(net: nn.Module, seed: int) -> Tensor:
            return sample(lambda x, t, y: net(x, t, torch.where(y == 2, label, y) if seed == changed else y), seed)

        return inner

    for seed in (1, 1001):
        with pytest.raises(ScheduleError, match=f"a sample of seed {seed} from other inputs"):
            moeca.calibrate(model, prompted(3, seed), budget="macs:0.5", resume=folder, **QUICK)
    assert moeca.calibrate(model, prompted(2, 1), budget="macs:0.5", resume=folder, **QUICK).rows == found.rows


@pytest.mark.slow
def test_numbers_of_seeds_and_a_speedup(model: nn.Module) -> None:
    def drawn(net: nn.Module, seed: int) -> Tensor:
        seeds.add(seed)
        return sample(net, seed)

    seeds: set[int] = set()
    made = moeca.calibrate(model, drawn, budget="speedup:1.25", **{**QUICK, "seeds": 2, "holdout": 1, "effort": 1})
    assert seeds == {0, 1, 1000}
    assert made.predicted["latency_fraction"] <= 0.8


@pytest.mark.slow
def test_bad_samplers_are_refused() -> None:
    model, noise = DiT(depth=1).eval(), count()
    nan_at_one = {0: 1.0, 1: float("nan")}
    some = {key: value for key, value in QUICK.items() if key != "seeds"}
    for sampler, says in (
        (lambda m, seed: sample(m, next(noise)), "two results for one seed"),
        (lambda m, seed: torch.zeros(1), "never called the model"),
        (lambda m, seed: sample(m, 0), "alike"),
        (lambda m, seed: sample(m, seed) * nan_at_one[seed], "seed 1 aren't all finite"),
        (lambda m, seed: sample(m, seed)[: 1 + seed], "different shapes"),
        (lambda m, seed: [sample(m, seed)], "gave a list"),
    ):
        with pytest.raises(ScheduleError, match=says):
            moeca.calibrate(model, sampler, budget="macs:0.5", seeds=(0, 1), **{**some, "holdout": 0})


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"seeds": (1,), "holdout": (1,)}, "both"),
        ({"seeds": ()}, "must not be empty"),
        ({"seeds": (1, 1)}, "a seed twice"),
        ({"max_variants": 1}, "two rows"),
        ({"order": 3}, "expected 0, 1, 2"),
        ({"effort": -1}, "effort"),
        ({"memory": -1}, "memory=-1, expected a whole number of bytes"),
        ({"memory": "1GiB"}, "memory=.1GiB., expected a whole number of bytes"),
        ({"perturb": -1}, "perturb=-1, expected a number of experts"),
        ({"perturb": 1}, "perturb needs resume=FOLDER"),
        ({"data_range": 0.0}, "data_range"),
        ({"budget": "mac:1"}, "expected macs"),
        ({"budget": "2x"}, "did you mean speedup:2"),
        ({"budget": 2}, "budget is 2, expected a text"),
        ({"holdout": ()}, "holdout is empty"),
        ({"seeds": 0}, "must not be empty"),
        ({"seeds": 1001}, "seeds=1001, expected whole numbers, or how many"),
        ({"seeds": -1}, "seeds=-1, expected whole numbers"),
        ({"seeds": True}, "seeds=True, expected whole numbers"),
        ({"seeds": "01"}, "seeds='01', expected whole numbers"),
        ({"seeds": (0, 1.5)}, "expected whole numbers"),
        ({"resume": __file__}, "can't keep a calibration: it is no folder"),
        ({"resume": f"{__file__}/deeper"}, "can't keep a calibration: it is no folder"),
        ({"resume": "a\0b"}, "can't keep a calibration: embedded null"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(request_: dict[str, Any], says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        moeca.calibrate(nn.Identity(), sample, **{"budget": "macs:0.5", **QUICK, **request_})


def test_calibrating_leaves_no_plan_behind_for_an_equal_compile(model: nn.Module, found: Schedule) -> None:
    """Equal options are one compiled graph for torch: it must run its own schedule, not the search's last one."""
    uniform = Schedule.uniform(2, order=2)
    compiled = moeca.compile(model, schedule=uniform, inner="eager", granularity="region")
    with torch.no_grad():
        sample(compiled, 0)
    ran = [record.variant for record in moeca.stats(compiled).steps if record.stream == "0"]
    assert len(set(ran)) == 2
    assert ran == [
        ran[0] if uniform.rows[uniform.row_index(s) or 0][0] is Action.COMPUTE else ran[1] for s in range(STEPS)
    ]


def test_guidance_may_stop_on_the_way(model: nn.Module) -> None:
    """Later steps have a smaller batch, so the second run of the first seed still compiles something."""

    def limited(net: nn.Module, seed: int) -> Tensor:
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for step in range(STEPS):
            t, labels = torch.full((2,), 1000.0 * (1 - step / STEPS)), torch.tensor([1, 2])
            if step < 4:
                both = torch.cat([labels, torch.full_like(labels, 10)])
                cond, uncond = net(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
                x = x - (uncond + 1.5 * (cond - uncond)) / STEPS
            else:
                x = x - net(x, t, labels) / STEPS
        return x

    found = moeca.calibrate(model, limited, budget="macs:0.5", **QUICK)
    assert found.predicted["trajectories"] > 0
