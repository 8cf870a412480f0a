"""What a calibration has found so far, in a folder, so that an interrupted one goes on and the next budget is cheaper.

    facts.json       which model and sampler: graph, steps, timesteps, granularity
    truth/<seed>.npy the uncached samples; truth.jsonl: the seconds that each took
    drift.npz        the measured pairs; split.npz: those of groups of regions
    experts.jsonl    one line an expert that was made stale: what the sample suffered
    rollouts.jsonl   one line a rollout, added when it is done: plan, predictor, seed, errors, seconds

None of it depends on the budget. A folder of another model, sampler or granularity is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeca_compile.errors import ScheduleError
from moeca_compile.plan.drift import Drift
from moeca_compile.plan.rows import Plan
from moeca_compile.study.stale import Harm

FORMAT, VERSION = "moeca-calibration", 1


@dataclass
class Store:
    """The folder, or memory only where `path` is None."""

    path: Path | None = None
    rollouts: dict[tuple[Plan, int], tuple[tuple[float, ...], float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of each uncached trajectory

    def __post_init__(self) -> None:
        if self.path is None:
            return
        (self.path / "truth").mkdir(parents=True, exist_ok=True)
        self.seconds = [line["seconds"] for line in _lines(self.path / "truth.jsonl")]
        for line in _lines(self.path / "rollouts.jsonl"):
            plan = Plan(line["plan"], line["predictor"])
            self.rollouts[plan, line["seed"]] = tuple(line["mse"]), line["seconds"]

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
        known = json.loads(file.read_text())
        other = [f"{k} is {known.get(k)!r} there, {v!r} here" for k, v in wanted.items() if known.get(k) != v]
        if other:
            raise ScheduleError(
                f"resume={str(self.path)!r} holds the calibration of something else: {'; '.join(other)}. "
                "Name another folder"
            )

    # -- uncached samples -------------------------------------------------------------------------------------------

    def truth(self, seed: int) -> torch.Tensor | None:
        file = None if self.path is None else self.path / "truth" / f"{seed}.npy"
        return torch.from_numpy(np.load(file)) if file is not None and file.exists() else None

    def keep_truth(self, seed: int, samples: torch.Tensor, seconds: float) -> None:
        self.seconds.append(seconds)
        if self.path is not None:
            with (self.path / "truth.jsonl").open("a") as log:
                log.write(json.dumps({"seed": seed, "seconds": seconds}) + "\n")
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
        with np.load(file, allow_pickle=False) as kept:
            noted = json.loads(str(kept["noted"]))
            known = noted["wanted"]
            if wanted is not None and ({**known, "lookback": 0} != {**wanted, "lookback": 0}):
                return None
            if wanted is not None and known["lookback"] < wanted["lookback"]:
                return None
            pairs = {(int(a), int(s)): n for n, (a, s) in enumerate(kept["pairs"])}
            atoms = tuple(tuple(atom) for atom in noted["atoms"])
            return Drift(noted["steps"], pairs, atoms, kept["parts"]), noted["extra"]

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

    def harms(self) -> list[Harm]:
        """What samples suffered from stale experts, in the order in which it was measured."""
        return [] if self.path is None else [Harm(**line) for line in _lines(self.path / "experts.jsonl")]

    def keep_harm(self, harm: Harm) -> None:
        if self.path is not None:
            with (self.path / "experts.jsonl").open("a") as file:
                file.write(json.dumps(asdict(harm)) + "\n")

    # -- rollouts ---------------------------------------------------------------------------------------------------

    def keep_rollout(self, plan: Plan, seed: int, errors: Sequence[float], seconds: float) -> None:
        self.rollouts[plan, seed] = tuple(errors), seconds
        if self.path is not None:
            line = {"plan": plan.letters, "predictor": plan.predictor, "seed": seed}
            line |= {"mse": list(errors), "seconds": seconds}
            with (self.path / "rollouts.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


def _lines(file: Path) -> list[dict[str, Any]]:
    """The readable lines: the last one may be cut short by an interrupt."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _write(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text + "\n")
    part.replace(file)
