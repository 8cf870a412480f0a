"""How far the values of a step are from those of earlier steps, as ratios of sums: pure functions of tensors.

The values *now* are compared with the *previous* ones, some steps before, as a cache would give them: copied (*reuse*),
or extrapolated (*forecast*: 2 previous - earlier) with the *earlier* ones, as many steps before those. An expert branch
*persists* if its token was routed to its expert before too; otherwise it is a *transition*. Caching by branch depends
on this (MoECa, arXiv 2606.15615). Shapes: T tokens of all samples, K branches per token, D channels, E experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moeca_compile.planner.drift.ratios import Sum
from moeca_compile.planner.drift.routed import Reading

WORST = (0.1, 0.25)  # of a call's tokens
Fractions = dict[str, tuple[Sum, Sum]]  # quantity -> numerator, denominator


def region_changes(now: Tensor, previous: Tensor | None, earlier: Tensor | None, tokens: int) -> Fractions:
    """The changes of a region's output.

    Args:
        now, previous, earlier: the outputs [T, D].
        tokens: of one sample.

    Returns:
        `reuse` and `forecast`: squared errors relative to the squared output. `worst 10%` and so on: the fraction of
        the forecast's error in the worst tokens.
    """
    fractions: Fractions = {}
    squares = now.square().sum(dim=1)
    if previous is not None:
        change = (now - previous).square().sum(dim=1)
        fractions["reuse"] = change.sum(), squares.sum()
        fractions["reuse at positions"] = change.view(-1, tokens).sum(dim=0), squares.view(-1, tokens).sum(dim=0)
    if previous is not None and earlier is not None:
        error = (now - 2 * previous + earlier).square().sum(dim=1)
        fractions["forecast"] = error.sum(), squares.sum()
        fractions |= {f"worst {share:.0%}": (worst(error, share), error.sum()) for share in WORST}
    return fractions


def worst(error: Tensor, share: float) -> Tensor:
    """The sum of the largest entries of a vector; `share`: the fraction of the entries."""
    return error.topk(math.ceil(share * len(error))).values.sum()


def load(now: Reading, tokens: int) -> Fractions:
    """The fraction of all branches that each expert has, in total and at each of a sample's `tokens` positions."""
    routed = F.one_hot(now.ids, now.experts).sum(dim=1).double()  # [T, E]
    positions = routed.reshape(-1, tokens, now.experts).sum(dim=0)
    total = routed.sum()
    return {
        "load": (routed.sum(dim=0), total.expand(now.experts)),
        "load at positions": (positions.flatten(), total.expand(positions.numel())),
    }


def routing(now: Reading, previous: Reading) -> Fractions:
    """The changes of the branches since the previous step.

    `transitions`: branches whose token did not have their expert before. `routing`: L1 distance of a token's gate
    weights over all experts, relative to their sum. `branches`: squared change of persisting branches before gate
    weighting, relative to their squares. `within a token`: of the logarithms of these relative changes, the intraclass
    correlation of a token's branches (Shrout & Fleiss 1979, ICC(1)): 1 if all branches of a token change alike, 0 if
    they change independently.
    """
    persists, values = aligned(now, previous)
    squares = now.y.square().sum(dim=2)
    change = (now.y - values).square().sum(dim=2) * persists
    gates = dense(now)
    return {
        "transitions": ((~persists).sum(), persists.numel()),
        "transitions by expert": (by_expert(now, (~persists).double()), by_expert(now, torch.ones_like(squares))),
        "routing": ((gates - dense(previous)).abs().sum(), gates.abs().sum()),
        "branches": (change.sum(), (squares * persists).sum()),
        "branches by expert": (by_expert(now, change), by_expert(now, squares * persists)),
        "within a token": intraclass(((change + 1e-20) / (squares + 1e-20)).log(), persists & (change > 0)),
    }


def forecasts(now: Reading, previous: Reading, earlier: Reading) -> Fractions:
    """The error of the routed sum, forecast as one sum and forecast branch by branch; relative squares.

    Branch by branch, gate weights are the current ones, transitions are computed, and a branch that persisted since
    `previous` only is copied. `at transitions`: the fraction of the error of the sum's forecast in tokens with a
    transition since `earlier`; `tokens with transitions`: the fraction of such tokens.
    """
    persists, previous_values = aligned(now, previous)
    persists_longer, earlier_values = aligned(now, earlier)
    routed = now.routed
    squares = routed.square().sum()
    error = (routed - 2 * previous.routed + earlier.routed).square().sum(dim=1)
    extrapolated = 2 * previous_values - earlier_values
    forecast = torch.where((persists & persists_longer).unsqueeze(-1), extrapolated, previous_values)
    branch_errors = (now.y - forecast) * persists.unsqueeze(-1)
    changed = ~(persists.all(dim=1) & aligned(previous, earlier)[0].all(dim=1))
    error_by_branch = (now.gates.unsqueeze(-1) * branch_errors).sum(dim=1).square().sum(dim=1)
    return {
        "sum forecast": (error.sum(), squares),
        "branch forecast": (error_by_branch.sum(), squares),
        "at transitions": (error[changed].sum(), error.sum()),
        "tokens with transitions": (changed.sum(), len(changed)),
        **{f"branch worst {share:.0%}": (worst(error_by_branch, share), error_by_branch.sum()) for share in WORST},
    }


def aligned(now: Reading, previous: Reading) -> tuple[Tensor, Tensor]:
    """Find each current branch among the previous branches of its token.

    Returns:
        [T, K] bool, whether the branch persists; and [T, K, D], its previous output (that of another branch if it does
        not persist).
    """
    same = now.ids.unsqueeze(2) == previous.ids.unsqueeze(1)
    slot = same.int().argmax(dim=2, keepdim=True).expand(-1, -1, previous.y.shape[2])
    return same.any(dim=2), previous.y.gather(1, slot)


def dense(reading: Reading) -> Tensor:
    """[T, E], the gate weights, 0 for experts that a token is not routed to."""
    gates = reading.gates.new_zeros(len(reading.ids), reading.experts)
    return gates.scatter_add(1, reading.ids, reading.gates)


def by_expert(reading: Reading, values: Tensor) -> Tensor:
    """The sums [E] of values [T, K] over the branches of each expert; float64."""
    sums = torch.zeros(reading.experts, dtype=torch.float64, device=values.device)
    return sums.index_add(0, reading.ids.flatten(), values.flatten().double())


def intraclass(values: Tensor, valid: Tensor) -> tuple[float, float]:
    """ICC(1) of values [T, K] in groups of a token, as numerator and denominator; groups of one are left out."""
    several = valid.sum(dim=1) > 1
    values, valid = values[several].double(), valid[several]
    sizes = valid.sum(dim=1).double()
    count, groups = float(sizes.sum()), len(sizes)
    if groups < 2:
        return 0.0, 0.0
    means = (values * valid).sum(dim=1) / sizes
    grand_mean = float((values * valid).sum()) / count
    within = float(((values - means.unsqueeze(1)).square() * valid).sum()) / (count - groups)
    between = float((sizes * (means - grand_mean).square()).sum()) / (groups - 1)
    mean_size = (count - float(sizes.square().sum()) / count) / (groups - 1)
    return between - within, between + (mean_size - 1) * within
