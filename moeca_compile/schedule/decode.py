"""Typed decoding of JSON: each error names the entry that is wrong. Pure data, standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from moeca_compile.errors import ScheduleError

LARGEST_TEXT = 1 << 26  # bytes; far more than any file that this package writes


class DecodeError(ValueError):
    """What is wrong with a text; the caller adds the name of the file."""


class NoJson(DecodeError):
    """A text that is not JSON, such as a truncated line."""


def read_text(path: Path) -> str:
    """The contents of a UTF-8 text file of at most `LARGEST_TEXT` bytes.

    Raises:
        DecodeError: the file can't be read, is too large, or is not text.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_TEXT + 1)
        if len(raw) > LARGEST_TEXT:
            raise DecodeError(f"it is larger than {LARGEST_TEXT} bytes")
        return raw.decode()
    except OSError as error:
        raise DecodeError(f"it can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DecodeError("it can't be read: it isn't text") from error
    except DecodeError:
        raise
    except ValueError as error:  # a path that no file can have
        raise DecodeError(f"it can't be read: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        DecodeError: it can't be written; says why.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DecodeError(getattr(error, "strerror", None) or error) from error


def is_positive(value: object) -> bool:
    """Whether it is a whole number from 1 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def parse(text: str) -> Entries:
    """The entries of a JSON object.

    Raises:
        DecodeError: the text is not JSON, not an object, nested too deeply, or gives an entry twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except DecodeError:
        raise
    except RecursionError as error:
        raise DecodeError("it is nested too deeply") from error
    except ValueError as error:  # not JSON, or a number with too many digits
        raise NoJson(f"it isn't JSON: {error}") from error
    if not isinstance(value, dict):
        raise DecodeError(f"it is {short(value)}, expected an object")
    return Entries(value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise DecodeError(f"{short(name)} is given twice")
        entries[name] = value
    return entries


def numbers(name: str, values: Iterable[Any]) -> tuple[float, ...]:
    """Convert number-like values (elements of arrays and tensors too) to finite floats.

    Raises:
        ScheduleError: a value is not a finite number; the message begins with `name`.
    """
    try:
        return tuple(_number(name, float(value)) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise ScheduleError(f"{name}: {short(values)}, expected finite numbers") from None


def short(value: object) -> str:
    """The representation of a value for a message, at most 60 characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


class Entries:
    """The entries of a JSON object. Each method reads an entry of one type, or returns the default if it is missing."""

    def __init__(self, data: Mapping[str, Any], inside: str = "") -> None:
        self.data, self.inside = data, inside

    def reject_unknown(self, names: Collection[str]) -> None:
        """Raise DecodeError if there is an entry that is not in `names`."""
        if unknown := [name for name in self.data if name not in names]:
            raise DecodeError(f"{self.inside or 'it'} has unknown entries {short(unknown)}; known: {', '.join(names)}")

    def get(self, name: str, default: Any = ...) -> Any:
        """An entry of any type. This and every other method raises DecodeError for a missing or wrong entry."""
        if name not in self.data and default is ...:
            raise DecodeError(f"{self._path(name)} is missing")
        return self.data.get(name, default)

    def text(self, name: str, default: Any = ...) -> str:
        """A string."""
        return str(self._typed(str, "a text", name, default))

    def integer(self, name: str, default: Any = ...) -> int:
        """An integer."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise DecodeError(f"{self._path(name)} is {short(value)}, expected a whole number")
        return value

    def number(self, name: str, default: Any = ...) -> float:
        """A finite number."""
        return _number(self._path(name), self.get(name, default))

    def numbers(self, name: str, default: Any = ...) -> tuple[float, ...]:
        """A list of finite numbers."""
        values = self._typed(list, "a list of numbers", name, default)
        return tuple(_number(self._path(name), value) for value in values)

    def texts(self, name: str, default: Any = ...) -> tuple[str, ...]:
        """A list of strings."""
        values = self._typed(list, "a list of texts", name, default)
        if wrong := [value for value in values if not isinstance(value, str)]:
            raise DecodeError(f"{self._path(name)} holds {short(wrong[0])}, expected texts")
        return tuple(values)

    def entries(self, name: str, default: Any = ...) -> Entries:
        """The entries of a nested object."""
        return Entries(self._typed(dict, "an object", name, default), self._path(name))

    def _typed(self, kind: type, description: str, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if not isinstance(value, kind):
            raise DecodeError(f"{self._path(name)} is {short(value)}, expected {description}")
        return value

    def _path(self, name: str) -> str:
        return f"{self.inside}.{name}" if self.inside else name


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond the range of floats
        pass
    raise DecodeError(f"{name}: {short(value)} isn't a finite number")
