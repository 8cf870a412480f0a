"""Drop nodes that compute nothing: assertions, detach and alias, dropout out of training, casts to the same dtype.

Before: what the tracer left.  After: the same values, bit for bit, in fewer nodes.
Does nothing where there are none. A matcher then meets `x + f(x)` and not `x + detach(dropout(f(x)))`.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.passes.facts import Facts

_PASS_ON = (aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default)
_COPIES = (aten._to_copy.default, aten.lift_fresh_copy.default)
_CHECKS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg)


def drop_noops(gm: GraphModule, facts: Facts) -> GraphModule:
    for node in list(gm.graph.nodes):
        if node.target in _CHECKS:
            gm.graph.erase_node(node)
        elif node.op == "call_function" and _passes_on(node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code(fx.has_effect)
    return gm


def _passes_on(node: Node) -> bool:
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target in _COPIES and any(user.op == "output" for user in node.users):
        return False  # the caller may change an output in place
    if node.target in _PASS_ON:
        return True
    if node.target is aten.dropout.default:
        return bool(node.args[1] == 0 or node.args[2] is False)
    if node.target in (aten._to_copy.default, aten.to.dtype):
        before, after = fx.need(fx.arg(node, 0)), fx.need(node)
        kind = (before.dtype, before.device, before.layout, before.stride())
        return kind == (after.dtype, after.device, after.layout, after.stride())
    return False
