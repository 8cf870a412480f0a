"""The slots' operators as the plain operators that they are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moeca_compile.passes.facts import RewriteRequest
from moeca_compile.passes.partial.expand_slots import expand_slots
from tests.graphs import applied, assert_unchanged, graph_of
from tests.ops.test_branch_ops import routing

REQUEST: Any = None  # the pass looks at nodes alone
moeca = torch.ops.moeca


def aligned(ids: Tensor, gates: Tensor, held: Tensor, due: Tensor) -> Any:
    source, hit = moeca.align(ids, held, gates, due > 0.5)
    return source * 2, hit


def picked(ids: Tensor, gates: Tensor, held: Tensor, due: Tensor) -> Tensor:
    return moeca.pick(ids, gates, held, due, None, None, None, None, 4)


def picked_by_tables(ids: Tensor, gates: Tensor, held: Tensor, due: Tensor) -> Tensor:
    taken, tables = due.sum(-1) > 1.5, due.flatten()[:6]
    return moeca.pick(ids, gates, held, due, taken, tables, tables * 0.1, torch.full((6,), 2), 4)


@pytest.mark.parametrize("function", [aligned, picked, picked_by_tables])
def test_plain_operators_give_the_same_bits(function: Any) -> None:
    args = routing()
    gm = graph_of(function, *args)
    plain, modified = applied(expand_slots, gm, REQUEST)
    assert modified
    assert not [node for node in plain.graph.nodes if str(node.target).startswith("moeca.")]
    for result, expected in zip(plain(*args), gm(*args), strict=True):
        assert result.dtype == expected.dtype
        assert torch.equal(result, expected)


def test_a_graph_without_slots_stays() -> None:
    request: RewriteRequest = REQUEST
    assert_unchanged(expand_slots, graph_of(lambda x: x.topk(2).indices, torch.zeros(3)), request)
