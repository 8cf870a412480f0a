"""Bundles of granularity 'output': one network, and sums of its last outputs at the steps between."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moeca_compile as moeca
from examples import digits
from moeca_compile.errors import BundleError, CaptureError, LoweringError, OptionError, ScheduleError
from moeca_compile.runtime.bundle.bench import bench_bundle
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.verify import verify
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.trajectory import Trajectory
from moeca_compile.runtime.triton import write_repository
from moeca_compile.runtime.triton.sequences import Sequences
from moeca_compile.schedule import Action, Partial, Schedule
from moeca_compile.schedule.output import OutputRule
from tests.bundle.conftest import EACH_PROVIDER, PROVIDERS, Edit, call_of, edit_manifest, small_model, warnings_of
from tests.bundle.tensorrt.conftest import put_engines
from tests.bundle.tensorrt.test_running import on_engines
from tests.bundle.test_bad_bundles import seal
from tests.models import DiT

STEPS = 50
TERMS = ("y0", "y1", "x", "d0")
TIMES = tuple(1000.0 - 20 * step for step in range(STEPS))
Model = Callable[..., Any]


def ruled() -> Schedule:
    """Every third step computed. Weights near the polynomial's, and some of the other terms; the last step has none."""
    rows = tuple((Action.FORECAST if step % 3 else Action.COMPUTE,) for step in range(STEPS))
    weights = [(1.0 + step % 3 / 3, -(step % 3) / 3, 0.02, -0.03) for step in range(STEPS)]
    weights[:3] = [(1.0, 0.0, 0.01 * step, 0.02) for step in range(3)]  # y1 isn't there yet
    weights[-1] = ()  # type: ignore[call-overload]
    rule = OutputRule(TERMS, tuple(weights))
    return Schedule(
        rows, ("output",), timesteps=TIMES, searched_timesteps=True, granularity="output", output=rule
    )  # fmt: skip


def in_numpy(trajectory: Trajectory) -> Model:
    """A trajectory as a model of tensors."""
    return lambda x, t, y: torch.from_numpy(trajectory.run({"x": x.numpy(), "t": t.numpy(), "y": y.numpy()})["output"])


def sample(
    model: Model, seed: int = 0, batch: int = 2, times: Any = TIMES, scale: float = 2.0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Euler with both halves of the guidance in one batch. What it ends with, and what the model gave at each step."""
    x, _, y = call_of(batch, seed=seed)
    x, y, outputs = torch.cat([x, x]), torch.cat([y, torch.full_like(y, 10)]), []
    for time in times:
        output = model(x, torch.full((2 * batch,), time), y)
        outputs.append(output)
        conditional, unconditional = output.chunk(2)
        x = x - torch.cat(2 * [unconditional + scale * (conditional - unconditional)]) / STEPS
    return x[:batch], outputs


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10((b.max() - b.min()) ** 2 / (a - b).square().mean()))


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.fixture(scope="module")
def bundle(model: DiT, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("output") / "b"
    return moeca.export(model, call_of(2), ruled(), path, granularity="output", targets=("onnx", "openvino"))


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    shutil.copytree(bundle.path, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module", params=EACH_PROVIDER)
def session(bundle: Bundle, request: pytest.FixtureRequest) -> Session:
    return Session.open(bundle.path, request.param, threads=1)


@pytest.fixture(scope="module")
def handle(model: DiT) -> Model:
    return moeca.compile(model, schedule=ruled(), granularity="output", inner="eager")


def test_fifty_steps_are_torch_s_and_cheap_ones_run_no_session(
    session: Session, handle: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    kind = type(session.variants[0])
    original = kind.run
    monkeypatch.setattr(kind, "run", lambda self, feeds: runs.append(1) or original(self, feeds))
    with session.trajectory(steps=STEPS) as trajectory:
        ours, outputs = sample(in_numpy(trajectory))
        assert len(runs) == 17
        assert [record.variant for record in trajectory.records] == [f"v{min(step % 3, 1)}" for step in range(STEPS)]
        assert not any(record.cold for record in trajectory.records)
        assert trajectory.stats().mac_fraction == pytest.approx(17 / STEPS)
        assert trajectory.stats().state_bytes == 2 * outputs[0].numel() * 4
    with torch.no_grad():
        theirs, wanted = sample(handle)
    for one, other in zip(outputs, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
    assert psnr(ours, theirs) > 60


def calls_of(seed: int, batch: int, count: int = 9) -> list[tuple[torch.Tensor, ...]]:
    """Calls at the schedule's own timesteps, which depend on no output."""
    x, _, y = call_of(batch, seed=seed)
    return [(x * 0.98**k, torch.full((batch,), TIMES[k]), y) for k in range(count)]


def test_interleaved_trajectories_and_a_reset(session: Session) -> None:
    first, second = calls_of(0, 2), calls_of(1, 4)
    with session.trajectory() as a, session.trajectory() as b:
        alone = [[in_numpy(a)(*call) for call in first], [in_numpy(b)(*call) for call in second]]
    with session.trajectory(stream="a") as a, session.trajectory(stream="b") as b:
        for step, (one, other) in enumerate(zip(first, second, strict=True)):
            assert torch.equal(in_numpy(a)(*one), alone[0][step])
            assert torch.equal(in_numpy(b)(*other), alone[1][step])
        a.reset()
        assert equal([in_numpy(a)(*call) for call in second], alone[1])


def test_two_streams_of_one_guidance(session: Session, handle: Model) -> None:
    """Step by step in turn, as a sampler with two calls makes them; torch tells them apart by name."""
    calls, null = calls_of(0, 2), torch.tensor([10, 10])
    labels = {"cond": calls[0][2], "uncond": null}
    with session.trajectory(stream="cond") as cond, session.trajectory(stream="uncond") as uncond:
        found: dict[str, list[torch.Tensor]] = {"cond": [], "uncond": []}
        for x, t, _ in calls:
            for trajectory in (cond, uncond):
                found[trajectory.stream].append(in_numpy(trajectory)(x, t, labels[trajectory.stream]))
    for stream, outputs in found.items():
        with moeca.trajectory(handle, steps=STEPS, stream=stream), torch.no_grad():
            for (x, t, _), output in zip(calls, outputs, strict=True):
                torch.testing.assert_close(output, handle(x, t, labels[stream]), rtol=1e-4, atol=1e-5)


def test_what_the_caller_writes_to_is_not_what_is_kept(session: Session) -> None:
    def spoiled(model: Model) -> Model:
        def run(*args: torch.Tensor) -> torch.Tensor:
            output = model(*args)
            copy = output.clone()
            output.zero_()
            return copy

        return run

    with session.trajectory() as a, session.trajectory() as b:
        assert equal(sample(spoiled(in_numpy(a)), times=TIMES[:9])[1], sample(in_numpy(b), times=TIMES[:9])[1])


def test_a_call_by_itself_is_the_model(session: Session, model: DiT) -> None:
    x, t, y = call_of(3)
    found = session.run({"x": x.numpy(), "t": t.numpy(), "y": y.numpy()})["output"]
    torch.testing.assert_close(torch.from_numpy(found), model(x, t, y), rtol=1e-3, atol=1e-5)


def unruled(handle: Model, model: Model, times: Any, batch: int = 2) -> list[str]:
    """Runs both engines where no weights hold, and gives the bundle's warnings."""
    (x, _, y), outputs = call_of(batch), []

    def ours() -> None:
        outputs.extend(model(x, torch.as_tensor(time).expand(batch).clone(), y) for time in times)

    said = warnings_of(ours)

    def theirs() -> None:
        with moeca.trajectory(handle, steps=STEPS, stream="only"), torch.no_grad():
            for time, output in zip(times, outputs, strict=True):
                wanted = handle(x, torch.as_tensor(time).expand(batch).clone(), y)
                torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)

    warnings_of(theirs)
    return said


def test_other_timesteps_fall_back_to_the_polynomial_with_one_warning(bundle: Bundle, handle: Model) -> None:
    with Session.open(bundle.path, threads=1).trajectory() as trajectory:
        said = unruled(handle, in_numpy(trajectory), [995.0, 970.0, 955.0, 930.0, 905.0])
        assert len([text for text in said if "output weights aren't used" in text]) == 1
        assert len(said) == 2  # and that the schedule is for other timesteps
        assert any("were searched: give the sampler schedule.timesteps" in text for text in said)


@pytest.mark.parametrize("time", [torch.tensor([900.0, 100.0]), float("nan")])
def test_a_timestep_that_does_not_hold_for_the_batch(bundle: Bundle, handle: Model, time: Any) -> None:
    """Both engines count, as for any schedule with timesteps, and say so. A refusal would end samplers that give each
    sample a timestep of its own; but weights that were fitted for one timestep aren't used."""
    with Session.open(bundle.path, threads=1).trajectory() as trajectory:
        times = [time] * 3 if isinstance(time, torch.Tensor) else [TIMES[0], time, time]
        said = unruled(handle, in_numpy(trajectory), times)
        assert [record.variant for record in trajectory.records] == ["v0", "v1", "v1"]
    assert any(
        "no finite timestep that holds for its whole batch: the row is found by counting" in text for text in said
    )
    assert any("output weights aren't used, for the call has no finite timestep" in text for text in said)


def test_a_batch_without_halves(bundle: Bundle, handle: Model) -> None:
    with Session.open(bundle.path, threads=1).trajectory() as trajectory:
        said = unruled(handle, in_numpy(trajectory), TIMES[:6], batch=3)
    assert len(said) == 1
    assert "the batch has no two halves" in said[0]


def test_values_that_are_not_finite_do_not_live_on(bundle: Bundle) -> None:
    x, _, y = call_of(2)
    with Session.open(bundle.path, threads=1).trajectory() as trajectory:
        model = in_numpy(trajectory)
        model(x * float("nan"), torch.full((2,), TIMES[0]), y)
        said = warnings_of(lambda: model(x, torch.full((2,), TIMES[1]), y))
        assert "step 0 gave values that aren't finite" in said[0]
        assert trajectory.records[-1].variant == "v0"


def test_what_is_said_of_it(bundle: Bundle, session: Session) -> None:
    manifest = bundle.manifest
    assert (manifest.granularity, manifest.timestep, manifest.latent) == ("output", "t", "x")
    assert [file.name for file in bundle.path.glob("*.onnx")] == ["v0.onnx"]
    assert "DiT, its output cached, float32" in str(bundle)
    assert "50 rows, 33 of them without a graph" in str(bundle)
    verdict = verify(session)
    assert verdict.passed
    assert verdict.variants == ("v0", "v1")
    figures = bench_bundle(session, steps=6, rounds=1)
    assert figures.mac_fraction == pytest.approx(1 / 3)
    assert set(figures.variant_ms) == {"v0", "v1"}


# -- other servers ----------------------------------------------------------------------------------------------------


def test_triton_s_python_backend_runs_it(bundle: Bundle, tmp_path: Path) -> None:
    (model,) = write_repository(bundle, tmp_path / "repository", name="m")
    session = Session.open(model / "1" / "bundle", threads=1)
    sequences = Sequences(session, most=2, idle_seconds=60)
    steps = [{"x": x.numpy(), "t": np.full(2, time, np.float32), "y": y.numpy()}
             for time in TIMES[:6] for x, _, y in [call_of(2)]]  # fmt: skip
    with session.trajectory() as trajectory:
        for number, step in enumerate(steps):
            found = sequences.call(1, number == 0, number == 5, step)["output"]
            assert np.array_equal(found, trajectory.run(step)["output"])


def test_tensorrt_s_engine_of_the_network(copy: Path) -> None:
    """Run by a fake: the sums are of what came back to the host."""
    engines, reference = on_engines(put_engines(copy)), Session.open(copy, threads=1)
    with engines.trajectory() as ours, reference.trajectory() as theirs:
        for call in calls_of(0, 2):
            assert torch.equal(in_numpy(ours)(*call), in_numpy(theirs)(*call))


# -- bad input --------------------------------------------------------------------------------------------------------

EDITS: dict[str, tuple[Edit, str]] = {
    "no latent": (lambda d: d.update(latent=None), "weighs the latent, and no input is named"),
    "another latent": (lambda d: d.update(latent="y"), "the latent 'y' is no input with the sizes"),
    "an unknown latent": (lambda d: d.update(latent="z"), "the latent 'z' is no input"),
    "another granularity": (lambda d: d.update(granularity=""), "aren't the schedule's rows"),
    "an unknown granularity": (lambda d: d.update(granularity="half"), r"at `\$\.granularity`"),
    "a graph at a cheap step": (lambda d: d["steps"].__setitem__(1, 0), "steps and schedule differ"),
    "no graph at a computed step": (lambda d: d["steps"].__setitem__(0, None), "steps and schedule differ"),
    "a state of another dtype": (
        lambda d: d["state"][0].update(dtype="float16"),
        "the state isn't made of the outputs",
    ),
    "a state of no output": (lambda d: d["state"][0].update(output=1), "differ"),
    "less state": (lambda d: d["state"].pop(), "state and schedule differ"),
    "a graph that writes state": (lambda d: d["variants"][0].update(writes=["state_000"]), "doesn't write what"),
    "no timestep": (lambda d: d.update(timestep=None), "a schedule with timesteps needs a timestep input"),
    "a fused graph": (lambda d: d.update(fused={"file": "fused.onnx", "steps": 50}), "every row is a graph"),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_manifest_sealed_again(what: str, copy: Path) -> None:
    edit, says = EDITS[what]
    edit_manifest(copy, edit)
    with pytest.raises(BundleError, match=says):
        Session.open(copy, threads=1)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("weights", [[1.0]] * STEPS, "step 0 has 1 weights for 4 terms"),
        ("weights", [[]] * 3, "weights of 3 steps for 50 rows"),
        ("weights", [[0.0, 1.0, 0.0, 0.0]] * STEPS, "step 0 weighs y1, but the model was computed 1 times"),
        ("terms", ["y0", "y1", "x", "q"], "expected y0 to y3"),
        ("terms", ["y0", "y1", "y2", "x"], "state and schedule differ"),
    ],
)
def test_a_sealed_schedule_with_another_rule(copy: Path, name: str, value: Any, says: str) -> None:
    data = json.loads((copy / "schedule.json").read_text())
    data["output"][name] = value
    (copy / "schedule.json").write_text(json.dumps(data))
    seal(copy)
    with pytest.raises(BundleError, match=says):
        Session.open(copy, threads=1)


def test_a_bundle_of_regions_has_no_latent(exported: Bundle, tmp_path: Path) -> None:
    shutil.copytree(exported.path, tmp_path / "copy")
    edit_manifest(tmp_path / "copy", lambda d: d.update(latent="x"))
    with pytest.raises(BundleError, match="it is for bundles of granularity 'output'"):
        Bundle.open(tmp_path / "copy")


class Breaking(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x * 2


class Flat(torch.nn.Module):
    """Gives no output of the latent's sizes, and takes the time as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, t: float) -> torch.Tensor:
        return self.mix(x).sum(1) * t


C, F = (Action.COMPUTE,), (Action.FORECAST,)
OF_X = Schedule((C,), ("output",), granularity="output", output=OutputRule(("x",), ((1.0,),)))
TIMED = Schedule((C, F), ("output",), granularity="output", timesteps=(1.0, 0.0))


@pytest.mark.parametrize(
    ("model", "inputs", "schedule", "options", "error", "says"),
    [
        (Breaking(), (torch.ones(2, 3),), "uniform:3", {}, CaptureError, "a bundle runs the model as one graph"),
        (Flat(), (torch.ones(2, 3, 4), 0.5), OF_X, {}, LoweringError, "no input has the output's sizes"),
        (Flat(), (torch.ones(2, 3, 4), 0.5), TIMED, {}, LoweringError, "pass the timestep as a tensor"),
        (None, None, "uniform:3", {"fused": True}, OptionError, "a cheap step runs no graph"),
        (None, None, "adaptive:0.1", {}, ScheduleError, "no drift metric"),
        (None, None, Schedule((C, (Partial(0.5),)), ("output",)), {}, ScheduleError, "the model's output has no parts"),
        (None, None, Schedule((C, F), ("attn",)), {}, ScheduleError, "another graph"),
        (None, None, TIMED, {"granularity": "region"}, ScheduleError, "pass granularity='output'"),
    ],
)
def test_exports_that_can_not_be(
    model: Any, inputs: Any, schedule: Any, options: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    model = (model or small_model()).eval().requires_grad_(False)
    with pytest.raises(error, match=says):
        moeca.export(model, inputs or call_of(2), schedule, tmp_path / "b", **{"granularity": "output", **options})
    assert not (tmp_path / "b").exists()


# -- the digits model -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_calibrated_schedule_gives_torch_s_quality(tmp_path: Path) -> None:
    model = digits.load_model()

    def sampled(one: Model, seed: int) -> torch.Tensor:
        return digits.sample(one, seed, 4, steps=12)

    schedule = moeca.calibrate(
        model, sampled, granularity="output", inner="eager", budget="macs:0.5", seeds=6, holdout=2, progress=False
    )
    assert schedule.output is not None
    handle = moeca.compile(model, schedule=schedule, granularity="output", inner="eager")
    truth, theirs = sampled(digits.load_model(), 5), sampled(handle, 5)
    inputs = digits.initial_noise(0, 2), torch.full((2,), 1000.0), digits.labels_of(2)
    bundle = moeca.export(model, inputs, schedule, tmp_path / "b", granularity="output", targets=("onnx", "openvino"))
    for provider in PROVIDERS:
        with Session.open(bundle.path, provider).trajectory() as trajectory:
            ours = sampled(in_numpy(trajectory), 5)
        quality = digits.psnr(ours, truth).mean().item()
        assert quality == pytest.approx(digits.psnr(theirs, truth).mean().item(), abs=0.1)
        assert psnr(ours, theirs) > 60
