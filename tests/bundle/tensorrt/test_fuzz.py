"""Mutated engines, and mutated entries about them: a clean error, or the result that there was before."""

from __future__ import annotations

import copy as copies
import json
import random

from moeca_compile.errors import MoecaError
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.manifest import MANIFEST, digest_of
from tests.bundle.tensorrt.test_running import on_engines
from tests.bundle.test_fuzz import mutate_bytes, mutate_entry, result_of

ENTRIES, BYTES = 100, 40


def outcome(bundle: Bundle, wanted: list[bytes]) -> str:
    try:
        found = result_of(on_engines(bundle))
    except MoecaError:
        return "refused"
    assert found == wanted, "mutated engines gave another result"
    return "unchanged"


def test_entries(with_engines: Bundle) -> None:
    """Sealed again, as somebody would who knows how."""
    dice, wanted = random.Random(0), result_of(on_engines(with_engines))
    original = json.loads((with_engines.path / MANIFEST).read_text())
    seen = []
    for _ in range(ENTRIES):
        data = copies.deepcopy(original)
        mutate_entry({"engines": data["engines"], "plans": plans(data)}, dice)
        data["digest"] = digest_of(data)
        (with_engines.path / MANIFEST).write_text(json.dumps(data))
        seen.append(outcome(with_engines, wanted))
    assert seen.count("refused") > ENTRIES / 2


def plans(data: dict[str, dict[str, dict[str, object]]]) -> list[dict[str, object]]:
    return [entry for name, entry in data["files"].items() if name.endswith(".plan")]


def test_bytes(with_engines: Bundle) -> None:
    dice, wanted = random.Random(1), result_of(on_engines(with_engines))
    files = [with_engines.path / one.file for one in with_engines.manifest.engines]
    for _ in range(BYTES):
        file = dice.choice(files)
        raw = file.read_bytes()
        file.write_bytes(mutate_bytes(raw, dice))
        changed = file.read_bytes() != raw
        assert outcome(with_engines, wanted) == ("refused" if changed else "unchanged")
        file.write_bytes(raw)
