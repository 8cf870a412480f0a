"""`fused.onnx`: one graph that counts its steps gives what the variants give, on both runtimes; what it can't hold."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from moeca_compile.errors import BundleError, LoweringError
from moeca_compile.exporting.request import Captured
from moeca_compile.exporting.steps import step_table
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.fused import FusedSession
from moeca_compile.runtime.bundle.manifest import FUSED, STEP, FusedSpec
from moeca_compile.runtime.bundle.verify import relative_error, verify
from moeca_compile.runtime.session import Session
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.forecast import COPY, NOTHING
from tests.bundle.conftest import EACH_PROVIDER, call_of, edit_manifest, named, warnings_of
from tests.bundle.test_bad_bundles import seal
from tests.models import DiT
from tests.tools import row


@pytest.fixture(scope="module", params=EACH_PROVIDER)
def fused(exported: Bundle, request: pytest.FixtureRequest) -> FusedSession:
    return FusedSession.open(exported.path, request.param, threads=1)


def test_it_gives_what_the_variants_give(fused: FusedSession, exported: Bundle) -> None:
    """Through all rows and round the period; then again with another batch, from step 0."""
    session = Session.open(exported.path, fused.provider, threads=1)
    for batch in (3, 2):
        with session.trajectory() as apart, fused.trajectory() as whole:
            for step in range(14):
                call = named(call_of(batch, seed=step))
                assert relative_error(whole.run(call)["output"], apart.run(call)["output"]) < 1e-5
            assert len({record.variant for record in apart.records}) == 4


def test_it_is_verified(fused: FusedSession, exported: Bundle) -> None:
    verdict = verify(fused)
    assert verdict.passed
    assert verdict.variants == ("fused",)
    assert exported.manifest.fused == FusedSpec(FUSED, None)


def test_weights_lie_in_the_main_graph_once(exported: Bundle) -> None:
    """A branch's own would be kept once more by the runtime; and all are references into the one file."""
    assert exported.fused is not None
    graph = onnx.load_from_string(exported.fused).graph
    inside = [part.g for node in graph.node for part in node.attribute if part.type == onnx.AttributeProto.GRAPH]
    while inside:
        one = inside.pop()
        assert not one.initializer
        inside += [part.g for node in one.node for part in node.attribute if part.type == onnx.AttributeProto.GRAPH]
    places = [tuple(entry.value for entry in one.external_data) for one in graph.initializer if one.external_data]
    assert places
    assert len(set(places)) == len(places)
    onnx.checker.check_model(str(exported.path / FUSED), full_check=True)


def test_states_are_named_so_that_inputs_and_outputs_sort_alike(exported: Bundle) -> None:
    """Triton pairs them by order, not by name."""
    assert exported.fused is not None
    graph = onnx.load_from_string(exported.fused).graph
    ins = [one.name.removesuffix("_in") for one in graph.input if one.name.endswith("_in")]
    outs = [one.name.removesuffix("_out") for one in graph.output if one.name.endswith("_out")]
    assert ins == outs == [STEP, *(one.name for one in exported.manifest.state)]
    assert ins == sorted(ins)
    assert [f"{one}_in" for one in ins] == sorted(f"{one}_in" for one in ins)


def test_step_0_reads_no_state(exported: Bundle, session: Session) -> None:
    """Whatever lies there, of whatever batch: so a runtime may begin with zeros, or with what another request left."""
    loaded = ort.InferenceSession(exported.path / FUSED, providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {f"{STEP}_in": np.zeros(1, np.int64)}
    feeds |= {f"{one.name}_in": np.full(one.sizes(5), np.nan, one.dtype) for one in exported.manifest.state}
    names = [one.name for one in loaded.get_outputs()]
    with session.trajectory() as trajectory:
        for step in range(6):
            call = named(call_of(2, seed=step))
            found = dict(zip(names, loaded.run(names, feeds | call), strict=True))
            assert relative_error(found["output"], trajectory.run(call)["output"]) < 1e-5
            feeds = {f"{name[:-4]}_in": one for name, one in found.items() if name.endswith("_out")}


def test_trajectories_in_threads(fused: FusedSession) -> None:
    def outputs(seed: int) -> list[Any]:
        with fused.trajectory() as trajectory:
            return [trajectory.run(named(call_of(2, seed=seed + step)))["output"] for step in range(6)]

    wanted = {seed: outputs(seed) for seed in (0, 10)}
    found: dict[int, list[Any]] = {}
    threads = [threading.Thread(target=lambda seed=seed: found.update({seed: outputs(seed)})) for seed in wanted]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for seed, arrays in wanted.items():
        assert all((a == b).all() for a, b in zip(found[seed], arrays, strict=True))


def test_inputs_are_checked(fused: FusedSession) -> None:
    with fused.trajectory() as trajectory, pytest.raises(BundleError, match="x has shape"):
        trajectory.run({**named(call_of(2)), "x": np.zeros((2, 4, 8, 9), np.float32)})


@pytest.mark.slow
def test_a_schedule_that_ends(model: DiT, closed: Bundle) -> None:
    bundle = closed
    assert bundle.manifest.fused == FusedSpec(FUSED, 3)
    fused = FusedSession.open(bundle.path, threads=1)
    with fused.trajectory() as trajectory:
        for time in (900.0, 600.0, 300.0):
            trajectory.run({**named(call_of(2)), "t": np.full(2, time, np.float32)})
        found: list[Any] = []
        call = named(call_of(2, seed=9))
        said = warnings_of(lambda: found.extend(trajectory.run(call)["output"] for _ in range(2)))
    assert ["step 3 is past the schedule's last row" in one for one in said] == [True]
    assert all(relative_error(one, model(*call_of(2, seed=9))) < 1e-4 for one in found)
    with fused.trajectory() as trajectory:
        calls = [{**call, "t": np.full(2, time, np.float32)} for time in (900.0, 500.0, 100.0)]
        said = warnings_of(lambda: [trajectory.run(one) for one in calls])
    assert ["row 1 of the schedule was made for 600" in one for one in said] == [True]
    # who runs the graph without us gets a step that computes everything
    loaded = ort.InferenceSession(bundle.path / FUSED, providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {f"{STEP}_in": np.array([7])}
    feeds |= {f"{one.name}_in": np.ones(one.sizes(2), one.dtype) for one in bundle.manifest.state}
    call = call_of(2, seed=9)
    assert relative_error(loaded.run(["output"], feeds | named(call))[0], model(*call)) < 1e-4


def test_a_table_of_steps(torch_side: Captured, schedule: Schedule) -> None:
    program = torch_side.program
    table = step_table(program.schedule, program.layout, 2)
    assert table.steps is None
    assert table.period == 4
    assert table.variants[:5] == (0, 1, 2, 0, 3)
    assert table.coefficients[0] == table.coefficients[3] == (NOTHING, NOTHING)
    assert table.coefficients[1] == (COPY, COPY)  # nothing to forecast from but one output
    assert table.coefficients[-4:] == tuple(table.coefficients[-8:-4])


def test_what_no_table_holds_is_refused(torch_side: Captured) -> None:
    program = torch_side.program
    endless = replace(program.schedule, rows=(row("CC"), row("CC"), row("CF")), period=1)
    with pytest.raises(LoweringError, match="ever larger distances"):
        step_table(endless, program.layout, 2)


def test_a_bundle_without_one(copy: Path, exported: Bundle) -> None:
    edit_manifest(copy, lambda data: (data.update(fused=None), data["files"].pop(FUSED)))
    with pytest.raises(BundleError, match=r"has no fused\.onnx: export it with fused=True"):
        FusedSession.open(copy)


@pytest.mark.parametrize("provider", EACH_PROVIDER)
@pytest.mark.parametrize("what", ["missing", "changed", "a variant", "steps", "name", "signature"])
def test_a_spoiled_one_is_refused(what: str, provider: str, copy: Path) -> None:
    says = {
        "missing": r"fused\.onnx is missing", "changed": r"fused\.onnx isn't what was exported",
        "a variant": "carries another id or row", "steps": "fused graph is of another schedule",
        "name": "fused", "signature": r"fused\.onnx has the outputs",
    }[what]  # fmt: skip
    file = copy / FUSED
    if what == "missing":
        file.unlink()
    elif what == "changed":
        raw = file.read_bytes()
        file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif what == "a variant":
        shutil.copy(copy / "v0.onnx", file)
        seal(copy)
    elif what == "steps":
        edit_manifest(copy, lambda data: data["fused"].update(steps=5))
    elif what == "name":
        edit_manifest(copy, lambda data: data["fused"].update(file="../fused.onnx"))
    else:
        graph = onnx.load(file, load_external_data=False)
        del graph.graph.output[-1]
        file.write_bytes(graph.SerializeToString())
        seal(copy)
    with pytest.raises(BundleError, match=says):
        FusedSession.open(copy, provider, threads=1)
