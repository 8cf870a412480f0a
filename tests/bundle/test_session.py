"""Trajectories over a bundle: their own state, exact steps, and every misuse refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moeca_compile as moeca
from moeca_compile.errors import BundleError, MoecaWarning, OptionError, StateError
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.verify import verify
from moeca_compile.runtime.providers.onnxruntime import CPU, OrtRuntime, refuse_strays
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import EACH_PROVIDER, call_of, edit_manifest, named, warnings_of
from tests.models import DiT


def outputs_of(session: Session, seeds: range, batch: int = 2) -> list[Any]:
    with session.trajectory() as trajectory:
        return [trajectory.run(named(call_of(batch, seed=seed)))["output"] for seed in seeds]


def test_interleaved_trajectories_do_not_mix(session: Session) -> None:
    alone = outputs_of(session, range(8)), outputs_of(session, range(20, 28), batch=3)
    with session.trajectory(stream="a") as a, session.trajectory(stream="b") as b:
        for step in range(8):
            assert (a.run(named(call_of(2, seed=step)))["output"] == alone[0][step]).all()
            assert (b.run(named(call_of(3, seed=20 + step)))["output"] == alone[1][step]).all()
    assert a.records == []


def test_trajectories_in_threads(session: Session) -> None:
    wanted = {seed: outputs_of(session, range(seed, seed + 6)) for seed in (0, 10, 20)}
    found: dict[int, list[Any]] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: outputs_of(session, range(seed, seed + 6))}))
        for seed in wanted
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for seed, arrays in wanted.items():
        assert all((a == b).all() for a, b in zip(found[seed], arrays, strict=True))


def test_two_threads_on_one_trajectory_are_refused(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, leave = threading.Event(), threading.Event()
    kind = type(session.variants[0])
    slow = kind.run

    def wait(self: Any, feeds: Any) -> Any:
        inside.set()
        assert leave.wait(30)
        return slow(self, feeds)

    monkeypatch.setattr(kind, "run", wait)
    trajectory = session.trajectory()
    first = threading.Thread(target=trajectory.run, args=(named(call_of(2)),))
    first.start()
    assert inside.wait(30)
    with pytest.raises(StateError, match="another thread"):
        trajectory.run(named(call_of(2)))
    leave.set()
    first.join()
    assert len(trajectory.records) == 1


def test_a_call_by_itself_keeps_nothing(session: Session, model: DiT) -> None:
    for seed in range(3):
        call = call_of(2, seed=seed)
        np.testing.assert_allclose(session.run(named(call))["output"], model(*call), rtol=1e-3, atol=1e-5)


def test_state_is_handed_on_without_a_copy(session: Session) -> None:
    with session.trajectory() as trajectory:
        trajectory.run(named(call_of(2)))
        state = trajectory.state
        assert state is not None
        first = [address(one) for one in state.tensors if one is not None]
        trajectory.run(named(call_of(2, seed=1)))  # forecasts: writes nothing
        assert [address(one) for one in state.tensors if one is not None] == first
        trajectory.run(named(call_of(2, seed=2)))  # attention again: what was y0 is y1
        slots = {(s.region, s.slot): t for s, t in zip(state.layout, state.tensors, strict=True)}
        assert address(slots[0, "y1"]) in first


def address(value: Any) -> int:
    found: int = value.ctypes.data if isinstance(value, np.ndarray) else value.data_ptr()
    return found


def test_leaving_and_resetting(session: Session) -> None:
    with session.trajectory() as trajectory:
        first = [trajectory.run(named(call_of(2, seed=s)))["output"] for s in range(3)]
        trajectory.reset()
        again = [trajectory.run(named(call_of(2, seed=s)))["output"] for s in range(3)]
        assert all((a == b).all() for a, b in zip(first, again, strict=True))
    with pytest.raises(StateError, match="was closed"):
        trajectory.run(named(call_of(2)))
    with pytest.raises(StateError, match="was closed"), trajectory:
        pass


def test_one_step_too_many(session: Session) -> None:
    with session.trajectory(steps=2) as trajectory:
        trajectory.run(named(call_of(2)))
        trajectory.run(named(call_of(2)))
        with pytest.raises(StateError, match="steps=2, and this is call 3"):
            trajectory.run(named(call_of(2)))
    with pytest.raises(StateError, match="steps=0"):
        session.trajectory(steps=0)


def test_another_batch_is_refused_and_the_trajectory_goes_on(session: Session) -> None:
    wanted = outputs_of(session, range(2))
    with session.trajectory() as trajectory:
        trajectory.run(named(call_of(2, seed=0)))
        with pytest.raises(StateError, match="began with batch 2, this call has 3"):
            trajectory.run(named(call_of(3)))
        assert (trajectory.run(named(call_of(2, seed=1)))["output"] == wanted[1]).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"z": np.zeros(2)}, "the model takes x: float32"),
        ({"x": None}, r"inputs \['t', 'y'\]"),
        ({"x": np.zeros((2, 4, 8, 8))}, "x has dtype float64"),
        ({"y": np.zeros(2, np.int32)}, "y has dtype int32"),
        ({"x": np.zeros((2, 4, 8, 9), np.float32)}, "x has shape"),
        ({"x": np.zeros((2, 4, 8), np.float32)}, "x has shape"),
        ({"x": np.zeros((0, 4, 8, 8), np.float32)}, "x has shape"),
        ({"t": np.zeros(3, np.float32)}, "the other inputs have batch 2"),
        ({"y": "seven"}, "y has dtype"),
    ],
)
def test_wrong_inputs(change: dict[str, Any], says: str, session: Session) -> None:
    inputs = {k: v for k, v in {**named(call_of(2)), **change}.items() if v is not None}
    with pytest.raises(BundleError, match=says):
        session.run(inputs)
    with session.trajectory() as trajectory:
        with pytest.raises(BundleError, match=says):
            trajectory.run(inputs)
        assert trajectory.records == []


def test_inputs_of_any_layout(session: Session) -> None:
    inputs = named(call_of(2))
    turned = np.asfortranarray(inputs["x"])
    assert not turned.flags.c_contiguous
    assert (session.run({**inputs, "x": turned})["output"] == session.run(inputs)["output"]).all()


def test_values_that_are_not_finite_do_not_live_on(session: Session) -> None:
    bad = named(call_of(2))
    bad["x"] = np.full_like(bad["x"], np.nan)
    with session.trajectory() as trajectory:
        trajectory.run(bad)
        with pytest.warns(MoecaWarning, match="step 0 gave values that aren't finite"):
            assert np.isfinite(trajectory.run(named(call_of(2, seed=1)))["output"]).all()
        assert [record.cold for record in trajectory.records] == [False, True]


def test_options_reach_the_provider(exported: Bundle) -> None:
    runtime = OrtRuntime(CPU, threads=1, provider_options={"device_id": 0})
    assert runtime.options == {"device_id": "0"}
    session = Session.open(
        exported.path, "openvino", threads=1, provider_options={"INFERENCE_PRECISION_HINT": "undefined"}
    )
    assert verify(session).passed
    with pytest.raises(BundleError, match=r"openvino .* refuses v0.onnx"):
        Session.open(exported.path, "openvino", provider_options={"NO_SUCH_THING": 1})


def test_without_the_package_it_says_what_to_install(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BundleError, match="pip install onnxruntime"):
        Session.open(exported.path)
    with pytest.raises(BundleError, match=r"moeca-compile\[openvino\]"):
        Session.open(exported.path, "openvino")


def test_no_other_provider_is_taken(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match="no 'CUDAExecutionProvider'"):
        Session.open(exported.path, provider="CUDAExecutionProvider")
    # a build that lists a provider and then can't load it falls back by itself
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["TensorrtExecutionProvider"])
    with pytest.warns(UserWarning), pytest.raises(BundleError, match="fell back to"):  # noqa: PT030
        Session.open(exported.path, provider="TensorrtExecutionProvider")


class Node:
    def __init__(self, op_type: str) -> None:
        self.op_type = op_type


class Part:
    """As onnxruntime tells it: which provider got which nodes."""

    def __init__(self, ep_name: str, *kinds: str) -> None:
        self.ep_name, self.nodes = ep_name, [Node(kind) for kind in kinds]

    def get_nodes(self) -> list[Node]:
        return self.nodes


def test_parts_left_to_the_cpu_are_told() -> None:
    ours = Part("CUDAExecutionProvider", "MatMul", "NonZero")
    refuse_strays("v0.onnx", "CUDAExecutionProvider", [ours, Part(CPU, "Shape", "Gather", "Concat")])
    with pytest.raises(BundleError, match=r"v0.onnx: CUDAExecutionProvider leaves Gemm, ScatterND to the CPU"):
        refuse_strays("v0.onnx", "CUDAExecutionProvider", [ours, Part(CPU, "Shape", "ScatterND", "Gemm")])


def test_what_onnxruntime_says_of_parts(exported: Bundle) -> None:
    """The same question put to the real one, as if its CPU provider were the helper of another."""
    session = OrtRuntime(CPU, threads=1).session(exported.graphs[0], "v0.onnx", exported.path, exported.manifest)
    with pytest.raises(BundleError, match=r"leaves .*LayerNormalization.* to the CPU"):
        refuse_strays("v0.onnx", "SomeProvider", session.get_provider_graph_assignment_info())


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_on_a_gpu(provider: str, exported: Bundle) -> None:
    ort = pytest.importorskip("onnxruntime")
    if provider not in ort.get_available_providers():
        pytest.skip(f"this onnxruntime has no {provider}")
    session = Session.open(exported.path, provider)
    assert verify(session).passed
    with session.trajectory() as trajectory:
        trajectory.run(named(call_of(2)))
        assert trajectory.state is not None
        assert {one.device_name().lower() for one in trajectory.state.tensors if one is not None} == {"cuda"}


def test_memory_modes(exported: Bundle) -> None:
    with pytest.raises(OptionError, match="OpenVINO has its own copy"):
        Session.open(exported.path, "openvino", memory="shared")
    assert verify(Session.open(exported.path, memory="shared", threads=1)).passed
    with pytest.raises(OptionError, match="memory='little'"):
        Session.open(exported.path, memory="little")


def test_rows_by_timestep_and_the_end_of_a_schedule(closed: Bundle) -> None:
    session = Session.open(closed.path, threads=1)
    names = [one.name for one in closed.manifest.variants]

    def at(time: float) -> dict[str, Any]:
        return {**named(call_of(2)), "t": np.full(2, time, np.float32)}

    with session.trajectory() as trajectory:
        for time in (910.0, 590.0, 310.0):
            trajectory.run(at(time))
        assert [r.variant for r in trajectory.records] == names
    with session.trajectory() as trajectory:  # a row can't be found by two timesteps: it is counted, as torch does it
        found = warnings_of(lambda: [trajectory.run({**at(0.0), "t": np.array([1, 2], np.float32)}) for _ in names])
        assert [r.variant for r in trajectory.records] == names
    assert ["the row is found by counting calls" in one for one in found] == [True]
    with session.trajectory() as trajectory:
        found = warnings_of(lambda: [trajectory.run(at(time)) for time in (900.0, 750.0, 600.0, 450.0, 300.0, 150.0)])
        assert [r.variant for r in trajectory.records] == [names[i] for i in (0, 1, 1, 1, 2, 1)]
    assert ["made for another sampler" in one for one in found] == [True]
    # the same bundle, counting: what isn't there is computed in full, as torch does it
    counted = Session(
        replace(session.bundle, schedule=replace(closed.schedule, timesteps=())), session.runtime, session.variants
    )
    counted.schedule = counted.bundle.schedule
    with counted.trajectory() as trajectory:
        for _ in range(3):
            trajectory.run(at(1.0))
        found = warnings_of(lambda: [trajectory.run(at(1.0)) for _ in range(2)])
        assert [r.variant for r in trajectory.records[3:]] == [names[0]] * 2
    assert ["step 3 is past the schedule's last row" in one for one in found] == [True]


SERVE = """
import sys
sys.modules["torch"] = None  # importing it fails
import numpy as np
from moeca_compile.runtime import Session
from examples.samplers import euler, guided, model_of
from moeca_compile.runtime.bundle.verify import verify
session = Session.open(sys.argv[1], sys.argv[2], threads=1)
assert verify(session).passed
x = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
with session.trajectory() as trajectory:
    model = guided(model_of(trajectory), np.full(2, 10), 2.0)
    x = euler(model, x, np.array([1, 2]), np.linspace(1, 0, 9), 1000.0)
assert np.isfinite(x).all() and len(trajectory.session.variants) == 4
print(*sorted(name for name in sys.modules if name.split(".")[0] in ("onnx", "onnxscript", "torch", "typer", "rich")))
"""


@pytest.mark.parametrize("provider", EACH_PROVIDER)
def test_it_serves_without_torch(provider: str, exported: Bundle, tmp_path: Path) -> None:
    shutil.copytree(exported.path, tmp_path / "elsewhere")
    command = [sys.executable, "-c", SERVE, str(tmp_path / "elsewhere"), provider]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(moeca.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch"]


def test_no_gradients_no_torch_types(session: Session) -> None:
    found = session.run({name: one.numpy() for name, one in zip("xty", call_of(1), strict=True)})
    assert type(found["output"]) is np.ndarray
    assert not isinstance(found["output"], torch.Tensor)


def test_a_bundle_prints_as_a_short_table(exported: Bundle, copy: Path) -> None:
    said = str(exported)
    assert repr(exported) == f"Bundle({str(exported.path)!r}, 4 variants)"
    assert all(one in said for one in ("x: float32 [batch, 4, 8, 8]", "2 of 2", "segments", str(exported.path)))
    assert len(said) < 2000
    edit_manifest(copy, lambda data: data["model"].update(name="\x1b[2Jevil"))
    assert r"\x1b[2Jevil" in str(Bundle.open(copy))
