"""Residual branches: an add one of whose operands is an ancestor of the other.

Before: any functional graph.  After: one `Branch` per such add, with the cut moved up before the gate multiply, so
that the current step's gate is applied to a cached value. In `(x + a(x)) + b(x)` both branches have the trunk x.
Does nothing to adds of unrelated values (biases, position tables, routed + shared). A residual that is written with
another op (a difference, `lerp`, `addcmul`, a product that adds, an add with `alpha`) around a matmul is a miss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch.fx import GraphModule, Node

from moeca_compile import fx
from moeca_compile.fx import aten
from moeca_compile.passes.context import Branch, Context
from moeca_compile.regions import Miss

_OTHER_JOINS = (
    aten.sub.Tensor, aten.lerp.Tensor, aten.lerp.Scalar, aten.addcmul.default, aten.addmm.default,
    aten.baddbmm.default,
)  # fmt: skip


def find_residuals(gm: GraphModule, ctx: Context) -> Context:
    cone = fx.Cone(gm)
    trunk_of: dict[Node, Node] = {}  # join -> the value that its branch started from
    branches = []
    misses = list(ctx.misses)
    for node in cone.nodes:
        if _joins_otherwise(cone, node):
            what = "an add with alpha" if node.target is aten.add.Tensor else str(node.target)
            misses.append(Miss(f"a residual written as {what}: write it as x + f(x)", node.name, fx.where(node)))
        for trunk, branch in _operands(node):
            root = _common_trunk(cone, trunk_of, trunk, branch)
            if root is None:
                continue
            cut = _before_gate(cone, root, branch)
            if cut is not root:
                trunk_of[node] = root
                body = tuple(inner.name for inner in cone.between(root, cut))
                branches.append(Branch(node.name, root.name, cut.name, body))
                break
    return replace(ctx, branches=tuple(branches), misses=tuple(misses))


def _joins_otherwise(cone: fx.Cone, node: Node) -> bool:
    """Whether one operand comes to another through a matmul, in an op that isn't a plain add."""
    if node.target not in _OTHER_JOINS and not (node.target is aten.add.Tensor and node.kwargs):
        return False
    if node.target in fx.MATMULS:  # x + a b, where a or b is or comes from x
        x, *factors = fx.nodes_of(node.args)
        return any(factor is x or cone.feeds(x, factor) for factor in factors)
    pairs = [(a, b) for a in node.all_input_nodes for b in node.all_input_nodes if cone.feeds(a, b)]
    return any(
        fx.shape(trunk) == fx.shape(node) and any(inner.target in fx.MATMULS for inner in cone.between(trunk, other))
        for trunk, other in pairs
    )


def _operands(node: Node) -> Iterator[tuple[Node, Node]]:
    """Both readings of a plain add of two tensors: (trunk, branch)."""
    if node.target is aten.add.Tensor and not node.kwargs:
        left, right = node.args
        if isinstance(left, Node) and isinstance(right, Node):
            for trunk, branch in ((left, right), (right, left)):
                if fx.shape(trunk) == fx.shape(node):
                    yield trunk, branch


def _common_trunk(cone: fx.Cone, trunk_of: dict[Node, Node], trunk: Node, branch: Node) -> Node | None:
    """`trunk` itself, or what a chain of adds that only this add reads started from, if it feeds `branch`."""
    while not cone.feeds(trunk, branch):
        if trunk not in trunk_of or len(trunk.users) > 1:
            return None
        trunk = trunk_of[trunk]
    return trunk


def _before_gate(cone: fx.Cone, root: Node, branch: Node) -> Node:
    """Walk up through multiplications by values that don't come from the trunk (gates, layer scales, constants)."""

    def moves(node: object) -> bool:
        return isinstance(node, Node) and (node is root or cone.feeds(root, node))

    cut = node = branch
    while node is not root:
        if node.target is aten.mul.Tensor and moves(node.args[0]) != moves(node.args[1]):
            cut = node = next(source for source in node.all_input_nodes if moves(source))
        elif fx.is_view(node):
            node = node.all_input_nodes[0]
        else:
            break
    return cut
