"""`fused.onnx` on a runtime: as a check of it, and to show how it is run. No schedule here: the graph counts steps.

On onnxruntime states go round by hand, as OrtValues; on OpenVINO they become the model's own variables.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle import bfloat16
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.feeds import Arrays, admit, arrays_of
from moeca_compile.runtime.bundle.manifest import DROPPED, FUSED, FUSED_ROW, STEP, Manifest, TensorSpec, VariantSpec
from moeca_compile.runtime.bundle.signature import check_identity, check_shape, check_side
from moeca_compile.runtime.driver import StepDriver
from moeca_compile.runtime.providers import onnxruntime as ort
from moeca_compile.runtime.providers import openvino
from moeca_compile.runtime.providers.provider import runtime_of
from moeca_compile.runtime.stats import StepRecord
from moeca_compile.runtime.trajectory import timestep_of
from moeca_compile.runtime.warned import Warned

Specs = dict[str, TensorSpec]


def fused_signature(manifest: Manifest) -> tuple[Specs, Specs]:
    """Inputs and outputs of the fused graph: the model's, the number of the step, and all states."""
    state = {f"{STEP}": TensorSpec(STEP, "int64", (1,))} | {spec.name: spec for spec in manifest.state}
    takes: Specs = {spec.name: spec for spec in manifest.inputs} | {f"{name}_in": spec for name, spec in state.items()}
    gives: Specs = {spec.name: spec for spec in manifest.outputs} | {
        f"{name}_out": spec for name, spec in state.items()
    }
    if any(variant.counts_dropped for variant in manifest.variants):
        gives[DROPPED] = TensorSpec(DROPPED, "int64", ())
    return takes, gives


class FusedSession:
    """A bundle's fused graph, loaded. Trajectories have their own state, in any threads."""

    def __init__(self, bundle: Bundle, provider: str, loaded: _OnOrt | _OnOpenvino) -> None:
        self.bundle, self.provider, self._loaded = bundle, provider, loaded
        self.manifest, self.schedule = bundle.manifest, bundle.schedule
        self.warned = Warned()
        self.driver = StepDriver(self.schedule, self.warned)

    @classmethod
    def open(
        cls, path: str | Path, provider: str = ort.CPU, memory: str = "speed", threads: int | None = None,
        provider_options: Mapping[str, Any] | None = None,
    ) -> FusedSession:  # fmt: skip
        """Verify a bundle and load its fused graph.

        Args:
            path: as for `Session.open`.
            provider: an execution provider of onnxruntime, or "openvino".
            memory: as for `Session.open`.
            threads: as for `Session.open`.
            provider_options: as for `Session.open`.

        Returns:
            The session.

        Raises:
            BundleError: the bundle has no fused graph, isn't what was exported, or can't run here.
            OptionError: an unknown memory mode.
        """
        runtime = runtime_of(provider, memory, threads, provider_options)
        bundle = Bundle.open(path)
        if bundle.fused is None:
            raise BundleError(f"the bundle has no {FUSED}: export it with fused=True")
        spec = VariantSpec("fused", FUSED, FUSED_ROW, (), (), (), False, False, 0)
        kind = _OnOpenvino if isinstance(runtime, openvino.OpenvinoRuntime) else _OnOrt
        return cls(bundle, provider, kind(runtime, bundle, spec))  # type: ignore[arg-type]

    def trajectory(self) -> FusedTrajectory:
        """Begin a denoising loop at step 0.

        Returns:
            A context manager that owns the cached state.
        """
        return FusedTrajectory(self, self._loaded.start())


class FusedTrajectory:
    """One stream of one denoising loop. A context manager; for one thread."""

    def __init__(self, session: FusedSession, run: Any) -> None:
        self.session, self._run = session, run
        self.records: list[StepRecord] = []

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """Run the next step.

        Args:
            inputs: arrays by input name, as for `Session.run`.

        Returns:
            Arrays by output name.

        Raises:
            BundleError: inputs that the model doesn't take.
        """
        step, session = len(self.records), self.session
        feeds, batch = admit(session.manifest, arrays_of(session.manifest, inputs))
        session.driver.warn_of_counted(step, timestep_of(session.manifest, feeds))
        begin = time.perf_counter()
        results = self._run(feeds, batch)
        ms = (time.perf_counter() - begin) * 1e3
        dropped = int(results.pop(DROPPED, 0))
        self.records.append(StepRecord(step, "", "fused", ms, 0.0, 0, False, dropped))
        outputs = session.manifest.outputs
        return {spec.name: bfloat16.from_stored(results[spec.name], spec.dtype) for spec in outputs}

    def __enter__(self) -> FusedTrajectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._run = None


class _OnOrt:
    def __init__(self, runtime: ort.OrtRuntime, bundle: Bundle, spec: VariantSpec) -> None:
        assert bundle.fused is not None
        self.runtime, self.manifest = runtime, bundle.manifest
        self.session = runtime.session(bundle.fused, FUSED, bundle.path, bundle.manifest)
        check_identity(spec, bundle.manifest, self.session.get_modelmeta().custom_metadata_map)
        self.takes, self.gives = fused_signature(bundle.manifest)
        check_side(FUSED, "inputs", self.takes, ort.signature_reported(self.session.get_inputs()))
        check_side(FUSED, "outputs", self.gives, ort.signature_reported(self.session.get_outputs()))

    def start(self) -> Any:
        states: dict[str, Any] = {}

        def run(feeds: Arrays, batch: int) -> Arrays:
            for name, spec in self.takes.items():
                if name.endswith("_in") and name not in states and name not in feeds:
                    states[name] = self.runtime.zeros(spec.sizes(batch), spec.dtype)
            values = ort.bound_run(self.runtime, self.session, FUSED, self.takes, self.gives, feeds | states)
            results = dict(zip(self.gives, values, strict=True))
            outputs = {spec.name for spec in self.manifest.outputs}
            for name, value in results.items():
                if name not in outputs and name != DROPPED:
                    states[f"{name.removesuffix('_out')}_in"] = value
            host = {name: value for name, value in results.items() if name in outputs or name == DROPPED}
            return {name: self.runtime.numpy(value) for name, value in host.items()}

        return run


class _OnOpenvino:
    def __init__(self, runtime: openvino.OpenvinoRuntime, bundle: Bundle, spec: VariantSpec) -> None:
        assert bundle.fused is not None
        model = runtime.read(bundle.fused, FUSED, bundle.path)
        check_identity(spec, bundle.manifest, openvino.metadata(model))
        self.takes, self.gives = fused_signature(bundle.manifest)
        check_side(FUSED, "inputs", self.takes, openvino.signature_reported(model.inputs))
        check_side(FUSED, "outputs", self.gives, openvino.signature_reported(model.outputs))
        self.runtime, self.manifest = runtime, bundle.manifest
        names = [STEP, *(spec.name for spec in bundle.manifest.state)]
        openvino.make_stateful(model, {f"{name}_in": f"{name}_out" for name in names})
        self.compiled = runtime.compile(model, FUSED)

    def start(self) -> Any:
        request = self.compiled.create_infer_request()
        request.reset_state()  # all variables are zero: step 0
        library, dtypes = self.runtime.library, {spec.name: spec.dtype for spec in self.manifest.inputs}
        stored_dtypes = {spec.name: bfloat16.stored_dtype(spec.dtype) for spec in self.manifest.outputs}
        stored_dtypes |= {DROPPED: np.dtype(np.int64)} if DROPPED in self.gives else {}

        def run(feeds: Arrays, batch: int) -> Arrays:
            try:
                for name, array in feeds.items():
                    request.set_tensor(name, openvino.tensor_of(library, array, dtypes[name]))
                request.infer()
            except Exception as error:
                raise BundleError(f"OpenVINO failed in {FUSED}: {openvino.last_lines(error)}") from error
            tensors = {name: request.get_tensor(name) for name in stored_dtypes}
            for name, tensor in tensors.items():
                check_shape(FUSED, name, tensor.shape, self.gives[name].sizes(batch))
            return {name: tensors[name].data.copy().view(stored) for name, stored in stored_dtypes.items()}

        return run
