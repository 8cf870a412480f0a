"""Mutated bundles: a clean error, or the result that the bundle gave before. Nothing else, hundreds of times."""

from __future__ import annotations

import copy as copies
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from moeca_compile.errors import MoecaError
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.fused import FusedSession
from moeca_compile.runtime.bundle.manifest import MANIFEST, digest_of
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import call_of, named

BYTES, ENTRIES, SEALED = 240, 180, 120
FEWER = 4  # times, where every bundle that opens is compiled for seconds
STEPS = 4


def result_of(session: Session | FusedSession) -> list[bytes]:
    with session.trajectory() as trajectory:
        return [trajectory.run(named(call_of(2, seed=step)))["output"].tobytes() for step in range(STEPS)]


@pytest.fixture(scope="module")
def wanted(session: Session) -> list[bytes]:
    """Of the variants, then of the fused graph."""
    fused = FusedSession.open(session.bundle.path, session.provider, threads=1)
    return result_of(session) + result_of(fused)


@pytest.fixture(scope="module")
def share(session: Session) -> int:
    return FEWER if session.provider == "openvino" else 1


def outcome(folder: Path, wanted: list[bytes], provider: str) -> str:
    try:
        session = Session.open(folder, provider, threads=1)
        session.bundle.golden()
        found = result_of(session) + result_of(FusedSession.open(folder, provider, threads=1))
    except MoecaError:
        return "refused"
    assert found == wanted, "a mutated bundle gave another result"
    return "unchanged"


def mutate_bytes(raw: bytes, dice: random.Random) -> bytes:
    kind = dice.randrange(5)
    if kind == 0 or not raw:
        return raw[: dice.randrange(len(raw) + 1)]
    at, end = sorted((dice.randrange(len(raw)), dice.randrange(len(raw))))
    if kind == 1:
        return raw[:at] + bytes([raw[at] ^ (1 << dice.randrange(8))]) + raw[at + 1 :]
    if kind == 2:
        return raw[:at] + raw[end:]
    if kind == 3:
        return raw[:at] + raw[at : min(end, at + 64)] * 2 + raw[end:]
    return raw + dice.randbytes(dice.randrange(1, 100))


def test_bytes(exported: Bundle, tmp_path: Path, wanted: list[bytes], session: Session, share: int) -> None:
    """Files cut, flipped, spliced, grown, or exchanged for one another."""
    dice = random.Random(0)
    folder = tmp_path / "b"
    shutil.copytree(exported.path, folder)
    names = sorted(file.name for file in folder.iterdir())
    seen = []
    for _ in range(BYTES // share):
        name = dice.choice(names)
        original = (folder / name).read_bytes()
        exchanged = dice.random() < 0.1
        new = (folder / dice.choice(names)).read_bytes() if exchanged else mutate_bytes(original, dice)
        (folder / name).write_bytes(new)
        found = outcome(folder, wanted, session.provider)
        assert found == "refused" or new == original or name == MANIFEST
        seen.append(found)
        (folder / name).write_bytes(original)
    assert seen.count("refused") > 0.9 * len(seen)
    assert outcome(folder, wanted, session.provider) == "unchanged"


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree of JSON."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [pair for key in keys for pair in places(value[key])]


def other(value: Any, dice: random.Random, all_values: list[Any]) -> Any:
    simple = [None, True, -1, 0, 1, 2, 3.5, 1 << 40, "", "batch", "../x", "v0.onnx", "x\x00", [], {}, ["batch"], [[]]]
    if isinstance(value, int) and not isinstance(value, bool) and dice.random() < 0.5:
        return value + dice.choice([-1, 1, 7, 1 << 33])
    if isinstance(value, str) and value and dice.random() < 0.5:
        at = dice.randrange(len(value))
        return value[:at] + dice.choice("CRFb0*./ \n") + value[at + 1 :]
    if isinstance(value, list) and value and dice.random() < 0.5:
        return dice.choice([value[1:], value[::-1], value * 2, [*value, dice.choice(value)]])
    return copies.deepcopy(dice.choice(dice.choice([simple, all_values])))


def mutate_entry(data: dict[str, Any], dice: random.Random) -> None:
    where = places(data)
    container, key = dice.choice(where)
    if isinstance(container, dict) and dice.random() < 0.15:
        if dice.random() < 0.5:
            del container[key]
        else:
            container[f"{key}_"] = container[key]
    else:
        container[key] = other(container[key], dice, [holder[k] for holder, k in where])


@pytest.mark.parametrize("sealed", [False, True])
def test_manifest_entries(
    exported: Bundle, tmp_path: Path, wanted: list[bytes], session: Session, share: int, sealed: bool
) -> None:
    """Entries of the manifest changed, exchanged, dropped, added: as they are, and with a digest that fits again."""
    dice = random.Random(1 + sealed)
    folder = tmp_path / "b"
    shutil.copytree(exported.path, folder)
    original = json.loads((folder / MANIFEST).read_text())
    seen = []
    for _ in range((SEALED if sealed else ENTRIES) // share):
        data = copies.deepcopy(original)
        mutate_entry(data, dice)
        if sealed:
            data["digest"] = digest_of(data)
        (folder / MANIFEST).write_text(json.dumps(data))
        found = outcome(folder, wanted, session.provider)
        assert sealed or found == "refused" or data == original
        seen.append(found)
    assert seen.count("refused") > len(seen) / 2


def test_schedule_entries(exported: Bundle, tmp_path: Path, wanted: list[bytes], session: Session, share: int) -> None:
    """The schedule's too, with all checksums made to fit."""
    from tests.bundle.test_bad_bundles import seal

    dice = random.Random(3)
    folder = tmp_path / "b"
    shutil.copytree(exported.path, folder)
    original = json.loads((folder / "schedule.json").read_text())
    for _ in range(100 // share):
        data = copies.deepcopy(original)
        mutate_entry(data, dice)
        (folder / "schedule.json").write_text(json.dumps(data))
        seal(folder)
        assert (
            outcome(folder, wanted, session.provider) == "refused"
        )  # the graphs carry the id of the schedule that they are for
