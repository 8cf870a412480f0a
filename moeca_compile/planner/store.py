"""What a calibration has found so far, in a folder, so that an interrupted one goes on and the next budget is cheaper.

    facts.json       which model and sampler: graph, steps, timesteps, granularity
    origins.jsonl    of each seed, a sketch of what the model got in the sampler's first call
    truth/<seed>.npy the uncached samples; truth.jsonl: the seconds that each took
    drift.npz        the measured pairs; split.npz: those of groups of regions
    experts.jsonl    one line an expert that was made stale: what the sample suffered
    rollouts.jsonl   one line a rollout, added when it is done: plan, predictor, seed, errors, seconds

None of it depends on the budget. A folder of another model, sampler or granularity is refused, and a damaged file is
named. A line that an interrupt cut short is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.drift.stale import PerturbationResult
from moeca_compile.planner.origin import Origin
from moeca_compile.planner.search.drift import Drift
from moeca_compile.planner.search.predict import PREDICTORS
from moeca_compile.planner.search.rows import Plan
from moeca_compile.schedule.decode import DecodeError, Entries, NoJson, parse, read_text, short

FORMAT, VERSION = "moeca-calibration", 2

Found = TypeVar("Found")

RETIRED = ("damped", "damped-bend", "fitted-line", "hermite")  # predictors of folders that version 0.1.0 wrote


@dataclass
class Store:
    """The folder, or memory only where `path` is None."""

    path: Path | None = None
    rollouts: dict[tuple[Plan, int], tuple[tuple[float, ...], float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of each uncached trajectory
    origins: dict[int, Origin] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        (self.path / "truth").mkdir(parents=True, exist_ok=True)
        self.seconds = _lines(self.path / "truth.jsonl", _seconds)
        for plan, seed, errors, seconds in _lines(self.path / "rollouts.jsonl", _rollout):
            self.rollouts[plan, seed] = errors, seconds
        self.origins = dict(_lines(self.path / "origins.jsonl", _origin))

    # -- which model ------------------------------------------------------------------------------------------------

    def check(self, facts: Mapping[str, Any]) -> None:
        """Note what was measured; raise if the folder is of something else.

        Raises:
            ScheduleError: says which facts differ.
        """
        if self.path is None:
            return
        file = self.path / "facts.json"
        wanted = {"format": FORMAT, "version": VERSION, **facts}
        if not file.exists():
            _write(file, json.dumps(wanted, indent=1))
            return
        with _sound(file, f"Delete the folder {str(self.path)!r}: all of it is measured again"):
            known = parse(read_text(file)).data
            if not {"format", "version"} <= known.keys():
                raise DecodeError("it doesn't say what the folder holds")
        other = [f"{k} is {known.get(k)!r} there, {v!r} here" for k, v in wanted.items() if known.get(k) != v]
        if other:
            raise ScheduleError(
                f"resume={str(self.path)!r} holds the calibration of something else: {'; '.join(other)}. "
                "Name another folder"
            )

    # -- uncached samples -------------------------------------------------------------------------------------------

    def truth(self, seed: int) -> torch.Tensor | None:
        file = None if self.path is None else self.path / "truth" / f"{seed}.npy"
        if file is None or not file.exists():
            return None
        with _sound(file), file.open("rb") as opened:
            found = np.load(opened, allow_pickle=False)
            if not isinstance(found, np.ndarray) or found.dtype.kind != "f" or not np.isfinite(found).all():
                raise DecodeError("it doesn't hold finite numbers")
            return torch.from_numpy(found)

    def keep_origin(self, seed: int, origin: Origin) -> None:
        self.origins[seed] = origin
        if self.path is not None:
            _add(self.path / "origins.jsonl", {"seed": seed, "inputs": origin})

    def keep_truth(self, seed: int, samples: torch.Tensor, seconds: float) -> None:
        self.seconds.append(seconds)
        if self.path is not None:
            _add(self.path / "truth.jsonl", {"seed": seed, "seconds": seconds})
            file = self.path / "truth" / f"{seed}.npy"
            np.save(file.with_suffix(".part.npy"), samples.numpy())
            file.with_suffix(".part.npy").replace(file)

    # -- drift ------------------------------------------------------------------------------------------------------

    def drift(
        self, wanted: Mapping[str, Any] | None = None, name: str = "drift"
    ) -> tuple[Drift, dict[str, Any]] | None:
        """The drift measured as `wanted` says (letters, seeds, at least the lookback; None: any), and what was noted.

        None: it wasn't measured yet, or otherwise.
        """
        file = None if self.path is None else self.path / f"{name}.npz"
        if file is None or not file.exists():
            return None
        with _sound(file), file.open("rb") as opened, np.load(opened, allow_pickle=False) as kept:
            noted = json.loads(str(kept["noted"]))
            known = noted["wanted"]
            if wanted is not None and ({**known, "lookback": 0} != {**wanted, "lookback": 0}):
                return None
            if wanted is not None and known["lookback"] < wanted["lookback"]:
                return None
            pairs = {(int(a), int(s)): n for n, (a, s) in enumerate(kept["pairs"])}
            atoms = tuple(tuple(atom) for atom in noted["atoms"])
            parts = kept["parts"]
            if parts.shape[:2] != (len(atoms), len(pairs)) or not np.isfinite(parts).all():
                raise DecodeError("its arrays don't fit each other, or hold numbers that aren't finite")
            return Drift(noted["steps"], pairs, atoms, parts), noted["extra"]

    def keep_drift(
        self, drift: Drift, wanted: Mapping[str, Any], extra: Mapping[str, Any], name: str = "drift"
    ) -> None:
        if self.path is None:
            return
        noted = {"wanted": wanted, "atoms": drift.atoms, "steps": drift.steps, "extra": extra}
        part = self.path / f"{name}.part.npz"
        np.savez(part, noted=json.dumps(noted), pairs=np.array(list(drift.pairs)), parts=drift.parts)
        part.replace(self.path / f"{name}.npz")

    # -- stale experts ----------------------------------------------------------------------------------------------

    def harms(self) -> list[PerturbationResult]:
        """What samples suffered from stale experts, in the order in which it was measured."""
        return [] if self.path is None else _lines(self.path / "experts.jsonl", _harm)

    def keep_harm(self, harm: PerturbationResult) -> None:
        if self.path is not None:
            _add(self.path / "experts.jsonl", asdict(harm))

    # -- rollouts ---------------------------------------------------------------------------------------------------

    def keep_rollout(self, plan: Plan, seed: int, errors: Sequence[float], seconds: float) -> None:
        self.rollouts[plan, seed] = tuple(errors), seconds
        if self.path is not None:
            line = {"plan": plan.letters, "predictor": plan.predictor, "seed": seed}
            line |= {"mse": list(errors), "seconds": seconds}
            _add(self.path / "rollouts.jsonl", line)


def _lines(file: Path, read: Callable[[Entries], Found | None]) -> list[Found]:
    """The lines of a record, read; one that an interrupt cut short, or that nothing needs any more, is left out."""
    found = []
    with _sound(file):
        for line in read_text(file).splitlines() if file.exists() else []:
            try:
                entries = parse(line)
            except NoJson:
                continue
            entry = read(entries)
            if entry is not None:
                found.append(entry)
    return found


def _seconds(line: Entries) -> float:
    return line.number("seconds")


def _rollout(line: Entries) -> tuple[Plan, int, tuple[float, ...], float] | None:
    errors = line.numbers("mse")
    if not errors or min(errors) < 0:
        raise DecodeError(f"mse is {short(errors)}, expected one number >= 0 a sample")
    plan = Plan(line.text("plan"), line.text("predictor"))
    if plan.predictor in RETIRED:
        return None
    if plan.predictor not in PREDICTORS:
        raise DecodeError(f"predictor is {short(plan.predictor)}, expected one of {', '.join(PREDICTORS)}")
    return plan, line.integer("seed"), errors, line.number("seconds")


def _origin(line: Entries) -> tuple[int, Origin]:
    inputs = line.get("inputs")
    if not isinstance(inputs, list):
        raise DecodeError(f"inputs is {short(inputs)}, expected lists of numbers")
    return line.integer("seed"), tuple(Entries({"inputs": one}).numbers("inputs") for one in inputs)


def _harm(line: Entries) -> PerturbationResult:
    whole = {name: line.integer(name) for name in ("layer", "expert", "seed")}
    return PerturbationResult(region=line.text("region"), **whole, psnr_db=line.number("psnr_db"))


@contextmanager
def _sound(file: Path, remedy: str = "Delete this file: what it held is measured again") -> Iterator[None]:
    """Turn whatever a damaged file makes of its reader into an error that names the file."""
    try:
        yield
    except ScheduleError:
        raise
    except Exception as error:  # numpy, zipfile, json and the readers above raise all kinds of them
        what = str(error) if isinstance(error, DecodeError) else f"{type(error).__name__}: {error}"
        raise ScheduleError(f"resume: {str(file)!r} is damaged: {what}. {remedy}") from error


def _add(file: Path, line: Mapping[str, Any]) -> None:
    with file.open("a") as log:
        log.write(json.dumps(line, allow_nan=False) + "\n")


def _write(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text + "\n")
    part.replace(file)
