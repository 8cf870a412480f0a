"""Weights that only prologues read: freed once their values are computed, with the same results, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moeca_compile as moeca
from moeca_compile.engine.freeing import weights
from moeca_compile.errors import MoecaWarning, OptionError, StateError
from tests.sampling import TIMES, cfg_calls, compiled, dit, plain, run, same


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of memory that the parameters hold, as a user sees them between calls."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def planned(model: Any, loop: Any = plain, times: Any = TIMES, **keywords: Any) -> list[torch.Tensor]:
    with moeca.trajectory(model, timesteps=times):
        return run(loop(model, times=times, **keywords))


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the CPU for a device beside the host."""
    monkeypatch.setattr(weights, "needs_device_sync", lambda value: True)


@pytest.mark.parametrize("loop", [plain, pytest.param(cfg_calls, marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", [pytest.param("full", marks=pytest.mark.slow), "uniform:3"])
def test_dropped_weights_leave_memory_and_the_results_are_the_same(schedule: str, loop: Any) -> None:
    module, other = dit(), dit()
    model = compiled(module, schedule=schedule, free_hoisted="drop")
    expected = planned(compiled(other, schedule=schedule), loop)
    before = parameter_bytes(module)
    assert same(planned(model, loop), expected)
    freed = moeca.stats(model).freed_bytes
    assert freed > 0.1 * before
    assert parameter_bytes(module) <= before - freed
    assert f"{freed / 2**20:.2f} MiB of weights freed" in str(moeca.stats(model))
    assert same(planned(model, loop), expected), "the stored values serve the next trajectory"


def test_explain_tells_the_bytes_that_are_freed() -> None:
    module = dit()
    model, before = compiled(module, free_hoisted="drop"), parameter_bytes(module)
    planned(model)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 500.0]), torch.tensor([1, 2])
    report = moeca.explain(compiled(dit()), *inputs)
    assert before - parameter_bytes(module) == report.hoisted_weight_bytes
    largest = report.hoisted_weight_bytes - moeca.stats(model).freed_bytes
    assert largest in {p.numel() * p.element_size() for p in dit().parameters()}, "stand-ins lie in as much memory"


@pytest.mark.slow
def test_few_steps_without_cache_free_too() -> None:
    model, times = compiled(dit(), schedule="full", free_hoisted="drop"), (1000.0, 750.0, 500.0, 250.0)
    assert same(planned(model, times=times), planned(compiled(dit(), schedule="full"), times=times))
    assert moeca.stats(model).freed_bytes


def test_without_declared_timesteps_the_second_trajectory_frees() -> None:
    model = compiled(dit(), free_hoisted="drop")
    first = run(plain(model))
    assert moeca.stats(model).freed_bytes == 0
    assert same(run(plain(model)), first)
    assert moeca.stats(model).freed_bytes
    assert same(run(plain(model)), first)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: planned(model, label=5),
        lambda model: planned(model, times=[t - 7.0 for t in TIMES]),
        pytest.param(lambda model: planned(model, batch=3), marks=pytest.mark.slow),
    ],
    ids=["another label", "other timesteps", "another batch"],
)
def test_what_needs_dropped_weights_is_refused(call: Any) -> None:
    model = compiled(dit(), free_hoisted="drop")
    planned(model)
    with pytest.raises(StateError, match="needs a weight of shape"):
        call(model)
    assert planned(model), "the plan still runs"


def test_a_model_without_its_weights_is_not_exported_saved_or_compiled_again(tmp_path: Path) -> None:
    module = dit()
    model = compiled(module, free_hoisted="drop")
    planned(model)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 500.0]), torch.tensor([1, 2])
    for call in (
        lambda: moeca.export(model, inputs, "uniform:3", tmp_path / "bundle"),
        lambda: moeca.export(module, inputs, "uniform:3", tmp_path / "bundle"),
        lambda: moeca.save(model, tmp_path / "package", *inputs),
        lambda: moeca.compile(module, schedule="full"),
    ):
        with pytest.raises(StateError, match="was dropped, so the model has no state dict, and can't be compiled"):
            call()
    assert not list(tmp_path.iterdir())
    assert planned(model), "the plan still runs"


@pytest.mark.parametrize("assign", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_weights_that_are_loaded_again_are_there(assign: bool) -> None:
    module = dit()
    model = compiled(module, free_hoisted="drop")
    planned(model)
    module.load_state_dict(dit().state_dict(), assign=assign)
    assert module.state_dict().keys() == dit().state_dict().keys()
    moeca.prepare(module)
    assert same(planned(model, label=5), planned(compiled(dit()), label=5)), "what dropped weights couldn't compute"


def test_a_model_without_its_weights_has_no_state_dict() -> None:
    module = dit()
    model = compiled(module, free_hoisted="drop")
    planned(model)
    with pytest.raises(StateError, match="dropped"):
        module.state_dict()
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 4, 8, 8), torch.tensor([500.0, 500.0]), torch.tensor([1, 2]))


@pytest.mark.slow
def test_weights_on_the_host_serve_another_conditioning_and_other_timesteps(on_device: None) -> None:
    module = dit()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    model, other = compiled(module, free_hoisted=True), compiled(dit())
    assert same(planned(model), planned(other))
    assert moeca.stats(model).freed_bytes
    for keywords in ({"label": 5}, {"times": [t - 7.0 for t in TIMES]}, {"batch": 3}, {}):
        assert same(planned(model, **keywords), planned(other, **keywords))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.slow
def test_a_weight_on_the_host_that_is_written_to_counts(on_device: None) -> None:
    module, other = dit(), dit()
    model = compiled(module, free_hoisted="host")
    planned(model)
    for target in (module, other):
        for weight in target.parameters():
            weight.mul_(1.5)
    assert same(planned(model), planned(compiled(other)))
    module.load_state_dict(dit().state_dict())
    assert same(planned(model), planned(compiled(dit())))


@pytest.mark.slow
def test_a_weight_that_is_replaced_is_not_freed_any_more(on_device: None) -> None:
    module = dit()
    model = compiled(module, free_hoisted="host")
    planned(model)
    freed = moeca.stats(model).freed_bytes
    for weight in module.parameters():
        weight.data = weight.data.clone()
    assert same(planned(model), planned(compiled(dit())))
    assert moeca.stats(model).freed_bytes == freed, "they are freed again"


@pytest.mark.slow
def test_weights_come_back_when_the_handle_goes(on_device: None) -> None:
    module = dit()
    model = compiled(module, free_hoisted="host")
    expected = planned(model)
    del model
    assert same(planned(compiled(module)), expected)


def test_on_the_host_nothing_is_moved_to_the_host() -> None:
    model = compiled(dit(), free_hoisted="host")
    with pytest.warns(MoecaWarning, match="in the host's memory already"):
        planned(model)
    assert moeca.stats(model).freed_bytes == 0


@pytest.mark.slow
def test_values_that_change_from_step_to_step_free_nothing() -> None:
    model = compiled(dit(), free_hoisted="drop")
    with pytest.warns(MoecaWarning, match="weren't computed beforehand"), moeca.trajectory(model, timesteps=TIMES):
        run(plain(model, times=[t - 7.0 for t in TIMES]))
    assert moeca.stats(model).freed_bytes == 0


@pytest.mark.slow
def test_where_nothing_can_be_hoisted_nothing_is_freed() -> None:
    model = compiled(dit(), free_hoisted="drop", disable=("hoist_step_only", "hoist_invariant"))
    with pytest.warns(MoecaWarning, match="each weight is read by the steps themselves"):
        planned(model)


@pytest.mark.parametrize("mode", ["gpu", 1, None])
def test_another_place_is_refused(mode: Any) -> None:
    with pytest.raises(OptionError, match="expected False, True, 'host' or 'drop'"):
        moeca.compile(dit(), free_hoisted=mode)


def test_without_a_graph_it_is_refused() -> None:
    with pytest.raises(OptionError, match="free_hoisted is for captured graphs"):
        moeca.compile(dit(), free_hoisted=True, granularity="output")
