"""`moeca::align` and `moeca::pick` as the operators that they are made of, for programs that other runtimes run.

Before: a rewritten graph of a row that keeps expert branches.  After: the same values by plain torch operators; the
choice of the branches stays a part of the graph.
Does nothing where no expert branches are kept.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.ops.branch_slots import align, pick
from moeca_compile.passes.facts import RewriteRequest
from moeca_compile.passes.transform.inline import inline


def expand_slots(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    for node in list(gm.graph.nodes):
        if node.target not in _EXPANDED:
            continue
        with gm.graph.inserting_before(node):
            results = list(inline(gm, _EXPANDED[node.target], **fx.arguments_of(node)).values())
        for user in list(node.users):
            if user.target is operator.getitem:
                number = user.args[1]
                assert isinstance(number, int)
                user.replace_all_uses_with(results[number])
                gm.graph.erase_node(user)
        node.replace_all_uses_with(results[0])
        gm.graph.erase_node(node)
    return gm


def _align(**arguments: Tensor) -> dict[str, Tensor]:
    source, hit = align(**arguments)
    return {"source": source, "hit": hit}


def _pick(**arguments: Any) -> dict[str, Tensor]:
    return {"positions": pick(**arguments)}


_EXPANDED = {torch.ops.moeca.align.default: _align, torch.ops.moeca.pick.default: _pick}
