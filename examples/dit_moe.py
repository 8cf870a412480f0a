"""DiT-MoE: a diffusion transformer whose every block has a mixture-of-experts layer.

Reimplemented from its description (Fei et al., "Scaling Diffusion Transformers to 16 Billion Parameters",
arXiv 2407.11633). The parameter names are those of the released checkpoints, so a released state dict loads as it is.
The expert dispatch is on purpose the one such models ship: a Python loop over counts read back to the host.

    model = dit_moe("S/2-8E2A").eval()
    out = model(x, t, y)          # x (N,4,32,32), t (N,), y (N,) -> (N,8,32,32): noise and sigma

Shapes below: N samples, T tokens, D hidden size, E experts, K experts per token, M = N*T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DiTMoEConfig:
    """Everything that shapes a DiT-MoE. ``None`` intermediate sizes mean the published multiples of the hidden size."""

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int = 2
    num_experts: int = 8
    experts_per_token: int = 2
    expert_hidden: int | None = None  # 4 * hidden_size
    shared_hidden: int | None = None  # 2 * hidden_size: two shared experts in one SwiGLU
    input_size: int = 32
    in_channels: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True
    pretraining_tp: int = 1
    attention: Literal["plain", "qk_norm"] = "plain"
    aux_loss_weight: float = 0.01

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


_SIZES = {
    "S": DiTMoEConfig(hidden_size=384, depth=12, num_heads=6, pretraining_tp=2),
    "B": DiTMoEConfig(hidden_size=768, depth=12, num_heads=12, pretraining_tp=2),
    "L": DiTMoEConfig(hidden_size=1024, depth=24, num_heads=16),
    "XL": DiTMoEConfig(hidden_size=1152, depth=28, num_heads=16, attention="qk_norm"),
    "G": DiTMoEConfig(hidden_size=1408, depth=40, num_heads=16, attention="qk_norm"),
}

CONFIGS: dict[str, DiTMoEConfig] = {
    f"{size}/{patch}-{experts}E2A": replace(base, patch_size=patch, num_experts=experts)
    for size, base in _SIZES.items()
    for patch in (2, 4, 8)
    for experts in (8, 16)
}


def dit_moe(name: str, **overrides: Any) -> DiTMoE:
    """Build a published configuration, e.g. ``dit_moe("S/2-8E2A", depth=2)``; overrides are `DiTMoEConfig` fields."""
    if name not in CONFIGS:
        raise ValueError(f"unknown DiT-MoE configuration {name!r}; known: {', '.join(CONFIGS)}")
    return DiTMoE(replace(CONFIGS[name], **overrides))


class Attention(nn.Module):
    """Self-attention as in timm (sizes S, B, L): (N,T,D) -> (N,T,D)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(n, t, d))


class QKNormAttention(nn.Module):
    """Self-attention of the sizes XL and G: per-head LayerNorm on queries and keys, other parameter names."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.Wqkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads, eps=1e-6)
        self.k_norm = nn.LayerNorm(dim // num_heads, eps=1e-6)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.Wqkv(x).reshape(n, t, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # Under autocast LayerNorm answers in float32 while v is half; attention needs one dtype.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).reshape(n, t, d))


class SwiGLU(nn.Module):
    """One expert: ``down(silu(gate(x)) * up(x))``, (..., D) -> (..., D), no biases.

    ``slices > 1`` computes the same in that many slices of the intermediate size, as checkpoints
    pretrained with tensor parallelism do it (``pretraining_tp``).
    """

    def __init__(self, dim: int, hidden: int, slices: int = 1) -> None:
        super().__init__()
        if hidden % slices:
            raise ValueError(f"intermediate size {hidden} does not divide into {slices} slices")
        self.slices = slices
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.slices == 1:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        width = self.gate_proj.out_features // self.slices
        gates, ups = self.gate_proj.weight.split(width), self.up_proj.weight.split(width)
        gate = torch.cat([F.linear(x, w) for w in gates], dim=-1)
        up = torch.cat([F.linear(x, w) for w in ups], dim=-1)
        hidden = (F.silu(gate) * up).split(width, dim=-1)
        downs = self.down_proj.weight.split(width, dim=1)
        parts = [F.linear(h, w) for h, w in zip(hidden, downs, strict=True)]
        return sum(parts[1:], parts[0])


class Gate(nn.Module):
    """The router: softmax over the experts, then top-k; the weights are not renormalised."""

    def __init__(self, dim: int, num_experts: int, top_k: int, aux_loss_weight: float) -> None:
        super().__init__()
        self.top_k, self.aux_loss_weight = top_k, aux_loss_weight
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (N,T,D) -> expert ids (M,K), their weights (M,K), and in training the load-balancing loss ()."""
        logits = F.linear(x.reshape(-1, x.shape[-1]), self.weight)
        scores = logits.softmax(dim=-1)
        topk_weight, topk_idx = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        aux = self._balance(scores, topk_idx) if self.training else None
        return topk_idx, topk_weight, aux

    def _balance(self, scores: Tensor, topk_idx: Tensor) -> Tensor:
        """E * sum_e (share of routed slots)_e * (mean score)_e (Switch Transformer, arXiv 2101.03961, eq. 4)."""
        num_experts = scores.shape[-1]
        share = F.one_hot(topk_idx, num_experts).to(scores.dtype).mean(dim=(0, 1))
        return self.aux_loss_weight * num_experts * (share * scores.mean(dim=0)).sum()


class _AttachLoss(torch.autograd.Function):
    """Identity on ``x`` that adds ``loss`` to whatever loss is later computed from ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.loss_like)


class SparseMoE(nn.Module):
    """K of E routed experts per token, plus a shared one that every token passes: (N,T,D) -> (N,T,D)."""

    def __init__(self, config: DiTMoEConfig) -> None:
        super().__init__()
        dim, slices = config.hidden_size, config.pretraining_tp
        self.top_k = config.experts_per_token
        self.gate = Gate(dim, config.num_experts, self.top_k, config.aux_loss_weight)
        expert_hidden = config.expert_hidden or 4 * dim
        self.experts = nn.ModuleList(SwiGLU(dim, expert_hidden, slices) for _ in range(config.num_experts))
        self.shared_experts = SwiGLU(dim, config.shared_hidden or 2 * dim, slices)

    def forward(self, x: Tensor) -> Tensor:
        topk_idx, topk_weight, aux = self.gate(x)
        tokens, flat_idx = x.reshape(-1, x.shape[-1]), topk_idx.reshape(-1)
        if self.training:
            branches = self.moe_train(tokens, flat_idx).view(*topk_idx.shape, -1)
            routed = (branches * topk_weight.unsqueeze(-1)).sum(dim=1).view_as(x)
            routed = _AttachLoss.apply(routed, aux)
        else:
            routed = self.moe_infer(tokens, flat_idx, topk_weight.reshape(-1, 1)).view_as(x)
        return routed + self.shared_experts(x)

    def moe_train(self, x: Tensor, flat_expert_indices: Tensor) -> Tensor:
        """x (M,D), ids (M*K,) -> the branch outputs (M*K,D) before gate weighting; differentiable."""
        repeated = x.repeat_interleave(self.top_k, dim=0)
        out = torch.empty_like(repeated)
        for i, expert in enumerate(self.experts):
            mine = flat_expert_indices == i
            out[mine] = expert(repeated[mine]).to(out.dtype)
        return out

    @torch.no_grad()
    def moe_infer(self, x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor) -> Tensor:
        """x (M,D), ids (M*K,), weights (M*K,1) -> the gate-weighted sum of the routed experts (M,D)."""
        out = torch.zeros_like(x)
        order = flat_expert_indices.argsort()
        ends = flat_expert_indices.bincount().cpu().numpy().cumsum(0)
        token_of = order // self.top_k
        for i, end in enumerate(ends):
            start = 0 if i == 0 else ends[i - 1]
            if start == end:
                continue
            rows = token_of[start:end]
            expert_out = self.experts[i](x[rows])
            expert_out.mul_(flat_expert_weights[order[start:end]])
            out = out.to(expert_out.dtype)
            out.scatter_reduce_(0, rows.view(-1, 1).repeat(1, x.shape[-1]), expert_out, reduce="sum")
        return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x (N,T,D) with a shift and a scale (N,D) per sample."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """One adaLN-Zero transformer block: attention, then the mixture of experts ``moe_layer(config)``."""

    def __init__(self, config: DiTMoEConfig, moe_layer: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        dim = config.hidden_size
        attention = Attention if config.attention == "plain" else QKNormAttention
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = attention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.moe = moe_layer(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N,T,D), conditioning c (N,D) -> (N,T,D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.moe(modulate(self.norm2(x), shift_m, scale_m))


class PatchEmbed(nn.Module):
    """(N,C,H,W) -> (N,T,D), patches in row order."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """t (N,) -> (N,D): a sinusoid of 256 numbers (cosines first), then a two-layer MLP."""

    FREQUENCIES = 128

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        index = torch.arange(self.FREQUENCIES, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10000.0) * index / self.FREQUENCIES)
        wave = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(wave.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """y (N,) -> (N,D); the label ``num_classes`` is the null label of classifier-free guidance."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class FinalLayer(nn.Module):
    """(N,T,D), c (N,D) -> (N,T,patch*patch*out_channels)."""

    def __init__(self, config: DiTMoEConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiTMoE(nn.Module):
    """The whole network. See `dit_moe` for the published configurations."""

    moe_layer: ClassVar[Callable[[Any], nn.Module]] = SparseMoE

    def __init__(self, config: DiTMoEConfig) -> None:
        super().__init__()
        self.config = config
        dim, self.grid = config.hidden_size, config.input_size // config.patch_size
        self.x_embedder = PatchEmbed(config.in_channels, dim, config.patch_size)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(config.num_classes, dim)
        # A frozen parameter, not a buffer, because released checkpoints carry it as one.
        self.pos_embed = nn.Parameter(sincos_2d(dim, self.grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(config, self.moe_layer) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._init_weights()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (N,C,H,W) float, t (N,) float or int, y (N,) int labels -> (N, out_channels, H, W)."""
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def unpatchify(self, x: Tensor) -> Tensor:
        """(N, T, p*p*C) -> (N,C,H,W)."""
        p, c, g = self.config.patch_size, self.config.out_channels, self.grid
        x = x.reshape(x.shape[0], g, g, p, p, c)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], c, g * p, g * p)

    def _init_weights(self) -> None:
        """DiT's initialisation: Xavier linears, small embeddings, adaLN and the output at zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith("adaLN_modulation.1") or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)


def sincos_2d(dim: int, grid: int) -> Tensor:
    """Fixed position embedding (grid*grid, dim): half for the column, half for the row; sines first, then cosines."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    column = line[None, :].expand(grid, grid, -1)
    row = line[:, None].expand(grid, grid, -1)
    return torch.cat([column, row], dim=-1).reshape(grid * grid, dim).float()


@torch.no_grad()
def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every trainable parameter a non-degenerate random value, in place, and return the model.

    As initialised, adaLN's gates and the output layer are zero: every block does nothing and the output is zero, so
    parity and speed measured on it would mean nothing. Weights get unit gain (standard deviation ``fan_in ** -0.5``),
    norm weights stay near one, biases and embeddings are small. Values depend on the parameters' device and dtype.
    """
    generators: dict[torch.device, torch.Generator] = {}
    norms = {id(m.weight) for m in model.modules() if isinstance(m, nn.LayerNorm)}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for p in model.parameters():
        if not p.requires_grad:
            continue
        generator = generators.setdefault(p.device, torch.Generator(p.device).manual_seed(seed))
        if p.ndim < 2:
            p.normal_(1.0 if id(p) in norms else 0.0, 0.1, generator=generator)
        elif id(p) in embeddings:
            p.normal_(0.0, 0.5, generator=generator)
        else:
            p.normal_(0.0, p[0].numel() ** -0.5, generator=generator)
    return model
