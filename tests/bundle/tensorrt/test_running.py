"""What runs engines, on engines that a fake runs: states at addresses that take turns, results those of onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeca_compile.errors import BundleError, OptionError
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.verify import verify
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.tensorrt import library as libraries
from moeca_compile.runtime.tensorrt import runtime
from moeca_compile.runtime.tensorrt.library import Library, find
from moeca_compile.runtime.tensorrt.memory import Device, Pool
from moeca_compile.runtime.writing import entry_of
from tests.bundle.conftest import call_of, edit_manifest, named
from tests.bundle.tensorrt.fake import Engine, HostDevice, library_for


def on_engines(
    bundle: Bundle, device: HostDevice | None = None, library: Library | None = None,
    options: dict[str, str] | None = None,
) -> Session:  # fmt: skip
    """A session on engines, with the fake in TensorRT's place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "Device", lambda: device or HostDevice())
        patch.setattr(runtime, "find", lambda *names: library or library_for(bundle))
        return Session.open(bundle.path, "tensorrt", provider_options=options)


def step_of(step: int, batch: int = 2) -> dict[str, Any]:
    return named(call_of(batch, seed=step))


def test_two_trajectories_in_turn(with_engines: Bundle) -> None:
    """Of different batches, over all variants: bit by bit what onnxruntime's own session gives."""
    engines, reference = on_engines(with_engines), Session.open(with_engines.path, threads=1)
    pairs = [(engines.trajectory(), reference.trajectory(), batch) for batch in (2, 3)]
    for step in range(9):
        for *both, batch in pairs:
            found, wanted = (one.run(step_of(step, batch))["output"] for one in both)
            assert np.array_equal(found, wanted)
    assert len({record.variant for record in pairs[0][0].records}) == len(engines.variants)


def test_the_golden_steps(with_engines: Bundle) -> None:
    verdict = verify(on_engines(with_engines))
    assert verdict.passed
    assert verdict.provider == "tensorrt"


def test_state_stays_on_the_device_and_memory_stops_growing(with_engines: Bundle) -> None:
    device = HostDevice()
    session = on_engines(with_engines, device)
    pool = session.variants[0].pool  # type: ignore[attr-defined]
    with session.trajectory() as trajectory:
        trajectory.run(step_of(0))
        assert (device.uploads, device.downloads) == (3, 1)  # x, t and y; the output
        held = []
        for step in range(1, 25):
            trajectory.run(step_of(step))
            held.append(pool.allocated)
        assert len(set(held[12:])) == 1
        assert device.uploads < 25 * 8  # inputs, coefficients, and zeros for what was never written
    allocated = pool.allocated
    with session.trajectory() as trajectory:
        for step in range(8):
            trajectory.run(step_of(step))
    assert pool.allocated == allocated  # what the first one gave back is enough


def test_states_take_turns_at_addresses(with_engines: Bundle) -> None:
    """What was y0 becomes y1 where it lies, and no two states ever lie at one place."""
    session = on_engines(with_engines)
    with session.trajectory() as trajectory:
        trajectory.run(step_of(0))
        state = trajectory.state
        assert state is not None
        for step in range(1, 9):
            y0 = state.tensors[0].address
            trajectory.run(step_of(step))
            alive = [one.address for one in state.tensors if one is not None]
            assert len(alive) == len(set(alive))
            if state.history[0][0] == step:  # this step computed the first region
                assert state.tensors[1].address == y0 != state.tensors[0].address


def test_a_batch_that_the_engine_was_not_built_for(with_engines: Bundle) -> None:
    session = on_engines(with_engines)
    with pytest.raises(BundleError, match=r"doesn't take x of shape \[9, 4, 8, 8\]: it was built for batches 1 to 8"):
        session.run(step_of(0, batch=9))


def test_an_engine_that_fails(with_engines: Bundle) -> None:
    session = on_engines(with_engines)
    for variant in session.variants:
        variant._context.fails = True  # type: ignore[attr-defined]
    with session.trajectory() as trajectory:
        with pytest.raises(BundleError, match=r"TensorRT failed in engines/sm_90-trt11\.4\.0/v0\.plan"):
            trajectory.run(step_of(0))
        assert trajectory.records == []


def test_an_engine_that_takes_no_address(with_engines: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session = on_engines(with_engines)
    monkeypatch.setattr("tests.bundle.tensorrt.fake.Context.set_tensor_address", lambda *args: False)
    with pytest.raises(BundleError, match="doesn't take an address for x"):
        session.run(step_of(0))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("get_tensor_mode", lambda self, name: None, r"has the inputs \[\], the manifest says"),
        ("get_tensor_dtype", lambda self, name: None, "x is None"),
        ("get_tensor_shape", lambda self, name: (-1, 3, 8, 8), r"x is float32 \[None, 3, 8, 8\]"),
        ("create_execution_context", lambda self: None, "makes no context"),
    ],
)
def test_an_engine_of_something_else(
    with_engines: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, says: str
) -> None:
    monkeypatch.setattr(Engine, name, value)
    with pytest.raises(BundleError, match=says):
        on_engines(with_engines)


def test_nothing_else_is_taken_in_its_place(
    exported: Bundle, with_engines: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match="has no engines: build them with `moeca engines"):
        Session.open(exported.path, provider="tensorrt")
    for name in libraries.MODULES:
        monkeypatch.setitem(libraries.MODULES, name, ("no_such_module",))
    with pytest.raises(BundleError, match=r"needs tensorrt or tensorrt-rtx: pip install 'moeca-compile\[tensorrt\]'"):
        Session.open(with_engines.path, provider="tensorrt")


def test_options(with_engines: Bundle) -> None:
    session = on_engines(with_engines, options={"library": "tensorrt"})
    assert session.runtime.version() == "TensorRT 11.4.0"
    with pytest.raises(OptionError, match="has its own copy of the weights"):
        Session.open(with_engines.path, "tensorrt", memory="shared")
    for options in ({"library": "trt"}, {"device_id": 1}):
        with pytest.raises(OptionError, match="provider_options="):
            Session.open(with_engines.path, "tensorrt", provider_options=options)


@pytest.mark.parametrize(
    ("library", "arch"), [({"version": "11.4.1"}, "sm_90"), ({}, "sm_89"), ({"name": "tensorrt-rtx"}, "sm_90")]
)
def test_engines_for_another_machine(with_engines: Bundle, library: dict[str, str], arch: str) -> None:
    device = HostDevice()
    device.arch = arch
    says = rf"no engines for {arch} with .*; the bundle has them for sm_90 with tensorrt 11\.4\.0\. .*build here"
    with pytest.raises(BundleError, match=says):
        on_engines(with_engines, device, library_for(with_engines, **library))


def test_a_plan_that_tensorrt_refuses(with_engines: Bundle) -> None:
    """Sealed, so that only TensorRT itself is left to refuse it."""
    name = with_engines.manifest.engines[0].file
    (with_engines.path / name).write_bytes(b"another")
    edit_manifest(with_engines.path, lambda data: data["files"].update({name: entry_of(with_engines.path / name)}))
    bundle = Bundle.open(with_engines.path)
    with pytest.raises(BundleError, match=r"refuses engines/.*v0\.plan: the plan's header is wrong\. Build"):
        on_engines(bundle)


def test_the_pool() -> None:
    device = HostDevice()
    pool = Pool(device)
    first = pool.put(np.arange(6, dtype=np.float32).reshape(2, 3), "float32")
    np.testing.assert_array_equal(first.numpy(), np.arange(6).reshape(2, 3))
    place = first.address
    second = pool.take((2, 3), "float32")
    assert second.address != place
    del first
    assert pool.take((4,), "int32").address == place  # as large, rounded up
    assert pool.allocated == 512
    bits = np.array([0x3F80, 0xC000], np.uint16)
    np.testing.assert_array_equal(pool.put(bits, "bfloat16").numpy(), bits)
    np.testing.assert_array_equal(pool.zeros((2, 2), "bfloat16").numpy(), np.zeros((2, 2), np.uint16))


def test_no_gpu_here() -> None:
    """The real CUDA runtime, on a machine that has none."""
    cuda = pytest.importorskip("cuda.bindings.runtime")
    if cuda.cudaGetDeviceCount()[0] == cuda.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU")
    with pytest.raises(BundleError, match="CUDA: cudaDeviceGetAttribute failed: CUDA driver"):
        Device()


def test_the_real_library_without_a_gpu(with_engines: Bundle, tmp_path: Path) -> None:
    """It refuses to load; nothing runs in its place."""
    pytest.importorskip("tensorrt_rtx_bindings")
    library = find("tensorrt-rtx")
    assert library.tag == f"rtx{library.version}"
    edit_manifest(
        with_engines.path,
        lambda data: [one.update(library=library.name, version=library.version) for one in data["engines"]],
    )
    bundle = Bundle.open(with_engines.path)
    with pytest.raises(BundleError, match=r"TensorRT-RTX .* refuses engines/"):
        on_engines(bundle, library=library)


def test_a_library_that_is_not_there() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(libraries.MODULES, "tensorrt", ("no_such_tensorrt",))
        patch.setitem(libraries.MODULES, "tensorrt-rtx", ("no_such_rtx",))
        with pytest.raises(BundleError, match=r"this needs tensorrt or tensorrt-rtx: .*no_such_tensorrt.*no_such_rtx"):
            find()
