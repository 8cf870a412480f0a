"""Reading JSON that others wrote: typed entries, or one error that names the entry. Pure data, no package needed."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from moeca_compile.errors import ScheduleError

LARGEST_TEXT = 1 << 26  # bytes; no schedule, manifest or record of ours comes near


class DecodeError(ValueError):
    """What is wrong with a text, without the name of its file."""


class NoJson(DecodeError):
    """A text that isn't JSON at all, such as a line that was cut short."""


def read_text(path: Path) -> str:
    """A text file of sane size.

    Raises:
        DecodeError: it can't be read, or is no text.
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


def parse(text: str) -> Entries:
    """The entries of a JSON object.

    Raises:
        DecodeError: no JSON, no object, nested too deeply, or an entry given twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except DecodeError:
        raise
    except RecursionError as error:
        raise DecodeError("it is nested too deeply") from error
    except ValueError as error:  # no JSON, or a number of too many digits
        raise NoJson(f"it isn't JSON: {error}") from error
    if not isinstance(value, dict):
        raise DecodeError(f"it is {short(value)}, expected an object")
    return Entries(value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name in found if sum(name == one for one, _ in pairs) > 1)
        raise DecodeError(f"{short(twice)} is given twice")
    return found


def numbers(name: str, values: Iterable[Any]) -> tuple[float, ...]:
    """Whatever stands for numbers (arrays' and tensors' too) as finite floats.

    Raises:
        ScheduleError: one that isn't.
    """
    try:
        return tuple(_number(name, float(one)) for one in values)
    except (TypeError, ValueError, OverflowError):
        raise ScheduleError(f"{name}: {short(values)}, expected finite numbers") from None


def short(value: object) -> str:
    """A value, shortened for a message."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


class Entries:
    """An object's entries. Each reader gives an entry of one type, or the default where the entry isn't there."""

    def __init__(self, data: Mapping[str, Any], inside: str = "") -> None:
        self.data, self.inside = data, inside

    def only(self, known: Collection[str]) -> None:
        """Refuse entries that nobody reads."""
        if unknown := [name for name in self.data if name not in known]:
            raise DecodeError(f"{self.inside or 'it'} has unknown entries {short(unknown)}; known: {', '.join(known)}")

    def get(self, name: str, default: Any = ...) -> Any:
        if name not in self.data and default is ...:
            raise DecodeError(f"{self._path(name)} is missing")
        return self.data.get(name, default)

    def text(self, name: str, default: Any = ...) -> str:
        return str(self._of(str, "a text", name, default))

    def whole(self, name: str, default: Any = ...) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise DecodeError(f"{self._path(name)} is {short(value)}, expected a whole number")
        return value

    def number(self, name: str, default: Any = ...) -> float:
        return _number(self._path(name), self.get(name, default))

    def numbers(self, name: str, default: Any = ...) -> tuple[float, ...]:
        """A list of finite numbers."""
        found = self._of(list, "a list of numbers", name, default)
        return tuple(_number(self._path(name), one) for one in found)

    def texts(self, name: str, default: Any = ...) -> tuple[str, ...]:
        found = self._of(list, "a list of texts", name, default)
        if wrong := [one for one in found if not isinstance(one, str)]:
            raise DecodeError(f"{self._path(name)} holds {short(wrong[0])}, expected texts")
        return tuple(found)

    def entries(self, name: str, default: Any = ...) -> Entries:
        return Entries(self._of(dict, "an object", name, default), self._path(name))

    def _of(self, kind: type, wanted: str, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if not isinstance(value, kind):
            raise DecodeError(f"{self._path(name)} is {short(value)}, expected {wanted}")
        return value

    def _path(self, name: str) -> str:
        return f"{self.inside}.{name}" if self.inside else name


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number beyond all floats
        pass
    raise DecodeError(f"{name}: {short(value)} isn't a finite number")
