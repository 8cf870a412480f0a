"""Engines from bundles: what is refused before TensorRT is asked, what it refuses or dies of, what the bundle keeps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

import moeca_compile as moeca
from moeca_compile.errors import BundleError, LoweringError, MoecaWarning, OptionError
from moeca_compile.exporting.engines import add_engines
from moeca_compile.lowering.tensorrt import build as tensorrt
from moeca_compile.lowering.tensorrt.build import EngineRequest, build, build_engines, profile, targets
from moeca_compile.lowering.tensorrt.operators import operators_of, refuse_unsupported
from moeca_compile.runtime.bundle.bundle import Bundle, engine_file
from moeca_compile.runtime.tensorrt import library as libraries
from moeca_compile.runtime.tensorrt.library import Library, find
from moeca_compile.schedule import Schedule
from tests.bundle.conftest import call_of, edit_manifest, small_model

pytestmark = pytest.mark.slow  # `make engines` runs these too
rtx = pytest.mark.skipif(
    "not __import__('importlib').util.find_spec('tensorrt_rtx_bindings')", reason="TensorRT-RTX isn't installed"
)


@rtx
def test_every_variant_is_an_engine_in_the_bundle(lowered: Bundle) -> None:
    manifest, library = lowered.manifest, find("tensorrt-rtx")
    assert [one.variant for one in manifest.engines] == [one.name for one in manifest.variants]
    for one in manifest.engines:
        assert one.folder == f"engines/sm_80-sm_86-sm_89-sm_120-{library.tag}"
        assert (one.arch, one.version, one.batch) == (tensorrt.PORTABLE, library.version, (1, 2, 8))
        assert len(engine_file(lowered.path, one, lowered.manifest)) == manifest.files[one.file].bytes > 100_000
    assert sorted(file.name for file in lowered.path.iterdir() if file.is_dir()) == ["engines"]


@rtx
def test_more_engines_and_the_same_again(lowered: Bundle, tmp_path: Path) -> None:
    shutil.copytree(lowered.path, tmp_path / "b")
    request = EngineRequest("tensorrt-rtx", ("sm_89",), (2, 2, 4), tmp_path / "timing.cache")
    bundle = build_engines(Bundle.open(tmp_path / "b"), request)
    folders = {one.folder for one in bundle.manifest.engines}
    assert len(folders) == 2
    assert (tmp_path / "timing.cache").exists()
    first = bundle.path / f"engines/sm_89-{find('tensorrt-rtx').tag}" / "v0.plan"
    first.write_bytes(b"damaged")
    again = build_engines(bundle, request)
    assert {one.folder for one in again.manifest.engines} == folders
    assert all(len(engine_file(again.path, one, again.manifest)) > 100_000 for one in again.manifest.engines)
    assert Bundle.open(again.path).manifest == again.manifest


def test_requests_that_cannot_be() -> None:
    with pytest.raises(OptionError, match="library='trt'"):
        EngineRequest(library="trt")
    with pytest.raises(OptionError, match=r"\['89'\] aren't like 'sm_89'"):
        EngineRequest(arch=("89",))
    for batch in ((0, 1, 2), (2, 1, 4), (1, 8, 4)):
        with pytest.raises(OptionError, match="the least, the usual and the largest"):
            EngineRequest(batch=batch)


@rtx
def test_architectures() -> None:
    library = find("tensorrt-rtx")
    assert targets(library, ("sm_120", "sm_89", "sm_89")) == ("sm_89", "sm_120")
    with pytest.raises(OptionError, match=r"doesn't build for \['sm_90'\]; it does for"):
        targets(library, ("sm_90",))


def test_classic_tensorrt_builds_for_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library("tensorrt", "11.4", None)
    monkeypatch.setattr(tensorrt, "Device", lambda: type("Device", (), {"arch": "sm_90"}))
    assert targets(library, ()) == targets(library, ("sm_90",)) == ("sm_90",)
    with pytest.raises(OptionError, match="for this machine's GPU only, which is sm_90"):
        targets(library, ("sm_89",))


def graph(*operators: str, domain: str = "", dtype: int = TensorProto.FLOAT) -> bytes:
    ends = [helper.make_tensor_value_info(name, dtype, [2]) for name in ("0", str(len(operators)))]
    nodes = [
        helper.make_node(one, [str(i)], [str(i + 1)], name=f"the_{one}", domain=domain)
        for i, one in enumerate(operators)
    ]
    return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:])).SerializeToString()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (graph("Relu", "NonZero"), r"NonZero \(node the_NonZero\): how many values it gives depends on data"),
        (graph("Attention"), r"Attention \(node the_Attention\)"),
        (graph("MoE", domain="com.microsoft"), r"com\.microsoft\.MoE \(node the_MoE\): no operator of ONNX itself"),
        (graph("Relu", dtype=TensorProto.DOUBLE), r"float64 \(0\): TensorRT has no such type"),
    ],
)
def test_operators_that_are_refused_by_name(raw: bytes, says: str) -> None:
    with pytest.raises(LoweringError, match=rf"x\.onnx can't become an engine of TensorRT: {says}"):
        refuse_unsupported(raw, "x.onnx")
    refuse_unsupported(graph("Relu", "Erf"), "x.onnx")


def test_operators_inside_branches_count() -> None:
    inner = helper.make_graph(
        [helper.make_node("NonZero", ["0"], ["n"])],
        "i",
        [],
        [helper.make_tensor_value_info("n", TensorProto.INT64, None)],
    )
    node = helper.make_node("If", ["0"], ["1"], then_branch=inner, else_branch=inner)
    raw = helper.make_model(helper.make_graph([node], "g", [], [])).SerializeToString()
    assert set(operators_of(raw)) == {"If", "NonZero"}


def test_a_bundle_for_cpus_is_refused_before_anything_is_built(exported: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    with pytest.raises(LoweringError, match=r"v0\.onnx can't become an engine of TensorRT: NonZero"):
        build_engines(exported)
    assert not (exported.path / "engines").exists()


@rtx
def test_what_the_library_itself_refuses(tmp_path: Path) -> None:
    def attempt(raw: bytes, shapes: Any = None) -> None:
        build(raw, tmp_path / "x.onnx", tmp_path / "x.plan", find("tensorrt-rtx"), ("sm_89",), shapes or {})

    with pytest.raises(LoweringError, match=r"TensorRT-RTX .* refuses x\.onnx: it has no BitwiseNot"):
        attempt(graph("Relu", "BitwiseNot"))
    with pytest.raises(LoweringError, match=r"refuses x\.onnx: NonZero \(node the_NonZero\)"):
        attempt(graph("NonZero"))
    with pytest.raises(LoweringError, match=r"refuses x\.onnx"):
        attempt(open_graph())  # any batch, and no profile says which
    attempt(open_graph(), {"x": [(1, 2), (2, 2), (8, 2)]})
    assert (tmp_path / "x.plan").stat().st_size > 0
    assert not (tmp_path / "x.json").exists()


def open_graph() -> bytes:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in "xy"]
    made = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()


BUILDERS = {
    "raise": r"starting x\.onnx: RuntimeError: no driver",
    "die parsing": r"died \(SIGSEGV\) while parsing x\.onnx: .*The graph has Relu",
    "die building": r"died \(SIGSEGV\) while building x\.onnx",
    "refuse the graph": r"refuses x\.onnx: Relu \(node the_Relu\): nothing to like about it",
    "refuse the profile": r"refuses x\.onnx: the optimization profile .* doesn't fit",
    "refuse the cache": r"refuses x\.onnx: the timing cache .*timing\.cache isn't of this TensorRT and GPU: remove it",
    "give no plan": r"refuses x\.onnx: no kernel for the_Relu",
}


@pytest.mark.parametrize("does", [*BUILDERS, "build"])
def test_builders_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    """In TensorRT's place stands a module that does what a builder may do."""
    shutil.copy(Path(__file__).with_name("builder.py"), tmp_path / "tensorrt.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MOECA_FAKE", does)
    plan, cache, library = tmp_path / "x.plan", tmp_path / "timing.cache", Library("tensorrt", "11.4.0", None)

    def attempt() -> None:
        build(graph("Relu"), tmp_path / "x.onnx", plan, library, (), {"x": [(1,), (2,), (8,)]}, cache)

    if does in BUILDERS:
        with pytest.raises(LoweringError, match=rf"TensorRT 11\.4\.0.*{BUILDERS[does]}"):
            attempt()
        assert not plan.exists()
    else:
        attempt()
        attempt()
        assert (plan.read_bytes(), cache.read_bytes()) == (b"a plan", b"timingstimings")


@pytest.mark.parametrize("path", ["{}", "{}:", ":{}"])
def test_modules_of_the_current_folder_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Where the builder is started there may be anything; PYTHONPATH's empty places mean that folder too."""
    (tmp_path / "fake").mkdir()
    shutil.copy(Path(__file__).with_name("builder.py"), tmp_path / "fake" / "tensorrt.py")
    for name in ("json", "numpy", "typing"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", path.format(tmp_path / "fake"))
    monkeypatch.setenv("MOECA_FAKE", "build")
    build(graph("Relu"), tmp_path / "x.onnx", tmp_path / "x.plan", Library("tensorrt", "11.4.0", None), (), {})
    assert not (tmp_path / "imported").exists()


@rtx
def test_a_failed_build_leaves_the_bundle_as_it_was(lowered: Bundle, tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copytree(lowered.path, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")

    def broken(graph: bytes, path: Path, *args: Any) -> None:
        if path.name == "v1.onnx":
            raise LoweringError("broken")
        real(graph, path, *args)

    real = tensorrt.build
    monkeypatch.setattr(tensorrt, "build", broken)
    with pytest.raises(LoweringError, match="broken"):
        build_engines(bundle, EngineRequest(arch=("sm_89",)))
    assert Bundle.open(bundle.path).manifest == bundle.manifest
    assert not list(bundle.path.glob(".*"))


def test_an_export_where_no_tensorrt_is(lowered: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning says where the engines are to be built; asked for, they are an error."""
    for name in libraries.MODULES:
        monkeypatch.setitem(libraries.MODULES, name, ("no_such_module",))

    def tick(text: str, done: float) -> None:
        pytest.fail("nothing can be built")

    with pytest.warns(MoecaWarning, match=r"no engines were built: this needs .*: moeca engines b\.moeca$"):
        add_engines(lowered.path, Path("b.moeca"), None, tick)
    with pytest.raises(BundleError, match="this needs tensorrt"):
        add_engines(lowered.path, Path("b.moeca"), EngineRequest(), tick)


def test_an_opset_that_tensorrt_was_not_tried_with(schedule: Schedule, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"opset=21: expected 18 to 20 for targets=\['tensorrt'\]"):
        moeca.export(small_model(), call_of(2), schedule, tmp_path / "b", targets=("tensorrt",), opset=21)


def test_the_profile(exported: Bundle) -> None:
    spec = exported.manifest.variants[2]
    shapes = profile(exported, spec, (1, 2, 8))
    assert shapes["x"] == [(1, 4, 8, 8), (2, 4, 8, 8), (8, 4, 8, 8)]
    assert "coefficients" not in shapes


Edit = Callable[[Any], Any]
OTHER = "engines/sm_90-trt11.4.0"
EDITS: dict[str, tuple[Edit, str]] = {
    "an engine less": (lambda d: d["engines"].pop(), "isn't one engine for each variant"),
    "one twice": (lambda d: d["engines"].append(d["engines"][0]), "isn't one engine for each variant"),
    "of no variant": (lambda d: d["engines"][0].update(variant="v9"), "isn't one engine for each variant"),
    "another kind": (lambda d: d["engines"][0].update(arch=["sm_80"]), "has engines of several kinds"),
    "a path that leaves": (
        lambda d: d["engines"][0].update(file="engines/../../v0.plan"),
        r"matching regex .* at `\$\.engines\[0\]\.file`",
    ),
    "a hidden path": (
        lambda d: d["engines"][0].update(file="engines/.x/v0.plan"),
        r"matching regex .* at `\$\.engines\[0\]\.file`",
    ),
    "an absolute path": (
        lambda d: d["engines"][0].update(file="/engines/x/v0.plan"),
        r"matching regex .* at `\$\.engines\[0\]\.file`",
    ),
    "a deep path": (
        lambda d: d["engines"][0].update(file="engines/a/b/v0.plan"),
        r"matching regex .* at `\$\.engines\[0\]\.file`",
    ),
    "a file that leaves": (lambda d: d["files"].update({"engines/../x.plan": d["files"]["v0.onnx"]}), "at `key` in"),
    "another file": (lambda d: d["engines"][0].update(file=f"{OTHER}/v9.plan"), "missing or too many"),
    "one file twice": (lambda d: d["engines"][0].update(file=f"{OTHER}/v1.plan"), "missing or too many"),
    "another library": (lambda d: d["engines"][0].update(library="x"), "matching regex .*library"),
    "no batch": (lambda d: d["engines"][0].update(batch=[0, 1, 2]), ">= 1 - at .*batch"),
    "no arch": (lambda d: d["engines"][0].update(arch=[]), "length >= 1 - at .*arch"),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_manifest_with_engines_sealed_again(what: str, with_engines: Bundle) -> None:
    edit, says = EDITS[what]
    edit_manifest(with_engines.path, edit)
    with pytest.raises(BundleError, match=says):
        Bundle.open(with_engines.path)


def test_damaged_engines_and_links(with_engines: Bundle, tmp_path: Path) -> None:
    """Refused when they are used; the bundle still serves others."""
    engine = with_engines.manifest.engines[0]
    plan = with_engines.path / engine.file
    plan.write_bytes(b"xx")
    bundle = Bundle.open(with_engines.path)
    with pytest.raises(BundleError, match=r"v0\.plan isn't what was exported"):
        engine_file(bundle.path, engine, bundle.manifest)
    plan.unlink()
    with pytest.raises(BundleError, match=r"v0\.plan is missing"):
        engine_file(bundle.path, engine, bundle.manifest)
    (tmp_path / "plan").write_bytes(b"v0")
    plan.symlink_to(tmp_path / "plan")
    with pytest.raises(BundleError, match=r"v0\.plan is a link"):
        engine_file(bundle.path, engine, bundle.manifest)
    folder = plan.parent
    folder.rename(tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match=r"engines/sm_90-trt11\.4\.0 is a link"):
        engine_file(bundle.path, bundle.manifest.engines[1], bundle.manifest)


@rtx
def test_engines_are_not_written_through_a_link(lowered: Bundle, tmp_path: Path) -> None:
    shutil.copytree(lowered.path, tmp_path / "b")
    shutil.move(tmp_path / "b" / "engines", tmp_path / "outside")
    (tmp_path / "b" / "engines").symlink_to(tmp_path / "outside")
    bundle = Bundle.open(tmp_path / "b")
    with pytest.raises(BundleError, match="is or is in a link"):
        build_engines(bundle, EngineRequest(arch=("sm_89",)))
