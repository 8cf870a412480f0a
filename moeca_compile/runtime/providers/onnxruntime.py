"""Variants on onnxruntime: loading, the checks of what was loaded, and one run with bound inputs and outputs."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moeca_compile.dtypes import OF_ONNXRUNTIME
from moeca_compile.errors import BundleError, OptionError
from moeca_compile.runtime.bundle.bfloat16 import NAME as BFLOAT16
from moeca_compile.runtime.bundle.bfloat16 import stored_dtype
from moeca_compile.runtime.bundle.manifest import GraphSpec, Manifest
from moeca_compile.runtime.bundle.signature import Specs, batch_of, check_identity, check_side, signature_of

MEMORY = ("speed", "shared")
CPU = "CPUExecutionProvider"
# providers that keep tensors on a device, by the name that onnxruntime gives the device
_DEVICES = {
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "cuda",
}
# what a provider may leave to others: CUDA runs what TensorRT refuses, a CPU the arithmetic of sizes
_HELPERS = {"TensorrtExecutionProvider": ("CUDAExecutionProvider",)}
# operators that a CPU may run beside a device: they work on sizes and indices
_OF_SIZES = {
    "Shape", "Size", "Gather", "Concat", "Unsqueeze", "Squeeze", "Slice", "Cast", "Add", "Sub", "Mul", "Div", "Mod",
    "Range", "Reshape", "Constant", "ConstantOfShape", "Identity", "Less", "Equal", "Where", "And", "Neg", "Min", "Max",
}  # fmt: skip
_SWIGLU_SINCE = (1, 28)
_ONNX_BFLOAT16 = 16  # in ONNX's list of types


class OrtRuntime:
    """One execution provider of onnxruntime; another one is never taken in its place.

    Args:
        provider: such as CPUExecutionProvider, CUDAExecutionProvider, TensorrtExecutionProvider.
        memory: "speed" reads the weights and lets onnxruntime repack them, a private copy for each variant; "shared"
            leaves them in the mapped file, one copy for all variants and all processes: a file that is changed while it
            is mapped changes results, and one that shrinks kills the process.
        threads: of one operator; None: onnxruntime's choice.
        provider_options: the provider's own, such as {"device_id": 1} or {"trt_engine_cache_enable": True}.

    Raises:
        BundleError: onnxruntime isn't installed, or has no such provider.
        OptionError: no such memory mode.
    """

    def __init__(
        self, provider: str, memory: str = "speed", threads: int | None = None,
        provider_options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if memory not in MEMORY:
            raise OptionError(f"memory={memory!r}: expected one of {MEMORY}")
        self.library = library()
        available = self.library.get_available_providers()
        if provider not in available:
            raise BundleError(
                f"this onnxruntime has no {provider!r}; it has {available}. Nothing else is taken in its place"
            )
        self.provider, self.memory, self.threads = provider, memory, threads
        self.options = {name: str(value) for name, value in (provider_options or {}).items()}
        self.device = _DEVICES.get(provider, "cpu")
        self.device_id = int(self.options.get("device_id", 0))

    def load(self, graph: bytes, spec: GraphSpec, manifest: Manifest, folder: Path) -> OrtVariant:
        """Raises:
        BundleError: onnxruntime refuses the graph, leaves parts of it to a CPU, or its signature isn't the manifest's.
        """
        session = self.session(graph, spec.file, folder, manifest)
        check_identity(spec, manifest, session.get_modelmeta().custom_metadata_map)
        return OrtVariant(self, session, spec, manifest)

    def session(self, graph: bytes, file: str, folder: Path, manifest: Manifest) -> Any:
        """An InferenceSession of `graph`, whose weights lie in `folder`, on this provider and no other."""
        ort = self.library
        refuse_swiglu(graph, file, self.provider, ort.__version__)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what it would print it also raises
        options.intra_op_num_threads = self.threads or 0
        # the next step may run another variant: its threads must not fight with idle ones of this
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if self.memory == "shared":
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False  # it keeps the largest working memory that it ever had
        elif hasattr(options, "add_external_initializers_from_files_in_memory"):  # else it maps the file
            names = list(manifest.weight_files)
            weights = [(folder / name).read_bytes() for name in names]
            options.add_external_initializers_from_files_in_memory(names, weights, list(map(len, weights)))
            # what is repacked is freed then: not into an arena that keeps it
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        helpers = _HELPERS.get(self.provider, ())
        try:
            session = ort.InferenceSession(graph, options, providers=[(self.provider, self.options), *helpers])
        except Exception as error:  # onnxruntime's own classes have no common base
            raise BundleError(
                f"onnxruntime {ort.__version__} ({self.provider}) refuses {file}: {_first_line(error)}"
                + _about_halves(manifest, self.provider)
            ) from error
        if (used := session.get_providers()[:1]) != [self.provider]:
            raise BundleError(f"{self.provider} was asked for, and onnxruntime fell back to {used}")
        if self.provider != CPU:
            refuse_strays(file, self.provider, session.get_provider_graph_assignment_info())
        return session

    def zeros(self, sizes: tuple[int, ...], dtype: str) -> Any:
        """A state that was never written, where this provider keeps its tensors."""
        array = np.zeros(sizes, stored_dtype(dtype))
        if dtype == BFLOAT16:
            return array
        return self.library.OrtValue.ortvalue_from_numpy(array, self.device, self.device_id)

    def numpy(self, value: Any) -> Any:
        return value if isinstance(value, np.ndarray) else value.numpy()

    def version(self) -> str:
        return version()


class OrtVariant:
    """One variant, ready to run. Several threads may run it at once: each run binds its own values."""

    def __init__(self, runtime: OrtRuntime, session: Any, spec: GraphSpec, manifest: Manifest) -> None:
        self.runtime, self.session, self.spec = runtime, session, spec
        takes, gives = signature_of(spec, manifest)
        check_side(spec.file, "inputs", takes, signature_reported(session.get_inputs()))
        check_side(spec.file, "outputs", gives, signature_reported(session.get_outputs()))
        self._takes, self._gives = takes, gives

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        """One run. `feeds`: arrays or OrtValues by the graph's input names, at least those that it takes.

        Returns:
            OrtValues: the model's outputs, then what the variant writes, then how many branches were dropped, where it
            counts them. States go in and come out without a copy, and stay on the provider's device.
        """
        return bound_run(self.runtime, self.session, self.spec.file, self._takes, self._gives, feeds)


def bound_run(
    runtime: OrtRuntime, session: Any, file: str, takes: Specs, gives: Specs, feeds: Mapping[str, Any]
) -> list[Any]:
    """Values of `gives`: what is called `..._out` stays on the device, the rest comes to the host. OrtValues, or for
    bfloat16 on the host an array of its bits, which an OrtValue wouldn't hand out."""
    binding = session.io_binding()
    held = []  # an OrtValue over an array's memory doesn't keep it
    for name, spec in takes.items():
        value = feeds[name]
        if spec.dtype == BFLOAT16 and not hasattr(value, "_ortvalue"):
            value = runtime.library.OrtValue.ortvalue_from_numpy_with_onnx_type(value, _ONNX_BFLOAT16)
            held.append(value)
        if hasattr(value, "_ortvalue"):
            binding.bind_ortvalue_input(name, value)
        else:
            binding.bind_cpu_input(name, value)
    batch, hosted = batch_of(takes, feeds), {}
    for name, spec in gives.items():
        if name.endswith("_out"):
            binding.bind_output(name, runtime.device, runtime.device_id)
        elif spec.dtype == BFLOAT16:
            array = hosted[name] = np.empty(spec.sizes(batch), np.uint16)
            binding.bind_output(name, "cpu", 0, _ONNX_BFLOAT16, array.shape, array.ctypes.data)
        else:
            binding.bind_output(name)
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        raise BundleError(f"onnxruntime failed in {file}: {_first_line(error)}") from error
    return [hosted.get(name, value) for name, value in zip(gives, binding.get_outputs(), strict=True)]


def refuse_strays(file: str, provider: str, assigned: Iterable[Any]) -> None:
    """Operators that a provider doesn't have go to the CPU without a word.

    Args:
        assigned: onnxruntime's `get_provider_graph_assignment_info()`.

    Raises:
        BundleError: some that do more than sizes went there.
    """
    nodes = (node for part in assigned if part.ep_name == CPU for node in part.get_nodes())
    if strays := sorted({node.op_type for node in nodes} - _OF_SIZES):
        raise BundleError(
            f"{file}: {provider} leaves {', '.join(strays)} to the CPU, and copies their tensors there and back at "
            f"each step. Export for it (targets=...), or open the bundle with {CPU}"
        )


def refuse_swiglu(graph: bytes, file: str, provider: str, version: str) -> None:
    """On CUDA, onnxruntime's MoE operator took GPT-OSS's constants whatever its attributes said, until 1.28.

    Raises:
        BundleError: the graph has that operator with SwiGLU, and this onnxruntime would compute something else.
    """
    old = tuple(int(part) for part in version.split(".")[:2]) < _SWIGLU_SINCE
    if old and provider in _DEVICES and b"swiglu_fusion" in graph:
        raise BundleError(
            f"{file} has com.microsoft.MoE with SwiGLU, whose attributes onnxruntime {version} ignores on CUDA: "
            f"install {'.'.join(map(str, _SWIGLU_SINCE))} or newer, or export with experts='dense'"
        )


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


def signature_reported(values: Iterable[Any]) -> dict[str, tuple[str, list[Any]]]:
    """What onnxruntime says of inputs or outputs; a size that depends on the batch is a name, or None."""
    kinds = {value.name: (value.type.removeprefix("tensor(").removesuffix(")"), value.shape) for value in values}
    return {name: (OF_ONNXRUNTIME.get(kind, kind), shape) for name, (kind, shape) in kinds.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:500]


def _about_halves(manifest: Manifest, provider: str) -> str:
    dtype, experts = manifest.dtype, manifest.expert_lowering
    if provider != CPU or dtype not in ("bfloat16", "float16"):
        return ""
    if dtype == "float16":
        return ". onnxruntime's CPU provider has the MoE operator in float32 alone" if experts == "moe" else ""
    return ". onnxruntime's CPU provider has no bfloat16 kernels: export the model in float32 or float16 for it"
