"""Which integers an input may hold: those that index a table. torch raises for others, and runtimes may not."""

from __future__ import annotations

import torch
from torch.fx import Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten

# what hands every value of its first argument on
_ALL_OF_IT = {
    aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.expand.default, aten.alias.default,
    aten.clone.default, aten.permute.default, aten.transpose.int, aten.squeeze.dim, aten.squeeze.dims, *fx.CASTS,
}  # fmt: skip


def index_range(node: Node) -> tuple[int, int] | None:
    """The least value of `node` that every table takes which it indexes, and the one after the largest; None: it
    indexes none that is known."""
    if fx.need(node).dtype not in (torch.int64, torch.int32):
        return None
    limits = [limit for user in node.users if (limit := _through(node, user)) is not None]
    return (max(low for low, _ in limits), min(end for _, end in limits)) if limits else None


def _through(node: Node, user: Node) -> tuple[int, int] | None:
    if user.target in _ALL_OF_IT and user.args[0] is node:
        return index_range(user)
    if user.target is aten.embedding.default and user.args[1] is node:
        return 0, fx.shape(fx.arg(user, 0))[0]
    if user.target is aten.index_select.default and user.args[2] is node:
        return 0, fx.shape(fx.arg(user, 0))[_number(user.args[1])]
    if user.target is aten.index.Tensor:
        sizes = fx.shape(fx.arg(user, 0))
        indexed = [sizes[i] for i, index in enumerate(user.args[1]) if index is node]  # type: ignore[arg-type]
        return (-min(indexed), min(indexed)) if indexed else None
    return None


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value
