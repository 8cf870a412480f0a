"""The page of errors and warnings lists every class and every message, with a cause and a remedy."""

from __future__ import annotations

import re

import pytest

from moeca_compile import errors
from tests.docs.messages import PAGE, covers, fragments, letters, messages, messages_of, rows, strings

if not PAGE.exists():
    pytest.skip("needs the checkout", allow_module_level=True)

QUOTES = 8  # letters of its own, up to which a text only quotes another message ("schedule: …")
MADE_ELSEWHERE = {  # texts that aren't written where they are raised: what the page lists for them
    "_COUNTED": "no finite timestep that holds for its whole batch",
    "_EVERY_EXPERT_RUNS": "every expert runs on every token, by its own forward",
    "_difference": "but the trajectory declared",
    "left_out": "result is approximate. Export with a larger capacity",
    "_not_calibrated_for": "it was made for another sampler or number",
    "_other_call": "the package wasn't saved for a call with",
    "_nothing_found": "nothing to cache was found in this graph",
    "_past_end": "is past the schedule's last row",
    "warning": "no call of the compiled model came in this trajectory",
    "placement.warning": "a timestep was visited again",
    "runtime.refused": "nothing to cache was found in this graph",
    "self._too_tight": "can't be kept: the nearest that can is",
    "self.uncached": "the model runs uncached, as plain torch.compile runs it: …",
    "unused": "the schedule's … weights aren't used, for",
    "text": "the bundle is written but couldn't be tried here",
}


def test_every_class_is_listed() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    own = {name: v for name, v in vars(errors).items() if isinstance(v, type) and v.__module__ == errors.__name__}
    assert listed == {name: value.__mro__[1].__name__ for name, value in own.items()}


def uncovered(code: str, where: str) -> list[str]:
    """Messages of a piece of source that no row stands for."""
    return [message.where for message in messages_of(code, where) if not is_listed(message.text, message.source)]


def is_listed(text: str | None, source: str) -> bool:
    if text is None:
        return MADE_ELSEWHERE.get(re.split(r"[(\[]|\.format", source)[0]) in fragments()
    return letters(text) <= QUOTES or any(covers(fragment, text) for fragment in fragments())


def test_every_message_is_listed() -> None:
    every = messages()
    assert len(every) > 250
    missing = [f"{m.where}: {m.text or m.source}" for m in every if not is_listed(m.text, m.source)]
    assert not missing, "list them in docs/reference/errors.md, with the cause and the remedy"


def test_a_new_message_is_missed() -> None:
    code = 'raise OptionError(f"speed={speed}: this knob goes to eleven")\nwarnings.warn("the moon is made of cheese")'
    assert uncovered(code, "new.py") == ["new.py:1", "new.py:2"]
    assert uncovered("self.warned.once(made_somewhere(else_))", "new.py") == ["new.py:1"]
    assert uncovered("raise OptionError(f\"unknown option {name!r}\")\nraise ValueError('not ours')", "new.py") == []


def test_every_listed_message_is_one_of_the_package() -> None:
    known = strings()
    gone = [fragment for fragment in fragments() if not covers(fragment, known)]
    assert not gone, "the package has no such message; change it here, or put it back there"


def test_rows_are_specific_and_help() -> None:
    for listed, cause, remedy in rows():
        assert min(map(letters, listed)) >= QUOTES - 2, listed
        assert min(letters(cause), letters(remedy)) >= 4, listed
    assert len(fragments()) == len(set(fragments()))
