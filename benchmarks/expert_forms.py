"""A layer of routed experts in every form that a runtime here has: time, memory, error against torch.

    python -m benchmarks.expert_forms            # six layers, about 12 minutes; writes results/expert_forms.json
    python -m benchmarks.expert_forms --quick    # one small layer, few rounds: does it run?

All forms of a layer take turns in one process, so that a slow spell of the machine meets them alike. What a form takes
in memory is measured in a process of its own, which opens it, runs it three times and has no torch. The layer is the
experts and the weighted sum of their results, in float32. `expert_graphs.py` has what an export doesn't write too: the
forms in which the runtime's operator weights and sums by itself, and those over quantized weights.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.protocol import Timing, arguments, folder_of, interleave, pin_threads, save

BASE = "onnxruntime, segments"
STATUS = Path("/proc/self/smaps_rollup")
Run = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """One layer: tokens in a call, channels, hidden channels, experts, experts a token."""

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int


LAYERS = {
    "DiT-MoE-S/2": Layer(512, 384, 1536, 8, 2),
    "the same, 32 tokens": Layer(32, 384, 1536, 8, 2),
    "96 channels, 2 of 8": Layer(2048, 96, 384, 8, 2),
    "digits DSMoE": Layer(2048, 96, 72, 16, 4),
    "the same, 128 tokens": Layer(128, 96, 72, 16, 4),
    "many narrow experts": Layer(512, 128, 64, 64, 6),
}


def onnxruntime_session(model: Path | bytes) -> Callable[[Mapping[str, Any]], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(["y"], feeds)[0]


def openvino_session(path: Path) -> Callable[[Mapping[str, Any]], Any]:
    request = openvino_model(path).create_infer_request()
    return lambda feeds: np.array(request.infer(feeds)["y"])


def openvino_model(path: Path) -> Any:
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(core.read_model(path), "CPU", options)


RUNTIMES = {"onnxruntime": onnxruntime_session, "OpenVINO": openvino_session}


def layer_kinds(path: Path) -> dict[str, int]:
    """How many operators of each kind OpenVINO's compiled model has."""
    operators = openvino_model(path).get_runtime_model().get_ops()
    return dict(Counter(operator.get_rt_info()["layerType"].astype(str) for operator in operators))


def memory(runtime: str, path: Path) -> int:
    """Bytes of anonymous memory that the form adds to a process that has its runtime."""
    feeds = dict(np.load(path.with_suffix(".npz")))
    __import__(runtime.lower())
    before = _anonymous()
    run = RUNTIMES[runtime](path)
    for _ in range(3):
        run(feeds)
    return _anonymous() - before


def _anonymous() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("Anonymous:"))
    return 1024 * int(line.split()[1])


def measure(layer: Layer, folder: Path, rounds: int) -> dict[str, Any]:
    """All forms of one layer."""
    from benchmarks.expert_graphs import graphs_of

    graphs = graphs_of(layer, folder)
    runs: dict[str, Run] = {"torch, eager": graphs.torch}
    found: dict[str, Any] = {}
    for form, path in graphs.files.items():
        np.savez(path.with_suffix(".npz"), **graphs.feeds)
        for runtime, opened in RUNTIMES.items():
            name = f"{runtime}, {form}"
            try:
                run = partial(opened(path), graphs.feeds)
                error = float(abs(run() - graphs.expected).max() / abs(graphs.expected).max())
            except Exception as refusal:
                found[name] = {"refused": str(refusal).strip().splitlines()[0][:200]}
                continue
            command = [sys.executable, "-m", "benchmarks.expert_forms", "--part", runtime, str(path)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[name] = run
            found[name] = {"relative_error": error, "bytes": int(done.stdout)}
            if runtime == "OpenVINO":
                found[name]["operators"] = layer_kinds(path)
    timings = interleave(runs, rounds=rounds)
    for name, timing in timings.items():
        found[name] = found.get(name, {}) | figures(timing, timings[BASE])
    return found


def figures(timing: Timing, base: Timing) -> dict[str, Any]:
    """Milliseconds, and the ratio to the base round by round: its median and quartiles."""
    ratios = [own / other for own, other in zip(timing.ms, base.ms, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median_ms": timing.median, "ratio": middle, "quartiles": [low, high], "rounds": len(ratios)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments("Measure the forms of routed experts.", "one small layer, few rounds")
    parser.add_argument("--part", nargs=2, metavar=("RUNTIME", "GRAPH"), help="bytes that one form adds")
    args = parser.parse_args(argv)
    if args.part:
        print(memory(args.part[0], Path(args.part[1])))
        return
    pin_threads()
    layers = {"small": Layer(32, 32, 32, 4, 2)} if args.quick else LAYERS
    payload = {}
    for name, layer in layers.items():
        with tempfile.TemporaryDirectory() as folder:
            payload[name] = {"layer": asdict(layer), "forms": measure(layer, Path(folder), 4 if args.quick else 21)}
        for form, facts in payload[name]["forms"].items():
            print(f"{name}; {form}: {json.dumps(facts)}", flush=True)
    out = folder_of(args)
    if out:
        print(f"written: {save('expert_forms', payload, out).name}")


if __name__ == "__main__":
    main()
