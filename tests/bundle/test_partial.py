"""Rows that recompute parts of regions, in a bundle: what torch makes of them, on every runtime."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moeca_compile as moeca
from examples import digits
from moeca_compile.errors import BundleError, LoweringError, MoecaError
from moeca_compile.lowering.tensorrt.operators import refuse_unsupported
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.graphs import graph_of, nodes_of
from moeca_compile.runtime.bundle.verify import relative_error
from moeca_compile.runtime.session import Session
from moeca_compile.schedule import Action, Control, Partial, Row, Schedule
from moeca_compile.schedule.fitted import FittedWeights
from tests.bundle.conftest import EACH_PROVIDER, PROVIDERS, Edit, as_model, call_of, edit_manifest, named, small_model
from tests.bundle.test_fuzz import mutate_entry
from tests.bundle.test_output import psnr

pytestmark = pytest.mark.slow

STEPS = 9
KEYS = ("blocks.0", "blocks.0.moe")
C, R, F = Action.COMPUTE, Action.REUSE, Action.FORECAST
TABLES = {"blocks.0.moe": (1.0, 0.5, 2.0, 1.0)}
QUOTA = {"blocks.0.moe": (0.5, 0.25, 0.125, 0.125)}
# tokens and branches by how far their input moved; branches by their error, with the shared expert, and order 2
BY_DRIFT = Schedule(
    ((C, C), (C, C), (Partial(0.25), Partial(0.25, 0.2)), (F, Partial(0, 0.3)), (R, F)), KEYS, period=4,
    control=Control("drift"),
)  # fmt: skip
BY_ERROR = Schedule(
    ((C, C), (C, C), (Partial(0.25), Partial(0.25, 0.2)), (F, Partial(0, 0.3, shared=True))), KEYS, order=2, period=3,
    control=Control("error", sensitivity=TABLES, threshold=TABLES, quota=QUOTA),
)  # fmt: skip


def sample(model: Any, batch: int = 2) -> list[Any]:
    """What the model gives at each step of an Euler run, and the last latent."""
    x, t, y = (one.numpy() for one in call_of(batch))
    outputs = []
    for step in range(STEPS):
        outputs.append(np.asarray(model({"x": x, "t": t - np.float32(20 * step), "y": y})))
        x = x - outputs[-1] / STEPS
    return [*outputs, x]


def in_torch(schedule: Schedule, batch: int = 2) -> list[Any]:
    handle = moeca.compile(small_model(), schedule=schedule, inner="eager")

    def call(inputs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return handle(*(torch.from_numpy(inputs[name]) for name in "xty")).numpy()

    return sample(call, batch)


def exported(schedule: Schedule, path: Path, dynamic_batch: bool) -> Bundle:
    targets = ("onnx", "openvino")
    return moeca.export(small_model(), call_of(2), schedule, path, targets=targets, dynamic_batch=dynamic_batch)


@pytest.fixture(scope="module")
def by_drift(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(BY_DRIFT, tmp_path_factory.mktemp("drift") / "b", False)


@pytest.fixture(scope="module")
def by_error(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(BY_ERROR, tmp_path_factory.mktemp("error") / "b", True)


def check_run(bundle: Bundle, provider: str, expected: list[Any], batch: int = 2) -> None:
    """Each step to 1e-4, the last latent to 60 dB; every variant runs."""
    with Session.open(bundle.path, provider, threads=1).trajectory(steps=STEPS) as trajectory:
        found = sample(lambda inputs: trajectory.run(inputs)["output"], batch)
        assert len({record.variant for record in trajectory.records}) == len(bundle.manifest.variants)
    for result, reference in zip(found, expected, strict=True):
        assert relative_error(result, reference) < 1e-4
    assert psnr(torch.from_numpy(found[-1]), torch.from_numpy(expected[-1])) > 60


@pytest.mark.parametrize("provider", EACH_PROVIDER)
def test_tokens_and_branches_by_drift(provider: str, by_drift: Bundle) -> None:
    check_run(by_drift, provider, in_torch(BY_DRIFT))


@pytest.mark.slow
@pytest.mark.parametrize("provider", EACH_PROVIDER)
def test_branches_by_error_with_tables(provider: str, by_error: Bundle) -> None:
    check_run(by_error, provider, in_torch(BY_ERROR))


@pytest.mark.slow
def test_branches_that_are_kept_in_16_bits(tmp_path: Path) -> None:
    schedule = replace(BY_ERROR, control=Control(kept="bfloat16"))
    bundle = moeca.export(small_model(), call_of(2), schedule, tmp_path / "b", targets=("onnx",))
    with Session.open(bundle.path, "CPUExecutionProvider", threads=1).trajectory(steps=STEPS) as trajectory:
        found = sample(lambda inputs: trajectory.run(inputs)["output"])
    for result, reference in zip(found, in_torch(schedule), strict=True):
        assert relative_error(result, reference) < 1e-2  # where a sum differs in its last bit, it may round apart


@pytest.mark.slow
def test_a_batch_that_was_not_captured(by_error: Bundle) -> None:
    check_run(by_error, "CPUExecutionProvider", in_torch(BY_ERROR, 5), 5)


@pytest.mark.parametrize("provider", EACH_PROVIDER)
def test_a_call_outside_a_trajectory_is_the_model_s(provider: str, by_drift: Bundle) -> None:
    session = Session.open(by_drift.path, provider, threads=1)
    expected = small_model()(*call_of(2))
    assert relative_error(session.run(named(call_of(2)))["output"], expected.numpy()) < 1e-4


def test_what_the_graphs_are_made_of(by_drift: Bundle) -> None:
    """The choice of branches is one TopK beside the router's; experts run on the rows that it gathers."""
    counts = [Counter(node.op_type for node in nodes_of(graph_of(raw))) for raw in by_drift.graphs]
    assert [count["TopK"] for count in counts] == [1, 4, 2, 1]  # router; tokens, their order, branches
    assert [count["NonZero"] for count in counts] == [4, 4, 4, 0]
    assert [count["Conv"] for count in counts] == [1, 1, 1, 1]
    assert [(count["MatMul"], count["Gemm"]) for count in counts] == [(8, 13), (8, 13), (1, 13), (1, 1)]
    assert all(node.domain == "" for raw in by_drift.graphs for node in nodes_of(graph_of(raw)))
    assert [count["Softmax"] for count in counts] == [2, 2, 1, 1]  # router; attention
    assert [variant.row for variant in by_drift.manifest.variants] == ["CC", "ab", "Fc", "RF"]
    assert [variant.now for variant in by_drift.manifest.variants] == [True] * 4


@pytest.mark.slow
def test_thresholds_are_not_for_tensorrt(by_error: Bundle, by_drift: Bundle) -> None:
    refuse_unsupported(by_drift.graphs[3], "v3.onnx")
    with pytest.raises(LoweringError, match=r"v2.onnx .* ScatterElements that reduces .* export a schedule without"):
        refuse_unsupported(by_error.graphs[2], "v2.onnx")


def state(number: int, **change: Any) -> Edit:
    return lambda data: data["state"][number].update(change)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (state(0, slot="held"), "state and schedule differ"),
        (state(1, slot="error"), "state and schedule differ"),
        (state(0, slot="drifts"), r"matching regex .* at `\$\.state\[0\]\.slot`"),
        (state(0, region=1), "state and schedule differ"),
        (lambda data: data["state"].pop(), "state and schedule differ"),
        (lambda data: data["variants"][1].update(row="ba"), "the variants aren't the schedule's rows"),
        (lambda data: data["variants"][1]["writes"].pop(), "doesn't write what its row computes"),
        (lambda data: data["variants"][3]["writes"].append("state_000"), "doesn't write what its row computes"),
        (lambda data: data["variants"][1].pop("now"), "has the inputs"),
    ],
)
def test_manifests_that_lie(edit: Edit, says: str, by_drift: Bundle, tmp_path: Path) -> None:
    shutil.copytree(by_drift.path, tmp_path / "b")
    edit_manifest(tmp_path / "b", edit)
    with pytest.raises(BundleError, match=says):
        Session.open(tmp_path / "b")


def test_states_of_equal_shape_swapped(by_drift: Bundle, tmp_path: Path) -> None:
    """A manifest that feeds one state in the place of another, with checksums that fit."""
    shutil.copytree(by_drift.path, tmp_path / "b")

    def swap(data: dict[str, Any]) -> None:
        data["state"][0]["slot"], data["state"][2]["slot"] = data["state"][2]["slot"], data["state"][0]["slot"]

    edit_manifest(tmp_path / "b", swap)
    with pytest.raises(BundleError, match="state and schedule differ"):
        Bundle.open(tmp_path / "b")


def test_mutated_manifests(by_drift: Bundle, tmp_path: Path) -> None:
    """Sealed again: refused, or the same bits."""
    dice, folder = random.Random(0), tmp_path / "b"
    shutil.copytree(by_drift.path, folder)
    original = json.loads((folder / "manifest.json").read_text())
    expected = [array.tobytes() for array in _run(folder)]
    refused = 0
    for _ in range(60):
        (folder / "manifest.json").write_text(json.dumps(original))
        edit_manifest(folder, lambda data: mutate_entry(data, dice))
        try:
            assert [array.tobytes() for array in _run(folder)] == expected
        except MoecaError:
            refused += 1
    assert refused > 30


def _run(folder: Path) -> list[Any]:
    with Session.open(folder, threads=1).trajectory() as trajectory:
        return [trajectory.run(named(call_of(2, seed=step)))["output"] for step in range(4)]


# -- the digits model -------------------------------------------------------------------------------------------------


def mixed() -> Schedule:
    """Full steps, attention alone, branches alone, and cached ones; the attentions' forecasts are fitted."""
    branches, attention = (F, Partial(0, 0.05)) * 6, (C, F) * 6
    cycle = ((C, C) * 6, branches, attention, branches, (F, F) * 6)
    rows = tuple(cycle[0] if step < 3 else cycle[step % 5] for step in range(50))
    weights, computed = [], list[int]()
    for step, row in enumerate(rows):
        weights.append(_damped(row, step, computed))
        computed += [step] if row[0] is C else []
    keys = tuple(f"blocks.{block}.{part}" for block in range(6) for part in ("attn", "moe"))
    times = tuple(1000.0 - 20 * step for step in range(50))
    return Schedule(rows, keys, timesteps=times, fitted=FittedWeights(tuple(weights)))


def _damped(row: Row, step: int, computed: list[int]) -> tuple[tuple[float, ...], ...]:
    """Nine tenths of the line's slope, for the attentions that are forecast."""
    if row[0] is not F or len(computed) < 2:
        return ((),) * len(row)
    ahead = 0.9 * (step - computed[-1]) / (computed[-1] - computed[-2])
    return ((1 + ahead, -ahead), ()) * (len(row) // 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_mixed_schedule_of_the_digits_model(tmp_path: Path) -> None:
    model = digits.load_model()
    call = (digits.initial_noise(0, 8), torch.full((8,), 500.0), digits.labels_of(8))
    bundle = moeca.export(model, call, mixed(), tmp_path / "b", targets=("onnx", "openvino"))
    assert [measured.relative_error < 1e-4 for measured in bundle.manifest.golden.measured] == [True, True]

    def sampled(one: Callable[..., Any]) -> torch.Tensor:
        with torch.no_grad():
            return digits.sample(one, 3, 4)

    uncached, cached = sampled(model), sampled(moeca.compile(model, schedule=mixed(), inner="eager"))
    for provider in PROVIDERS:
        with Session.open(bundle.path, provider, threads=1).trajectory(steps=50) as trajectory:
            found = sampled(as_model(trajectory))
        assert psnr(found, cached) > 60
        assert abs(psnr(found, uncached) - psnr(cached, uncached)) < 0.1


@pytest.mark.slow
def test_a_manifest_of_version_3_opens(tmp_path: Path) -> None:
    """Its entries are those of version 4 without what came since; whole-region bundles had no other."""
    whole = moeca.export(small_model(), call_of(2), "uniform:2", tmp_path / "b", dynamic_batch=False)
    edit_manifest(whole.path, lambda data: data.update(version=3))
    assert json.loads((whole.path / "manifest.json").read_text())["version"] == 3
    assert Session.open(whole.path).run(named(call_of(2)))
