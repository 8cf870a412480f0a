"""MoE layers with Python branches on masks, and with routers in a module or function of their own.

Tokens (N,T,D) -> (N,T,D), sizes as in `layers`; labels (N,) int, where NULL is the unconditional one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.expert_dispatch.layers import EXPERTS, HIDDEN, TOP_K, WIDTH
from tests.models import SwiGLU

NULL = 10


class Prototypes(nn.Module):
    """ProMoE, token choice: unconditional tokens go to the last expert, others by cosine similarity to prototypes."""

    def __init__(self, top_k: int = 1, score: str = "sigmoid", null: int = NULL) -> None:
        super().__init__()
        self.top_k, self.score, self.null = top_k, score, null
        self.centres = nn.Parameter(torch.randn(EXPERTS - 1, WIDTH))
        self.experts = nn.ModuleList(SwiGLU(WIDTH, HIDDEN) for _ in range(EXPERTS))
        self.shared = SwiGLU(WIDTH, HIDDEN)

    def assign(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, None]:
        flat, of_token = x.reshape(-1, WIDTH), labels.view(-1, 1).expand(-1, x.shape[1]).reshape(-1)
        uncond = of_token == self.null
        cond = ~uncond
        weights = torch.zeros(flat.shape[0], self.top_k, device=x.device)
        ids = torch.zeros(flat.shape[0], self.top_k, dtype=torch.long, device=x.device)
        if uncond is not None and uncond.any():
            rows = torch.where(uncond)[0]
            weights[rows, 0] = 1.0
            ids[rows] = len(self.experts) - 1
        if cond.any():
            rows_cond = torch.where(cond)[0]
            similarity = F.normalize(flat[rows_cond], dim=1) @ F.normalize(self.centres, dim=1).T
            scores = similarity.softmax(1) if self.score == "softmax" else torch.sigmoid(similarity)
            best, chosen = scores.topk(self.top_k, dim=1)
            weights[rows_cond] = best
            ids[rows_cond] = chosen
        return weights, ids, None

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        weights, ids, loss = self.assign(x, labels)
        flat = x.view(-1, WIDTH)
        out = torch.zeros(flat.shape[0], WIDTH, device=x.device)
        for e in range(EXPERTS):
            token = torch.where((ids == e).any(dim=1))[0]
            if token.numel() > 0:
                share = (weights[token] * (ids[token] == e).float()).sum(dim=1)
                out.index_add_(0, token, self.experts[e](flat[token]) * share.unsqueeze(1))
            else:
                out[0] += self.experts[e](torch.zeros(1, WIDTH, device=x.device)).float()[0] * 0
        out = out.view(x.shape)
        out += self.shared(x)
        return out, loss


class Inline(Prototypes):
    """Everything in one forward; the mask itself is the index."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        uncond = (labels == self.null).repeat_interleave(x.shape[1])
        ids = torch.full((flat.shape[0], self.top_k), EXPERTS - 1, device=x.device)
        weights = torch.ones(flat.shape[0], self.top_k, device=x.device)
        if torch.any(~uncond):
            kept = flat[~uncond]
            scores = (F.normalize(kept, dim=-1) @ F.normalize(self.centres, dim=-1).T).sigmoid()
            weights[~uncond], ids[~uncond] = scores.topk(self.top_k, dim=-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() > 0:
                out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.reshape(x.shape)


class Nested(nn.Module):
    """PixelDiT-ProMoE: the expert loop inside the branch of the conditional tokens, no loss."""

    def __init__(self, null: int = NULL) -> None:
        super().__init__()
        self.null = null
        self.centres = nn.Parameter(torch.randn(EXPERTS - 1, WIDTH))
        self.routed = nn.ModuleList(SwiGLU(WIDTH, HIDDEN) for _ in range(EXPERTS - 1))
        self.shared, self.uncond = SwiGLU(WIDTH, HIDDEN), SwiGLU(WIDTH, HIDDEN)
        self.last: dict[str, Tensor] = {}

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = (F.normalize(x, dim=-1) @ F.normalize(self.centres, dim=-1).T).topk(1, dim=-1, sorted=False)
        return ids.squeeze(-1), weights.squeeze(-1)

    def contrast(self, x: Tensor, ids: Tensor) -> Tensor:
        used = torch.unique(ids)
        if used.numel() < 2:
            return self.centres.sum() * 0
        means = torch.stack([x[ids == one].mean(0) for one in used])
        return F.cross_entropy(F.normalize(self.centres[used], dim=-1) @ means.T, torch.arange(len(used)))

    def forward(self, x: Tensor, labels: Tensor, with_loss: bool = True) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, WIDTH)
        cond = labels.reshape(-1, 1).expand(-1, x.shape[1]).reshape(-1) != self.null
        out = torch.zeros_like(flat)
        all_ids = torch.full((flat.shape[0],), EXPERTS - 1, device=x.device)
        all_weights = torch.ones(flat.shape[0], device=x.device, dtype=x.dtype)
        if cond.any():
            kept = flat[cond]
            ids, weights = self.choose(kept)
            all_ids[cond] = ids
            all_weights[cond] = weights.to(x.dtype)
            mixed = torch.zeros_like(kept)
            for e, expert in enumerate(self.routed):
                mine = ids == e
                if mine.any():
                    made = expert(kept[mine]).to(mixed.dtype)
                    mixed[mine] = made * weights[mine].unsqueeze(-1)
            out[cond] = mixed
            loss = self.contrast(kept, ids) if with_loss else self.centres.sum() * 0
        else:
            loss = self.centres.sum() * 0
        uncond = ~cond
        if uncond.any():
            out[uncond] = self.uncond(flat[uncond]).to(out.dtype)
        out = out.view_as(x) + self.shared(x)
        self.last = {"ids": all_ids.view(x.shape[:2]).detach(), "weights": all_weights.view(x.shape[:2]).detach()}
        return out, loss


class Choosers(nn.Module):
    """ProMoE, expert choice: experts choose among the tokens of conditional samples, others have their own expert."""

    def __init__(self, null: int = NULL) -> None:
        super().__init__()
        self.null = null
        self.centres = nn.Parameter(torch.randn(EXPERTS - 1, WIDTH))
        self.experts = nn.ModuleList(SwiGLU(WIDTH, HIDDEN) for _ in range(EXPERTS))

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = torch.sigmoid(F.normalize(x, dim=-1) @ F.normalize(self.centres, dim=-1).T).transpose(1, 2)
        weights, rows = scores.topk(max(1, x.shape[1] // (EXPERTS - 1)), dim=-1, sorted=False)
        dispatch = F.one_hot(rows, x.shape[1]).to(x.dtype)
        return dispatch, weights, torch.einsum("becs,bsd->becd", dispatch, x)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        cond = labels.view(-1) != self.null
        uncond = ~cond
        experts = self.experts[:-1]
        if cond.any():
            dispatch, weights, inputs = self.choose(x[cond])
            outputs = torch.stack([experts[e](inputs[:, e]) for e in range(len(experts))], dim=1)
            out[cond] = torch.einsum("becs,bec,becd->bsd", dispatch, weights, outputs)
        else:
            for expert in experts:
                out = out + expert(torch.zeros(1, 1, WIDTH, device=x.device)).sum() * 0
        if uncond.any():
            out[uncond] = self.experts[-1](x[uncond])
        return out


class Otherwise(Choosers):
    """Where the mask picks nothing, something else is computed."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        out = self.experts[0](x)
        cond = labels.view(-1) != self.null
        if cond.any():
            out[cond] = self.experts[1](x[cond])
        else:
            out = out + self.experts[2](x)
        return out


class OrExtra(Choosers):
    """A branch on a mask and on what callers give."""

    def forward(self, x: Tensor, labels: Tensor, extra: Tensor | None = None) -> Tensor:
        out = self.experts[0](x)
        cond = labels.view(-1) != self.null
        if extra is None and cond.any():
            out[cond] = self.experts[1](x[cond])
        elif extra is not None:
            out = out + extra
        return out


class Unreached(Choosers):
    """A branch on a mask that mixes rows, where callers give something."""

    def forward(self, x: Tensor, labels: Tensor, extra: Tensor | None = None) -> Tensor:
        out = self.experts[0](x)
        cond = labels.view(-1) != self.null
        if extra is None:
            if cond.any():
                out[cond] = self.experts[1](x[cond])
        else:
            if cond.any():
                out[cond] = x[cond] - x[cond].mean(0)
        return out


class LoopArguments(Choosers):
    """A loop that takes what callers may give beside the tokens."""

    def forward(self, x: Tensor, halve: bool = False, scale: Tensor | None = None) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, ids = (flat @ self.centres.T).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() > 0:
                made = expert(flat[token]) * weights[token, slot, None]
                if halve:
                    made = made / 2
                if scale is not None:
                    made = made * scale[token, None]
                out.index_add_(0, token, made)
        return out.reshape(x.shape)


class HelperArguments(LoopArguments):
    """The same loop in a method that `forward` hands its arguments on to."""

    def forward(self, x: Tensor, halve: bool = False, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        flat = x.reshape(-1, WIDTH)
        weights, ids = (flat @ self.centres.T).softmax(-1).topk(2, dim=-1)
        return self.mix(flat, ids, weights, len(flat), halve, scale).reshape(x.shape)

    def mix(self, flat: Tensor, ids: Tensor, weights: Tensor, count: int, halve: bool, scale: float) -> Tensor:
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids[:count] == e)
            if token.numel() > 0:
                made = expert(flat[token]) * weights[token, slot, None] * scale
                out.index_add_(0, token, made / 2 if halve else made)
        return out


class Averaged(Choosers):
    """A branch that mixes rows: what one sample gets depends on which others the mask picks."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        out = self.experts[0](x)
        cond = labels.view(-1) != self.null
        if cond.any():
            kept = x[cond]
            out[cond] = out[cond] + self.experts[1](kept - kept.mean(0, keepdim=True))
        return out


class Thresholded(Choosers):
    """Branches on the data itself: nothing that can be fed in makes the mask empty and full."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.experts[0](x)
        loud = x.square().mean((1, 2)) > 1e6
        if loud.any():
            out[loud] = self.experts[1](x[loud])
        return out


class Gate(nn.Module):
    """A router as a module of its own that calls a function."""

    def __init__(self, capacity: str) -> None:
        super().__init__()
        self.project, self.capacity = nn.Linear(WIDTH, EXPERTS, bias=False), capacity

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x.reshape(-1, WIDTH)
        logits = self.project(x.float() if self.project.weight.dtype == torch.float32 else x)
        return one_hots(logits, TOP_K, self.capacity)


def one_hots(logits: Tensor, top_k: int, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [S,E] -> balance, combine [S,E,C], dispatch [S,E,C] bool, counts [E]; earlier choices have priority."""
    gates = F.softmax(logits.float(), dim=1)
    experts = gates.shape[1]
    _, chosen = torch.topk(gates, top_k)
    hot = F.one_hot(chosen, experts)
    share = gates / (hot * gates.unsqueeze(1)).sum((1, 2)).clamp(min=1e-9)[:, None]
    counts = hot.sum((0, 1))
    if kind == "static":
        capacity = max(top_k, top_k * gates.shape[0] // experts)
    elif kind == "all":
        capacity = int(counts.max().item())
    else:
        capacity = int(counts.float().mean().item())
    chosen = chosen.transpose(0, 1).reshape(-1)
    queue = F.one_hot(chosen, experts)
    place = (queue.cumsum(0) * queue - 1).reshape(top_k, -1, experts).transpose(0, 1).amax(1)
    valid = (place >= 0) & (place < capacity)
    dispatch = F.one_hot(place.masked_fill(~valid, 0), capacity).bool() & valid.unsqueeze(-1)
    combine = torch.einsum("se,sec->sec", share, dispatch.float())
    return gates.mean(), combine, dispatch, counts


class Rank3(nn.Module):
    """A gated MLP that splits dimension 2: it takes [1, C, D], not [C, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_and_up = nn.Linear(WIDTH, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_and_up(x).chunk(2, dim=2)
        return self.down(up * F.silu(gate))


class Rank3Normed(Rank3):
    """The same with a norm inside."""

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_and_up(x).chunk(2, dim=2)
        return self.down(F.layer_norm(up * F.silu(gate), (HIDDEN,)))


class GShard(nn.Module):
    """HunyuanImage-3: one-hot dispatch and combine; `capacity` is "all" (nothing dropped), "mean" or "static"."""

    def __init__(
        self, capacity: str = "all", comprehension: bool = False, expert: Callable[[], nn.Module] = Rank3
    ) -> None:
        super().__init__()
        self.gate, self.comprehension = Gate(capacity), comprehension
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))
        self.shared = expert()

    def forward(self, x: Tensor) -> Tensor:
        shared, flat = self.shared(x), x.reshape(-1, x.shape[-1])
        _balance, combine, dispatch, _counts = self.gate(x)
        chunks = torch.einsum("sec,sm->ecm", dispatch.type_as(x), flat).chunk(EXPERTS, dim=0)
        if self.comprehension:
            outputs = [expert(chunk) for chunk, expert in zip(chunks, self.experts, strict=True)]
        else:
            outputs = []
            for chunk, expert in zip(chunks, self.experts, strict=True):
                outputs.append(expert(chunk))
        mixed = torch.einsum("sec,ecm->sm", combine.type_as(x), torch.cat(outputs, dim=0))
        return shared + mixed.reshape(x.shape)
