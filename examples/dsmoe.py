"""DSMoE: a DiT with many narrow experts, routed as in DeepSeek-V3; and one of it trained on the digits.

Written from the description (arXiv 2512.01252; the router: DeepSeek-V3, arXiv 2412.19437, section 2.1.2). Attention,
embeddings and blocks are DiT-MoE's: positions are added, not rotary, and every block has experts.
The dispatch is on purpose the one such models ship: a loop over the experts that were hit.

    model = load_digits()                          # trained by examples/train_digits.py --model dsmoe
    images = digits.sample(model, seed=0)

Shapes below: T tokens of all samples, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import digits
from examples.dit_moe import DiTMoE, DiTMoEConfig, SwiGLU

MODEL_FILE = digits.CHECKPOINTS / "dsmoe.safetensors"


@dataclass(frozen=True)
class DSMoEConfig(DiTMoEConfig):
    """Everything that shapes a DSMoE; nothing of DiT-MoE's balancing loss is used."""

    routed_scale: float = 2.0  # the sum of a token's gate weights
    bias_rate: float = 0.001  # how far an expert's bias moves in a training step


class BiasGate(nn.Module):
    """The router: sigmoid scores; a bias per expert takes part in the choice only, and keeps the load even."""

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__()
        self.top_k, self.scale, self.rate = config.experts_per_token, config.routed_scale, config.bias_rate
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (T,D) -> expert ids (T,K), and their weights (T,K), which sum to the scale."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        choice = scores + self.e_score_correction_bias
        topk_idx = torch.topk(choice, self.top_k, dim=-1, sorted=False)[1]
        topk_weight = scores.gather(1, topk_idx)
        topk_weight = topk_weight / (topk_weight.sum(dim=-1, keepdim=True) + 1e-20) * self.scale
        if self.training:
            self.balance(topk_idx)
        return topk_idx, topk_weight.to(x.dtype)

    @torch.no_grad()
    def balance(self, topk_idx: Tensor) -> None:
        """Raise the bias of every expert with less than the mean load, lower it where there is more."""
        load = topk_idx.flatten().bincount(minlength=len(self.weight)).float()
        self.e_score_correction_bias += self.rate * (load.mean() - load).sign()


class BiasRoutedMoE(nn.Module):
    """K of E routed experts per token, plus a shared one that every token passes: (N,L,D) -> (N,L,D)."""

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.top_k = config.experts_per_token
        self.gate = BiasGate(config)
        self.experts = nn.ModuleList(SwiGLU(dim, config.expert_hidden or dim) for _ in range(config.num_experts))
        self.shared_experts = SwiGLU(dim, config.shared_hidden or 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        topk_idx, topk_weight = self.gate(tokens)
        return self.dispatch(tokens, topk_idx, topk_weight).view_as(x) + self.shared_experts(x)

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
        """x (T,D), ids (T,K), weights (T,K) -> the gate-weighted sum of the routed experts (T,D); differentiable."""
        out = torch.zeros_like(x)
        masks = F.one_hot(topk_idx, num_classes=len(self.experts)).permute(2, 1, 0)
        hit = torch.greater(masks.sum(dim=(-1, -2)), 0).nonzero()
        for expert in hit:
            slot, token = torch.where(masks[expert].squeeze(0))
            expert_out = self.experts[expert](x[token]) * topk_weight[token, slot, None]
            out.index_add_(0, token, expert_out.to(x.dtype))
        return out


class DSMoE(DiTMoE):
    """The whole network: `DiTMoE` with another mixture-of-experts layer."""

    moe_layer = BiasRoutedMoE


def build_digits() -> DSMoE:
    """The untrained network: 6 blocks, width 96, 3 heads, 4 of 16 narrow experts per token, one shared."""
    config = DSMoEConfig(
        hidden_size=96,
        depth=6,
        num_heads=3,
        num_experts=16,
        experts_per_token=4,
        expert_hidden=72,
        shared_hidden=144,
        input_size=digits.SIZE,
        in_channels=1,
        num_classes=digits.CLASSES,
        learn_sigma=False,
    )
    return DSMoE(config)


def load_digits(path: str | Path | None = None) -> DSMoE:
    """The trained network, eval mode, float32, CPU; ``path`` defaults to the committed checkpoint."""
    return digits.load_weights(build_digits(), path or MODEL_FILE)
