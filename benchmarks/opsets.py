"""The same bundle at several opsets: nodes, bytes, seconds to export and to load, speed, error against torch.

    python -m benchmarks.opsets            # two models, about 15 minutes on one core; writes results/opsets.json
    python -m benchmarks.opsets --only FLUX    # one of them; writes results/opsets_flux.json
    python -m benchmarks.opsets --quick    # small models, few rounds: does it run?

All figures come from one process. Sessions open and steps run in turn, opset after opset, and each ratio is between
neighbors in time.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import moeca_compile as moeca
from benchmarks import models
from benchmarks.protocol import arguments, as_json, folder_of, interleave, pin_threads, print_table, save
from moeca_compile.runtime import Session

OPSETS = (20, 23, 24)
PROVIDERS = ("CPUExecutionProvider", "openvino")
NAMED = ("Attention", "RMSNormalization", "RotaryEmbedding", "LayerNormalization", "Softmax")
Example = tuple[torch.nn.Module, Any]


def dit_moe(quick: bool) -> Example:
    """DiT-MoE-S/2-8E2A: attention without norms of queries and keys."""
    return models.network(1 if quick else 4), models.example_inputs()


def flux(quick: bool) -> Example:
    """A FLUX of 6 blocks, 256 image tokens and 64 of text: RMS norms of queries and keys, rotary embeddings."""
    from diffusers import FluxTransformer2DModel

    width, blocks = (16, 1) if quick else (64, 2)
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=blocks, num_single_layers=2 * blocks, attention_head_dim=width,
        num_attention_heads=6, joint_attention_dim=384, pooled_projection_dim=64,
        axes_dims_rope=(width // 4, 3 * width // 8, 3 * width // 8),
    )  # fmt: skip
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    inputs = {
        "hidden_states": torch.randn(2, 256, 64),
        "encoder_hidden_states": torch.randn(2, 64, 384),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.full((2,), 0.9),
        "img_ids": torch.stack([torch.zeros(16, 16), rows, columns], dim=-1).view(256, 3),
        "txt_ids": torch.zeros(64, 3),
    }
    return model.eval().requires_grad_(False), inputs


MODELS: dict[str, Callable[[bool], Example]] = {"DiT-MoE": dit_moe, "FLUX": flux}


def graph_of(path: Path) -> dict[str, Any]:
    """The variant that computes everything: its nodes and bytes, and how many nodes of each operator in question."""
    import onnx

    file = path / "v0.onnx"
    counts = Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)
    operators = {name: counts[name] for name in NAMED if counts[name]}
    return {"nodes": counts.total(), "bytes": file.stat().st_size, "operators": operators}


def measure(build: Callable[[bool], Example], folder: Path, quick: bool) -> dict[str, Any]:
    """One model at all opsets, on all runtimes."""
    model, inputs = build(quick)
    bundles: dict[str, Path] = {}
    found: dict[str, Any] = {"graphs": {}, "load": {}, "step": {}}
    for opset in OPSETS:
        path = folder / str(opset)
        begin = time.perf_counter()
        bundle = moeca.export(
            model, inputs, "uniform:3", path, targets=("onnx", "openvino"), opset=opset, dynamic_batch=False
        )
        seconds = time.perf_counter() - begin
        errors = {entry.provider: entry.relative_error for entry in bundle.manifest.golden.measured}
        bundles[f"opset {opset}"] = path
        found["graphs"][f"opset {opset}"] = {"export_seconds": seconds, "relative_error": errors, **graph_of(path)}
    base = f"opset {OPSETS[0]}"
    for provider in PROVIDERS:
        opens = {name: partial(Session.open, path, provider, threads=1) for name, path in bundles.items()}
        loads = interleave(opens, rounds=2 if quick else 9, warmup=1)
        sessions = {name: Session.open(path, provider, threads=1) for name, path in bundles.items()}
        steps = {name: partial(session.run, feeds_of(session)) for name, session in sessions.items()}
        timings = interleave(steps, rounds=2 if quick else 41)
        for what, measured in (("load", loads), ("step", timings)):
            print_table(f"{what}, {provider}", measured, baseline=base)
            found[what][provider] = as_json(measured, baseline=base)
    return found


def feeds_of(session: Session) -> dict[str, Any]:
    """The inputs of the first golden step: `Session.run` computes everything."""
    return session.bundle.golden()[0][0]


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments("Measure opsets.", "small models, few rounds")
    parser.add_argument("--only", choices=MODELS, help="one model, into a result of its own")
    args = parser.parse_args(argv)
    pin_threads()
    payload: dict[str, Any] = {}
    for name in [args.only] if args.only else MODELS:
        with tempfile.TemporaryDirectory() as folder:
            payload[name] = measure(MODELS[name], Path(folder), args.quick)
        for opset, facts in payload[name]["graphs"].items():
            print(f"{name}, {opset}: {facts}")
    out = folder_of(args)
    if out:
        result = f"opsets_{args.only.lower()}" if args.only else "opsets"
        print(f"written: {save(result, payload, out).name}")


if __name__ == "__main__":
    main()
