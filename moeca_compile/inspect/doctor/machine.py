"""The machine and what is installed, read without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = (
    "torch", "numpy", "msgspec", "triton", "diffusers", "transformers", "torchao", "onnx", "onnxscript", "onnxruntime",
    "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt_rtx_cu13_bindings", "typer", "rich", "safetensors",
)  # fmt: skip
# what Inductor, oneDNN and onnxruntime choose their kernels by
INSTRUCTIONS = (
    "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


def machine() -> dict[str, str]:
    """Python, the system, the processor with its vector instructions, and the memory, by name."""
    known = _processor()
    model = known.get("model name") or platform.processor() or platform.machine()
    flags = set((known.get("flags") or known.get("Features") or "").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
        "processor": f"{model}, {cores} cores for this process",
        "vector instructions": " ".join(name for name in INSTRUCTIONS if name in flags) or "unknown",
    }
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        facts["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    return facts


def packages() -> dict[str, str]:
    """The versions of the packages that matter here and are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _processor() -> dict[str, str]:
    """What Linux says of its first processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return {}
    entries = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in entries}
