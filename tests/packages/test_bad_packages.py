"""Packages that somebody spoiled, or that are of another machine: refused before any native code is loaded."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import moeca_compile as moeca
from moeca_compile.engine.packages import program
from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.packages.machine import this_machine
from moeca_compile.runtime.writing import entry_of
from tests.bundle.conftest import Edit, edit_manifest

NAMES = ["weights.pt", "v0.pt2", "v1.pt2", "schedule.json", "manifest.json"]


@pytest.fixture(autouse=True)
def no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path) -> Any:
        raise AssertionError(f"{file} was loaded")

    monkeypatch.setattr(program, "native_code", refuse)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        moeca.load(copy)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_changed_file(copy: Path, name: str) -> None:
    raw = bytearray((copy / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / name).write_bytes(raw)
    with pytest.raises(BundleError, match=f"{name} isn't what was exported|{name}: "):
        moeca.load(copy)
    (copy / name).write_bytes(raw[:-1])
    with pytest.raises(BundleError, match=f"{name} has .* bytes"):
        moeca.load(copy)


def test_a_link_in_place_of_a_file(copy: Path, saved: Path) -> None:
    (copy / "v0.pt2").unlink()
    (copy / "v0.pt2").symlink_to(saved / "v0.pt2")
    with pytest.raises(BundleError, match=r"v0\.pt2 is a link"):
        moeca.load(copy)


def test_a_changed_manifest(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"v1"', '"v7"'))
    with pytest.raises(BundleError, match="changed after the package was saved"):
        moeca.load(copy)
    (copy / "manifest.json").write_text(text[:-20])
    with pytest.raises(BundleError, match="isn't JSON"):
        moeca.load(copy)


def _set(place: str, value: object) -> Edit:
    def edit(data: dict[str, Any]) -> None:
        *parents, last = place.split(".")
        for parent in parents:
            data = data[int(parent)] if parent.isdigit() else data[parent]  # type: ignore[index]
        data[int(last) if last.isdigit() else last] = value  # type: ignore[index]

    return edit


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        ("format", "zip", "isn't of a package"),
        ("version", 9, "format is version 9"),
        ("sizes.0.latent", "x", "Expected `int | null`, got `str`"),
        ("sizes.0.variants", [], "length >= 1"),
        ("sizes.0.variants.1.takes", [999], "v1 takes an unknown input"),
        ("sizes.0.variants.1.reads", [999], "v1 has an unknown state"),
        ("sizes.0.variants.1.hoists", [999], "v1 has an unknown value"),
        ("sizes.0.variants.1.file", "v0.pt2", r"\['v1.pt2'\] are missing or too many"),
        ("sizes.0.variants.1.file", "../v1.pt2", "matching regex"),
        ("sizes.0.latent", 999, "a role is of no input"),
        ("sizes.0.arguments.0", {"leaf": 999}, "a tensor is of no argument"),
        ("made_for.torch", "2.10.0", "compiled with torch 2.10.0, and this is torch 2"),
        ("made_for.machine", "riscv64", "compiled for riscv64, and this machine is"),
        ("made_for.features", ["avx1024"], "lacks avx1024"),
    ],
)
def test_a_sealed_manifest_that_does_not_fit(copy: Path, place: str, value: object, match: str) -> None:
    edit_manifest(copy, _set(place, value))
    with pytest.raises(BundleError, match=match):
        moeca.load(copy)


def test_a_variant_too_few(copy: Path) -> None:
    edit_manifest(copy, lambda data: data["sizes"][0]["variants"].pop())
    with pytest.raises(BundleError, match="the variants aren't the schedule's rows"):
        moeca.load(copy)


def test_a_bundle_is_no_package_and_no_folder_is_none(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no directory; a package is one"):
        moeca.load(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"moeca_compile.load opens it"):
        Bundle.open(copy)
    edit_manifest(copy, lambda data: data.update(format="moeca-bundle"))
    with pytest.raises(BundleError, match="bundle of ONNX graphs"):
        moeca.load(copy)


def test_native_code_that_torch_cannot_load(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    broken = tmp_path / "v0.pt2"
    broken.write_bytes(b"no archive")
    with pytest.raises(BundleError, match=r"v0\.pt2 can't be loaded"):
        program.native_code(broken)


def test_the_machine_is_read_from_linux(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name : A\nflags : fpu avx2 fma hypervisor sse4_2\n\nmodel name : B\n")
    here = this_machine("2.13.0", cpuinfo)
    assert (here.torch, here.processor, here.features) == ("2.13.0", "A", ("avx2", "fma", "sse4_2"))
    assert this_machine("2.13.0", tmp_path / "none").features == ()


KILLED = """
import os, signal, sys, torch
import moeca_compile as moeca
from moeca_compile.exporting.packages import entry
from tests.packages.conftest import call_at, compiled, small_model

def die(folder, *rest):
    (folder / "v0.pt2").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

entry.write_programs = die
moeca.save(compiled(small_model()), sys.argv[1], *call_at())
"""


@pytest.mark.slow
def test_a_killed_save_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "package")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".unfinished")
    for folder in (left, tmp_path / "package"):
        with pytest.raises(BundleError, match=r"manifest.json is missing|is no directory"):
            moeca.load(folder)


def test_weights_that_are_no_weights(copy: Path) -> None:
    (copy / "weights.pt").write_bytes(b"nothing")
    edit_manifest(copy, lambda data: data["files"].update({"weights.pt": entry_of(copy / "weights.pt")}))
    with pytest.raises(BundleError, match=r"weights.pt can't be read"):
        moeca.load(copy)
