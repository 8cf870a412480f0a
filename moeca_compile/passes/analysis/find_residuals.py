"""Residual branches: an add one of whose operands is an ancestor of the other.

Before: any functional graph.  After: one `Branch` per such add, with the cut moved up before the gate multiply, so
that the current step's gate is applied to a cached value. In `(x + a(x)) + b(x)` and `x + (g a(x) + h b(x))` both
branches have the trunk x; a cast or a view of x is x; a trunk may hold one sample for the whole batch (a text beside
the latents of several images). Does nothing to adds of unrelated values (biases, position tables, routed + shared), nor
to a value that doesn't depend on the latent and is added to the stream in every layer (a position table, the shift of
one adaLN for all layers): the stream comes to such an add past other residuals. A residual that is written with another
op (a difference, `lerp`, `addcmul`, a product that adds, an add with `alpha`) around a matmul is a branch with the
reason why it can't be taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.passes.facts import Branch, Facts

_OTHER_JOINS = (
    aten.sub.Tensor, aten.lerp.Tensor, aten.lerp.Scalar, aten.addcmul.default, aten.addmm.default,
    aten.baddbmm.default,
)  # fmt: skip


def find_residuals(gm: GraphModule, facts: Facts) -> Facts:
    finder = _Finder(fx.Cone(gm), facts.dependence)
    branches = [branch for node in finder.cone.nodes for branch in (*finder.otherwise(node), *finder.added(node))]
    return replace(facts, branches=tuple(branches))


class _Finder:
    def __init__(self, cone: fx.Cone, depends: Mapping[str, str]) -> None:
        self.cone, self.depends = cone, depends
        self.trunk_of: dict[Node, Node] = {}  # join -> the value that its branch started from

    def added(self, node: Node) -> Iterator[Branch]:
        """The branches that a plain add of two tensors joins to their trunk."""
        if node.target is not aten.add.Tensor or node.kwargs:
            return
        operands = [operand for operand in node.args if isinstance(operand, Node)]
        for trunk, branch in (operands, operands[::-1]) if len(operands) == 2 else ():
            root = self._root(trunk, branch) if fx.fills(trunk, node) else None
            cuts = [cut for cut in self._cuts(root, branch) if cut is not root] if root is not None else []
            if root is not None and cuts and not self._meets_the_stream(root, branch):
                self.trunk_of[node] = root
                for cut in cuts:
                    yield self._branch(node, root, cut)
                return

    def otherwise(self, node: Node) -> Iterator[Branch]:
        """The branch that another op than a plain add joins, one operand coming to another through a matmul."""
        if node.target not in _OTHER_JOINS and not (node.target is aten.add.Tensor and node.kwargs):
            return
        what = "an add with alpha" if node.target is aten.add.Tensor else str(node.target)
        reason = f"a residual written as {what}: write it as x + f(x)"
        if node.target in fx.MATMULS:  # x + a b, where a or b is or comes from x
            x, *factors = fx.nodes_of(node.args)
            if any(factor is x or self.cone.feeds(x, factor) for factor in factors):
                yield Branch(node.name, x.name, node.name, tuple(n.name for n in self.cone.between(x, node)), reason)
            return
        pairs = [(a, b) for a in node.all_input_nodes for b in node.all_input_nodes if self.cone.feeds(a, b)]
        for trunk, other in pairs:
            body = self.cone.between(trunk, other)
            if fx.shape(trunk) == fx.shape(node) and any(inner.target in fx.MATMULS for inner in body):
                yield replace(self._branch(node, trunk, other), reason=reason)
                return

    def _branch(self, join: Node, root: Node, cut: Node) -> Branch:
        return Branch(join.name, root.name, cut.name, tuple(node.name for node in self.cone.between(root, cut)))

    def _root(self, trunk: Node, branch: Node) -> Node | None:
        """`trunk`, or what it is a view of, or what a chain of adds that only this add reads started from."""
        size = math.prod(fx.shape(trunk))  # behind an expand it would be another value
        value, shared = fx.strip(branch, fx.is_view), False
        while not self.cone.feeds(trunk, branch):
            if fx.strip(trunk, fx.is_view) is value:
                return None  # `branch` is this sum itself, the early end of a skip
            shared |= len(trunk.users) > 1  # a view that others read shows them the sum behind it
            if fx.is_view(trunk) and trunk.args and isinstance(trunk.args[0], Node):
                trunk = trunk.args[0]
            elif trunk in self.trunk_of and not shared:
                trunk = self.trunk_of[trunk]
            else:
                return None
        return trunk if math.prod(fx.shape(trunk)) == size else None

    def _meets_the_stream(self, root: Node, branch: Node) -> bool:
        """Whether `root` doesn't depend on the latent and `branch` comes to it past the sums of another trunk."""
        if self._level(root) == "latent" or self._level(branch) != "latent":
            return False
        body = self.cone.between(root, branch)
        return any(self.trunk_of.get(inner, root) is not root for inner in body)

    def _level(self, node: Node) -> str:
        return self.depends.get(node.name, "const")

    def _cuts(self, root: Node, branch: Node) -> Iterator[Node]:
        """Before the gate; of a sum of two gated values, before each one's gate."""
        cut, _ = self._before_gates(root, branch)
        parts = [operand for operand in cut.args if isinstance(operand, Node)] if cut.target is aten.add.Tensor else []
        under = [self._before_gates(root, part) for part in parts]
        if len(under) == 2 and not cut.kwargs and all(self._steers(gates) for _, gates in under):
            yield from (inner for inner, _ in under)
        else:
            yield self._as_it_was(cut)

    def _steers(self, gates: list[Node]) -> bool:
        return any(self._level(gate) != "const" for gate in gates)

    def _before_gates(self, root: Node, branch: Node) -> tuple[Node, list[Node]]:
        """Up through multiplications by values that don't come from the trunk; and these gates and layer scales."""
        cut = node = branch
        gates: list[Node] = []
        while node is not root:
            if node.target is aten.mul.Tensor and self._moves(root, node.args[0]) != self._moves(root, node.args[1]):
                gates += [source for source in node.all_input_nodes if not self._moves(root, source)]
                cut = node = next(source for source in node.all_input_nodes if self._moves(root, source))
            elif fx.is_view(node):
                node = node.all_input_nodes[0]
            else:
                break
        return cut, gates

    def _moves(self, root: Node, node: object) -> bool:
        return isinstance(node, Node) and (node is root or self.cone.feeds(root, node))

    def _as_it_was(self, cut: Node) -> Node:
        """Before a cast to a wider dtype: the state needs no more than what was computed."""
        while cut.target in fx.CASTS and fx.need(cut).dtype.itemsize > fx.need(fx.arg(cut, 0)).dtype.itemsize:
            cut = fx.arg(cut, 0)
        return cut
