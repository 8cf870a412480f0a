"""How far one step's values are from earlier ones, in ratios of sums: pure tensors in, numerators and denominators out.

*now* is compared with *then*, some steps before, copied (*reuse*), or with *then* and *before*, as many steps earlier
still, extrapolated (*forecast*: 2 then - before), as a cache would give them. A branch *persists* where its token was
routed to its expert before as well, and is a *transition* elsewhere: what caching by branch rests on (MoECa, arXiv
2606.15615). T tokens of all samples, K branches a token, D channels, E experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moeca_compile.planner.drift.ratios import Sum
from moeca_compile.planner.drift.routed import Reading

WORST = (0.1, 0.25)  # of a call's tokens
Found = dict[str, tuple[Sum, Sum]]  # quantity -> numerator, denominator


def whole(now: Tensor, then: Tensor | None, before: Tensor | None, tokens: int) -> Found:
    """A region's output [T, D]: squared errors relative to its square, and what the worst tokens hold of the error.

    tokens: of one sample.
    """
    found: Found = {}
    size = now.square().sum(dim=1)
    if then is not None:
        moved = (now - then).square().sum(dim=1)
        found["reuse"] = moved.sum(), size.sum()
        found["reuse at positions"] = moved.view(-1, tokens).sum(dim=0), size.view(-1, tokens).sum(dim=0)
    if then is not None and before is not None:
        error = (now - 2 * then + before).square().sum(dim=1)
        found["forecast"] = error.sum(), size.sum()
        found |= {f"worst {share:.0%}": (worst(error, share), error.sum()) for share in WORST}
    return found


def worst(error: Tensor, share: float) -> Tensor:
    """What the worst `share` of the entries hold of a sum."""
    return error.topk(math.ceil(share * len(error))).values.sum()


def load(now: Reading, tokens: int) -> Found:
    """The branches of each expert, of each expert at each of a sample's `tokens` positions, as shares of all."""
    taken = F.one_hot(now.ids, now.experts).sum(dim=1).double()  # [T, E]
    places = taken.reshape(-1, tokens, now.experts).sum(dim=0)
    total = taken.sum()
    return {
        "load": (taken.sum(dim=0), total.expand(now.experts)),
        "load at positions": (places.flatten(), total.expand(places.numel())),
    }


def routing(now: Reading, then: Reading) -> Found:
    """What became of the branches of one step before: who changed, and how far the others moved.

    `transitions`: branches whose expert the token didn't have. `routing`: L1 distance of a token's gate weights over
    all experts, relative to their sum. `branches`: squared distance of persisting branches before gate weighting,
    relative. `within a token`: of the logarithms of these, the intraclass correlation of a token's branches (Shrout &
    Fleiss 1979, ICC(1)): 1 where all branches of a token move alike, 0 where they know nothing of each other.
    """
    kept, last = aligned(now, then)
    size = now.y.square().sum(dim=2)
    moved = (now.y - last).square().sum(dim=2) * kept
    gates = dense(now)
    return {
        "transitions": ((~kept).sum(), kept.numel()),
        "transitions by expert": (by_expert(now, (~kept).double()), by_expert(now, torch.ones_like(size))),
        "routing": ((gates - dense(then)).abs().sum(), gates.abs().sum()),
        "branches": (moved.sum(), (size * kept).sum()),
        "branches by expert": (by_expert(now, moved), by_expert(now, size * kept)),
        "within a token": intraclass(((moved + 1e-20) / (size + 1e-20)).log(), kept & (moved > 0)),
    }


def forecasts(now: Reading, then: Reading, before: Reading) -> Found:
    """The routed sum's error, forecast as one sum, and with each branch forecast by itself.

    In the second, gate weights are the current ones, transitions are computed, and a branch that persisted for one
    gap only is copied. `at transitions`: what the tokens with a transition in either gap hold of the first error,
    beside their share of the tokens.
    """
    kept, last = aligned(now, then)
    longer, older = aligned(now, before)
    routed = now.routed
    size = routed.square().sum()
    error = (routed - 2 * then.routed + before.routed).square().sum(dim=1)
    guess = torch.where((kept & longer).unsqueeze(-1), 2 * last - older, last)
    off = (now.y - guess) * kept.unsqueeze(-1)
    changed = ~(kept.all(dim=1) & aligned(then, before)[0].all(dim=1))
    apart = (now.gates.unsqueeze(-1) * off).sum(dim=1).square().sum(dim=1)
    return {
        "sum forecast": (error.sum(), size),
        "branch forecast": (apart.sum(), size),
        "at transitions": (error[changed].sum(), error.sum()),
        "tokens with transitions": (changed.sum(), len(changed)),
        **{f"branch worst {share:.0%}": (worst(apart, share), apart.sum()) for share in WORST},
    }


def aligned(now: Reading, then: Reading) -> tuple[Tensor, Tensor]:
    """[T, K] whether each branch's token had its expert then, and [T, K, D] its output then (another's where not)."""
    same = now.ids.unsqueeze(2) == then.ids.unsqueeze(1)
    slot = same.int().argmax(dim=2, keepdim=True).expand(-1, -1, then.y.shape[2])
    return same.any(dim=2), then.y.gather(1, slot)


def dense(one: Reading) -> Tensor:
    """[T, E], the gate weights, 0 for experts that weren't chosen."""
    gates = one.gates.new_zeros(len(one.ids), one.experts)
    return gates.scatter_add(1, one.ids, one.gates)


def by_expert(one: Reading, values: Tensor) -> Tensor:
    """[T, K] -> [E] sums."""
    sums = torch.zeros(one.experts, dtype=torch.float64, device=values.device)
    return sums.index_add(0, one.ids.flatten(), values.flatten().double())


def intraclass(values: Tensor, valid: Tensor) -> tuple[float, float]:
    """ICC(1) of [T, K] values in groups of a token, as numerator and denominator; groups of one are left out."""
    several = valid.sum(dim=1) > 1
    values, valid = values[several].double(), valid[several]
    sizes = valid.sum(dim=1).double()
    count, groups = float(sizes.sum()), len(sizes)
    if groups < 2:
        return 0.0, 0.0
    means = (values * valid).sum(dim=1) / sizes
    middle = float((values * valid).sum()) / count
    inside = float(((values - means.unsqueeze(1)).square() * valid).sum()) / (count - groups)
    between = float((sizes * (means - middle).square()).sum()) / (groups - 1)
    typical = (count - float(sizes.square().sum()) / count) / (groups - 1)
    return between - inside, between + (typical - 1) * inside
