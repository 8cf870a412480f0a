"""A checker for the part of JSON Schema that the manifest's schema uses, so that opening a bundle needs no package.

Known words: type, enum, const, properties, required, additionalProperties (false or a schema), propertyNames, items,
minItems, maxItems, uniqueItems, pattern, maxLength, minimum, maximum, anyOf, and $ref into $defs. An unknown word is
an error: a rule that isn't checked would be a promise that isn't kept.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from moeca_compile.errors import InvariantError

_TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": (int, float),
    "integer": int,
}  # fmt: skip
_SILENT = {"$schema", "$id", "$defs", "title", "description"}


def check(value: Any, schema: Mapping[str, Any]) -> str | None:
    """The first thing wrong with `value`, as `path: what`; None if it fits."""
    return _check(value, schema, schema, "manifest")


def _check(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], path: str) -> str | None:
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    for word, rule in schema.items():
        if word in _SILENT or (word in ("properties", "additionalProperties") and not isinstance(value, dict)):
            continue
        if word not in _RULES:
            raise InvariantError(f"the manifest's schema uses {word!r}, which isn't checked")
        wrong: str | None = _RULES[word](value, rule, schema, root, path)
        if wrong is not None:
            return wrong
    return None


def _type(value: Any, rule: str, schema: Any, root: Any, path: str) -> str | None:
    fits = isinstance(value, _TYPES[rule]) and (rule == "boolean" or not isinstance(value, bool))
    if fits and isinstance(value, float):
        fits = math.isfinite(value)
    return None if fits else f"{path} is {_short(value)}, expected {rule}"


def _properties(value: dict[str, Any], rule: Any, schema: Any, root: Any, path: str) -> str | None:
    found = (_check(value[name], part, root, f"{path}.{name}") for name, part in rule.items() if name in value)
    return next((wrong for wrong in found if wrong), None)


def _others(value: dict[str, Any], rule: Any, schema: Any, root: Any, path: str) -> str | None:
    others = [name for name in value if name not in schema.get("properties", {})]
    if rule is False:
        return f"{path} has unknown entries {_short(others)}" if others else None
    return next(
        (wrong for name in others if (wrong := _check(value[name], rule, root, f"{path}.{_short(name)}"))), None
    )


def _items(value: Any, rule: Any, schema: Any, root: Any, path: str) -> str | None:
    found = (_check(item, rule, root, f"{path}[{i}]") for i, item in enumerate(value))
    return next((wrong for wrong in found if wrong), None)


def _any_of(value: Any, rule: Any, schema: Any, root: Any, path: str) -> str | None:
    found = [_check(value, part, root, path) for part in rule]
    return None if None in found else f"{path} is {_short(value)}: {' / '.join(str(one) for one in found)}"


def _says(fits: Any, what: str) -> Any:
    def rule(value: Any, bound: Any, schema: Any, root: Any, path: str) -> str | None:
        return None if fits(value, bound) else f"{path} is {_short(value)}, expected {what} {_short(bound)}"

    return rule


_RULES: dict[str, Any] = {
    "type": _type,
    "properties": _properties,
    "additionalProperties": _others,
    "propertyNames": lambda v, rule, s, root, path: next(
        (wrong for name in v if (wrong := _check(name, rule, root, f"{path}: the name {_short(name)}"))), None
    ),
    "items": _items,
    "anyOf": _any_of,
    "required": _says(lambda v, names: all(name in v for name in names), "entries"),
    "enum": _says(lambda v, values: v in values, "one of"),
    "const": _says(lambda v, one: v == one, "exactly"),
    # NOTE: Python's $ would also match before a last newline
    "pattern": _says(lambda v, text: re.search(text.replace("$", r"\Z"), v) is not None, "a text like"),
    "maxLength": _says(lambda v, n: len(v) <= n, "length at most"),
    "minItems": _says(lambda v, n: len(v) >= n, "length at least"),
    "maxItems": _says(lambda v, n: len(v) <= n, "length at most"),
    "uniqueItems": _says(lambda v, wanted: len({json.dumps(one) for one in v}) == len(v), "no repeats:"),
    "minimum": _says(lambda v, n: v >= n, "at least"),
    "maximum": _says(lambda v, n: v <= n, "at most"),
}


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else f"{text[:117]}..."
