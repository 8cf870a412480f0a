"""What a bundle costs on onnxruntime and OpenVINO: DiT-MoE-S/2-8E2A, time at interval 3, memory of three variants.

    python -m benchmarks.bundle            # about 20 minutes on one core; writes results/bundle.json
    python -m benchmarks.bundle --short    # onnxruntime alone, graphs for one batch; writes results/bundle_short.json
    python -m benchmarks.bundle --quick    # two blocks, few steps: does it run?

The figures come from processes of their own, which import numpy and the runtime and not torch. Times are ratios of
medians in one process; runtimes are measured one after the other, so their milliseconds aren't to be compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.protocol import arguments, folder_of, pin_threads, save

TIMED = "uniform:3"
PROVIDERS = ("CPUExecutionProvider", "openvino")
MAPS = Path("/proc/self/smaps")


@dataclass(frozen=True)
class Size:
    depth: int
    steps: int
    rounds: int
    providers: tuple[str, ...] = PROVIDERS
    any_batch: bool = True


SIZES = {
    "whole": Size(depth=12, steps=50, rounds=3),
    "short": Size(depth=12, steps=50, rounds=2, providers=PROVIDERS[:1], any_batch=False),
    "quick": Size(depth=2, steps=6, rounds=1),
}


def export(folder: Path, size: Size) -> dict[str, Any]:
    """Two bundles: at interval 3, and with three different rows. Seconds, bytes."""
    import torch

    import moeca_compile as moeca
    from benchmarks import models
    from moeca_compile.schedule import Action, Schedule

    pin_threads()
    model, inputs = models.network(size.depth), models.example_inputs()
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    targets = ("onnx", "openvino")[: len(size.providers)]
    begin, begin_cpu = time.perf_counter(), time.process_time()
    timed = moeca.export(model, inputs, TIMED, folder / "timed", targets=targets, dynamic_batch=size.any_batch)
    seconds, processor_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    regions = moeca.explain(model, *inputs).regions
    rows = [
        tuple(Action.COMPUTE for _ in regions),
        tuple(Action.COMPUTE if region.kind == "attention" else Action.FORECAST for region in regions),
        tuple(Action.FORECAST for _ in regions),
    ]
    keys = tuple(region.key for region in regions)
    schedule = Schedule(tuple(rows), keys, order=1, period=3)
    three = moeca.export(model, inputs, schedule, folder / "three", dynamic_batch=size.any_batch)
    files = timed.manifest.files
    graphs = sum(entry.bytes for name, entry in files.items() if name.endswith(".onnx"))
    return {
        "weights_bytes": weights,
        "weights_file_bytes": files["weights.bin"].bytes,
        "graphs_bytes": graphs,
        "bundle_over_weights_and_graphs": timed.bytes / (weights + graphs),
        "export_seconds": seconds,
        "export_processor_seconds": processor_seconds,
        "golden_relative_error": {
            name: {each.provider: each.relative_error for each in one.manifest.golden.measured}
            for name, one in (("timed", timed), ("three", three))
        },
        "torch": torch.__version__,
    }


def speed(path: Path, size: Size, provider: str) -> dict[str, Any]:
    """Trajectories cached and all computed in turn."""
    from dataclasses import asdict

    from moeca_compile.runtime import Session
    from moeca_compile.runtime.bundle.bench import bench_bundle

    figures = bench_bundle(Session.open(path, provider, threads=1), steps=size.steps, rounds=size.rounds)
    return {**asdict(figures), "speedup_times_mac_fraction": figures.speedup * figures.mac_fraction}


def memory(path: Path, mode: str) -> dict[str, Any]:
    """Bytes that three variants add to a process that has onnxruntime: loaded, and after two rounds of their steps.

    What the weights take is what is mapped of their file, plus what loading allocated; running adds state and working
    memory. A page that is mapped twice counts once (proportional set size).
    """
    from moeca_compile.runtime import Session
    from moeca_compile.runtime.bundle.bundle import Bundle
    from moeca_compile.runtime.providers.onnxruntime import library

    library()
    steps = Bundle.open(path).golden()[0]
    base = _resident()
    session = Session.open(path, memory=mode, threads=1)
    loaded = _resident()
    with session.trajectory() as trajectory:
        for step in range(6):
            trajectory.run(steps[min(step, len(steps) - 1)])
        ran = _resident()
        state = trajectory.stats().state_bytes
    return {
        "variants": len(session.variants),
        "state_bytes": state,
        "loaded": {name: loaded[name] - base[name] for name in base},
        "ran": {name: ran[name] - base[name] for name in base},
        "weights_take": loaded["anonymous"] - base["anonymous"] + ran["weights_file"],
    }


def _resident() -> dict[str, int]:
    found = {"pss": 0, "anonymous": 0, "weights_file": 0}
    of_weights = False
    for line in MAPS.read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):
            of_weights = line.endswith("weights.bin")
        elif name in ("Pss:", "Anonymous:"):
            size = 1024 * int(words[0])
            found[name[:-1].lower()] += size
            found["weights_file"] += size if of_weights and name == "Pss:" else 0
    return found


def apart(what: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bundle", "--part", what, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def part(what: str, path: Path, *rest: str) -> dict[str, Any]:
    sys.modules["torch"] = None  # type: ignore[assignment]
    if what == "memory":
        return memory(path, rest[0])
    return speed(path, SIZES[rest[0]], rest[1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments("Measure a bundle on onnxruntime.", "two blocks, few steps")
    parser.add_argument("--short", action="store_true", help="onnxruntime alone, graphs for one batch, two rounds")
    parser.add_argument("--part", nargs="+", metavar="WHAT", help="one measurement, as JSON: WHAT BUNDLE HOW ...")
    args = parser.parse_args(argv)
    if args.part:
        what, path, *rest = args.part
        print(json.dumps(part(what, Path(path), *rest)))
        return
    how = "quick" if args.quick else "short" if args.short else "whole"
    size = SIZES[how]
    with tempfile.TemporaryDirectory() as folder:
        payload: dict[str, Any] = {"export": export(Path(folder), size)}
        weights = payload["export"]["weights_bytes"]
        payload["memory"] = {mode: apart("memory", Path(folder, "three"), mode) for mode in ("shared", "speed")}
        payload["time"] = {one: apart("speed", Path(folder, "timed"), how, one) for one in size.providers}
    for one in payload["memory"].values():
        one["weights_take_over_weights"] = one["weights_take"] / weights
    print(json.dumps(payload, indent=1))
    out = folder_of(args)
    if out:
        model = f"DiT-MoE-S/2-8E2A, {size.depth} blocks, 256 tokens, batch 2, float32, {TIMED} order 1"
        name = "bundle_short" if args.short else "bundle"
        print(f"written: {save(name, {'model': model, **payload}, out).name}")


if __name__ == "__main__":
    main()
