"""Expert weights in oneDNN's blocked layout, which `moeca::experts` multiplies fastest on CPUs: few rows above all.

Packed weights are copies, so they are used only inside `Packs.active`, by the thread and for the weights that they were
made of: the caller drops them when a weight changes. Writes that no version counter shows (`.data`) are found by their
bits: of all weights after each `mark_unverified`, and of a part of each, another one in turn, at every use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_compile.graph.content import Stamp

Weights = Sequence[Tensor]
Linear = Callable[[Tensor], Tensor]

# Elements of a weight: below, a call into oneDNN and the look at the weight cost more than the layout saves. Seen in
# float32 on a thread with AVX-512: packed, weights of 384 x 96 numbers are slower, 384 x 384 alike, 1536 x 384 faster.
SMALLEST = 1 << 17

_local = threading.local()


@dataclass
class PackedExperts:
    """One layer's linear maps by expert, bias included: rows [n, in] -> [n, out].

    Attributes:
        up, down, gate: E maps each; `gate` may be empty.
        stamps: what the weights were when they were packed, in the order of `Packs.of`.
        proven: no write that version counters don't show is suspected.
        uses: how often the layer was asked for.
    """

    up: list[Linear]
    down: list[Linear]
    gate: list[Linear]
    stamps: list[Stamp]
    proven: bool = True
    uses: int = 0

    def are_of(self, weights: Iterable[Tensor]) -> bool:
        """Whether the weights are those that were packed, as far as this use looks."""
        self.uses += 1
        if not self.proven:
            return all(stamp.matches(weight) for stamp, weight in zip(self.stamps, weights, strict=True))
        return all(stamp.sample_matches(weight, self.uses) for stamp, weight in zip(self.stamps, weights, strict=True))


class Packs:
    """The packed layers of one set of weights."""

    def __init__(self) -> None:
        self.layers: dict[Hashable, PackedExperts] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """In this thread `moeca::experts` packs the weights it gets, and keeps them here."""
        before = current()
        _local.packs = self
        try:
            yield
        finally:
            _local.packs = before

    def mark_unverified(self) -> None:
        """Weights may have been written to past their version counters: check each layer before it is used again."""
        for layer in self.layers.values():
            layer.proven = False

    def of(
        self, up: Weights, down: Weights, gate: Weights, up_bias: Weights, down_bias: Weights, gate_bias: Weights
    ) -> PackedExperts | None:
        """The packed form of one layer's weights.

        Args:
            up, gate: E weights [I, D]; `gate` may be empty.
            down: E weights [D_out, I].
            up_bias, gate_bias: E biases [I], or none.
            down_bias: E biases [D_out], or none.

        Returns:
            The layer, packed now or before; None where oneDNN doesn't take these weights (`can_pack`).
        """
        groups = (up, down, gate, up_bias, down_bias, gate_bias)
        if not can_pack(up[0]):
            return None
        weights = [weight for group in groups for weight in group]
        key = (up[0].stride(), *(weight.data_ptr() for weight in weights))
        layer = self.layers.get(key)
        if layer is None or not layer.are_of(weights):
            layer = self.layers[key] = PackedExperts(
                _linears(up, up_bias), _linears(down, down_bias), _linears(gate, gate_bias), list(map(Stamp, weights))
            )
        layer.proven = True
        return layer


def current() -> Packs | None:
    """The packs that are active in this thread."""
    packs: Packs | None = getattr(_local, "packs", None)
    return packs


def can_pack(weight: Tensor) -> bool:
    """Whether weights like it gain from oneDNN's layout: float32, or bfloat16 on processors that have it, on the CPU,
    and large enough."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or weight.numel() < SMALLEST:
        return False
    wide: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and wide)


def _linears(weights: Weights, biases: Weights) -> list[Linear]:
    if not biases:
        return [_linear(weight, None) for weight in weights]
    return [_linear(*pair) for pair in zip(weights, biases, strict=True)]


def _linear(weight: Tensor, bias: Tensor | None) -> Linear:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    bias = None if bias is None else bias.clone()
    run = torch.ops.mkldnn._linear_pointwise

    def linear(x: Tensor) -> Tensor:
        result: Tensor = run(x, packed, bias, "none", [], "")
        return result

    return linear
