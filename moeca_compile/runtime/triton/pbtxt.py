"""Protobuf's text format, as far as `config.pbtxt` needs it: messages, lists, strings, numbers and names.

Triton's message classes come with its client, whose protobuf isn't that of onnx: no environment holds both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moeca_compile.errors import BundleError

_TOKEN = re.compile(
    r"""\s+|\#[^\n]*|(?P<text>"(?:[^"\\\n]|\\.)*")|(?P<word>[A-Za-z_]\w*)|(?P<number>-?[0-9][\w.+-]*)|(?P<mark>[{}\[\]:,])"""
)


class Name(str):
    """A value that stands without quotes: of an enumeration."""

    __slots__ = ()


def dumps(message: Mapping[str, Any]) -> str:
    """A message as text. Mappings are messages, lists repeat, `Name`s stand without quotes."""
    return "".join(_field(name, value, "") for name, value in message.items())


def loads(text: str) -> dict[str, Any]:
    """The message that `text` holds; a field that stands more than once becomes a list.

    Raises:
        BundleError: the text isn't of this form.
    """
    return _message(_tokens(text), end="")


def many(message: Mapping[str, Any], name: str) -> list[Any]:
    """A repeated field: as a list, however often it stands."""
    value = message.get(name, [])
    return value if isinstance(value, list) else [value]


def _field(name: str, value: Any, indent: str) -> str:
    if isinstance(value, Mapping):
        inside = "".join(_field(key, one, f"{indent}  ") for key, one in value.items())
        return f"{indent}{name} {{\n{inside}{indent}}}\n"
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return "".join(_field(name, one, indent) for one in value)
    return f"{indent}{name}: {_plain(value)}\n"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return value if isinstance(value, Name) else json.dumps(value)


def _tokens(text: str) -> Iterator[tuple[str, Any]]:
    """("word", name), ("value", text or number), or a mark twice; ("", None) at the end."""
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise BundleError(f"config.pbtxt isn't protobuf text, at {text[at : at + 40]!r}")
        at = match.end()
        kind, found = match.lastgroup, match.group()
        if kind == "word":
            yield "word", found
        elif kind == "mark":
            yield found, found
        elif kind is not None:
            yield "value", _literal(found)
    yield "", None


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise BundleError(f"config.pbtxt: {text} is no text or number") from None


def _message(tokens: Iterator[tuple[str, Any]], end: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while (token := next(tokens))[0] != end:
        if token[0] == ",":
            continue
        if token[0] != "word":
            raise BundleError(f"config.pbtxt: {token[1]!r} stands where a field's name belongs")
        value, is_list = _value(tokens)
        name = token[1]
        if name in found:
            before = found[name] if isinstance(found[name], list) else [found[name]]
            found[name] = [*before, *(value if is_list else [value])]
        else:
            found[name] = value
    return found


def _value(tokens: Iterator[tuple[str, Any]]) -> tuple[Any, bool]:
    kind, value = next(tokens)
    if kind == ":":
        kind, value = next(tokens)
    if kind == "{":
        return _message(tokens, "}"), False
    if kind == "[":
        return list(_items(tokens)), True
    if kind in ("word", "value"):
        return _word(value) if kind == "word" else value, False
    raise BundleError(f"config.pbtxt: {value!r} stands where a value belongs")


def _items(tokens: Iterator[tuple[str, Any]]) -> Iterator[Any]:
    while (token := next(tokens))[0] != "]":
        kind, value = token
        if kind == "{":
            yield _message(tokens, "}")
        elif kind in ("word", "value"):
            yield _word(value) if kind == "word" else value
        elif kind != ",":
            raise BundleError(f"config.pbtxt: {value!r} stands where a list's item belongs")


def _word(text: str) -> Any:
    return {"true": True, "false": False}.get(text, Name(text))
