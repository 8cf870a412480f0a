"""Blocks, each of which knows which regions it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.architectures.attention import Attention, Cross, QKNorm, core, heads_of
from tests.architectures.expected import Expected, Wanted, matrices
from tests.architectures.experts import DISPATCHES, routing
from tests.architectures.feedforward import HIDDEN, Mlp
from tests.architectures.joining import Join, Modulation
from tests.architectures.parts import DIM, HEADS, Parts


def feed_forward(parts: Parts, index: int) -> nn.Module:
    return DISPATCHES[parts.dispatch](parts) if index in parts.moe_blocks else Mlp(parts.mlp)


class Block(nn.Module):
    """Attention, perhaps cross-attention to the prompt, and feed-forward or experts, in turn or in parallel."""

    def __init__(self, parts: Parts, index: int) -> None:
        super().__init__()
        self.parts, self.routed = parts, index in parts.moe_blocks
        self.odd = parts.odd[1:] if parts.odd is not None and parts.odd[0] == index else ("", "")
        self.attn, self.mlp = Attention(parts), feed_forward(parts, index)
        self.cross = Cross(parts) if parts.cross else None
        self.modulation = Modulation(parts, 2)
        ways = {self.odd[0]: self.odd[1]}
        self.join1 = Join(parts, ways.get("attn", ""), parts.dropout)
        self.join2 = Join(parts, ways.get("mlp", ""), parts.dropout)
        self.join3 = Join(parts) if parts.cross else None

    def forward(self, x: Tensor, c: Tensor, shared: Tensor | None, prompt: Tensor | None) -> Tensor:
        one, two = self.modulation(c, shared)
        if self.parts.arrangement == "in turn":
            x = self.join1.leave(x, self.attn(self.join1.enter(x, one)), one)
            x = self.attend(x, prompt)
            return self.join2.leave(x, self.mlp(self.join2.enter(x, two)), two)
        a, b = self.attn(self.join1.enter(x, one)), self.mlp(self.join2.enter(x, two))
        if self.parts.arrangement == "x + a + b":
            x = self.join2.leave(self.join1.add(x, a, self.join1.gate(one)), b, two)
        elif self.parts.arrangement == "x + (a + b)":
            x = self.join1.leave(x, a + b, one)
        else:
            both = self.join1.gated(a, one) + self.join2.gated(b, two)
            x = self.join1.after(self.join1.add(x, both, None))
        return self.attend(x, prompt)

    def attend(self, x: Tensor, prompt: Tensor | None) -> Tensor:
        if self.cross is None:
            return x
        assert prompt is not None
        nothing = (None, None, None)
        return self.join3.leave(x, self.cross(self.join3.enter(x, nothing), prompt), nothing)

    def expect(self, prefix: str, expected: Expected) -> None:
        attention, mlp = matrices(prefix, ("attn", self.attn)), matrices(prefix, ("mlp", self.mlp))
        maybe = frozenset(
            name for name in mlp if name.endswith("router.weight")
        )  # normalized ones aren't multiplied by
        heads = ("head", HEADS, HEADS // 2) if self.parts.mixture_of_heads else None
        router = routing(self.parts) if self.routed else None
        alone = "self" if self.parts.layout == "one stream" else ""  # joined streams: as one sees it
        if self.parts.arrangement == "x + (a + b)":
            kind = "span" if self.routed else "attention"
            expected.regions.append(Wanted(kind, attention | mlp - maybe, 1, maybe, router or heads, alone))
        else:
            for name, wanted in (
                ("attn", Wanted("attention", attention, router=heads, attends=alone)),
                ("mlp", Wanted("experts" if self.routed else "mlp", mlp - maybe, 1, maybe, router)),
            ):
                if self.odd[0] == name:
                    expected.rejected["written otherwise"] += 1
                else:
                    expected.regions.append(wanted)
        if self.cross is not None:
            own = matrices(prefix, ("cross.q", self.cross.q), ("cross.out", self.cross.out))
            prompted = matrices(prefix, ("cross.kv", self.cross.kv))
            expected.regions.append(Wanted("attention", own, 1, prompted, attends="cross"))


class TwoStreams(nn.Module):
    """MMDiT: image and text tokens with weights of their own share one attention; `last` drops the text stream."""

    def __init__(self, parts: Parts, index: int, last: bool) -> None:
        super().__init__()
        self.parts, self.last, self.routed = parts, last, index in parts.moe_blocks
        self.image, self.text = Attention(parts), Attention(parts)
        self.image_mlp, self.text_mlp = feed_forward(parts, index), None if last else Mlp("gelu")
        self.modulation = Modulation(parts, 4)
        self.joins = nn.ModuleList(Join(parts, dropout=parts.dropout) for _ in range(4))

    def forward(self, x: Tensor, text: Tensor, c: Tensor, shared: Tensor | None) -> tuple[Tensor, Tensor]:
        triples = self.modulation(c, shared)
        streams = [self.joins[i].enter(s, triples[i]) for i, s in enumerate((x, text))]
        pairs = zip(self.image.project(streams[0]), self.text.project(streams[1]), strict=True)
        both = core(self.parts.core, *(torch.cat(pair, dim=2) for pair in pairs)).transpose(1, 2).flatten(2)
        of_image, of_text = both.split([x.shape[1], text.shape[1]], dim=1)
        x = self.joins[0].leave(x, self.image.out(of_image), triples[0])
        x = self.joins[2].leave(x, self.image_mlp(self.joins[2].enter(x, triples[2])), triples[2])
        if not self.last:
            text = self.joins[1].leave(text, self.text.out(of_text), triples[1])
            text = self.joins[3].leave(text, self.text_mlp(self.joins[3].enter(text, triples[3])), triples[3])
        return x, text

    def expect(self, prefix: str, expected: Expected) -> None:
        image, text = matrices(prefix, ("image", self.image)), matrices(prefix, ("text", self.text))
        out = matrices(prefix, ("text.out", self.text.out))
        if self.last:
            expected.regions.append(Wanted("attention", image, 1, text - out, attends="joint"))
        else:
            expected.regions.append(Wanted("attention", image | text, 2, attends="joint"))
            expected.regions.append(Wanted("mlp", matrices(prefix, ("text_mlp", self.text_mlp))))
        mlp = matrices(prefix, ("image_mlp", self.image_mlp))
        maybe = frozenset(name for name in mlp if name.endswith("router.weight"))
        router = routing(self.parts) if self.routed else None
        expected.regions.append(Wanted("experts" if self.routed else "mlp", mlp - maybe, 1, maybe, router))


class LinearInOut(nn.Module):
    """Flux's single block: attention and feed-forward share the linear in and the linear out."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.q_norm, self.k_norm = QKNorm(parts.qk_norm), QKNorm(parts.qk_norm)
        self.linear1, self.linear2 = nn.Linear(DIM, 3 * DIM + HIDDEN), nn.Linear(DIM + HIDDEN, DIM)
        self.modulation, self.join = Modulation(parts, 1), Join(parts, dropout=parts.dropout)

    def forward(self, x: Tensor, c: Tensor, shared: Tensor | None, prompt: Tensor | None) -> Tensor:
        (triple,) = self.modulation(c, shared)
        q, k, v, h = self.linear1(self.join.enter(x, triple)).split([DIM, DIM, DIM, HIDDEN], dim=-1)
        a = core(self.parts.core, *heads_of(self.parts, self.q_norm, self.k_norm, q, k, v)).transpose(1, 2).flatten(2)
        return self.join.leave(x, self.linear2(torch.cat([a, F.gelu(h, approximate="tanh")], dim=-1)), triple)

    def expect(self, prefix: str, expected: Expected) -> None:
        both = matrices(prefix, ("linear1", self.linear1), ("linear2", self.linear2))
        expected.regions.append(Wanted("attention", both))
