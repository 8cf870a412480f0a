"""Weights exchanged in a bundle: bit for bit what an export of the changed model gives, and nothing is copied."""

from __future__ import annotations

import copy as copies
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.utils.parametrizations import weight_norm

import moeca_compile as moeca
from moeca_compile.errors import BundleError, MoecaWarning
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.fused import FusedSession
from moeca_compile.runtime.bundle.manifest import EngineSpec
from moeca_compile.runtime.bundle.refit.given import GivenWeights
from moeca_compile.runtime.bundle.refit.parameters import ParameterSpec, ParameterTable
from moeca_compile.runtime.bundle.verify import verify
from moeca_compile.runtime.session import Session
from moeca_compile.schedule import Schedule
from tests.bundle.conftest import EACH_PROVIDER, call_of, named, small_model
from tests.bundle.test_bad_bundles import seal
from tests.models import DiT

STEPS = 6
EXPERT = "blocks.0.moe.experts.1.up_proj.weight"
CHANGED = ("blocks.0.qkv.weight", "blocks.0.qkv.bias", EXPERT, "time.2.weight", "pos")


def adapted(model: DiT, names: tuple[str, ...] = CHANGED) -> DiT:
    """The model as an adapter would leave it that was merged."""
    torch.manual_seed(1)
    twin = copies.deepcopy(model)
    for name in names:
        parameter = twin.get_parameter(name)
        parameter.add_(0.1 * torch.randn_like(parameter))
    return twin


def changes(model: DiT, names: tuple[str, ...] = CHANGED) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name in names}


def results(session: Session | FusedSession, batch: int = 3) -> list[bytes]:
    with session.trajectory() as trajectory:
        return [trajectory.run(named(call_of(batch, seed=step)))["output"].tobytes() for step in range(STEPS)]


def results_of(bundle: Bundle) -> list[bytes]:
    return results(Session.open(bundle.path, threads=1))


@pytest.fixture(scope="module")
def twin(model: DiT) -> DiT:
    return adapted(model)


@pytest.fixture(scope="module")
def fresh(twin: DiT, schedule: Schedule, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An export of the changed model."""
    path = tmp_path_factory.mktemp("fresh") / "b"
    return moeca.export(twin, call_of(2), schedule, path, fused=True, targets=("onnx", "openvino"))


@pytest.fixture(scope="module")
def refitted(exported: Bundle, twin: DiT, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported.with_weights(twin.state_dict(), tmp_path_factory.mktemp("refitted") / "b")


@pytest.mark.parametrize("provider", EACH_PROVIDER)
def test_it_is_an_export_of_the_changed_model(refitted: Bundle, fresh: Bundle, exported: Bundle, provider: str) -> None:
    for kind in (Session, FusedSession):
        found, wanted, before = (
            results(kind.open(bundle.path, provider, threads=1)) for bundle in (refitted, fresh, exported)
        )
        assert found == wanted
        assert all(one != other for one, other in zip(found, before, strict=True))


def test_graphs_do_not_depend_on_the_weights(fresh: Bundle, exported: Bundle) -> None:
    """But for the id that they carry."""
    for ours, others in zip(exported.graphs, fresh.graphs, strict=True):
        assert ours.replace(exported.manifest.id.encode(), fresh.manifest.id.encode()) == others


def test_golden_steps_are_run_anew(refitted: Bundle, fresh: Bundle) -> None:
    session = Session.open(refitted.path)
    assert verify(session).error == 0
    assert refitted.manifest.golden.by == session.runtime.version()
    assert refitted.manifest.golden.measured == ()
    for ours, torchs in zip(refitted.golden()[1], fresh.golden()[1], strict=True):
        np.testing.assert_allclose(ours["output"], torchs["output"], atol=1e-4)


def test_weights_that_stay_are_shared(refitted: Bundle, exported: Bundle, twin: DiT) -> None:
    assert (refitted.path / "weights.bin").samefile(exported.path / "weights.bin")
    changed = sum(value.numel() * value.element_size() for value in changes(twin).values())
    assert changed <= (refitted.path / "changed.bin").stat().st_size < changed + 64 * len(CHANGED)
    assert refitted.manifest.base == exported.manifest.id != refitted.manifest.id
    assert f"exchanged in {exported.manifest.id[:12]}" in str(refitted)


def test_it_outlives_its_base(exported: Bundle, twin: DiT, tmp_path: Path) -> None:
    base = Bundle.open(shutil.copytree(exported.path, tmp_path / "base"))
    bundle = base.with_weights(changes(twin), tmp_path / "b")
    wanted = results_of(bundle)
    shutil.rmtree(base.path)
    assert results_of(bundle) == wanted


def test_exchanged_twice(refitted: Bundle, exported: Bundle, model: DiT, tmp_path: Path) -> None:
    """One parameter back, then all of them."""
    once = refitted.with_weights(changes(model, (EXPERT,)), tmp_path / "once")
    assert results_of(once) != results_of(refitted)
    again = once.with_weights(model.state_dict(), tmp_path / "again")
    assert results_of(again) == results_of(exported)
    assert (again.path / "weights.bin").samefile(exported.path / "weights.bin")


def test_the_same_weights(exported: Bundle, model: DiT, tmp_path: Path) -> None:
    bundle = exported.with_weights(model.state_dict(), tmp_path / "b")
    assert not (bundle.path / "changed.bin").exists()
    assert bundle.manifest.id == exported.manifest.id
    assert results_of(bundle) == results_of(exported)


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["dense", "moe"])
def test_one_expert_of_a_layer_that_is_packed(model: DiT, tmp_path: Path, experts: str) -> None:
    def export(of: DiT, name: str) -> Bundle:
        return moeca.export(of, call_of(2), "uniform:2", tmp_path / name, experts=experts, dynamic_batch=False)

    twin = adapted(model, (EXPERT,))
    bundle = export(model, "base").with_weights(changes(twin, (EXPERT,)), tmp_path / "b")
    wanted = export(twin, "fresh")
    assert results(Session.open(bundle.path, threads=1), 2) == results(Session.open(wanted.path, threads=1), 2)


def test_from_a_file(exported: Bundle, refitted: Bundle, twin: DiT, tmp_path: Path) -> None:
    save_file(changes(twin), tmp_path / "adapter.safetensors")
    bundle = exported.with_weights(tmp_path / "adapter.safetensors", tmp_path / "b")
    assert bundle.manifest.id == refitted.manifest.id
    assert results_of(bundle) == results_of(refitted)


def test_where_nothing_can_be_shared(
    exported: Bundle, refitted: Bundle, twin: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: object, target: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    with pytest.warns(MoecaWarning, match=r"weights\.bin can't be shared with .*: Invalid cross-device link"):
        bundle = exported.with_weights(changes(twin), tmp_path / "b")
    assert not (bundle.path / "weights.bin").samefile(exported.path / "weights.bin")
    assert results_of(bundle) == results_of(refitted)


WRONG: dict[str, tuple[Callable[[DiT], Any], str]] = {
    "an unknown name": (lambda m: {"blocks.9.qkv.weight": m.pos}, r"no parameters blocks\.9\.qkv\.weight\. Give the"),
    "many unknown names": (lambda m: {f"lora.{i}": m.pos for i in range(9)}, r"lora\.4 and 4 more"),
    "another shape": (lambda m: {"pos": m.pos[0]}, r"pos is float32 \[16, 16\], the bundle's is float32 \[1, 16, 16\]"),
    "another dtype": (lambda m: {"pos": m.pos.half()}, r"pos is float16 .*give it in this shape and dtype"),
    "float64 by numpy's default": (lambda m: {"pos": np.zeros((1, 16, 16))}, "pos is float64"),
    "no array": (lambda m: {"pos": object()}, r"pos is object|pos is no array"),
    "ragged": (lambda m: {"pos": [[1.0], [1.0, 2.0]]}, r"pos is no array: ValueError"),
    "a model": (lambda m: m, r"got DiT; for a model give model\.state_dict\(\)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_weights_that_do_not_fit(exported: Bundle, model: DiT, tmp_path: Path, what: str) -> None:
    weights, message = WRONG[what]
    with pytest.raises(BundleError, match=message):
        exported.with_weights(weights(model), tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_an_unreadable_file(exported: Bundle, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    for name in ("x.safetensors", "nowhere.safetensors"):
        with pytest.raises(BundleError, match="is no readable safetensors file"):
            exported.with_weights(tmp_path / name, tmp_path / "b")


def test_a_path_that_is_taken(exported: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="exists already"):
        exported.with_weights({}, tmp_path)


def test_engines_are_left_out(exported: Bundle, tmp_path: Path) -> None:
    engine = EngineSpec("v0", "engines/a/v0.plan", "tensorrt", "11.0", ("sm_90",), None)
    manifest = msgspec.structs.replace(exported.manifest, engines=(engine,))
    with_engines = Bundle(exported.path, manifest, exported.schedule, exported.graphs)
    with pytest.warns(MoecaWarning, match="engines have its old weights in them and are left out"):
        bundle = with_engines.with_weights({}, tmp_path / "b")
    assert bundle.manifest.engines == ()


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiT, Bundle]:
    """A model with a weight that is computed with, one with two names, and one that no call reads."""
    model = small_model()
    weight_norm(model.out)
    model.requires_grad_(False)
    model.same_as_pos = model.pos
    model.unused = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    path = tmp_path_factory.mktemp("special") / "b"
    return model, moeca.export(model, call_of(2), "uniform:2", path, dynamic_batch=False)


@pytest.mark.slow
def test_a_weight_that_is_computed_with(special: tuple[DiT, Bundle], tmp_path: Path) -> None:
    model, bundle = special
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    bundle.with_weights(weights, tmp_path / "same")
    name = "out.parametrizations.weight.original1"
    weights[name] += 1
    with pytest.raises(BundleError, match=rf"computed with {name}: export again for other values"):
        bundle.with_weights(weights, tmp_path / "b")


@pytest.mark.slow
def test_two_names_of_one_weight(special: tuple[DiT, Bundle], tmp_path: Path) -> None:
    model, bundle = special
    one, other = model.pos + 1, model.pos + 2
    by_alias = bundle.with_weights({"same_as_pos": one}, tmp_path / "a")
    by_both = bundle.with_weights({"pos": one, "same_as_pos": one}, tmp_path / "b")
    assert by_alias.manifest.id == by_both.manifest.id != bundle.manifest.id
    with pytest.raises(BundleError, match="are one parameter, and two different arrays"):
        bundle.with_weights({"pos": one, "same_as_pos": other}, tmp_path / "c")


def test_a_weight_that_no_graph_reads(special: tuple[DiT, Bundle], tmp_path: Path) -> None:
    _, bundle = special
    assert bundle.with_weights({"unused": torch.zeros(3)}, tmp_path / "b").manifest.id == bundle.manifest.id


def test_bfloat16() -> None:
    table = ParameterTable({"w": ParameterSpec("bfloat16", (2,))}, {}, ())
    given = GivenWeights({"w": torch.tensor([1.0, -2.0], dtype=torch.bfloat16)}, table)
    assert given.array("w").tolist() == [0x3F80, 0xC000]
    with pytest.raises(BundleError, match=r"w is float32 \[2\], the bundle's is bfloat16"):
        GivenWeights({"w": np.ones(2, np.float32)}, table)


def test_a_bundle_of_an_older_format(copy: Path, tmp_path: Path) -> None:
    (copy / "parameters.json").unlink()
    data = json.loads((copy / "manifest.json").read_text())
    del data["files"]["parameters.json"]
    (copy / "manifest.json").write_text(json.dumps(data))
    seal(copy)
    with pytest.raises(BundleError, match=r"has no parameters\.json, which weights are exchanged by: export it again"):
        Bundle.open(copy).with_weights({}, tmp_path / "b")


LIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "an unknown parameter": (lambda t: t["parameters"].pop("pos"), r"unknown parameters \['pos'\]"),
    "past the end": (lambda t: t["stored"][0].update(offset=1 << 39), r"is outside weights\.bin"),
    "outside the folder": (lambda t: t["stored"][0].update(file="../x"), r"parameters\.json: .*regex"),
    "another file": (lambda t: t["stored"][0].update(file="x"), "is outside x"),
    "an alias of nothing": (lambda t: t["aliases"].update(a="b"), "the alias 'a' is of no parameter"),
    "no recipe": (lambda t: t["stored"][0].update(recipe={"op": "exec"}), r"parameters\.json: Invalid value"),
    "another shape": (lambda t: _stored(t, "pos").update(shape=[16, 16]), r"it gives \[1, 16, 16\]"),
    "a reshape that can't be": (
        lambda t: _stored(t, "pos").update(recipe={"op": "reshape", "sizes": [7], "of": _stored(t, "pos")["recipe"]}),
        "a recipe doesn't fit its parameters",
    ),
}


def _stored(table: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in table["stored"] if one["recipe"].get("name") == name)


@pytest.mark.parametrize("lie", LIES)
def test_a_sealed_table_that_lies(copy: Path, twin: DiT, tmp_path: Path, lie: str) -> None:
    edit, message = LIES[lie]
    table = json.loads((copy / "parameters.json").read_text())
    edit(table)
    (copy / "parameters.json").write_text(json.dumps(table))
    seal(copy)
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy).with_weights({"pos": twin.pos} if "pos" in table["parameters"] else {}, tmp_path / "b")
    assert not (tmp_path / "b").exists()
