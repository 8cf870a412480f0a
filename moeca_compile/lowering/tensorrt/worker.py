"""Builds one engine: the process that may die. `python -m moeca_compile.lowering.tensorrt.worker`, by `build.py` only.

On stdin: a line of JSON, then the ONNX file. What it was doing last, or what is wrong, it writes into the report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from moeca_compile.runtime.tensorrt.library import find, logger


def main() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    report = Path(request["report"])
    if error := _build(request, sys.stdin.buffer.read(), report):
        report.write_text(json.dumps({"error": error}))


def _build(request: dict[str, Any], graph: bytes, report: Path) -> str:
    """What is wrong; "" if the engine was built."""

    def stage(name: str) -> None:
        report.write_text(json.dumps({"stage": name}))

    api = find(request["library"]).api
    errors: list[str] = []
    log = logger(api, errors)
    builder = api.Builder(log)
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.OnnxParser(network, log)
    if unknown := [name for name in request["operators"] if not parser.supports_operator(name)]:
        return f"it has no {', '.join(unknown)}"
    stage("parsing")
    if not parser.parse(graph, request["path"]):
        return "; ".join(_parse_error(parser.get_error(i)) for i in range(parser.num_errors))
    config = builder.create_builder_config()
    if request["shapes"]:
        profile = builder.create_optimization_profile()
        for name, sizes in request["shapes"].items():
            profile.set_shape(name, *map(tuple, sizes))
        if config.add_optimization_profile(profile) < 0:
            return f"the optimization profile {request['shapes']} doesn't fit: {' '.join(errors)}"
    if request["library"] == "tensorrt-rtx":
        config.num_compute_capabilities = len(request["arch"])
        for i, arch in enumerate(request["arch"]):
            config.set_compute_capability(getattr(api.ComputeCapability, arch.replace("sm_", "SM")), i)
    cache = Path(request["timing_cache"]) if request["timing_cache"] else None
    timings = None
    if hasattr(config, "create_timing_cache"):
        timings = config.create_timing_cache(cache.read_bytes() if cache and cache.exists() else b"")
        if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
            return f"the timing cache {cache} isn't of this TensorRT and GPU: remove it"
    stage("building")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return " ".join(errors[-3:])[:1000] or "it gives no reason"
    Path(request["plan"]).write_bytes(memoryview(plan))
    if cache and timings is not None:
        cache.write_bytes(memoryview(config.get_timing_cache().serialize()))
    return ""


def _parse_error(error: Any) -> str:
    return f"{error.node_operator()} (node {error.node_name()}): {error.desc()[:300]}"


if __name__ == "__main__":
    main()
