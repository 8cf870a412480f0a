"""Variants on onnxruntime: loading, the checks of what was loaded, and one run with bound inputs and outputs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moeca_compile.errors import BundleError, OptionError
from moeca_compile.runtime.manifest import COEFFICIENTS, DROPPED, Manifest, TensorSpec, VariantSpec

MEMORY = ("speed", "shared")
_DTYPES = {
    "float64": "double", "float32": "float", "float16": "float16", "bfloat16": "bfloat16", "int64": "int64",
    "int32": "int32", "int16": "int16", "int8": "int8", "uint8": "uint8", "bool": "bool",
}  # fmt: skip


class OrtVariant:
    """One variant, ready to run. Several threads may run it at once: each run binds its own values.

    Args:
        graph: the ONNX file's bytes; its weights lie in `folder`.
        provider: an execution provider of onnxruntime; it takes the graph, or this raises.
        memory: "speed" lets onnxruntime repack weights, a private copy for each variant; "shared" leaves them in the
            mapped file, one copy for all variants and all processes.
        threads: of one operator; None: onnxruntime's choice.

    Raises:
        BundleError: onnxruntime refuses the graph, or its signature isn't the manifest's.
    """

    def __init__(
        self, graph: bytes, spec: VariantSpec, manifest: Manifest, folder: Path, provider: str, memory: str,
        threads: int | None,
    ) -> None:  # fmt: skip
        ort = library()
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what it would print it also raises
        options.intra_op_num_threads = threads or 0
        # the next step may run another variant: its threads must not fight with idle ones of this
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
        if memory == "shared":
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False  # it keeps the largest working memory that it ever had
        try:
            self.session = ort.InferenceSession(graph, options, providers=[provider])
        except Exception as error:  # onnxruntime's own classes have no common base
            raise BundleError(
                f"onnxruntime {ort.__version__} ({provider}) refuses {spec.file}: {_first_line(error)}"
                + _about_bfloat16(manifest, provider)
            ) from error
        if (used := self.session.get_providers()[:1]) != [provider]:
            raise BundleError(f"{provider} was asked for, and onnxruntime fell back to {used}")
        self.spec = spec
        self._outputs = [*(one.name for one in manifest.outputs), *(f"{name}_out" for name in spec.writes)]
        self._outputs += [DROPPED] if spec.counts_dropped else []
        self._check(manifest)

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        """One run. `feeds`: arrays or OrtValues by the graph's input names, at least those that it takes.

        Returns:
            OrtValues: the model's outputs, then what the variant writes, then how many branches were dropped, where it
            counts them. States go in and come out without a copy.
        """
        binding = self.session.io_binding()
        for name in self._inputs:
            value = feeds[name]
            if hasattr(value, "_ortvalue"):
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_cpu_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise BundleError(f"onnxruntime failed in {self.spec.file}: {_first_line(error)}") from error
        found: list[Any] = binding.get_outputs()
        return found

    def _check(self, manifest: Manifest) -> None:
        spec, meta = self.spec, self.session.get_modelmeta().custom_metadata_map
        carried = {"moeca.id": manifest.data["id"], "moeca.row": spec.row}
        if {name: meta.get(name) for name in carried} != carried:
            raise BundleError(f"{spec.file} isn't variant {spec.name} of this bundle: it carries another id or row")
        state = {one.name: one for one in manifest.state}
        inputs = {one.name: one for one in manifest.inputs}
        wanted = {name: inputs[name] for name in spec.takes}
        wanted |= {f"{name}_in": state[name] for name in spec.reads}
        if spec.coefficients:
            wanted[COEFFICIENTS] = TensorSpec(COEFFICIENTS, "float32", (manifest.regions, 2))
        self._compare("inputs", wanted, self.session.get_inputs())
        given = {one.name: one for one in manifest.outputs} | {f"{name}_out": state[name] for name in spec.writes}
        given |= {DROPPED: TensorSpec(DROPPED, "int64", ())} if spec.counts_dropped else {}
        self._compare("outputs", given, self.session.get_outputs())
        self._inputs = tuple(wanted)

    def _compare(self, side: str, wanted: Mapping[str, TensorSpec], found: Any) -> None:
        real = {one.name: (one.type, one.shape) for one in found}
        if set(real) != set(wanted):
            raise BundleError(f"{self.spec.file} has the {side} {sorted(real)}, the manifest says {sorted(wanted)}")
        for name, spec in wanted.items():
            kind, shape = real[name]
            fits = len(shape) == len(spec.shape) and kind == f"tensor({_DTYPES[spec.dtype]})"
            pairs = zip(shape, spec.shape, strict=True) if fits else ()
            # onnxruntime names a size that depends on the batch, or doesn't know it
            if not fits or any(a != b for a, b in pairs if isinstance(a, int) or isinstance(b, int)):
                raise BundleError(f"{self.spec.file}: {name} is {kind} {shape}, the manifest says {spec}")


def check_request(provider: str, memory: str) -> None:
    """Raises:
    BundleError: onnxruntime isn't installed, or has no such provider.
    OptionError: no such memory mode.
    """
    if memory not in MEMORY:
        raise OptionError(f"memory={memory!r}: expected one of {MEMORY}")
    known = library().get_available_providers()
    if provider not in known:
        raise BundleError(f"this onnxruntime has no {provider!r}; it has {known}. Nothing else is taken in its place")


def zeros(sizes: tuple[int, ...], dtype: str) -> Any:
    """A state that was never written."""
    return library().OrtValue.ortvalue_from_numpy(np.zeros(sizes, np.dtype(dtype)))


def version() -> str:
    return f"onnxruntime {library().__version__}"


def library() -> Any:
    """The onnxruntime package.

    Raises:
        BundleError: it isn't installed.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BundleError(f"running a bundle needs onnxruntime: pip install onnxruntime ({error})") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:500]


def _about_bfloat16(manifest: Manifest, provider: str) -> str:
    if manifest.data["dtype"] == "bfloat16" and provider == "CPUExecutionProvider":
        return ". onnxruntime's CPU provider has no bfloat16 kernels: export the model in float32 or float16 for it"
    return ""
