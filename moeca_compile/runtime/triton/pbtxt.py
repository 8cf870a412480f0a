"""Writing protobuf's text format, as far as `config.pbtxt` needs it: messages, lists, strings, numbers and names.

Triton's message classes come with its client, whose protobuf isn't that of onnx: no environment holds both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class Name(str):
    """A value that stands without quotes: of an enumeration."""

    __slots__ = ()


def dumps(message: Mapping[str, Any]) -> str:
    """A message as text. Mappings are messages, lists repeat, `Name`s stand without quotes."""
    return "".join(_field(name, value, "") for name, value in message.items())


def _field(name: str, value: Any, indent: str) -> str:
    if isinstance(value, Mapping):
        inside = "".join(_field(key, entry, f"{indent}  ") for key, entry in value.items())
        return f"{indent}{name} {{\n{inside}{indent}}}\n"
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return "".join(_field(name, entry, indent) for entry in value)
    return f"{indent}{name}: {_plain(value)}\n"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return value if isinstance(value, Name) else json.dumps(value)
