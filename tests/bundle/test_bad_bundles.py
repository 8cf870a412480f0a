"""Bundles that somebody spoiled: each is refused with what is wrong, before anything of it is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.consistency import check_consistency
from moeca_compile.runtime.bundle.manifest import OLDEST, VERSION, Manifest, bundle_id
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.writing import checksum
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.adaptive import Adaptive
from tests.bundle.conftest import EACH_PROVIDER, PROVIDERS, Edit, edit_manifest


def open_it(folder: Path, provider: str = PROVIDERS[0]) -> Session:
    return Session.open(folder, provider, threads=1)


def seal(folder: Path) -> None:
    """Make all checksums fit what is there now."""

    def edit(data: dict[str, Any]) -> None:
        for name, entry in data["files"].items():
            entry.update(sha256=checksum(folder / name), bytes=(folder / name).stat().st_size)
        data["id"] = bundle_id(data["files"]["schedule.json"]["sha256"], data["files"]["weights.bin"]["sha256"])

    edit_manifest(folder, edit)


@pytest.mark.parametrize("name", ["order", "period", "timesteps", "predicted", "version"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400, [10**400], {"psnr_db": float("inf")}])
def test_a_sealed_schedule_with_a_number_that_is_none(copy: Path, name: str, value: object) -> None:
    data = json.loads((copy / "schedule.json").read_text())
    (copy / "schedule.json").write_text(json.dumps({**data, name: value}))
    seal(copy)
    with pytest.raises(BundleError, match=r"schedule\.json: not a readable schedule"):
        Bundle.open(copy)


@pytest.mark.parametrize("name", ["weights.bin", "v0.onnx", "schedule.json", "golden.npz", "manifest.json"])
def test_a_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        open_it(copy)


@pytest.mark.parametrize("name", ["weights.bin", "v0.onnx", "schedule.json", "golden.npz"])
def test_a_truncated_or_changed_file(copy: Path, name: str) -> None:
    raw = (copy / name).read_bytes()
    (copy / name).write_bytes(raw[:-7])
    with pytest.raises(BundleError, match=f"{name} has {len(raw) - 7} bytes"):
        open_it(copy)
    (copy / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(BundleError, match=f"{name} isn't what was exported"):
        open_it(copy)


@pytest.mark.parametrize("name", ["weights.bin", "v0.onnx", "manifest.json"])
def test_a_link_is_no_file_of_the_bundle(copy: Path, name: str, tmp_path: Path) -> None:
    shutil.move(copy / name, tmp_path / "outside")
    (copy / name).symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match=f"{name} is a link"):
        open_it(copy)


def test_a_pipe_does_not_block(copy: Path) -> None:
    (copy / "golden.npz").unlink()
    os.mkfifo(copy / "golden.npz")
    with pytest.raises(BundleError, match="no plain file"):
        open_it(copy)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no directory"):
        open_it(tmp_path / "nowhere")


def variant(**change: Any) -> Edit:
    return lambda data: data["variants"][0].update(change)


EDITS: dict[str, tuple[Edit, str]] = {
    "a newer format": (
        lambda d: d.update(version=VERSION + 1),
        f"version {VERSION + 1}, this package reads up to {VERSION}: update moeca-compile",
    ),
    "an older format": (
        lambda d: d.update(version=1),
        rf"this package reads {OLDEST} to {VERSION}: export it again with moeca_compile\.export",
    ),
    "another format": (lambda d: d.update(format="zip"), "isn't of a moeca bundle"),
    "an unknown entry": (lambda d: d.update(plugin="x.so"), r"unknown field `plugin`"),
    "a missing entry": (lambda d: d.pop("state"), r"missing required field `state`"),
    "a path that leaves": (variant(file="../v0.onnx"), r"matching regex .* at `\$\.variants\[0\]\.file`"),
    "an absolute path": (variant(file="/etc/passwd"), r"matching regex .* at `\$\.variants\[0\]\.file`"),
    "a hidden path": (variant(file=".v0.onnx"), r"matching regex .* at `\$\.variants\[0\]\.file`"),
    "a newline in a name": (variant(file="v0.onnx\n"), r"matching regex .* at `\$\.variants\[0\]\.file`"),
    "a negative size": (lambda d: d["inputs"][0]["shape"].__setitem__(1, -4), "shape"),
    "an oversize size": (lambda d: d["inputs"][0]["shape"].__setitem__(1, 1 << 40), "shape"),
    "no size": (lambda d: d["inputs"][0]["shape"].__setitem__(1, "4 * batch"), "shape"),
    "a boolean number": (lambda d: d.update(opset=True), r"Expected `int`, got `bool` - at `\$\.opset`"),
    "a number as text": (
        lambda d: d["steps"].__setitem__(1, "1"),
        r"Expected `int \| null`, got `str` - at `\$\.steps\[1\]`",
    ),
    "no number": (lambda d: d["golden"].update(tolerance=float("nan")), "tolerance"),
    "too few numbers": (lambda d: d["inputs"][0].update(range=[1]), r"length 2, got 1 - at `\$\.inputs\[0\]\.range`"),
    "no inputs": (lambda d: d["inputs"].clear(), r"length >= 1 - at `\$\.inputs`"),
    "a target twice": (lambda d: d["targets"].append("onnx"), "target: a name appears twice"),
    "an input taken twice": (lambda d: d["variants"][0]["takes"].append("x"), "an input: a name appears twice"),
    "a checksum": (lambda d: d["files"]["weights.bin"].update(sha256="0" * 65), r"at `\$\.files\[\.\.\.\]\.sha256`"),
    "a file's name": (lambda d: d["files"].update({"a/b": d["files"]["v0.onnx"]}), r"at `key` in `\$\.files`"),
    "an infinite tolerance": (lambda d: d["golden"].update(tolerance=float("inf")), "tolerance"),
    "an unknown dtype": (lambda d: d["inputs"][0].update(dtype="object"), "dtype"),
    "another size": (lambda d: d["inputs"][0]["shape"].__setitem__(1, 5), "x is float32"),
    "another dtype": (lambda d: d["inputs"][0].update(dtype="float16"), "x is float32"),
    "another input": (lambda d: d["inputs"][0].update(name="latent"), "takes unknown inputs"),
    "another output": (lambda d: d["outputs"][0].update(name="image"), "has the outputs"),
    "another state": (lambda d: d["state"][0].update(slot="y1"), "state and schedule differ"),
    "less state": (lambda d: d["state"].pop(), "state and schedule differ"),
    "state's names": (lambda d: d["state"][0].update(name="state_007"), "other names"),
    "state's shape": (lambda d: d["state"][0].update(shape=["batch", 16, 17]), "state_000"),
    "a step's variant": (lambda d: d["steps"].__setitem__(1, 0), "steps and schedule differ"),
    "a step too many": (lambda d: d["steps"].append(0), "steps and schedule differ"),
    "a variant's row": (variant(row="FF"), "two variants have the same row"),
    "a variant's reads": (variant(reads=["state_000"]), "reads state that its row computes"),
    "a variant's writes": (variant(writes=[]), "doesn't write what its row computes"),
    "coefficients": (variant(coefficients=True), "has the inputs"),
    "counts": (variant(counts_dropped=True), "has the outputs"),
    "an unknown form of experts": (lambda d: d.update(expert_lowering="capacity"), "expert_lowering"),
    "one file twice": (variant(file="v1.onnx"), "files"),
    "no timestep": (lambda d: d.update(timestep="time"), "the timestep 'time' is no input"),
    "regions": (lambda d: d["model"]["regions"].reverse(), "for other regions"),
    "another graph": (lambda d: d["model"].update(fingerprint="0" * 16), "of another graph"),
    "an unknown file": (lambda d: d["files"].update({"x.so": d["files"]["v0.onnx"]}), "missing or too many"),
    "another id": (lambda d: d.update(id="0" * 64), "the id isn't that of"),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_manifest_sealed_again(what: str, copy: Path) -> None:
    edit, says = EDITS[what]
    edit_manifest(copy, edit)
    with pytest.raises(BundleError, match=says):
        open_it(copy)


def test_a_manifest_not_sealed_again(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"opset": 20', '"opset": 21'))
    with pytest.raises(BundleError, match="its digest doesn't fit"):
        open_it(copy)


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "[" * 100_000, '{"format": "moeca-bundle"}', "null"])
def test_no_manifest_at_all(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        open_it(copy)


@pytest.mark.parametrize("provider", EACH_PROVIDER)
def test_swapped_variants_with_checksums_that_fit(provider: str, copy: Path) -> None:
    (copy / "v1.onnx").rename(copy / "x")
    (copy / "v2.onnx").rename(copy / "v1.onnx")
    (copy / "x").rename(copy / "v2.onnx")
    seal(copy)
    with pytest.raises(BundleError, match="carries another id or row"):
        open_it(copy, provider)


@pytest.fixture(scope="module")
def sibling(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with other weights, and every file's own checksums: as good a bundle."""
    path = tmp_path_factory.mktemp("sibling") / "b"
    shutil.copytree(exported.path, path)
    weights = bytearray((path / "weights.bin").read_bytes())
    weights[0] ^= 1
    (path / "weights.bin").write_bytes(weights)
    identity = bundle_id(checksum(path / "schedule.json"), checksum(path / "weights.bin"))
    for file in path.glob("*.onnx"):
        model = onnx.load(file, load_external_data=False)
        next(one for one in model.metadata_props if one.key == "moeca.id").value = identity
        file.write_bytes(model.SerializeToString())
    seal(path)
    open_it(path)
    return path


@pytest.mark.parametrize("names", [("weights.bin",), ("v0.onnx",), ("schedule.json",), ("v0.onnx", "v1.onnx")])
def test_parts_of_another_bundle(names: tuple[str, ...], copy: Path, sibling: Path) -> None:
    for name in names:
        shutil.copy(sibling / name, copy / name)
    if names == ("schedule.json",):
        other = Schedule.load(copy / "schedule.json")
        Schedule(other.rows[:2], other.regions, order=1, fingerprint=other.fingerprint).save(copy / "schedule.json")
    with pytest.raises(BundleError):
        open_it(copy)
    seal(copy)
    with pytest.raises(BundleError, match=r"another id or row|schedule|refuses v0"):
        open_it(copy)


def test_a_schedule_of_another_graph(copy: Path) -> None:
    data = json.loads((copy / "schedule.json").read_text())
    (copy / "schedule.json").write_text(json.dumps({**data, "fingerprint": "0" * 16}))
    seal(copy)
    with pytest.raises(BundleError, match="of another graph"):
        open_it(copy)


def test_an_adaptive_schedule(copy: Path) -> None:
    """Its rows are the bundle's, but nothing in it could choose among them."""
    other = Schedule.load(copy / "schedule.json")
    adaptive = Adaptive((0.3, 0.2, 0.1))
    replace(other, rows=other.distinct_rows(), period=0, adaptive=adaptive).save(copy / "schedule.json")
    seal(copy)
    with pytest.raises(BundleError, match=r"steps and schedule differ|state and schedule differ"):
        open_it(copy)


@pytest.mark.parametrize("provider", EACH_PROVIDER)
@pytest.mark.parametrize("where", ["../outside.bin", "/etc/passwd", "sub/../../outside.bin"])
def test_a_graph_that_reads_weights_from_outside(where: str, provider: str, copy: Path) -> None:
    """Sealed, so that only the runtime's own check of locations is left."""
    shutil.copy(copy / "weights.bin", copy.parent / "outside.bin")

    def move(model: Any) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = where

    change_graph(copy, move)
    with pytest.raises(BundleError, match=r"refuses v0\.onnx: .*(outside|escapes|validation|not found)"):
        open_it(copy, provider)


@pytest.mark.parametrize("provider", EACH_PROVIDER)
def test_a_graph_that_reads_past_the_weights(provider: str, copy: Path) -> None:
    def move(model: Any) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "offset":
                    entry.value = str(1 << 40)

    change_graph(copy, move)
    with pytest.raises(BundleError, match=r"refuses v0\.onnx"):
        open_it(copy, provider)


@pytest.mark.parametrize("provider", EACH_PROVIDER)
def test_a_graph_that_is_none(provider: str, copy: Path) -> None:
    (copy / "v0.onnx").write_bytes(b"not a protobuf" * 100)
    seal(copy)
    with pytest.raises(BundleError, match=r"refuses v0\.onnx"):
        open_it(copy, provider)


def change_graph(folder: Path, change: Callable[[Any], None]) -> None:
    model = onnx.load(folder / "v0.onnx", load_external_data=False)
    change(model)
    (folder / "v0.onnx").write_bytes(model.SerializeToString())
    seal(folder)


@pytest.mark.parametrize("provider", EACH_PROVIDER)
@pytest.mark.parametrize("side", ["outputs", "state"])
@pytest.mark.parametrize("dim", ["2*batch", "batch+1", "batch-1", "batch-5", "1000000*batch", "2000000000*batch"])
def test_sizes_that_are_not_the_graph_s(dim: str, side: str, provider: str, copy: Path) -> None:
    """onnxruntime says what a graph's sizes are made of; OpenVINO gives them when it runs."""
    edit_manifest(copy, lambda data: data[side][0]["shape"].__setitem__(0, dim))
    call = Bundle.open(copy).golden()[0][0]
    with pytest.raises(BundleError, match=r"the manifest says|can't be at batch"):
        open_it(copy, provider).run(call)


def test_golden_steps_that_do_not_fit(copy: Path) -> None:
    edit_manifest(copy, lambda data: data["golden"].update(steps=1000))
    with pytest.raises(BundleError, match="doesn't hold 1000 steps"):
        open_it(copy).bundle.golden()
    (copy / "golden.npz").write_bytes(b"PK nothing")
    seal(copy)
    with pytest.raises(BundleError, match=r"golden\.npz can't be read"):
        open_it(copy).bundle.golden()


def test_pickled_golden_steps_are_not_unpickled(copy: Path) -> None:
    import numpy as np

    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(copy / "sprung"),)

    arrays = {f"{side}_{i:03d}": np.array([Trap()], dtype=object) for side in ("input", "output") for i in range(3)}
    np.savez(copy / "golden.npz", **arrays)
    seal(copy)
    with pytest.raises(BundleError, match="can't be read"):
        open_it(copy).bundle.golden()
    assert not (copy / "sprung").exists()


def test_manifest_of_an_export_passes(exported: Bundle) -> None:
    check_consistency(Manifest.parse((exported.path / "manifest.json").read_bytes()), exported.schedule)
