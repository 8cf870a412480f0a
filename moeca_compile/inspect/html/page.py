"""Writes the page: one HTML file with its style, its script and its data inside."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from moeca_compile.errors import UserError

_PARTS = {"STYLE": ("page.css",), "SCRIPT": ("dom.js", "charts.js", "diff.js", "sections.js", "page.js")}


def write_page(path: str | Path, data: Mapping[str, Any], text: str) -> Path:
    """Write the page.

    Args:
        path: the file to write; an existing one is replaced.
        data: of `page_data`.
        text: the report as text, for browsers without scripts.

    Returns:
        The path.

    Raises:
        UserError: the file can't be written.
    """
    target = Path(path)
    try:
        target.write_text(page(data, text), encoding="utf-8")
    except OSError as error:
        raise UserError(f"report {str(path)!r} can't be written: {error.strerror}") from error
    return target


def page(data: Mapping[str, Any], text: str) -> str:
    """The page's HTML. Names of a model are data and never markup: the script sets texts, and no HTML."""
    folder = files("moeca_compile.inspect.html")
    parts = {
        name: "\n".join(folder.joinpath(file).read_text(encoding="utf-8") for file in names)
        for name, names in _PARTS.items()
    }
    parts["DATA"] = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # no tag can end the script
    parts["TEXT"] = html.escape(text).encode("ascii", "xmlcharrefreplace").decode()
    template = folder.joinpath("page.html").read_text(encoding="utf-8")
    head, *rest = template.split("{{")
    filled = [head]
    for piece in rest:
        name, _, tail = piece.partition("}}")
        filled += [parts[name], tail]
    return "".join(filled)
