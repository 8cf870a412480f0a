"""Attention in the forms that are around: projections, the core written out, QK-norm, RoPE, groups, masks, heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.architectures.parts import DIM, HEADS, TOKENS, Parts

HEAD = DIM // HEADS


def core(form: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, grouped: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v for heads (N,H,T,d), in one of the ways that people write it."""
    scale = q.shape[-1] ** -0.5
    if form == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    if form in ("bmm", "baddbmm"):
        flat_q, flat_k, flat_v = (one.reshape(-1, *one.shape[2:]) for one in (q, k, v))
        if form == "bmm" or mask is not None:
            scores = torch.bmm(flat_q, flat_k.transpose(1, 2)) * scale
        else:  # diffusers' AttnProcessor: an empty tensor that beta=0 ignores
            empty = flat_q.new_zeros(flat_q.shape[0], flat_q.shape[1], flat_k.shape[1])
            scores = torch.baddbmm(empty, flat_q, flat_k.transpose(1, 2), beta=0, alpha=scale)
        weights = masked(scores.view(*q.shape[:2], *scores.shape[1:]), mask).softmax(dim=-1)
        return torch.bmm(weights.flatten(0, 1).to(v.dtype), flat_v).view(*q.shape[:-1], v.shape[-1])
    if form == "einsum":
        weights = masked(torch.einsum("nhqd,nhkd->nhqk", q, k) * scale, mask).softmax(dim=-1)
        return torch.einsum("nhqk,nhkd->nhqd", weights, v)
    if form == "matmul":
        weights = masked(torch.matmul(q * scale, k.transpose(-2, -1)), mask)
        return torch.matmul(F.softmax(weights, dim=-1, dtype=torch.float32).to(v.dtype), v)
    return masked(q @ k.mT / math.sqrt(q.shape[-1]), mask).softmax(-1) @ v


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def rotate(form: str, x: Tensor) -> Tensor:
    """RoPE over tokens for heads (N,H,T,d)."""
    rates = 100.0 ** -(torch.arange(HEAD // 2) / (HEAD // 2))
    angles = torch.arange(x.shape[-2])[:, None] * rates
    if form == "complex":
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    if form == "pairs":
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)
    left, right = x.chunk(2, dim=-1)
    both = torch.cat([angles, angles], dim=-1)
    return x * both.cos().to(x.dtype) + torch.cat([-right, left], dim=-1) * both.sin().to(x.dtype)


class QKNorm(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        make = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}.get(form)
        self.norm = make(HEAD, eps=1e-6) if make else None

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            return self.norm(x)
        return F.normalize(x, dim=-1) * 3 if self.form == "l2" else x


def heads_of(
    parts: Parts, q_norm: QKNorm, k_norm: QKNorm, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,T,H*d) -> (N,H,T,d), queries and keys normalized and rotated."""
    q, k, v = (one.unflatten(-1, (-1, HEAD)).transpose(1, 2) for one in (q, k, v))
    q, k = q_norm(q), k_norm(k)
    return (q, k, v) if parts.rope == "none" else (rotate(parts.rope, q), rotate(parts.rope, k), v)


class Attention(nn.Module):
    """x (N,T,D) -> (N,T,D), attending to itself."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.kv_heads = HEADS if parts.groups == "none" else HEADS // 2
        widths = [DIM, self.kv_heads * HEAD, self.kv_heads * HEAD]
        if parts.projection == "separate":
            self.q, self.k, self.v = (nn.Linear(DIM, width) for width in widths)
        else:
            self.qkv = nn.Linear(DIM, sum(widths), bias=parts.projection == "fused")
        self.q_norm, self.k_norm = QKNorm(parts.qk_norm), QKNorm(parts.qk_norm)
        self.out = nn.Linear(DIM, DIM)
        self.heads = nn.Linear(DIM, HEADS, bias=False) if parts.mixture_of_heads else None
        tokens = TOKENS + parts.registers
        self.bias = nn.Parameter(torch.randn(HEADS, tokens, tokens)) if parts.mask == "relative bias" else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as heads (N,H,T,d)."""
        if self.parts.projection == "separate":
            q, k, v = self.q(x), self.k(x), self.v(x)
        else:
            kv = self.kv_heads * HEAD
            q, k, v = self.qkv(x).split([DIM, kv, kv], dim=-1)
        return heads_of(self.parts, self.q_norm, self.k_norm, q, k, v)

    def mask(self, tokens: int) -> Tensor | None:
        if self.parts.mask == "bool":
            return torch.ones(tokens, tokens).tril(2).bool()
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        if self.parts.groups == "repeat":
            k, v = (one.repeat_interleave(HEADS // self.kv_heads, dim=1) for one in (k, v))
        elif self.parts.groups == "expand":
            k, v = (one[:, :, None].expand(-1, -1, HEADS // self.kv_heads, -1, -1).flatten(1, 2) for one in (k, v))
        y = core(self.parts.core, q, k, v, self.mask(x.shape[1]), self.parts.groups == "enable_gqa").transpose(1, 2)
        if self.heads is not None:
            y = y * self.chosen(x)[..., None]
        return self.out(y.flatten(2))

    def chosen(self, x: Tensor) -> Tensor:
        """Mixture of heads (MoH): the weight of each head for each token (N,T,H), 0 for all but the best half."""
        scores = self.heads(x).softmax(dim=-1)
        best, ids = scores.topk(HEADS // 2, dim=-1)
        return torch.zeros_like(scores).scatter(-1, ids, best / best.sum(-1, keepdim=True)) * HEADS


class Cross(nn.Module):
    """x (N,T,D) attends to the prompt (N,L,D)."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.form = parts.core
        self.q, self.kv, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        k, v = self.kv(prompt).chunk(2, dim=-1)
        q, k, v = (one.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for one in (self.q(x), k, v))
        return self.out(core(self.form, q, k, v).transpose(1, 2).flatten(2))
