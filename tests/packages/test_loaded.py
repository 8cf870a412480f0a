"""A loaded package stands for the model: same calls, same results, same trajectories, without Dynamo and compiler."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import moeca_compile as moeca
from moeca_compile.engine.packages import LoadedModel
from moeca_compile.errors import BundleError, StateError
from tests.packages.conftest import call_at, compiled, sample, small_model

ROOT = Path(__file__).parents[2]


def test_a_trajectory_is_that_of_the_compiled_model(model: LoadedModel) -> None:
    reference = compiled(small_model())
    for seed in (0, 1):  # the second one begins cold by itself
        torch.testing.assert_close(sample(model, seed), sample(reference, seed), rtol=1e-5, atol=1e-5)
    ours, theirs = model.stats(), moeca.stats(reference)
    assert [(step.step, step.stream, step.variant, step.macs) for step in ours.steps] == [
        (step.step, step.stream, step.variant, step.macs) for step in theirs.steps
    ]
    assert (ours.state_bytes, ours.graphs, len(ours.trajectories)) == (theirs.state_bytes, 1, 2)
    assert {step.variant for step in ours.steps} == {"v0", "v1"}


def test_a_computed_step_is_the_model_itself(model: LoadedModel) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(*call_at()), small_model()(*call_at()), rtol=1e-5, atol=1e-5)


def test_it_takes_what_the_model_takes(model: LoadedModel) -> None:
    x, t, y = call_at()
    assert list(inspect.signature(model._signature.bind).parameters)  # a real signature
    by_position = model(x, t, y)
    model.reset()
    assert torch.equal(model(y=y, x=x, t=t), by_position)
    model.reset()
    assert torch.equal(model(x.transpose(2, 3).contiguous().transpose(2, 3), t, y), by_position)  # other strides
    with pytest.raises(TypeError, match="missing a required argument"):
        model(x, t)


def test_named_streams_and_declared_trajectories(model: LoadedModel) -> None:
    with model.trajectory(steps=2, stream="cond") as trajectory:
        first, _ = model(*call_at(0)), model(*call_at(1))
    assert [step.stream for step in model.stats().steps] == ["named", "named"]
    with pytest.raises(StateError, match="declared with steps=2"), trajectory:
        model(*call_at(2))
    model.reset()
    assert not model.stats().steps
    assert torch.equal(model(*call_at(0)), first)


def test_guidance_in_two_calls(model: LoadedModel) -> None:
    reference = compiled(small_model())
    x, _, y = call_at()
    with torch.no_grad():
        for step in range(6):
            t = torch.full((3,), 900.0 - step)
            for labels in (y, y + 3):
                torch.testing.assert_close(model(x, t, labels), reference(x, t, labels), rtol=1e-5, atol=1e-5)
            x = 0.95 * x
    streams = [(step.step, step.stream, step.variant) for step in model.stats().steps]
    assert streams == [(step.step, step.stream, step.variant) for step in moeca.stats(reference).steps]
    assert {stream for _, stream, _ in streams} == {"0", "1"}


def test_trajectories_of_threads_stay_apart(model: LoadedModel) -> None:
    expected = [sample(model, seed) for seed in range(3)]
    results: dict[int, torch.Tensor] = {}

    def run(seed: int) -> None:
        with model.trajectory(steps=8):
            results[seed] = sample(model, seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], expected[seed]) for seed in range(3))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (call_at(batch=2), r"x: float32 \[2, 2, 4, 4\], t: float32 \[2\]"),
        ((call_at()[0].double(), *call_at()[1:]), "x: float64"),
        ((*call_at()[:2], 3), "y=3"),
        ((call_at()[0].to("meta"), *call_at()[1:]), r"x: float32 \[3, 2, 4, 4\] on meta"),
    ],
)
def test_another_call_is_refused_by_name(model: LoadedModel, call: tuple[object, ...], named: str) -> None:
    with pytest.raises(BundleError, match=rf"wasn't saved for a call with .*{named}.*saved for x: float32 \[3, 2"):
        model(*call)
    assert not model.stats().steps


def test_gradients_autocast_training_and_moving_are_refused(model: LoadedModel) -> None:
    x, t, y = call_at()
    with pytest.raises(StateError, match="moeca is for inference"):
        model(x.clone().requires_grad_(), t, y)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(StateError, match="autocast is cpu bfloat16, and was off"),
    ):
        model(x, t, y)
    with pytest.raises(StateError, match="a loaded package is for inference"):
        model.train()
    for move in (lambda: model.half(), lambda: model.to("meta"), lambda: model.to(torch.float64)):
        with pytest.raises(StateError, match="can't be moved or converted"):
            move()
    assert model.to("cpu") is model.eval() is model
    assert (model.dtype, model.device.type, model.training) == (torch.float32, "cpu", False)


FIRST_IMAGE = """
import sys
import torch
import moeca_compile as moeca
model = moeca.load(sys.argv[1])
x, y = torch.zeros(3, 2, 4, 4), torch.arange(3)
for step in range(4):
    x = x - model(x, torch.full((3,), 900.0 - step), y)
assert torch.isfinite(x).all() and len(model.stats().steps) == 4
print(*(name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules))
"""


def test_a_second_process_needs_neither_dynamo_nor_a_compiler(saved: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {
        "CXX": "/bin/false",
        "CC": "/bin/false",
        "PATH": str(tmp_path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TMPDIR": str(temporary),
    }
    done = subprocess.run(
        [sys.executable, "-c", FIRST_IMAGE, str(saved)], cwd=ROOT, text=True, capture_output=True, check=False,
        env={**{name: os.environ[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS", "HOME") if name in os.environ},
             **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), f"imported: {done.stdout}"
    assert not list(temporary.iterdir())
