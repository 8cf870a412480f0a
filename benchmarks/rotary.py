"""A rotary embedding written out (opset 22) and as one operator (opset 23) on CPUs: time, error.

    python -m benchmarks.rotary            # a minute or two; writes results/rotary.json
    python -m benchmarks.rotary --quick    # one small size, few rounds: does it run?

The graphs are those that an export writes; tables of cosines and sines come in, as from a prologue.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.expert_forms import RUNTIMES, figures
from benchmarks.protocol import arguments, folder_of, interleave, pin_threads, save
from moeca_compile.graph import fx
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.onnx.lower import lower_onnx
from moeca_compile.pipeline import LOWER_ONNX
from moeca_compile.schedule import Action

SIZES = {"2 x 320 tokens, 6 heads of 64": (2, 320, 6, 64)}  # sequences, tokens, heads, channels of a head
ROUNDS = 11
WRITTEN_OUT = "written out"
Code = Callable[..., Any]


def neighbors(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As FLUX."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-imaginary, real], dim=-1).flatten(-2) * sin


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As language models."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


FORMS: dict[str, tuple[Code, Code]] = {
    "neighbors": (neighbors, lambda half: half.repeat_interleave(2, dim=-1)[:, None]),
    "halves": (halves, lambda half: torch.cat([half, half], dim=-1)[:, None]),
}


def traced(code: Code, *args: Tensor) -> GraphModule:
    gm: GraphModule = make_fx(lambda *given: tuple(code(*given)), tracing_mode="fake", pre_dispatch=True)(*args)
    return gm


def graphs(form: str, size: tuple[int, ...]) -> tuple[dict[str, bytes], dict[str, Any], Tensor]:
    """The two graphs, what goes in, and what comes out in torch."""
    import onnx_ir as ir

    turn, table = FORMS[form]
    generator = torch.Generator().manual_seed(0)
    x, angles = torch.randn(*size, generator=generator), torch.rand(size[1], size[3] // 2, generator=generator) * 6
    tables = table(angles.cos()), table(angles.sin())
    prologue = traced(lambda half: (table(half.cos()), table(half.sin())), angles)
    gm = traced(lambda *given: (turn(*given),), x, *tables)
    names = dict(zip((node.name for node in fx.placeholders(gm)), ("x", "cos", "sin"), strict=True))
    hoisted = dict(zip(list(names)[1:], fx.nodes_of(fx.output_node(prologue).args[0]), strict=True))
    variant = Variant("v0", (Action.COMPUTE,), gm, (), (), (), False, False, 1)
    made = {}
    for name, opset in ((WRITTEN_OUT, 22), ("RotaryEmbedding", 23)):
        model, _ = lower_onnx([variant], (), {}, names, ["y"], opset, passes=LOWER_ONNX, hoisted=hoisted)
        made[name] = ir.serde.serialize_model(model).SerializeToString()
    feeds = {name: value.numpy() for name, value in zip(names.values(), (x, *tables), strict=True)}
    return made, feeds, turn(x, *tables)


def measure(form: str, size: tuple[int, ...], rounds: int) -> dict[str, Any]:
    made, feeds, expected = graphs(form, size)
    found: dict[str, Any] = {}
    for runtime, session in RUNTIMES.items():
        runs = {name: partial(session(model), feeds) for name, model in made.items()}
        timings = interleave(runs, rounds=rounds)
        found[runtime] = {name: figures(timing, timings[WRITTEN_OUT]) for name, timing in timings.items()}
        for name, run in runs.items():
            found[runtime][name]["error"] = float(abs(run() - expected.numpy()).max())
    return found


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments("Measure rotary embeddings.", "one small size, few rounds").parse_args(argv)
    pin_threads()
    payload: dict[str, Any] = {}
    for name, size in {"small": (2, 8, 2, 8)}.items() if args.quick else SIZES.items():
        payload[name] = {form: measure(form, size, 4 if args.quick else ROUNDS) for form in FORMS}
        print(f"{name}: {json.dumps(payload[name])}", flush=True)
    out = folder_of(args)
    if out:
        print(f"written: {save('rotary', payload, out).name}")


if __name__ == "__main__":
    main()
