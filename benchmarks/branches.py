"""What the operators of kept branches take, a layer, beside what the experts of a full step take.

    python -m benchmarks.branches            # two minutes; writes results/branches.json
    python -m benchmarks.branches --quick    # few rounds: does it run?

Layers like those of the digits models (32 samples) and of DiT-MoE-S/2 (batch 2 and 8), random weights, float32, one
thread, times of the processor. Each kind runs on six layers in turn, as in a step, so that no layer's state lies in
the cache; a tenth of the tokens change their experts at each step. *reading*: every kept value and difference once,
which bounds their forecast. *router*: its product, sigmoid and choice, which no forecast of a region needs. *written
out*: the same step in torch's operators, one by one; compiled they are fused.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.protocol import Timing, arguments, folder_of, pin_threads, save
from moeca_compile.graph.variant import Slot
from moeca_compile.ops.branches import BRANCHES_AT, FORECAST, KEEP
from moeca_compile.ops.top_k import TOP_K
from moeca_compile.passes.partial.branches import updated_branches
from moeca_compile.passes.partial.insert_branches import _pick, _spread

DEPTH, TAU, EXPERTS = 6, 0.05, "experts of a full step"


@dataclass(frozen=True)
class Sizes:
    """Of one layer: samples, tokens, branches a token, experts, channels, channels inside an expert."""

    batch: int
    tokens: int
    top_k: int
    experts: int
    width: int
    hidden: int


LAYERS = {
    "DSMoE": Sizes(32, 64, 4, 16, 96, 72),
    "DiT-MoE": Sizes(32, 64, 2, 8, 96, 192),
    "DiT-MoE-S/2, batch 2": Sizes(2, 256, 2, 8, 384, 1536),
    "DiT-MoE-S/2, batch 8": Sizes(8, 256, 2, 8, 384, 1536),
}


class Layer:
    """Weights, routing and kept branches of one layer; `now` grows with every call."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        torch.manual_seed(seed)
        items = (sizes.batch, sizes.tokens, sizes.top_k)
        rows = sizes.batch * sizes.tokens
        self.sizes, self.step = sizes, 3.0
        self.ids = torch.rand(*items[:2], sizes.experts).topk(sizes.top_k).indices
        self.gates, self.scores = torch.rand(items), torch.rand(*items[:2], sizes.experts)
        self.x, self.router = torch.randn(rows, sizes.width), torch.randn(sizes.width, sizes.experts) / 10
        shapes = ((sizes.hidden, sizes.width), (sizes.width, sizes.hidden), (sizes.hidden, sizes.width))
        self.weights = [[torch.randn(one) / 20 for _ in range(sizes.experts)] for one in shapes] + [[], [], []]
        self.addresses = torch.tensor(
            [[one.data_ptr() for one in group] or [0] * sizes.experts for group in self.weights]
        )
        values = (*items, sizes.width)
        self.state = {
            Slot.HELD: self.ids + 1, Slot.GATES: torch.rand(items), Slot.Y: torch.randn(values),
            Slot.AT: torch.ones(items), Slot.D1: torch.randn(values) / 10, Slot.ERROR: torch.rand(items),
        }  # fmt: skip
        self.slots = (*list(self.state.values())[:5], None, None, self.state[Slot.ERROR], None, None)
        self.fresh = torch.randn(values)
        self.count = max(1, round(TAU * sizes.tokens * sizes.top_k))

    def route(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids, gates and now of the next step: a tenth of the tokens have other experts than before."""
        self.step += 1
        other = torch.rand(self.scores.shape).topk(self.sizes.top_k).indices
        self.ids = torch.where(torch.rand(*self.ids.shape[:2], 1) < 0.1, other, self.ids)
        return self.ids, self.gates, torch.tensor(self.step)

    def written_out(self, ids: Tensor, gates: Tensor, now: Tensor) -> None:
        routed = {"ids": ids, "gates": gates, "scores": self.scores}
        picked = _pick(
            **routed, x=self.x, now=now, order=1, count=self.count, tokens=None, state=self.state, sensitivity=None,
            threshold=None, quota=None,
        )  # fmt: skip
        rows = torch.ops.moeca.experts(picked["rows"], picked["experts"], *self.weights, "silu")
        computed = _spread(rows, picked["positions"], tuple(self.fresh.shape))
        updated_branches(**computed, **routed, now=now, order=1, copy=False, state=self.state)["branches"].sum(2)

    def kinds(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], object]]:
        none, weights, slots = (None, None, None), self.weights, self.slots
        return {
            EXPERTS: lambda ids, gates, now: torch.ops.moeca.experts(self.x, ids.flatten(0, 1), *weights, "silu"),
            "reading": lambda ids, gates, now: (self.state[Slot.Y].sum(), self.state[Slot.D1].sum()),
            "forecast_branches": lambda ids, gates, now: FORECAST(ids, gates, now, *slots[:7], 1, False, torch.float32),
            f"branches_, tau {TAU}": lambda ids, gates, now: BRANCHES_AT(
                self.x,
                ids,
                gates,
                None,
                now,
                *slots,
                *none,
                self.addresses.view(-1),
                self.sizes.hidden,
                "silu",
                self.count,
                1,
                False,
            ),
            "keep_branches_": lambda ids, gates, now: KEEP(self.fresh, ids, gates, None, now, *slots, 1),
            "router": lambda ids, gates, now: TOP_K((self.x @ self.router).sigmoid(), self.sizes.top_k),
            f"tau {TAU}, written out": self.written_out,
        }


def measure(sizes: Sizes, rounds: int) -> dict[str, Timing]:
    """Milliseconds of processor time a layer of each kind, in turn."""
    layers = [Layer(sizes, seed) for seed in range(DEPTH)]
    samples: dict[str, list[float]] = {}
    for number in range(-1, rounds):
        for kind in layers[0].kinds():
            calls = [(layer.kinds()[kind], layer.route()) for layer in layers]
            begin = time.thread_time()
            for call, routed in calls:
                call(*routed)
            samples.setdefault(kind, []).extend([1000 * (time.thread_time() - begin) / DEPTH] * (number >= 0))
    return {kind: Timing(tuple(values)) for kind, values in samples.items()}


def shares(timings: dict[str, Timing]) -> dict[str, list[float]]:
    """Of each kind quartiles over the rounds of its time, over the experts' time."""
    whole = timings[EXPERTS].ms
    return {
        kind: statistics.quantiles([one / full for one, full in zip(timing.ms, whole, strict=True)], n=4)
        for kind, timing in timings.items()
        if kind != EXPERTS
    }


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments("Measure the operators of kept branches.", "few rounds").parse_args(argv)
    pin_threads()
    payload = {}
    for name, sizes in LAYERS.items():
        timings = measure(sizes, 2 if args.quick else 8)
        found = shares(timings)
        print(f"{name}: the experts of a full step take {timings[EXPERTS].median:.2f} ms a layer")
        for kind, (low, middle, high) in found.items():
            print(f"  {kind}: {timings[kind].median:.2f} ms, {middle:.3f} of that ({low:.3f} to {high:.3f})")
        payload[name] = {"ms": {kind: one.median for kind, one in timings.items()}, "of_the_experts_time": found}
    out = folder_of(args)
    if out:
        print(f"written: {save('branches', payload, out).name}")


if __name__ == "__main__":
    main()
