"""Values that don't depend on the latent as graphs of their own: when they run, and what the variants lose by them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import moeca_compile as moeca
from moeca_compile.errors import BundleError, MoecaError, OptionError
from moeca_compile.lowering.tensorrt.build import build_engines
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.graphs import graph_of, nodes_of
from moeca_compile.runtime.bundle.verify import relative_error
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import EACH_PROVIDER, Edit, call_of, edit_manifest, named, small_model
from tests.bundle.test_bad_bundles import seal
from tests.bundle.test_fuzz import mutate_entry

STEPS = 7


class Prompted(torch.nn.Module):
    """A transformer whose latent is shifted by a prompt [N, 3, 12]: what comes of the prompt stays for a trajectory."""

    def __init__(self) -> None:
        super().__init__()
        self.dit = small_model()
        self.shift = torch.nn.Sequential(torch.nn.Linear(12, 64), torch.nn.SiLU(), torch.nn.Linear(64, 4))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        shift = self.shift(prompt).mean(1)
        scale = (t / 1000)[:, None, None, None].sin()
        result: torch.Tensor = self.dit(x + shift[:, :, None, None] * scale, t, y)
        return result


def prompted() -> Prompted:
    torch.manual_seed(1)
    return Prompted().eval().requires_grad_(False)


def prompt_of(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("prologues") / "b"
    return moeca.export(small_model(), call_of(2), "uniform:3", path, targets=("onnx", "openvino"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same without prologues."""
    path = tmp_path_factory.mktemp("whole") / "b"
    return moeca.export(small_model(), call_of(2), "uniform:3", path, prologues=False)


@pytest.fixture(scope="module")
def of_prompts(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("prompted") / "b"
    targets = ("onnx", "openvino")
    call = (*call_of(2), prompt_of(2))
    return moeca.export(prompted(), call, "uniform:3", path, targets=targets, dynamic_batch=False)


def calls(batch: int = 2) -> list[tuple[torch.Tensor, ...]]:
    x, t, y = call_of(batch)
    return [(x * (1 - step / 20), t - 20 * step, y) for step in range(STEPS)]


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("provider", EACH_PROVIDER)
def test_a_run_is_torch_s(provider: str, batch: int, bundle: Bundle) -> None:
    handle = moeca.compile(small_model(), schedule="uniform:3", inner="eager")
    with torch.no_grad():
        expected = [handle(*call).numpy() for call in calls(batch)]
    session = Session.open(bundle.path, provider, threads=1)
    with session.trajectory(steps=STEPS) as trajectory:
        found = [trajectory.run(named(call))["output"] for call in calls(batch)]
        assert trajectory.stats().mac_fraction == moeca.stats(handle).mac_fraction
    for result, reference in zip(found, expected, strict=True):
        assert relative_error(result, reference) < 1e-4
    assert relative_error(session.run(named(calls(batch)[0]))["output"], expected[0]) < 1e-4


@pytest.mark.slow
def test_what_the_variants_lose(bundle: Bundle, whole: Bundle) -> None:
    """The conditioning's operators and weights are in the prologue alone; weights.bin has each weight once."""
    full, cached = bundle.graphs
    nodes = [sum(1 for _ in nodes_of(graph_of(raw))) for raw in (*whole.graphs, full, cached, *bundle.prologues)]
    held = [bytes_of(raw) for raw in (*whole.graphs, full, cached, *bundle.prologues)]
    assert nodes == [139, 41, 125, 27, 14]
    assert held == [43836, 16024, 31228, 3416, 12616]
    assert bundle.manifest.files["weights.bin"].bytes <= whole.manifest.files["weights.bin"].bytes * 1.02


def bytes_of(raw: bytes) -> int:
    """Of the constants of a graph, those in weights.bin too."""
    sizes = []
    for tensor in onnx.load_model_from_string(raw).graph.initializer:
        places = {entry.key: entry.value for entry in tensor.external_data}
        sizes.append(int(places["length"]) if places else len(tensor.raw_data))
    return sum(sizes)


@pytest.mark.slow
def test_what_it_says_of_them(of_prompts: Bundle) -> None:
    assert "prologue_trajectory.onnx, once a trajectory: 1 values" in str(of_prompts)
    assert "prologue_step.onnx, once a timestep: 2 values" in str(of_prompts)
    trajectory, step = of_prompts.manifest.prologues
    assert (trajectory.takes, trajectory.hoists) == (("prompt",), ())
    assert (step.takes, step.hoists) == (("t", "y"), ("hoisted_000",))
    assert all(variant.takes == ("x",) for variant in of_prompts.manifest.variants)


class Counted:
    """A loaded prologue that counts its runs."""

    def __init__(self, loaded: Any) -> None:
        self.loaded, self.spec, self.runs = loaded, loaded.spec, 0

    def run(self, feeds: Any) -> list[Any]:
        self.runs += 1
        result: list[Any] = self.loaded.run(feeds)
        return result


@pytest.mark.slow
@pytest.mark.parametrize("provider", EACH_PROVIDER)
def test_they_run_when_an_input_changes(provider: str, of_prompts: Bundle) -> None:
    """Once a trajectory, once a timestep; both again for a prompt that was written to. Always torch's values."""
    session = Session.open(of_prompts.path, provider, threads=1)
    counted = [Counted(loaded) for _, loaded in session.prologues]
    session.prologues = tuple((loaded.spec, loaded) for loaded in counted)
    handle = moeca.compile(prompted(), schedule="uniform:3", inner="eager")
    prompt, counts, errors = prompt_of(2), [], []
    times = (900.0, 900.0, 800.0, 700.0, 700.0, 600.0)
    with session.trajectory() as trajectory, moeca.trajectory(handle, stream="only"), torch.no_grad():
        for step, time in enumerate(times):
            if step == 4:
                prompt.mul_(2)
            x, t, y = call_of(2, seed=1)
            call = (x * (1 + step / 10), torch.full_like(t, time), y)
            result = trajectory.run({**named(call), "prompt": prompt.numpy()})["output"]
            errors.append(relative_error(result, handle(*call, prompt).numpy()))
            counts.append(tuple(loaded.runs for loaded in counted))
    assert max(errors) < 1e-4
    assert counts == [(1, 1), (1, 1), (1, 2), (1, 3), (2, 4), (2, 5)]


@pytest.mark.slow
def test_trajectories_share_nothing(of_prompts: Bundle) -> None:
    session = Session.open(of_prompts.path, threads=1)
    calls = [{**named(call_of(2, seed=seed)), "prompt": prompt_of(2, seed).numpy()} for seed in range(2)]
    alone = []
    for call in calls:
        with session.trajectory() as trajectory:
            alone.append([trajectory.run(call)["output"] for _ in range(4)])
    with session.trajectory() as first, session.trajectory() as second:
        turns = [(first.run(calls[0])["output"], second.run(calls[1])["output"]) for _ in range(4)]
    assert all(np.array_equal(turns[step][i], alone[i][step]) for step in range(4) for i in range(2))
    with session.trajectory() as trajectory:
        trajectory.run(calls[0])
        trajectory.reset()
        assert np.array_equal(trajectory.run(calls[1])["output"], alone[1][0])


def test_a_table_s_range_is_known_where_only_a_prologue_reads_it(bundle: Bundle) -> None:
    labels = next(spec for spec in bundle.manifest.inputs if spec.name == "y")
    assert labels.range == (0, 11)
    assert "y" not in bundle.manifest.variants[0].takes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fused": True}, "prologues=True: fused=True takes whole graphs"),
        ({"targets": ("onnx", "tensorrt")}, "prologues=True: the target 'tensorrt' takes whole graphs"),
        ({"granularity": "output"}, "prologues=True: granularity='output' takes whole graphs"),
    ],
)
def test_what_takes_whole_graphs(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=says):
        moeca.export(small_model(), call_of(2), "uniform:2", tmp_path / "b", prologues=True, **options)


def test_engines_are_whole(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"engines are whole: export with targets=\('tensorrt',\)"):
        build_engines(bundle)


def prologue(number: int, **change: Any) -> Edit:
    return lambda data: data["prologues"][number].update(change)


LIES: list[tuple[Edit, str]] = [
    (prologue(0, per="step"), "aren't one a trajectory and one a step"),
    (prologue(0, per="hour"), r"matching regex .* at `\$\.prologues\[0\]\.per`"),
    (prologue(0, takes=["prompt", "prompt"]), "a name appears twice"),
    (prologue(0, takes=["y"]), "has the inputs"),
    (prologue(0, takes=["z"]), "prologue_trajectory takes values that aren't there"),
    (prologue(0, hoists=["hoisted_001"]), "prologue_trajectory takes values that aren't there"),
    (prologue(0, file="v0.onnx"), "files: .* missing or too many|the same file"),
    (lambda data: data["prologues"][1]["gives"].reverse(), "aren't those that the prologues give"),
    (lambda data: data["prologues"].reverse(), "aren't one a trajectory and one a step"),
    (lambda data: data["hoisted"].pop(), "aren't those that the prologues give"),
    (lambda data: data["hoisted"][0].update(dtype="float16"), "the manifest says"),
    (lambda data: data["variants"][0].update(hoists=["hoisted_099"]), "takes hoisted values that no prologue gives"),
    (lambda data: data["variants"][0].pop("hoists"), "has the inputs"),
    (lambda data: (data.pop("prologues"), data.pop("hoisted")), "hoisted values that no prologue gives|files"),
    (lambda data: data.update(fused={"file": "fused.onnx", "steps": None}), "prologues are for bundles whose variants"),
]


@pytest.mark.parametrize(("edit", "says"), LIES)
def test_manifests_that_lie(edit: Edit, says: str, of_prompts: Bundle, tmp_path: Path) -> None:
    shutil.copytree(of_prompts.path, tmp_path / "b")
    edit_manifest(tmp_path / "b", edit)
    with pytest.raises(BundleError, match=says):
        Session.open(tmp_path / "b")


def test_prologues_exchanged(of_prompts: Bundle, bundle: Bundle, tmp_path: Path) -> None:
    """That of another bundle, with a checksum that fits: it carries another id."""
    shutil.copytree(of_prompts.path, tmp_path / "b")
    shutil.copy(bundle.path / "prologue_step.onnx", tmp_path / "b")
    seal(tmp_path / "b")
    with pytest.raises(BundleError, match="carries another id or row"):
        Session.open(tmp_path / "b")


def test_mutated_manifests(of_prompts: Bundle, tmp_path: Path) -> None:
    """Sealed again: refused, or the same bits."""
    dice, folder = random.Random(0), tmp_path / "b"
    shutil.copytree(of_prompts.path, folder)
    original = json.loads((folder / "manifest.json").read_text())
    expected, refused = run_of(folder), 0
    for _ in range(60):
        (folder / "manifest.json").write_text(json.dumps(original))
        edit_manifest(folder, lambda data: mutate_entry(data, dice))
        try:
            assert run_of(folder) == expected
        except MoecaError:
            refused += 1
    assert refused > 30


def run_of(folder: Path) -> list[bytes]:
    call = {**named(call_of(2)), "prompt": prompt_of(2).numpy()}
    with Session.open(folder, threads=1).trajectory() as trajectory:
        return [trajectory.run(call)["output"].tobytes() for _ in range(4)]
