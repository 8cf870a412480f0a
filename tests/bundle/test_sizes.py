"""One bundle for several resolutions: graphs of their own over the same weights, found by a call's shapes."""

from __future__ import annotations

import copy as copies
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import moeca_compile as moeca
from moeca_compile.engine.step import run_step
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.engine.trajectory_state import TrajectoryState
from moeca_compile.errors import BundleError, LoweringError, MoecaError, OptionError
from moeca_compile.exporting.request import capture
from moeca_compile.lowering.tensorrt.build import build_engines
from moeca_compile.options import Options
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.manifest import MANIFEST, digest_of
from moeca_compile.runtime.bundle.verify import relative_error, verify
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.triton import write_repository
from tests.bundle.conftest import EACH_PROVIDER, Edit, call_of, edit_manifest, named, small_model
from tests.bundle.test_fuzz import mutate_entry
from tests.models import DiT

pytestmark = pytest.mark.slow

SIZES = (8, 4)
MUTATIONS = 100
SCHEDULE = "uniform:2"


@pytest.fixture(scope="module")
def model() -> DiT:
    """It takes any resolution: one learned position for all tokens."""
    model = small_model()
    model.pos = nn.Parameter(model.pos[:, :1].detach(), requires_grad=False)
    return model


@pytest.fixture(scope="module")
def sized(model: DiT, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    first, *others = (call_of(2, size=size) for size in SIZES)
    return moeca.export(
        model, first, SCHEDULE, tmp_path_factory.mktemp("sizes") / "b", other_sizes=others,
        targets=("onnx", "openvino"),
    )  # fmt: skip


@pytest.fixture(scope="module", params=EACH_PROVIDER)
def session(sized: Bundle, request: pytest.FixtureRequest) -> Session:
    return Session.open(sized.path, request.param, threads=1)


@pytest.mark.parametrize("size", SIZES)
def test_a_trajectory_at_each_size_equals_torch(session: Session, model: DiT, size: int) -> None:
    side = capture(model, call_of(3, size=size), Options(schedule=SCHEDULE, inner="eager"))
    places = {one.name: i for i, one in enumerate(side.inputs)}
    torch_trajectory = Trajectory([], stream="test")
    running = TrajectoryState(torch_trajectory)
    with session.trajectory() as trajectory:
        for step in range(6):
            call, args = call_of(3, seed=step, size=size), list(side.args)
            for name, one in zip("xty", call, strict=True):
                args[places[name]] = one
            (wanted,) = run_step(side.program.compiled_schedule, running, args, torch_trajectory)
            assert relative_error(trajectory.run(named(call))["output"], wanted) < 1e-4
        stats = trajectory.stats()
    records = running.records
    assert [one.variant for one in stats.steps] == [one.variant for one in records]
    assert stats.mac_fraction == pytest.approx(sum(one.macs for one in records) / (6 * records[0].macs))
    assert stats.state_bytes == sum(slot.bytes for slot in side.program.layout)


def test_sizes_interleave_and_calls_by_themselves_too(session: Session, model: DiT) -> None:
    def outputs(size: int) -> list[Any]:
        with session.trajectory() as one:
            return [one.run(named(call_of(2, seed=seed, size=size)))["output"] for seed in range(4)]

    alone = [outputs(size) for size in SIZES]
    open_ones = [session.trajectory() for _ in SIZES]
    for seed in range(4):
        for i, size in enumerate(SIZES):
            call = call_of(2, seed=seed, size=size)
            assert (open_ones[i].run(named(call))["output"] == alone[i][seed]).all()
            assert relative_error(session.run(named(call))["output"], model(*call)) < 1e-4


def test_a_trajectory_keeps_its_size_until_it_is_reset(session: Session) -> None:
    small, large = (named(call_of(2, size=size)) for size in (4, 8))
    with session.trajectory() as trajectory:
        wanted = trajectory.run(small)["output"]
        with pytest.raises(BundleError, match=r"x has shape \[2, 4, 8, 8\], the model takes x: .* 4, 4\]"):
            trajectory.run(large)
        assert len(trajectory.records) == 1
        trajectory.reset()
        assert trajectory.run(large)["output"].shape == (2, 4, 8, 8)
        trajectory.reset()
        assert (trajectory.run(small)["output"] == wanted).all()


def test_a_size_that_it_has_not(session: Session) -> None:
    says = r"shapes x \[2, 4, 6, 6\], .* exported for x: float32 \[batch, 4, 8, 8\].*; or .*4, 4\]"
    with pytest.raises(BundleError, match=says):
        session.run(named(call_of(2, size=6)))
    with session.trajectory() as trajectory, pytest.raises(BundleError, match=says):
        trajectory.run(named(call_of(2, size=6)))
    with pytest.raises(BundleError, match="x has dtype float64"):
        session.run({**named(call_of(2, size=4)), "x": np.zeros((2, 4, 4, 4))})


def test_the_weights_are_there_once(sized: Bundle, model: DiT) -> None:
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    sizes = {name: file.bytes for name, file in sized.manifest.files.items()}
    assert 0.95 * weights < sizes["weights.bin"] <= 1.02 * weights
    assert {file.name for file in sized.path.iterdir()} == {*sizes, "manifest.json"}
    assert [len(one.graphs) for one in (sized, *sized.sizes)] == [2, 2]


def test_each_size_has_its_own_prologue(sized: Bundle) -> None:
    assert {"prologue_step.onnx", "size_1_prologue_step.onnx"} <= set(sized.manifest.files)


def test_all_sizes_are_verified(session: Session, sized: Bundle) -> None:
    verdict = verify(session)
    assert verdict.passed
    assert len(verdict.errors) == sum(len(one.golden()[0]) for one in (sized, *sized.sizes))


@pytest.mark.slow
def test_batches_as_sizes(model: DiT, tmp_path: Path) -> None:
    bundle = moeca.export(
        model, call_of(1, size=4), "full", tmp_path / "b", other_sizes=[call_of(4, size=4)], dynamic_batch=False
    )
    session = Session.open(bundle.path, threads=1)
    for batch in (1, 4):
        call = call_of(batch, seed=3, size=4)
        assert relative_error(session.run(named(call))["output"], model(*call)) < 1e-4
    with pytest.raises(BundleError, match="the bundle was exported for"):
        session.run(named(call_of(2, size=4)))


EDITS: dict[str, tuple[Edit, str]] = {
    "a size too few": (lambda d: d["sizes"].pop(), "missing or too many"),
    "one size twice": (lambda d: d["sizes"].append(d["sizes"][0]), "two sizes are the same"),
    "the first size twice": (lambda d: d["sizes"][0].update(inputs=d["inputs"]), "two sizes are the same"),
    "another row": (lambda d: d["sizes"][0]["variants"][0].update(row="FF"), "two variants have the same row"),
    "a file of another size": (lambda d: d["sizes"][0]["variants"][0].update(file="v0.onnx"), "missing or too many"),
    "another input": (lambda d: d["sizes"][0]["inputs"][0].update(name="z"), "takes unknown inputs"),
    "another dtype": (lambda d: d["sizes"][0]["outputs"][0].update(dtype="float16"), "other names or dtypes"),
    "another shape": (lambda d: d["sizes"][0]["inputs"][0].update(shape=["batch", 4, 5, 5]), "x is float32"),
    "a fused graph": (
        lambda d: d.update(fused={"file": "fused.onnx", "steps": None}),
        "prologues are for bundles whose variants run one",
    ),
    "an unknown entry": (lambda d: d["sizes"][0].update(files={}), "unknown field `files` - at"),
}


@pytest.mark.parametrize("what", EDITS)
def test_spoiled_sizes(what: str, sized: Bundle, tmp_path: Path) -> None:
    edit, says = EDITS[what]
    shutil.copytree(sized.path, tmp_path / "copy")
    edit_manifest(tmp_path / "copy", edit)
    with pytest.raises(BundleError, match=says):
        Session.open(tmp_path / "copy", threads=1)


def test_a_missing_graph_of_a_further_size(sized: Bundle, tmp_path: Path) -> None:
    shutil.copytree(sized.path, tmp_path / "copy")
    (tmp_path / "copy" / "size_1_v1.onnx").unlink()
    with pytest.raises(BundleError, match=r"size_1_v1\.onnx is missing"):
        Session.open(tmp_path / "copy")


def test_mutated_sizes(sized: Bundle, tmp_path: Path) -> None:
    """A clean error, or the result that the bundle gave before."""

    def result(folder: Path) -> list[bytes]:
        session = Session.open(folder, threads=1)
        return [session.run(named(call_of(2, size=size)))["output"].tobytes() for size in SIZES]

    dice, wanted, refused = random.Random(4), result(sized.path), 0
    folder = tmp_path / "copy"
    shutil.copytree(sized.path, folder)
    original = json.loads((folder / MANIFEST).read_text())
    for _ in range(MUTATIONS):
        data = copies.deepcopy(original)
        mutate_entry(data["sizes"], dice)
        data["digest"] = digest_of(data)
        (folder / MANIFEST).write_text(json.dumps(data))
        try:
            assert result(folder) == wanted
        except MoecaError:
            refused += 1
    assert MUTATIONS / 2 < refused < MUTATIONS


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"fused": True}, r"fused\.onnx is of one size"),
        ({"targets": ("tensorrt",)}, "engines .* are of one size"),
        ({"other_sizes": [32]}, "a list of example inputs"),
        ({"other_sizes": {"x": 1}}, "a list of example inputs"),
    ],
)
def test_wrong_requests(wrong: dict[str, Any], says: str, model: DiT, tmp_path: Path) -> None:
    request = {"other_sizes": [call_of(2, size=4)], **wrong}
    with pytest.raises(OptionError, match=says):
        moeca.export(model, call_of(2), "full", tmp_path / "b", **request)
    assert list(tmp_path.iterdir()) == []


def test_the_same_size_again_is_refused(model: DiT, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the same sizes twice, but for the batch"):
        moeca.export(model, call_of(2, size=4), "full", tmp_path / "b", other_sizes=[call_of(3, size=4)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_model_that_is_another_one_at_another_size(model: DiT, tmp_path: Path) -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            out = self.inner(x, t, y)
            return (out, out * 2) if x.shape[-1] > 4 else (out,)

    with pytest.raises(LoweringError, match=r"other_sizes\[0\]: the model has other regions, inputs or outputs"):
        moeca.export(
            Grows().eval(), call_of(2, size=4), "full", tmp_path / "b", other_sizes=[call_of(2)], dynamic_batch=False
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [build_engines, lambda bundle: write_repository(bundle, bundle.path.parent / "r")])
def test_what_has_one_size_only_refuses_it(write: Callable[[Bundle], Any], sized: Bundle) -> None:
    with pytest.raises(MoecaError, match="a bundle for each"):
        write(sized)
    assert not (sized.path.parent / "r").exists()
