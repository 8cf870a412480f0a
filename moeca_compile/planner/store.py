"""The results of a calibration in a folder: an interrupted one resumes, and another budget reuses the measurements.

    facts.json       which model and sampler: graph, steps, timesteps, granularity
    origins.jsonl    for each seed, a sketch of the inputs of the sampler's first call of the model
    truth/<seed>.npy the uncached samples; truth.jsonl: the seconds that each took
    wanted_<truth>/<seed>.npz    of granularity output: what the weights of a seed are fitted to;
                     converged/<seed>.npz: what the sampler of a held-out seed converges to
    given/<seed>.npz the samples that rollouts are compared with, where the caller gave them
    drift.npz        the measured pairs; split.npz: those of groups of regions
    experts.jsonl    one line per perturbed expert: the PSNR of the samples
    rollouts.jsonl   one line per rollout, added when it is done: plan, predictor, seed, errors, seconds
    fitted.jsonl     the same of fitted weights: the predictor ends with a mark of these

None of these depends on the budget. A folder of another model, sampler or granularity raises an error, and so does a
damaged file. A line that an interrupt truncated is ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.drift.stale import PerturbationResult
from moeca_compile.planner.origin import Origin, is_same
from moeca_compile.planner.search.drift import Drift
from moeca_compile.planner.search.predict import PREDICTORS
from moeca_compile.planner.search.rows import Plan
from moeca_compile.schedule.decode import DecodeError, Entries, NoJson, parse, read_text, short

FORMAT, VERSION = "moeca-calibration", 2
FACTS = "facts.json"

Line = TypeVar("Line")
Array = np.ndarray[Any, Any]

ROLLOUTS, FITTED_ROLLOUTS = "rollouts.jsonl", "fitted.jsonl"  # version 0.1.0 refuses a folder with other predictors
FITTED = "fitted weights"
_MARK = re.compile(f", {FITTED} [0-9a-f]{{8}}$")  # behind a predictor: which weights a schedule has
RETIRED = ("damped", "damped-bend", "fitted-line", "hermite")  # predictors of folders that version 0.1.0 wrote


@dataclass
class Store:
    """The results of one model under one granularity.

    Attributes:
        path: the folder; None: keep rollouts in memory only.
        rollouts: for each plan and seed, the mean squared error of each sample and the seconds.
        to_uncached: the same errors against the uncached samples, where the rollouts are compared with given ones.
        seconds: of each uncached trajectory.
        origins: of each seed.
    """

    path: Path | None = None
    rollouts: dict[tuple[Plan, int], tuple[tuple[float, ...], float]] = field(default_factory=dict)
    to_uncached: dict[tuple[Plan, int], tuple[float, ...]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    origins: dict[int, Origin] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        (self.path / "truth").mkdir(parents=True, exist_ok=True)
        self.seconds = _lines(self.path / "truth.jsonl", _seconds)
        done = (line for name in (ROLLOUTS, FITTED_ROLLOUTS) for line in _lines(self.path / name, _rollout))
        for plan, seed, errors, seconds, to_uncached in done:
            self.rollouts[plan, seed], self.to_uncached[plan, seed] = (errors, seconds), to_uncached
        self.origins = dict(_lines(self.path / "origins.jsonl", _origin))

    # -- which model ------------------------------------------------------------------------------------------------

    def check(self, facts: Mapping[str, Any]) -> None:
        """Compare the facts with those of the folder; a new folder records them.

        Raises:
            ScheduleError: facts differ. The message says which.
        """
        if self.path is None:
            return
        file = self.path / FACTS
        expected = {"format": FORMAT, "version": VERSION, **facts}
        if not file.exists():
            _write(file, json.dumps(expected, indent=1))
            return
        stored = self.facts()
        differing = [key for key, value in expected.items() if stored.get(key) != value]
        if differing:
            differences = "; ".join(f"{key} is {stored.get(key)!r} there, {expected[key]!r} here" for key in differing)
            raise ScheduleError(
                f"resume={str(self.path)!r} holds the calibration of something else: {differences}. Name another folder"
            )

    def facts(self) -> Mapping[str, Any]:
        """The facts of the folder.

        Raises:
            ScheduleError: they are damaged.
        """
        assert self.path is not None
        file = self.path / FACTS
        with _naming_damage(file, f"Delete the folder {str(self.path)!r}: all of it is measured again"):
            stored = parse(read_text(file)).data
            if not {"format", "version"} <= stored.keys():
                raise DecodeError("it doesn't say what the folder holds")
        return stored

    # -- uncached samples -------------------------------------------------------------------------------------------

    def truth(self, seed: int) -> torch.Tensor | None:
        """The uncached samples of a seed; None: not stored.

        Raises:
            ScheduleError: the file is damaged.
        """
        file = None if self.path is None else self.path / "truth" / f"{seed}.npy"
        if file is None or not file.exists():
            return None
        with _naming_damage(file), file.open("rb") as opened:
            samples = np.load(opened, allow_pickle=False)
            if not isinstance(samples, np.ndarray) or samples.dtype.kind != "f" or not np.isfinite(samples).all():
                raise DecodeError("it doesn't hold finite numbers")
            return torch.from_numpy(samples)

    def add_origin(self, seed: int, origin: Origin) -> None:
        """Store the origin of a seed."""
        self.origins[seed] = origin
        if self.path is not None:
            _add(self.path / "origins.jsonl", {"seed": seed, "inputs": origin})

    def check_origin(self, seed: int, origin: Origin) -> None:
        """Compare the inputs of a stored sample with those of the sampler now; record them for a new seed.

        Raises:
            ScheduleError: they are others, or aren't known.
        """
        stored = self.origins.get(seed)
        if stored is None and self.truth(seed) is None:
            self.add_origin(seed, origin)
        elif stored is None or not is_same(stored, origin):
            assert self.path is not None
            folder = f"resume={str(self.path.parent)!r}"
            problem = (
                f"{folder} doesn't say which inputs seed {seed} was sampled from"
                if stored is None
                else f"{folder} holds a sample of seed {seed} from other inputs: another prompt, label, latent "
                "or first timestep"
            )
            raise ScheduleError(f"{problem}. Name another folder, or delete this one")

    def add_truth(self, seed: int, samples: torch.Tensor, seconds: float) -> None:
        """Store the uncached samples of a seed and the seconds that they took."""
        self.seconds.append(seconds)
        if self.path is not None:
            _add(self.path / "truth.jsonl", {"seed": seed, "seconds": seconds})
            file = self.path / "truth" / f"{seed}.npy"
            np.save(file.with_suffix(".part.npy"), samples.numpy())
            file.with_suffix(".part.npy").replace(file)

    def seeds(self) -> list[int]:
        """Those whose uncached samples are stored."""
        return sorted(seed for _, seed in self._by_seed("truth/*.npy"))

    # -- what the output's weights are fitted to ----------------------------------------------------------------------

    def arrays(self, kind: str, seed: int, decode: Callable[[Mapping[str, Array]], Line]) -> Line | None:
        """What the stored arrays of a seed stand for; None: not stored.

        Raises:
            ScheduleError: the file is damaged.
        """
        file = None if self.path is None else self.path / kind / f"{seed}.npz"
        if file is None or not file.exists():
            return None
        with _naming_damage(file), file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            arrays = dict(stored)
            if not all(np.isfinite(array).all() for array in arrays.values() if array.dtype.kind == "f"):
                raise DecodeError("it holds numbers that aren't finite")
            return decode(arrays)

    def kept_arrays(self) -> list[tuple[str, int]]:
        """The kind and the seed of all stored arrays."""
        return sorted(self._by_seed("*/*.npz"))

    def _by_seed(self, pattern: str) -> list[tuple[str, int]]:
        """The folder and the seed of files that are named after seeds; what an interrupt left half-written is not."""
        files = [] if self.path is None else self.path.glob(pattern)
        return [(file.parent.name, int(file.stem)) for file in files if file.stem.removeprefix("-").isdecimal()]

    def add_arrays(self, kind: str, seed: int, arrays: Mapping[str, Array]) -> None:
        """Store arrays of a seed."""
        if self.path is not None:
            (self.path / kind).mkdir(exist_ok=True)
            part = self.path / kind / f"{seed}.part.npz"
            np.savez(part, **arrays)  # type: ignore[arg-type]  # its keyword allow_pickle is none of ours
            part.replace(self.path / kind / f"{seed}.npz")

    # -- drift ------------------------------------------------------------------------------------------------------

    def drift(
        self, settings: Mapping[str, Any] | None = None, name: str = "drift"
    ) -> tuple[Drift, dict[str, Any]] | None:
        """The stored drift.

        Args:
            settings: that it must have been measured with: letters, seeds, and at least the lookback. None: any.
            name: of the file.

        Returns:
            The drift and the `extra` of `add_drift`; None: it is not stored, or has other settings.

        Raises:
            ScheduleError: the file is damaged.
        """
        file = None if self.path is None else self.path / f"{name}.npz"
        if file is None or not file.exists():
            return None
        with _naming_damage(file), file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            header = json.loads(str(arrays["noted"]))
            stored = header["wanted"]
            if settings is not None and ({**stored, "lookback": 0} != {**settings, "lookback": 0}):
                return None
            if settings is not None and stored["lookback"] < settings["lookback"]:
                return None
            pairs = {(int(a), int(s)): number for number, (a, s) in enumerate(arrays["pairs"])}
            atoms = tuple(tuple(atom) for atom in header["atoms"])
            parts = arrays["parts"]
            if parts.shape[:2] != (len(atoms), len(pairs)) or not np.isfinite(parts).all():
                raise DecodeError("its arrays don't fit each other, or hold numbers that aren't finite")
            return Drift(header["steps"], pairs, atoms, parts), header["extra"]

    def add_drift(
        self, drift: Drift, settings: Mapping[str, Any], extra: Mapping[str, Any], name: str = "drift"
    ) -> None:
        """Store a drift with the settings that it was measured with, and `extra` as JSON."""
        if self.path is None:
            return
        header = {"wanted": settings, "atoms": drift.atoms, "steps": drift.steps, "extra": extra}
        part = self.path / f"{name}.part.npz"
        np.savez(part, noted=json.dumps(header), pairs=np.array(list(drift.pairs)), parts=drift.parts)
        part.replace(self.path / f"{name}.npz")

    # -- perturbed experts ------------------------------------------------------------------------------------------

    def perturbations(self) -> list[PerturbationResult]:
        """The results of perturbed experts, in the order in which they were measured."""
        return [] if self.path is None else _lines(self.path / "experts.jsonl", _perturbation)

    def add_perturbation(self, result: PerturbationResult) -> None:
        """Store one result."""
        if self.path is not None:
            _add(self.path / "experts.jsonl", asdict(result))

    # -- rollouts ---------------------------------------------------------------------------------------------------

    def add_rollout(
        self, plan: Plan, seed: int, errors: Sequence[float], seconds: float, to_uncached: Sequence[float] = ()
    ) -> None:
        """Store the mean squared error of each sample, the seconds that they took, and the errors against the uncached
        samples if `errors` are others."""
        to_uncached = to_uncached or errors
        self.rollouts[plan, seed], self.to_uncached[plan, seed] = (tuple(errors), seconds), tuple(to_uncached)
        if self.path is not None:
            line = {"plan": plan.letters, "predictor": plan.predictor, "seed": seed}
            line |= {"mse": list(errors), "seconds": seconds}
            line |= {} if list(to_uncached) == list(errors) else {"mse_uncached": list(to_uncached)}
            _add(self.path / (FITTED_ROLLOUTS if _MARK.search(plan.predictor) else ROLLOUTS), line)


def without_mark(predictor: str) -> str:
    """The name of a plan's predictor, without the mark that tells its fitted weights from others."""
    return _MARK.sub(f", {FITTED}", predictor)


def is_close(stored: torch.Tensor, samples: torch.Tensor) -> bool:
    """Whether samples are equal up to the rounding of another machine."""
    tolerance = 1e-3 * float(stored.abs().max())
    return stored.shape == samples.shape and torch.allclose(stored, samples, rtol=1e-3, atol=tolerance)


def _lines(file: Path, decode: Callable[[Entries], Line | None]) -> list[Line]:
    """The decoded lines of a file. Truncated lines, and those that decode to None, are left out."""
    lines = []
    with _naming_damage(file):
        for text in read_text(file).splitlines() if file.exists() else []:
            try:
                entries = parse(text)
            except NoJson:
                continue
            line = decode(entries)
            if line is not None:
                lines.append(line)
    return lines


def _seconds(line: Entries) -> float:
    return line.number("seconds")


def _rollout(line: Entries) -> tuple[Plan, int, tuple[float, ...], float, tuple[float, ...]] | None:
    errors = line.numbers("mse")
    to_uncached = line.numbers("mse_uncached", list(errors))
    if not errors or min(errors) < 0 or len(to_uncached) != len(errors) or min(to_uncached) < 0:
        raise DecodeError(f"mse is {short(errors)}, expected one number >= 0 a sample")
    plan = Plan(line.text("plan"), line.text("predictor"))
    if plan.predictor in RETIRED:
        return None
    if _MARK.sub("", plan.predictor) not in PREDICTORS:
        raise DecodeError(f"predictor is {short(plan.predictor)}, expected one of {', '.join(PREDICTORS)}")
    return plan, line.integer("seed"), errors, line.number("seconds"), to_uncached


def _origin(line: Entries) -> tuple[int, Origin]:
    inputs = line.get("inputs")
    if not isinstance(inputs, list):
        raise DecodeError(f"inputs is {short(inputs)}, expected lists of numbers")
    return line.integer("seed"), tuple(Entries({"inputs": sketch}).numbers("inputs") for sketch in inputs)


def _perturbation(line: Entries) -> PerturbationResult:
    numbers = {name: line.integer(name) for name in ("layer", "expert", "seed")}
    return PerturbationResult(region=line.text("region"), **numbers, psnr_db=line.number("psnr_db"))


@contextmanager
def _naming_damage(file: Path, remedy: str = "Delete this file: what it held is measured again") -> Iterator[None]:
    """Convert every exception of a reader into an error that names the damaged file."""
    try:
        yield
    except ScheduleError:
        raise
    except Exception as error:  # numpy, zipfile, json and the decoders above raise many kinds
        reason = str(error) if isinstance(error, DecodeError) else f"{type(error).__name__}: {error}"
        raise ScheduleError(f"resume: {str(file)!r} is damaged: {reason}. {remedy}") from error


def _add(file: Path, line: Mapping[str, Any]) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(line, allow_nan=False) + "\n")


def _write(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text + "\n")
    part.replace(file)
