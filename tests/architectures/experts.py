"""MoE layers (N,T,D) -> (N,T,D): routers, dispatches that trace as they are, and loops that `prepare` makes traceable.

M = N*T tokens, E experts, K of them a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.architectures.feedforward import Mlp
from tests.architectures.parts import DIM, TOKENS, Parts
from tests.models import NumpyMoE

EXPERTS, TOP_K, HIDDEN = 4, 2, 12


class Router(nn.Module):
    """tokens (M,D) -> ids (M,K), weights (M,K)."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.randn(EXPERTS, DIM))
        self.register_buffer("bias", torch.linspace(-0.05, 0.05, EXPERTS))

    def scores(self, x: Tensor) -> Tensor:
        """(..., E)."""
        if self.parts.scores == "cosine":
            return (F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1)) * 5).softmax(dim=-1)
        logits = F.linear(x, self.weight)
        return logits.sigmoid() if self.parts.scores == "sigmoid" else logits.softmax(dim=-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.scores(x)
        choice = scores if self.parts.selection == "plain" else scores + self.bias.to(scores.dtype)
        if self.parts.selection == "groups":  # DeepSeek-V3: the best groups first, then the best experts in them
            grouped = choice.view(-1, 2, EXPERTS // 2)
            best = grouped.topk(1, dim=-1)[0].sum(dim=-1).topk(1, dim=-1)[1]
            open_ = torch.zeros_like(grouped[..., 0]).scatter(1, best, 1.0).bool()
            choice = grouped.masked_fill(~open_.unsqueeze(-1), -1.0).flatten(1)
        ids = choice.topk(TOP_K, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        if self.parts.weighting != "plain":
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-6)
        return ids, weights * 2.0 if self.parts.weighting == "scaled" else weights


class MoE(nn.Module):
    """A router, `dispatch`, and shared experts that every token passes."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts, self.top_k = parts, TOP_K
        self.router = Router(parts)
        self.make_experts()
        self.shared = nn.ModuleList(Mlp("swiglu", HIDDEN) for _ in range(parts.shared))

    def make_experts(self) -> None:
        self.experts = nn.ModuleList(Mlp(self.parts.expert, HIDDEN) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, DIM)
        ids, weights = self.router(tokens)
        out = self.dispatch(tokens, ids, weights).reshape(x.shape)
        for shared in self.shared:
            out = out + shared(x)
        return out

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError


class Packed(MoE):
    """Experts as stacked matrices (E,.,.)."""

    def make_experts(self) -> None:
        width = 2 * HIDDEN if self.parts.expert == "swiglu" else HIDDEN
        self.w1 = nn.Parameter(torch.randn(EXPERTS, DIM, width))
        self.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, DIM))

    def act(self, h: Tensor) -> Tensor:
        if self.parts.expert == "swiglu":
            gate, up = h.chunk(2, dim=-1)
            return F.silu(gate) * up
        return F.gelu(h)


class Dense(Packed):
    """Every expert on every token, weighted by a row of gates that is 0 for most."""

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates = weights.new_zeros(x.shape[0], EXPERTS).scatter(1, ids, weights)
        y = torch.einsum("meh,ehd->med", self.act(torch.einsum("md,edh->meh", x, self.w1)), self.w2)
        return torch.einsum("me,med->md", gates.to(y.dtype), y)


class Gather(Packed):
    """The matrices of each token's experts are gathered."""

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        h = self.act(torch.einsum("md,mkdh->mkh", x, self.w1[ids]))
        y = torch.einsum("mkh,mkhd->mkd", h, self.w2[ids])
        return (y * weights.to(y.dtype).unsqueeze(-1)).sum(dim=1)


class ExpertChoice(Packed):
    """EC-DiT: each expert takes its best tokens of each sample, by one-hot dispatch and combine."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router.scores(x).transpose(1, 2)  # (N,E,T)
        weights, ids = scores.topk(TOKENS // 2, dim=-1)
        where = F.one_hot(ids, x.shape[1]).to(x.dtype)  # (N,E,C,T)
        h = self.act(torch.einsum("ntd,nect,edh->nech", x, where, self.w1))
        y = torch.einsum("nech,ehd->necd", h, self.w2)
        out = torch.einsum("nect,nec,necd->ntd", where, weights.to(x.dtype), y)
        for shared in self.shared:
            out = out + shared(x)
        return out


class Numpy(MoE):
    """Sorted segments, counts on the host (DiT-MoE)."""

    infer = NumpyMoE.infer

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.infer(x, ids.reshape(-1), weights.reshape(-1, 1))


class Nonzero(MoE):
    """A loop over the experts that were hit (DSMoE)."""

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        masks = F.one_hot(ids, num_classes=EXPERTS).permute(2, 1, 0)
        for e in torch.greater(masks.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(masks[e].squeeze(0))
            y = self.experts[e](x[None, token].reshape(-1, DIM)) * weights[token, slot, None]
            out.index_add_(0, token, y.to(x.dtype))
        return out


class Where(MoE):
    """A loop over all experts with a branch on an empty result (ProMoE)."""

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() > 0:
                out[token] += weights[token, slot, None] * expert(x[token])
        return out


class Inline(MoE):
    """Router, loop and shared experts in one forward; adds to the shared output."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        ids, weights = self.router(tokens)
        out = torch.zeros_like(tokens)
        for e in range(EXPERTS):
            token, slot = (ids == e).nonzero(as_tuple=True)
            if token.numel() == 0:
                continue
            out.index_add_(0, token, self.experts[e](tokens[token]) * weights[token, slot, None])
        for shared in self.shared:
            out = out + shared(tokens)
        return out.view_as(x)


DISPATCHES: dict[str, type[MoE]] = {
    "dense": Dense, "gather": Gather, "expert choice": ExpertChoice,
    "numpy": Numpy, "nonzero": Nonzero, "where": Where, "inline": Inline,
}  # fmt: skip
TRACEABLE = ("dense", "gather", "expert choice")


def routing(parts: Parts) -> tuple[str, int, int]:
    """Who chooses in these parts' MoE layers, among how many experts, and how many it takes."""
    return ("expert", EXPERTS, TOKENS // 2) if parts.dispatch == "expert choice" else ("token", EXPERTS, TOP_K)
