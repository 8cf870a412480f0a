"""What an export writes equals torch, whatever the batch and whichever experts the example hit."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
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
from moeca_compile.errors import BundleError, CaptureError, LoweringError, MoecaError, MoecaWarning, OptionError
from moeca_compile.exporting import entry, write
from moeca_compile.exporting.lower import Lowered
from moeca_compile.exporting.request import Captured
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.fused import FusedSession
from moeca_compile.runtime.bundle.verify import relative_error, verify
from moeca_compile.runtime.session import Session
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.action import Partial
from moeca_compile.schedule.forecast import MAX_KEPT
from tests.bundle.conftest import PROVIDERS, call_of, named, small_model
from tests.models import DiT


def test_every_variant_equals_torch(session: Session, torch_side: Captured) -> None:
    program = torch_side.program
    generator = torch.Generator().manual_seed(1)
    assert len(program.schedule.distinct_rows()) == len(session.variants) == 4
    for row in program.schedule.distinct_rows():
        variant, loaded = program.variant(row), session.variant_of(row)
        args = list(torch_side.args)
        feeds = named(call_of(4, seed=7))
        for i, one in enumerate(torch_side.inputs):
            if one.name in feeds:
                args[i] = torch.from_numpy(feeds[one.name])
        state = {s: torch.randn(program.layout[s].shape, generator=generator) for s in variant.reads}
        table = torch.randn(2, MAX_KEPT, generator=generator)
        flat = [*(args[i] for i in variant.takes), *state.values(), *([table] if variant.wants_coefficients else [])]
        wanted = torch.fx.Interpreter(variant.gm).run(*flat)
        feeds |= {f"{program.layout[s].name}_in": one.numpy() for s, one in state.items()}
        found = loaded.run({**feeds, "coefficients": table.numpy()})
        assert len(found) == len(wanted)
        assert max(relative_error(session.runtime.numpy(a), b) for a, b in zip(found, wanted, strict=True)) < 1e-4


def test_a_trajectory_equals_torch(session: Session, torch_side: Captured) -> None:
    """State, its rotation and the coefficients: ten steps in both, at a batch that no graph was captured at."""
    torch_trajectory = Trajectory([], stream="test")
    running = TrajectoryState(torch_trajectory)
    places = {one.name: i for i, one in enumerate(torch_side.inputs)}
    ran = []
    with session.trajectory() as trajectory:
        for step in range(10):
            call = call_of(4, seed=step)
            args = list(torch_side.args)
            for name, one in zip("xty", call, strict=True):
                args[places[name]] = one
            (wanted,) = run_step(torch_side.program.compiled_schedule, running, args, torch_trajectory)
            assert relative_error(trajectory.run(named(call))["output"], wanted) < 1e-4
        ran = [record.variant for record in trajectory.records]
        stats = trajectory.stats()
    records = running.records
    assert ran == [record.variant for record in records]
    assert stats.mac_fraction == pytest.approx(sum(r.macs for r in records) / (10 * records[0].macs))
    assert stats.state_bytes == sum(slot.bytes for slot in torch_side.program.layout)


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_any_batch(session: Session, model: DiT, batch: int) -> None:
    call = call_of(batch, seed=3)
    assert relative_error(session.run(named(call))["output"], model(*call)) < 1e-4


@pytest.mark.slow
def test_experts_that_the_example_does_not_hit(tmp_path: Path) -> None:
    """One token a sample and eight experts: the example's two samples hit half of them at most."""
    model = small_model(size=2, num_experts=8)
    moeca.export(model, call_of(2, size=2), "full", tmp_path / "sparse", dynamic_batch=False)
    session = Session.open(tmp_path / "sparse", threads=1)
    hit: set[int] = set()
    model.blocks[0].moe.router.register_forward_hook(
        lambda module, args, scores: hit.update(scores.topk(2)[1].flatten().tolist())
    )
    model(*call_of(2, size=2))
    of_the_example = set(hit)
    assert len(of_the_example) <= 4
    for seed in range(20):
        call = call_of(2, seed=seed, size=2)
        wanted = model(*call)
        assert relative_error(session.run(named(call))["output"], wanted) < 1e-4
    assert hit - of_the_example


@pytest.mark.slow
def test_the_targets_decide_the_form_of_the_experts(tmp_path: Path, model: DiT) -> None:
    with pytest.warns(MoecaWarning, match="here 'dense': onnx would run 'segments' faster"):
        bundle = moeca.export(
            model, call_of(2), "full", tmp_path / "b", targets=("onnx", "tensorrt"), dynamic_batch=False
        )
    assert bundle.manifest.expert_lowering == "dense"
    assert bundle.manifest.targets == ("onnx", "tensorrt")
    assert b"NonZero" not in bundle.graphs[0]
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    assert bundle.manifest.files["weights.bin"].bytes <= 1.02 * weights
    with pytest.raises(LoweringError, match="runs dense, capacity only"):
        moeca.export(model, call_of(2), "full", tmp_path / "no", targets=("tensorrt",), experts="segments")


@pytest.mark.slow
def test_a_capacity_is_exact_or_says_what_it_left_out(tmp_path: Path) -> None:
    model = small_model(hidden=16)
    with pytest.raises(LoweringError, match="branches of the golden steps find"):
        moeca.export(model, call_of(2), "full", tmp_path / "no", experts="capacity:0.3", dynamic_batch=False)
    bundle = moeca.export(model, call_of(2), "uniform:2", tmp_path / "b", experts="capacity:1.75", dynamic_batch=False)
    assert bundle.manifest.expert_lowering == "capacity:1.75"
    session = Session.open(bundle.path, threads=1)
    call = call_of(2, seed=2)
    assert relative_error(session.run(named(call))["output"], model(*call)) < 1e-4
    same = named(call_of(2)) | {"x": np.full((2, 4, 8, 8), 99, np.float32)}  # all tokens want the same experts
    with pytest.warns(MoecaWarning, match=r"this call left out \d+ branches"):
        session.run(same)
    with session.trajectory() as trajectory:
        with pytest.warns(MoecaWarning, match=r"step 0 left out \d+ branches.*larger capacity"):
            trajectory.run(same)
        trajectory.run(same)  # a forecast: no experts in it
        assert [bool(record.dropped) for record in trajectory.records] == [True, False]


def test_weights_are_on_disk_once(exported: Bundle, model: DiT) -> None:
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    sizes = {name: file.bytes for name, file in exported.manifest.files.items()}
    graphs = sum(size for name, size in sizes.items() if name.endswith(".onnx"))
    assert sizes["weights.bin"] <= 1.02 * weights
    # all but the smallest tensors are outside the graphs
    assert sizes["weights.bin"] > 0.95 * weights
    assert {file.name for file in exported.path.iterdir()} == {*sizes, "manifest.json"}
    assert graphs < 200_000


def test_the_bundle_says_nothing_of_this_machine(exported: Bundle) -> None:
    here = str(Path(__file__).parents[2]).encode()
    for file in exported.path.iterdir():
        assert here not in file.read_bytes(), file.name


def test_it_is_verified_and_says_so(session: Session, exported: Bundle) -> None:
    verdict = verify(session)
    assert verdict.passed
    assert set(verdict.variants) == {one.name for one in exported.manifest.variants}
    measured = {run.provider: run.relative_error for run in exported.manifest.golden.measured}
    assert list(measured) == list(PROVIDERS)
    assert measured[session.provider] == verdict.recorded < 1e-5
    assert "as recorded" in str(verdict)


@pytest.mark.slow
def test_a_fixed_batch_keywords_and_baked_numbers(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_model()
            self.held = torch.ones(8)  # neither parameter nor buffer

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
            return {"sample": self.inner(x, t, y) * scale * self.held, "t": t}

    x, t, y = call_of(3)
    model = Scaled().eval()
    keywords = {"y": y, "x": x, "t": t, "scale": 2.0}
    bundle = moeca.export(model, keywords, "uniform:2", tmp_path / "fixed", dynamic_batch=False)
    assert bundle.manifest.model.baked == {"scale": 2.0}
    assert {one.name: one.shape for one in bundle.manifest.inputs} == {"x": (3, 4, 8, 8), "t": (3,), "y": (3,)}
    session = Session.open(bundle.path, threads=1)
    found = session.run(named((x, t, y)))
    wanted = model(**keywords)
    assert list(found) == ["sample"]  # t is handed through, not computed
    assert relative_error(found["sample"], wanted["sample"]) < 1e-4
    with pytest.raises(BundleError, match="input x has shape"):
        session.run(named(call_of(2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "provider"), [(torch.float16, PROVIDERS[0]), (torch.float16, "openvino"), (torch.bfloat16, "openvino")]
)
def test_half_precision(dtype: torch.dtype, provider: str, tmp_path: Path) -> None:
    model = small_model().to(dtype)
    bundle = moeca.export(model, call_of(2, dtype=dtype), "uniform:2", tmp_path / "half", fused=True)
    assert bundle.manifest.dtype == str(dtype)[6:]
    tolerance = bundle.manifest.golden.tolerance
    for kind in (Session, FusedSession):
        assert verify(kind.open(bundle.path, provider, threads=1)).error < tolerance
    call = call_of(3, seed=4, dtype=dtype)
    given = named((call[0].float() if dtype == torch.bfloat16 else call[0], *call[1:]))
    found = Session.open(bundle.path, provider, threads=1).run(given)["output"]
    assert found.dtype == (np.float32 if dtype == torch.bfloat16 else np.float16)
    assert relative_error(found, model(*call).float()) < tolerance


@pytest.mark.slow
def test_bfloat16_and_a_cpu_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(2, dtype=torch.bfloat16)
    bundle = moeca.export(small_model().bfloat16(), call, "uniform:2", tmp_path / "b", dynamic_batch=False)
    (measured,) = bundle.manifest.golden.measured
    assert measured.provider == "openvino"
    assert bundle.golden()[1][0]["output"].dtype == np.float32
    with pytest.raises(BundleError, match="no bfloat16 kernels"):
        Session.open(bundle.path)
    session = Session.open(bundle.path, "openvino", threads=1)
    with pytest.raises(BundleError, match="give float32"):
        session.run({**bundle.golden()[0][0], "x": np.zeros((2, 4, 8, 8))})
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.warns(MoecaWarning, match="couldn't be tried here.*no bfloat16 kernels"):
        untried = moeca.export(small_model().bfloat16(), call, "full", tmp_path / "c", dynamic_batch=False)
    assert untried.manifest.golden.measured == ()


class Triangle(nn.Module):
    def forward(self, out: torch.Tensor, batch: int) -> torch.Tensor:
        return out / (batch * (batch + 1) // 2)


class Branch(nn.Module):
    def forward(self, out: torch.Tensor, batch: int) -> torch.Tensor:
        return out.relu() if batch == 3 else out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "says"),
    [(Triangle, r"div\w* \(test_export.py:\d+\): 3 at batch 2, 6 at batch 3, 28 at batch 7"), (Branch, "branches")],
)
def test_a_model_that_is_not_linear_in_its_batch(end: type[nn.Module], says: str, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.end = small_model(), end()

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.end(self.inner(x, t, y), x.shape[0])

    with pytest.raises(LoweringError, match=says) as caught:
        moeca.export(Model().eval(), call_of(2), "uniform:2", tmp_path / "no")
    assert "dynamic_batch=False" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_differs_from_the_model_at_another_batch_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lone(nn.Module):
        """Does something else for one sample, where no capture looks."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = small_model()

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.inner(x, t, y) * (3.0 if x.shape[0] == 1 else 1.0)

    monkeypatch.setattr(write, "golden_steps", lambda captured, _: _one_step(captured))
    with pytest.raises(LoweringError, match="a step at batch 1 in onnxruntime"):
        moeca.export(Lone().eval(), call_of(2), "full", tmp_path / "no")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_is_not_what_the_model_computes_is_refused(tmp_path: Path) -> None:
    class Traced(nn.Module):
        """Computes something else while it is traced: a change that the capture lost."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = small_model()

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.inner(x, t, y) * (1.1 if torch.compiler.is_compiling() else 1.0)

    with pytest.raises(LoweringError, match="the captured graph gives another output than the model itself"):
        moeca.export(Traced().eval(), call_of(2), "full", tmp_path / "no", dynamic_batch=False)
    assert list(tmp_path.iterdir()) == []


def _one_step(captured: Captured) -> list[Any]:
    args = captured.args
    own = [i for i, one in enumerate(captured.inputs) if one.name in captured.places]
    return [([args[i] for i in own], [captured.program.compiled_schedule.warm(args)[0]])]


@pytest.mark.parametrize("what", ["write_golden_steps", "write_manifest", "check_export", "write_graphs"])
def test_an_export_that_fails_leaves_nothing(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: Schedule, model: DiT
) -> None:
    def lower(*args: Any) -> Lowered:
        return Lowered({}, {"model": {}, "dtype": "float32", "sizes": []})

    def fail(*args: Any) -> Any:
        raise OSError("no space left on device")

    for name in ("write_golden_steps", "write_manifest", "check_export", "write_graphs"):
        monkeypatch.setattr(entry, name, fail if name == what else lambda *args: [1])
    monkeypatch.setattr(entry, "lower_sizes", lower)
    with pytest.raises(OSError, match="no space"):
        moeca.export(model, call_of(2), schedule, tmp_path / "bundle", dynamic_batch=False)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_path_is_refused(tmp_path: Path, model: DiT) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        moeca.export(model, call_of(2), "full", tmp_path / "taken")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"targets": ("onnx", "tpu")}, "tpu can't be exported to"),
        ({"experts": "loops"}, "experts='loops'"),
        ({"targets": ()}, "nothing can't"),
        ({"opset": 12}, "opset=12"),
        ({"schedule": "sometimes"}, "not understood"),
        ({"order": 5}, "order=5"),
        ({"model": torch.sin}, "torch.nn.Module"),
        ({"example_inputs": ()}, r"can't be called with the example inputs \(0 positional\)"),
    ],
)
def test_wrong_requests(wrong: dict[str, Any], says: str, tmp_path: Path, model: DiT) -> None:
    request = {"model": model, "example_inputs": call_of(2), "schedule": "full", "path": tmp_path / "b", **wrong}
    with pytest.raises(MoecaError, match=says):
        moeca.export(**request)
    assert list(tmp_path.iterdir()) == []


def test_a_fused_graph_with_partial_rows_is_refused(tmp_path: Path, model: DiT, schedule: Schedule) -> None:
    partial = replace(schedule, rows=(*schedule.rows[:1], (Partial(0.5), Partial(0.5))), period=2)
    with pytest.raises(LoweringError, match="the schedule has PARTIAL ones: export with fused=False"):
        moeca.export(model, call_of(2), partial, tmp_path / "b", fused=True)
    assert list(tmp_path.iterdir()) == []


def test_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"model\.eval"):
        moeca.export(small_model().train(), call_of(2), "full", tmp_path / "b")


def test_a_graph_break_is_refused(tmp_path: Path) -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_model()

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return self.inner(x, t, y)

    with pytest.raises(CaptureError, match="one graph"):
        moeca.export(Breaks().eval(), call_of(2), "full", tmp_path / "b")


def test_without_the_packages_it_says_what_to_install(
    tmp_path: Path, model: DiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"moeca-compile\[onnx\]"):
        moeca.export(model, call_of(2), "full", tmp_path / "b")


def test_the_schedule_in_the_bundle_is_the_one_given(exported: Bundle, schedule: Schedule) -> None:
    assert exported.schedule.rows == schedule.rows
    assert json.loads((exported.path / "schedule.json").read_text())["fingerprint"] == exported.schedule.fingerprint
