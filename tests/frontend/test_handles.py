"""What belongs to one handle: options as they were read, programs, warnings; and that it all goes with the handle."""

from __future__ import annotations

import functools
import gc
import re
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile import errors
from moeca_compile.engine.program import Program
from moeca_compile.errors import MoecaWarning
from moeca_compile.frontend.entry import ENTRIES
from moeca_compile.frontend.handles import states_of
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Schedule
from tests.sampling import TIMES, compiled, dit, noise, plain, records, run, same

INPUTS = noise(99, 2), torch.full((2,), 500.0), torch.tensor([1, 2])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def variants(model: nn.Module) -> list[str]:
    run(plain(model))
    return [record.variant for record in records(model)]


@functools.cache
def schedule_every(interval: int) -> Schedule:
    """Made for the toy's regions."""
    return moeca.explain(dit(), *INPUTS, schedule=f"uniform:{interval}", inner="eager").schedule


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "door",
    [
        "torch.compile",
        pytest.param("moeca.compile", marks=pytest.mark.slow),
        pytest.param("module.compile", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_schedule_file_that_was_rewritten_is_read_again(door: str, tmp_path: Path) -> None:
    module, path = dit(), str(tmp_path / "schedule.json")
    moeca.prepare(module)

    def handle() -> nn.Module:
        if door == "moeca.compile":
            return moeca.compile(module, schedule=path, inner="eager")
        if door == "module.compile":
            module.compile(backend="moeca", options={"schedule": path, "inner": "eager"})
            return module
        return torch.compile(module, backend="moeca", options={"schedule": path, "inner": "eager"})

    found = []
    for interval in (2, 5):
        schedule_every(interval).save(path)
        found.append(variants(handle()).count("v0"))
    assert found == [5, 2]


@pytest.mark.slow
def test_a_handle_keeps_the_schedule_that_it_read(tmp_path: Path) -> None:
    module, path = dit(), str(tmp_path / "schedule.json")
    schedule_every(2).save(path)
    model = moeca.compile(module, schedule=path, inner="eager")
    Path(path).unlink()
    assert variants(model).count("v0") == 5
    run(plain(model, batch=3), 1)  # another program
    assert moeca.explain(model, *INPUTS).schedule.rows == states_of(model)[0].schedule.rows


@pytest.mark.slow
def test_two_handles_of_one_model_have_their_own_state() -> None:
    module = dit()
    first, second = compiled(module), compiled(module)
    truth = run(plain(first))
    assert same(run(plain(second), 4), truth[:4])
    assert len(records(first)) == len(TIMES)
    assert len(records(second)) == 4
    moeca.reset(second)
    assert moeca.stats(first).state_bytes > 0 == moeca.stats(second).state_bytes


# -- warnings ---------------------------------------------------------------------------------------------------------


def test_a_cause_is_told_once_a_handle_and_counted() -> None:
    """Whatever was told to another handle, and whatever Python's own filter has seen."""
    models = [compiled(dit()) for _ in range(2)]
    for model in models:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("default")
            for _ in range(3):
                with torch.no_grad():
                    model(INPUTS[0], torch.tensor([500.0, float("nan")]), INPUTS[2])
        assert [one.category for one in seen] == [MoecaWarning]
        ((text, count),) = moeca.stats(model).warnings.items()
        assert "a timestep is NaN" in text
        assert count == 3


def test_warnings_name_the_line_that_called_the_model_and_differ_by_cause() -> None:
    warned = Warned()

    def warn() -> None:
        for number in range(3):
            warned.once(f"step {number} is odd")
            warned.once("another", "cause")
            warned.once("other words for it", "cause")

    with pytest.warns(MoecaWarning) as seen:
        warn()
    assert [str(one.message) for one in seen] == ["step 0 is odd", "another"]
    assert {Path(one.filename).name for one in seen} == {Path(__file__).name}
    assert warned.counts == {"step 0 is odd": 3, "another": 6}
    warned.clear()
    with pytest.warns(MoecaWarning, match="step 7"):
        warned.once("step 7 is odd")


def test_a_warning_skips_the_frames_of_libraries_between() -> None:
    """A pipeline of diffusers calls the model: the line of interest is the one that calls the pipeline."""
    library: dict[str, Any] = {"__name__": "diffusers.pipelines.flux", "warned": Warned(), "warn": errors.warn}
    exec(compile("def run():\n    warned.once('odd')\n    warn('even')", "flux.py", "exec"), library)
    generated: dict[str, Any] = {"run": library["run"]}  # as torch makes it: its module has no name
    exec(compile("def call():\n    run()", "<eval_with_key>.0", "exec"), generated)
    with pytest.warns(MoecaWarning) as seen:
        generated["call"]()
    assert [str(one.message) for one in seen] == ["odd", "even"]
    assert {Path(one.filename).name for one in seen} == {Path(__file__).name}


def test_all_warnings_go_through_the_one_that_skips_frames() -> None:
    package = Path(moeca.__file__).parent
    direct = [
        path.name for path in package.rglob("*.py") if re.search(r"warnings\.warn(_explicit)?\(", path.read_text())
    ]
    assert direct == ["errors.py"]


# -- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dynamo_graphs_that_compute_the_same_share_a_program_with_its_state() -> None:
    """A graph of symbolic sizes gives its arguments in another order, numbers first."""
    module = dit()
    moeca.prepare(module)
    model = torch.compile(module, backend="moeca", options={"schedule": "uniform:3", "inner": "eager"})
    before = set(ENTRIES)
    truth = run(plain(model))
    loop = plain(model)
    outputs = run(loop, 4)
    run(plain(compiled(module), batch=3), 1)  # another handle's
    torch._dynamo.reset()  # from here on Dynamo makes another graph
    torch._dynamo.config.assume_static_by_default, was = False, torch._dynamo.config.assume_static_by_default
    try:
        outputs += run(loop)
    finally:
        torch._dynamo.config.assume_static_by_default = was
    assert len(set(ENTRIES) - before) >= 1
    assert same(outputs, truth)
    assert [(record.step, record.cold) for record in records(model)] == [(step, False) for step in range(len(TIMES))]
    assert moeca.stats(model).graphs == 1
    program, *more = states_of(model)[0].runtime.programs.values()
    assert isinstance(program, Program)
    assert not more


class Constant(nn.Module):
    """One tensor of it isn't a weight, and Dynamo takes it for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dit()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = self.inner(x, t, y) * torch.tensor([scale])
        return out


@pytest.mark.slow
def test_graphs_that_differ_in_a_constant_do_not_share() -> None:
    module = Constant().eval().requires_grad_(False)
    model = compiled(module)
    with torch.no_grad():
        for scale in (1.0, 2.0):
            torch.testing.assert_close(model(*INPUTS, scale), module(*INPUTS, scale))


# -- what goes with a handle ------------------------------------------------------------------------------------------


def alive(kind: type) -> int:
    for _ in range(3):  # what a handle held is free only once the handle is collected
        gc.collect()
    return sum(issubclass(type(one), kind) for one in gc.get_objects())


@pytest.mark.usefixtures("own_garbage")
@pytest.mark.parametrize("door", ["moeca.compile", pytest.param("module.compile", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_dropped_models_leave_nothing(door: str) -> None:
    def use() -> weakref.ref[nn.Module]:
        module = dit()
        model = module
        if door == "moeca.compile":
            model = moeca.compile(module, schedule="uniform:3", inner="eager")
        else:
            moeca.prepare(module)
            module.compile(backend="moeca", options={"schedule": "uniform:3", "inner": "eager"})
        run(plain(model), 3)
        return weakref.ref(module)

    models = [use() for _ in range(2)]
    before, entries = (alive(Program), alive(torch.fx.GraphModule)), len(ENTRIES)
    models.append(use())
    assert (alive(Program), alive(torch.fx.GraphModule)) == before
    assert len(ENTRIES) == entries
    assert not any(model() for model in models)


# -- re-entrancy, other threads ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::moeca_compile.errors.MoecaWarning")
def test_a_sampler_may_warm_up_and_explain_inside_calibrate() -> None:
    module, other = dit(), compiled(dit(1))
    seen = []

    def sample(model: nn.Module, seed: int) -> Tensor:
        moeca.warmup(model, *INPUTS)
        seen.append(len(moeca.explain(model, *INPUTS).regions))
        x = noise(seed, 2)
        with torch.no_grad():
            for t in TIMES[:6]:
                x = x - 0.08 * model(x, torch.full((2,), t), INPUTS[2])
            return x + 0 * other(*INPUTS)

    schedule = moeca.calibrate(
        module, sample, budget="macs:0.5", seeds=(0,), holdout=(9,), inner="eager", progress=False, effort=1, order=1,
    )  # fmt: skip
    assert len(schedule.rows) == 6
    assert min(seen) > 0
    assert len(records(other)) > 0  # its calls were its own


@pytest.mark.slow
def test_stats_from_another_thread_work_while_the_model_runs() -> None:
    model, errors, done = compiled(dit()), list[BaseException](), threading.Event()
    run(plain(model), 1)

    def watch() -> None:
        while not done.is_set():
            try:
                str(moeca.stats(model))
            except BaseException as error:
                errors.append(error)
            done.wait(0.001)  # or the model would hardly run

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for batch in (1, 2, 3):
            with moeca.trajectory(model):
                run(plain(model, batch=batch))
    finally:
        done.set()
        thread.join()
    assert not errors
