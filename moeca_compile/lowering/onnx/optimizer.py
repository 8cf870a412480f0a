"""torch's translator and onnxscript's optimizer, without work that they do again and again.

Equal blocks give equal operators: each kind of operator is asked for its shapes once, by inputs, attributes and what is
known of its outputs. A rewrite rule is tried where the operator is the one that its pattern ends in, not everywhere.
Where types are promoted, operators that stay as they are aren't traced again. The graphs are the same; versions that
are built otherwise do all their work.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

_FOLDING, _RULES = "onnxscript.optimizer._constant_folding", "onnxscript.rewriter._rewrite_rule"
_PROMOTION = "torch.onnx._internal.fx.passes.type_promotion"
_SMALL = 20  # elements: inference reads the values of smaller constants


class _Unknown(Exception):
    """An operator that can't be told by plain data."""


@contextlib.contextmanager
def optimizing_once() -> Iterator[None]:
    """While this is entered, the optimizer leaves out what it did before; for one thread at a time."""
    with contextlib.ExitStack() as stack:
        for module, owner, name, made in (
            (_FOLDING, "FoldConstantsPass", "_do_inference", _remembering),
            (_RULES, "RewriteRule", "try_rewrite", _where_it_ends),
            (_PROMOTION, "_TypePromotionInterpreter", "run_node", _as_it_was_traced),
        ):
            try:
                cls: Any = getattr(importlib.import_module(module), owner)
                original = vars(cls)[name]
                replaced = made(original)
            except (ImportError, AttributeError, KeyError):
                continue
            setattr(cls, name, replaced)
            stack.callback(setattr, cls, name, original)
        yield


def _where_it_ends(original: Callable[..., Any]) -> Callable[..., Any]:
    """RewriteRule.try_rewrite: a pattern matches from the operator that it ends in on."""

    def try_rewrite(rule: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        last = _last_operator(rule)
        if last is not None and (node.domain, node.op_type) != last:
            return None
        return original(rule, model, graph, node, **options)

    return try_rewrite


def _as_it_was_traced(original: Callable[..., Any]) -> Callable[..., Any]:
    """_TypePromotionInterpreter.run_node: an operator's result is known from its trace; if its arguments get another
    type, `_maybe_promote_node` traces it anew."""
    rule_of = importlib.import_module(_PROMOTION).get_type_promotion_rule

    def run_node(promotion: Any, node: Any) -> Any:
        if node.op != "call_function" or node.meta.get("val") is None:
            return original(promotion, node)
        with promotion._set_current_node(node):
            if (rule := rule_of(node, promotion.type_promotion_table)) is not None:
                promotion._maybe_promote_node(node, rule)
        return node.meta["val"]

    return run_node


def _last_operator(rule: Any) -> tuple[str, str] | None:
    try:
        identifier = rule._target_pattern.output_nodes[0].op_identifier()
    except (AttributeError, IndexError):
        return None
    return None if identifier is None else identifier[:2]


def _remembering(original: Callable[..., Any]) -> Callable[..., Any]:
    """FoldConstantsPass._do_inference: what it makes of an operator's outputs follows from its key."""
    known: dict[Hashable, list[tuple[Any, Any]]] = {}

    def infer(folding: Any, node: Any) -> None:
        try:
            key = _key(folding, node)
        except _Unknown:
            original(folding, node)
            return
        if key not in known:
            original(folding, node)
            known[key] = [(_copied(output.shape), copy.copy(output.type)) for output in node.outputs]
            return
        for output, (shape, kind) in zip(node.outputs, known[key], strict=True):
            output.shape, output.type = _copied(shape), copy.copy(kind)

    return infer


def _copied(shape: Any) -> Any:
    return None if shape is None else shape.copy()


def _key(folding: Any, node: Any) -> Hashable:
    names: dict[str, int] = {}  # an input that is read twice, or unnamed
    inputs = tuple(None if x is None else (names.setdefault(x.name, len(names)), *_value(x)) for x in node.inputs)
    attributes = tuple(sorted((name, *_attribute(attribute)) for name, attribute in node.attributes.items()))
    outputs = tuple((output.name == "", *_kind(output)) for output in node.outputs)
    version = folding._opset_imports.get(node.domain), node.version
    return node.domain, node.op_type, node.overload, version, inputs, attributes, outputs


def _value(value: Any) -> tuple[Hashable, ...]:
    constant = value.const_value
    if constant is None or constant.size > _SMALL:
        return _kind(value)
    return *_kind(value), repr(constant.dtype), tuple(constant.shape), constant.numpy().tobytes()


def _kind(value: Any) -> tuple[Hashable, ...]:
    shape = None if value.shape is None else tuple(map(str, value.shape))
    return repr(value.type), shape


def _attribute(attribute: Any) -> tuple[str, str]:
    if attribute.is_ref() or attribute.type.name not in ("INT", "INTS", "FLOAT", "FLOATS", "STRING", "STRINGS"):
        raise _Unknown
    return attribute.type.name, repr(attribute.value)
