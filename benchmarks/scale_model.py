"""What caching does to a DiT-MoE on 8 to 1,024 GPUs: a cost model on paper, checked against what was measured.

    python -m benchmarks.scale_model             # the tables
    python -m benchmarks.scale_model --report    # writes docs/scale.md

Multiply-accumulates, bytes of state and bytes on the wire follow from a network's sizes; tests compare them with
captured graphs, number for number. Times follow from three constants that are fitted to the recorded runs of XL/2 on
one H200 (results/gpu.json), and are checked against those of G/2. Links and prices are assumptions, each with its
source. Nothing here ran on several GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu_report import computed_and_reused
from benchmarks.pages import markdown
from benchmarks.protocol import RESULTS, arguments, when

PAGE = Path("docs/scale.md")
STEPS, KEPT, WIDTH = 50, 2, 2  # steps of an image; kept values of an output at order 1; bytes of bfloat16
GUIDED = 2  # samples of an image
INTERVALS = (1, 2, 3, 5)
NODE = 8  # GPUs that NVLink joins
GPUS = (8, 16, 64, 256, 1024)


class Constant(NamedTuple):
    """A number of the model, and where it comes from."""

    value: float
    unit: str
    source: str


CONSTANTS = {
    "memory": Constant(141e9, "bytes", "NVIDIA H200 datasheet"),
    "nvlink": Constant(450e9, "bytes/s one way", "NVIDIA H200 datasheet: 900 GB/s both ways together"),
    "network": Constant(50e9, "bytes/s a GPU", "assumption: one 400 Gb/s adapter a GPU, as in NVIDIA's DGX H200"),
    "used": Constant(0.7, "of a link's rate", "assumption: what an all-to-all reaches"),
    "latency": Constant(30e-6, "s an all-to-all", "assumption"),
    "dollars": Constant(3.0, "dollars a GPU and hour", "assumption: it cancels out of every ratio below"),
    "reserve": Constant(0.2, "of the memory", "assumption: activations, workspace, fragments"),
}


@dataclass(frozen=True)
class Network:
    """A DiT-MoE: attention, and SwiGLU experts of which a token takes some, with a shared one.

    Attributes:
        tokens: of one sample.
        hidden, expert, shared: widths of the stream, of a routed expert and of the shared one.
    """

    name: str
    depth: int
    hidden: int
    tokens: int
    experts: int
    top_k: int
    expert: int
    shared: int

    def attention_macs(self, samples: int) -> int:
        """Of one layer: projections, scores and their sums."""
        rows = samples * self.tokens
        return rows * 4 * self.hidden**2 + 2 * rows * self.tokens * self.hidden

    def moe_macs(self, samples: int) -> int:
        """Of one layer: router, the experts that tokens chose, and the shared expert."""
        each = self.hidden * (self.experts + 3 * self.top_k * self.expert + 3 * self.shared)
        return samples * self.tokens * each

    def macs(self, samples: int) -> int:
        """Of all regions at a computed step."""
        return self.depth * (self.attention_macs(samples) + self.moe_macs(samples))

    def state_bytes(self, samples: int, width: int = WIDTH, kept: int = KEPT) -> int:
        """What each layer's attention and experts gave, at the last `kept` computed steps."""
        return self.depth * 2 * kept * samples * self.tokens * self.hidden * width

    def expert_parameters(self) -> int:
        return self.depth * self.experts * 3 * self.hidden * self.expert

    def other_parameters(self) -> int:
        """Attention, modulation, router and shared expert; biases and what stands outside the layers left out."""
        return self.depth * self.hidden * (10 * self.hidden + self.experts + 3 * self.shared)


def exchanged_bytes(rows: int, hidden: int, ranks: int, width: int = WIDTH) -> float:
    """What a rank sends to others in the two all-to-alls of a layer: its rows there, and the others' results back.

    Args:
        rows: that a rank sends to all experts, filled up to their capacity.
        hidden: width of a row.
        ranks: that the experts are spread over, evenly.
        width: bytes of a number.
    """
    return 2 * rows * hidden * width * (ranks - 1) / ranks


class Times(NamedTuple):
    """Seconds on one GPU, fitted: of a multiply-accumulate, of a layer whatever its size, and at a reused step of a
    byte of state and of the whole step."""

    mac: float
    layer: float
    state: float
    reused: float

    def computed(self, network: Network, samples: int) -> float:
        return self.mac * network.macs(samples) + self.layer * network.depth

    def cheap(self, network: Network, samples: int) -> float:
        return self.state * network.state_bytes(samples) + self.reused


G2 = Network("G/2-16E2A", 40, 1408, 256, 16, 2, 4 * 1408, 2 * 1408)
XL2 = Network("XL/2-8E2A", 28, 1152, 256, 8, 2, 4 * 1152, 2 * 1152)
# no published model has these sizes
LARGE = Network("100 B", 40, 2560, 1024, 64, 4, 5120, 5120)


def recorded(results: Mapping[str, Any]) -> Iterator[tuple[Network, int, float, float, int]]:
    """The runs of the H200: network, samples, seconds of a computed and of a reused step, bytes of state."""
    for name, run in results["runs"].items():
        if name.endswith("with guidance"):
            model, pixels, batch = name.split(", ")
            tokens = (int(pixels.split()[0]) // 16) ** 2
            base = G2 if model.startswith("G") else XL2
            network = Network(**{**vars(base), "tokens": tokens})
            if (found := computed_and_reused(run["contenders"])) is not None:
                computed, reused, state = found
                yield network, GUIDED * int(batch.split()[1]), computed / 1e3, reused / 1e3, state


def fitted(runs: Sequence[tuple[Network, int, float, float, int]]) -> Times:
    """The times that fit these runs, by least squares of relative errors."""

    def solve(rows: list[tuple[float, float]], seconds: list[float]) -> tuple[float, float]:
        weights = 1 / np.array(seconds)
        first, second = np.linalg.lstsq(np.array(rows) * weights[:, None], np.ones(len(seconds)), rcond=None)[0]
        return float(first), float(second)

    computed = solve([(float(n.macs(s)), float(n.depth)) for n, s, *_ in runs], [run[2] for run in runs])
    reused = solve([(float(n.state_bytes(s)), 1.0) for n, s, *_ in runs], [run[3] for run in runs])
    return Times(*computed, *reused)


class Plan(NamedTuple):
    """A network on some GPUs. Bytes are of one GPU; the exchange is what it sends for an image of its own."""

    spread: int
    weights: float
    images: int
    state: float
    exchange: float
    seconds: float
    share_on_wire: float

    @property
    def per_second(self) -> float:
        """Images a second and GPU."""
        return self.images / self.seconds


def plan(network: Network, gpus: int, interval: int, times: Times, most: int = 8) -> Plan:
    """Experts are spread over as many GPUs as there are experts, or over all; groups of GPUs repeat. Each GPU has
    images of its own: as many as its memory takes, at most `most`. Nothing overlaps.

    Args:
        network: on the GPUs.
        gpus: how many.
        interval: every so many steps is computed; 1: no caching.
        times: of one GPU.
        most: images of a GPU at a time.
    """
    value = {name: constant.value for name, constant in CONSTANTS.items()}
    spread = min(gpus, network.experts)
    weights = WIDTH * (network.other_parameters() + network.expert_parameters() / spread)
    room = value["memory"] * (1 - value["reserve"]) - weights
    kept = network.state_bytes(GUIDED) if interval > 1 else 0
    images = min(most, int(room // kept) if kept else most)
    if room <= 0 or images < 1:
        return Plan(spread, weights, 0, kept, 0.0, float("inf"), 0.0)
    samples = GUIDED * images
    layer = exchanged_bytes(samples * network.tokens * network.top_k, network.hidden, spread)
    outside = max(0, spread - NODE) / max(1, spread - 1)  # of what is sent, what leaves the node
    wire = layer * ((1 - outside) / value["nvlink"] + outside / value["network"]) / value["used"]
    wire = network.depth * (wire + 2 * value["latency"])
    computed = -(-STEPS // interval)
    seconds = computed * (times.computed(network, samples) + wire)
    seconds += (STEPS - computed) * times.cheap(network, samples)
    sent = computed * network.depth * layer / images
    return Plan(spread, weights, images, kept * images, sent, seconds, computed * wire / seconds)


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """The page's tables."""
    runs = list(recorded(results))
    times = fitted([run for run in runs if run[0].name == XL2.name])
    yield "## The constants\n"
    rows = [(name, f"{one.value:g}", one.unit, one.source) for name, one in CONSTANTS.items()]
    fits = {
        "computed step, by work": (times.mac, "s a MAC"),
        "computed step, by layer": (times.layer, "s a layer"),
        "reused step, by state": (times.state, "s a byte"),
        "reused step": (times.reused, "s a step"),
    }
    source = "fitted to XL/2 on one H200, docs/gpu.md"
    rows += [(name, f"{number:.3g}", unit, source) for name, (number, unit) in fits.items()]
    yield markdown(("", "value", "unit", "from"), rows, left=None)
    yield "\n## Against measured steps of one H200\n"
    yield "XL/2 was fitted to; G/2 is a prediction. Bytes of state come from the sizes alone.\n"
    yield markdown(("", "samples", "computed, ms", "model", "reused, ms", "model", "state, MB", "model"), [
        (
            f"{network.name}, {network.tokens} tokens", samples, f"{computed * 1e3:.2f}",
            f"{times.computed(network, samples) * 1e3:.2f}", f"{reused * 1e3:.2f}",
            f"{times.cheap(network, samples) * 1e3:.2f}", f"{state / 1e6:.0f}",
            f"{network.state_bytes(samples) / 1e6:.0f}",
        )
        for network, samples, computed, reused, state in runs
    ])  # fmt: skip
    for network in (G2, LARGE):
        total = network.expert_parameters() + network.other_parameters()
        yield f"\n## {network.name}: {total / 1e9:.1f} B parameters, {network.tokens} tokens a sample\n"
        yield markdown(HEAD, [row for gpus in GPUS for row in rows_of(network, gpus, times)])


HEAD = (
    "GPUs", "interval", "experts over", "weights, GB", "images at a time", "state, GB", "sent an image, GB",
    "time on the wire", "images/s", "images a dollar", "speedup",
)  # fmt: skip


def rows_of(network: Network, gpus: int, times: Times) -> Iterator[tuple[object, ...]]:
    base = plan(network, gpus, 1, times)
    for interval in INTERVALS:
        one = plan(network, gpus, interval, times)
        if not one.images:
            yield gpus, interval, one.spread, f"{one.weights / 1e9:.0f}", "no room", "", "", "", "", "", ""
            continue
        dollars = one.per_second * 3600 / CONSTANTS["dollars"].value
        yield (
            gpus, interval, one.spread, f"{one.weights / 1e9:.1f}", one.images, f"{one.state / 1e9:.1f}",
            f"{one.exchange / 1e9:.2f}", f"{one.share_on_wire:.0%}", f"{one.per_second * gpus:.3g}", f"{dollars:.3g}",
            f"{one.per_second / base.per_second:.2f}" if base.images else "",
        )  # fmt: skip


HEADER = """\
<!-- Written by `python -m benchmarks.scale_model --report` from benchmarks/results/gpu.json. -->
# Many GPUs, on paper

What caching would do to a DiT-MoE on 8 to 1,024 GPUs. **This is a model, not a measurement**: nothing here ran on more
than one GPU. Its multiply-accumulates, bytes of state and bytes on the wire equal those of captured graphs, number for
number (`tests/benchmarks/test_scale_model.py`; for the wire `tests/test_distributed.py`, with two processes). Its times
are fitted to recorded runs of one network and checked against another. Links, latency, memory reserve and price are
assumptions.

- Experts are spread over as many GPUs as there are experts, at most over all. Such groups repeat, so throughput grows
  with the number of GPUs. The rest of the network is on every GPU. A GPU has up to 8 images with guidance at a time.
- A computed step exchanges tokens twice a layer: to the experts, and back. Routing is taken as even. Exchange and
  computation don't overlap. A reused step exchanges nothing: its program has no collective.
- All ranks follow one static schedule, so none waits in a collective that another skips.
- The speedup is against the same GPUs at interval 1, where every step is computed. Quality isn't part of this page:
  [schedules](schedules.md).
- The model doesn't count that few samples of a large network are bound by reading its weights. So a computed step of
  G/2 with two samples of 256 tokens takes 26 % less time here than was measured.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments("What caching does on many GPUs, on paper.", "the same")
    parser.add_argument("--report", action="store_true", help=f"write {PAGE}")
    args = parser.parse_args(argv)
    results = json.loads((RESULTS / "gpu.json").read_text())
    text = "\n".join(lines(results))
    if args.report:
        PAGE.write_text(f"{HEADER}\nThe runs: {when(results['machine'])}.\n\n{text}\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
