"""`moeca::align` and `moeca::pick` as compilers see them: results, strides and fake forms agree."""

from __future__ import annotations

import pytest
import torch

from moeca_compile.ops import branch_slots as branch_ops


def routing(batch: int = 2, tokens: int = 5, top_k: int = 3, experts: int = 6) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    ids, held = (torch.rand(batch, tokens, experts).topk(top_k).indices for _ in range(2))
    return ids, torch.rand(ids.shape), held + 1, torch.rand(ids.shape)


def test_align_is_an_operator_as_it_says() -> None:
    ids, gates, held, due = routing()
    torch.library.opcheck(torch.ops.moeca.align.default, (ids, held, gates, due > 0.5))
    assert all(one.is_contiguous() for one in branch_ops.align(ids, held, gates, due > 0.5))


@pytest.mark.parametrize("bare", [False, True])
def test_pick_is_an_operator_as_it_says(bare: bool) -> None:
    ids, gates, held, due = routing()
    taken = None if bare else torch.rand(ids.shape[:2]) > 0.5
    sensitivity = None if bare else torch.rand(6)
    threshold = None if bare else torch.rand(6)
    quota = None if bare else torch.full((6,), 2)
    given = ids, gates, held, due, taken, sensitivity, threshold, quota, 4
    torch.library.opcheck(torch.ops.moeca.pick.default, given)


def test_experts_past_their_threshold_come_after_transitions_and_before_all_others() -> None:
    ids = torch.tensor([[[0, 1], [1, 2], [0, 3]], [[0, 1], [1, 2], [0, 3]]])
    held = torch.tensor([[[1, 2], [2, 3], [1, 2]], [[1, 2], [2, 3], [1, 2]]])  # expert 3 is held by nobody
    due = torch.tensor([[[1.0, 0.2], [0.4, 9.0], [3.0, 0.0]], [[1.0, 0.0], [0.1, 9.0], [3.0, 0.0]]])
    threshold = torch.tensor([3.0, 0.25, 10.0, 0.0])  # drifts: 2, 0.3 and 9; in the second sample 2, 0.05 and 9
    picked = branch_ops.pick(ids, torch.ones(2, 3, 2), held, due, None, None, threshold, None, 4)
    assert picked.tolist() == [[5, 2, 1, 3], [5, 3, 4, 0]]


def test_a_slot_is_whose_expert_it_holds_and_a_computed_transition_takes_the_least_of_the_others() -> None:
    ids, held = torch.tensor([[[4, 0, 2]]]), torch.tensor([[[1, 6, 4]]])  # expert + 1: 0, 5 and 3 are held
    gates, chosen = torch.tensor([[[0.2, 0.9, 0.5]]]), torch.tensor([[[True, False, False]]])
    source, hit = branch_ops.align(ids, held, gates, chosen)
    assert hit.tolist() == [[[False, True, False]]]
    assert source.tolist() == [[[2, 0, 1]]]  # 4 is computed and takes 3's slot (0.5), 2 isn't and gets 5's (0.9)
