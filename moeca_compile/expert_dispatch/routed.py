"""The canonical form of a dispatch: one `moeca::experts` call, then ordinary ops for the gate-weighted sum.

This runs while Dynamo traces. Parameters are read from the expert modules at that moment, so that replaced or loaded
weights are followed and a deep copy uses its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moeca_compile.ops.experts import WeightLists  # and registers moeca::experts

NAME = "_moeca_routed"  # what rewritten code calls it


class Experts(Protocol):
    """Where the experts of an MoE module keep their weights, and what they compute."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def activation(self) -> str: ...

    @property
    def gated(self) -> bool: ...

    @property
    def exhaustive(self) -> bool:
        """Whether every expert runs on every token, whatever the routing."""

    def condition(self, owner: nn.Module) -> int:
        """Whether the experts are still what was proven: SAME, ADAPTED or CHANGED, as `anatomy.compare` has it."""

    def branches(self, owner: nn.Module, tokens: Tensor, ids: Tensor, *extra: Tensor) -> Tensor:
        """tokens [T, D], ids [T, K], what else experts take for each token -> y [T, K, D_out] before gate weighting."""

    def dtype(self, owner: nn.Module) -> torch.dtype:
        """What the experts compute in."""

    def count(self, owner: nn.Module) -> int:
        """How many experts there are."""


@dataclass(frozen=True)
class Routed:
    """What a rewritten method calls in place of its dispatch.

    Attributes:
        experts: where the weights are.
        dense: the gate weights cover all experts, [T, E] in place of [T, K].
        per_sample: there is one choice for a whole sample, [N, K] for tokens [N, T, D].
        accumulate: the sum is added to what `like` holds.
        dtype: whose dtype the result has: "x", "y" (the experts' output, another one under autocast), or "" for what
            promotion gives.
    """

    experts: Experts
    dense: bool = False
    per_sample: bool = False
    accumulate: bool = False
    dtype: str = ""

    def __call__(
        self, owner: nn.Module, x: Tensor, idx: Tensor, w: Tensor, like: Tensor | None = None, *extra: Tensor
    ) -> Tensor:
        """sum_k w[t,k] * expert_{idx[t,k]}(x[t]), in the shape of `like`, else of `x`.

        Args:
            owner: the module whose dispatch this is.
            x: tokens [T, D] or [..., D].
            idx: expert ids, integers, T*K of them in any shape; N*K where `per_sample`.
            w: gate weights, T*K of them in any shape; T*E where `dense`; N in place of T where `per_sample`.
            like: the tensor that the dispatch adds to; it gives shape and dtype.
            extra: what else the experts take for each token, [T, D_i] or [..., D_i].
        """
        tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if self.per_sample:
            idx, w = (_repeated(part, x.shape[0], tokens.shape[0]) for part in (idx, w))
        count = tokens.shape[0]
        ids = idx if idx.dim() == 2 and idx.shape[0] == count else idx.reshape(count, idx.numel() // max(count, 1))
        ids = ids if ids.dtype == torch.int64 else ids.long()
        weights = w if w.dim() == 2 and w.shape[0] == count else w.reshape(count, w.numel() // max(count, 1))
        if self.dense:
            weights = weights.gather(1, ids)
        y = self.branches(owner, tokens, ids, *(part.reshape(count, part.shape[-1]) for part in extra))
        out = (y * weights.unsqueeze(-1)).sum(1)
        if like is not None:
            out = out if out.shape == like.shape else out.reshape(like.shape)
            out = out if out.dtype == like.dtype else out.to(like.dtype)
            return like + out if self.accumulate else out
        out = out if x.dim() == 2 else out.reshape(*x.shape[:-1], out.shape[-1])
        dtype = {"x": x.dtype, "y": y.dtype}.get(self.dtype, out.dtype)
        return out if out.dtype == dtype else out.to(dtype)

    def branches(self, owner: nn.Module, tokens: Tensor, ids: Tensor, *extra: Tensor) -> Tensor:
        """tokens [T, D], ids [T, K], extra [T, D_i] -> y [T, K, D_out] before gate weighting."""
        return self.experts.branches(owner, tokens, ids, *extra)


def _repeated(part: Tensor, samples: int, tokens: int) -> Tensor:
    """[N, ...] -> [N*T, ...]: what holds for a sample holds for its tokens."""
    part = part.reshape(samples, 1, part.numel() // max(samples, 1))
    return part.expand(samples, tokens // max(samples, 1), part.shape[-1]).reshape(tokens, part.shape[-1])


def operator(tokens: Tensor, ids: Tensor, weights: WeightLists, activation: str) -> Tensor:
    """One call of `moeca::experts`."""
    result: Tensor = torch.ops.moeca.experts(tokens, ids, *weights, activation)
    return result
