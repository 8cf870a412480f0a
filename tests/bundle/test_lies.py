"""Bundles that lie consistently: checksums fit, entries agree with one another, and something is another thing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.verify import verify
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import EACH_PROVIDER, edit_manifest
from tests.bundle.test_bad_bundles import change_graph


def states_of(data: dict[str, Any]) -> tuple[Any, Any]:
    """The latest outputs of two regions, whose shapes are the same."""
    first, second = (
        next(state for state in data["state"] if (state["region"], state["slot"]) == (region, "y0"))
        for region in range(2)
    )
    assert first["shape"] == second["shape"]
    return first, second


def swap_names(data: dict[str, Any]) -> None:
    first, second = states_of(data)
    first["name"], second["name"] = second["name"], first["name"]


def swap_names_everywhere(data: dict[str, Any]) -> None:
    """In the variants too, so that the manifest agrees with itself."""
    first, second = states_of(data)
    other = {first["name"]: second["name"], second["name"]: first["name"]}
    swap_names(data)
    for variant in data["variants"]:
        for side in ("reads", "writes"):
            variant[side] = [other.get(name, name) for name in variant[side]]


def swap_regions(data: dict[str, Any]) -> None:
    first, second = states_of(data)
    first["region"], second["region"] = second["region"], first["region"]


@pytest.mark.parametrize("provider", EACH_PROVIDER)
@pytest.mark.parametrize("edit", [swap_names, swap_names_everywhere, swap_regions])
def test_swapped_states_of_a_sealed_manifest(copy: Path, provider: str, edit: Callable[[dict[str, Any]], None]) -> None:
    edit_manifest(copy, edit)
    with pytest.raises(BundleError, match=r"the manifest says|doesn't write what its row computes|state"):
        Session.open(copy, provider, threads=1)


def swap_outputs(model: Any) -> None:
    """The graph gives the outputs of two regions under each other's names."""
    data = {value.name: value for value in model.graph.output}
    first, second = "state_000_out", "state_002_out"
    assert {first, second} <= set(data)
    other = {first: second, second: first}
    for node in model.graph.node:
        node.output[:] = [other.get(name, name) for name in node.output]
        node.input[:] = [other.get(name, name) for name in node.input]


def subtract(model: Any) -> None:
    """The last sum is a difference."""
    [node for node in model.graph.node if node.op_type == "Add"][-1].op_type = "Sub"


@pytest.mark.parametrize("change", [swap_outputs, subtract])
def test_a_changed_graph_whose_checksums_fit(copy: Path, change: Callable[[Any], None]) -> None:
    """Nothing that is read shows it; the golden steps do."""
    change_graph(copy, change)
    session = Session.open(copy, threads=1)
    verdict = verify(session)
    assert not verdict.passed
    assert verdict.error > 100 * verdict.tolerance


@pytest.mark.parametrize("where", ["../outside.bin", "/etc/passwd", "golden.npz/../../outside.bin"])
def test_exchanged_weights_do_not_come_from_outside(exported: Bundle, tmp_path: Path, where: str) -> None:
    bundle = exported.with_weights({}, tmp_path / "b")
    (tmp_path / "outside.bin").write_bytes((bundle.path / "weights.bin").read_bytes())

    def move(model: Any) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = where

    change_graph(bundle.path, move)
    with pytest.raises(BundleError, match=r"refuses v0\.onnx"):
        Session.open(bundle.path, threads=1)


KILLED = """
import os, signal, sys
import moeca_compile as moeca
from moeca_compile.exporting import entry
from tests.bundle.conftest import call_of, small_model

written = entry.check_export

def killed(folder, *rest):
    assert (folder / "manifest.json").exists()
    os.kill(os.getpid(), signal.SIGKILL)

entry.check_export = killed
moeca.export(small_model(), call_of(2), "full", sys.argv[1], dynamic_batch=False)
"""


@pytest.mark.slow
def test_an_export_that_is_killed(tmp_path: Path) -> None:
    """At its last step, when every file is written: nothing is at the path, and what is beside it is called
    unfinished."""
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "b"], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".b.")
    assert left.endswith(".unfinished")
    with pytest.raises(BundleError, match="is no directory"):
        Bundle.open(tmp_path / "b")


def test_a_graph_of_the_small_model_has_the_states_that_are_swapped(exported: Bundle) -> None:
    names = [value.name for value in onnx.load_from_string(exported.graphs[0]).graph.output]
    assert {"state_000_out", "state_002_out"} <= set(names)
    assert json.loads((exported.path / "manifest.json").read_text())["state"][2]["slot"] == "y0"
