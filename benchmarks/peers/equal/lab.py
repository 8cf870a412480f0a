"""What settings are chosen by: digits of other seeds than those that are told, and what was recorded of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.fitted import CONVERGED, UNCACHED
from benchmarks.paired import interval, psnr
from benchmarks.peers.equal import multistep
from benchmarks.peers.equal.multistep import Guided, integral
from benchmarks.peers.workload import SEED, Batch, with_null
from benchmarks.peers.workload import Size as WorkloadSize
from benchmarks.peers.workloads.trained_digits import TrainedDigits
from benchmarks.tasks import DIGITS, Task

FEW = 8  # digits that caches choose on: they have many settings, and run eagerly


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        steps: of the uncached run.
        finer: times the steps of the second-order run that counts as converged.
        counts: evaluations of the network at which contenders are compared.
        seeds, each: settings are chosen on so many seeds, counted from 0, and digits a seed.
        held_out, batch: seeds that are told, counted from `benchmarks.fitted`'s first, and digits a seed.
    """

    steps: int
    finer: int
    counts: tuple[int, ...]
    seeds: int
    each: int
    held_out: int
    batch: int


@dataclass(frozen=True)
class Setting:
    """One setting of a contender.

    Attributes:
        label: what is set, in words.
        draw: a whole trajectory.
        spent: full evaluations of the last trajectory, and its share of the uncached run's multiply-accumulates.
    """

    label: str
    draw: Callable[[Batch], Tensor]
    spent: Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Contender:
    """A family whose best setting is told at each number of evaluations.

    Attributes:
        name: of the family.
        kind: "sampler" leaves the network as it is, "cache" is inside it.
        target: the truth that settings are chosen by.
        note: what is tried, in words.
        settings: those that may compute at most so many full steps; chosen among by rollouts where there are several.
    """

    name: str
    kind: Literal["moeca", "sampler", "cache"]
    target: str
    note: str
    settings: Callable[[Lab, int], Sequence[Setting]]


@dataclass(frozen=True)
class OfTask(TrainedDigits):
    """The same network, trained for a task."""

    task: Task = DIGITS

    def shipped(self) -> Any:
        return self.task.load().requires_grad_(False)

    def batches(self, seed: int = SEED) -> list[Batch]:
        count, each = self.size.digits * self.size.rounds, self.size.digits
        labels = self.task.labels_of(0, count).split(each)
        return [Batch(*pair) for pair in zip(self.task.noise(seed, count).split(each), labels, strict=True)]

    def conditions(self, batch: Batch) -> tuple[Tensor, ...]:
        return (with_null(batch.labels, self.task.classes),)


def batch_of(task: Task, seed: int, samples: int) -> Batch:
    """What the samples of a seed begin with."""
    return Batch(task.noise(seed, samples), task.labels_of(seed, samples))


class Lab:
    """The model, the digits that settings are chosen on, and every quality that was found on them."""

    def __init__(self, size: Size, computed: Mapping[int, Sequence[int]], work: Path, task: Task = DIGITS) -> None:
        """Nothing is sampled yet.

        Args:
            size: how much is measured.
            computed: by number of evaluations, the steps that our schedule computes, for peers that can take them.
            work: where recorded trajectories are kept.
            task: the model.
        """
        self.size, self.computed = size, computed
        self.file = work / f"recorded_{size.seeds}_{size.each}_{size.steps}_{size.finer}.pt"
        self.work = OfTask(WorkloadSize(size.batch, 1, size.steps), task)
        self.journal = work / "qualities.json"
        self.qualities: dict[str, list[float]] = json.loads(self.journal.read_text()) if self.journal.exists() else {}
        noise = torch.cat([task.noise(seed, size.each) for seed in range(size.seeds)])
        self.batch = Batch(noise, torch.cat([task.labels_of(seed, size.each) for seed in range(size.seeds)]))
        self.few = Batch(self.batch.noise[:FEW], self.batch.labels[:FEW])

    @cached_property
    def model(self) -> Any:
        """Compiled; for samplers."""
        return torch.compile(self.work.prepared())

    def guided(self, batch: Batch) -> Guided:
        (both,) = self.work.conditions(batch)

        def guided(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            times = torch.full((2 * len(x),), 1000.0 * t)
            cond, uncond = self.model(torch.cat([x, x]), times, both).chunk(2)
            return uncond + self.work.guidance * (cond - uncond), cond - uncond

        return guided

    @cached_property
    def recorded(self) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
        """By truth: states before each step and after the last, and outputs at each."""
        if not self.file.exists():
            guided, steps = self.guided(self.batch), self.size.steps
            uncached = record(guided, self.batch.noise, steps, 0)
            converged = record(guided, self.batch.noise, self.size.finer * steps, 1)
            torch.save({UNCACHED: uncached, CONVERGED: converged}, self.file)
        runs: dict[str, tuple[list[Tensor], list[Tensor]]] = torch.load(self.file)
        return runs

    @cached_property
    def grams(self) -> dict[str, np.ndarray]:
        """By truth: inner products of the outputs."""
        flat = {truth: torch.stack([output.flatten() for output in run[1]]) for truth, run in self.recorded.items()}
        return {truth: (outputs.double() @ outputs.double().T).numpy() for truth, outputs in flat.items()}

    def choose(self, contender: Contender, count: int, known: Sequence[Any] = ("", 0)) -> tuple[Setting, int]:
        """The best setting of at most `count` evaluations, and among how many.

        Args:
            contender: a family.
            count: evaluations.
            known: the label of the setting that was chosen before, and among how many; an unknown label: none was.

        Raises:
            ValueError: no setting is as cheap as that.
        """
        settings = contender.settings(self, count)
        if len(settings) == 1:
            return settings[0], 1
        for setting in settings:
            if setting.label == known[0]:
                return setting, known[1]
        levels = {setting.label: self._quality(contender, setting) for setting in settings}
        cheap = [setting for setting in settings if levels[setting.label][1] <= count]
        if not cheap:
            raise ValueError(f"{contender.name}: no setting of {len(settings)} computes {count} steps or fewer")
        return max(cheap, key=lambda setting: levels[setting.label][0]), len(settings)

    def _quality(self, contender: Contender, setting: Setting) -> list[float]:
        """PSNR to the contender's truth, and evaluations; found once."""
        key = f"{contender.name}; {setting.label}"
        if key not in self.qualities:
            batch = self.few if contender.kind == "cache" else self.batch
            truth = self.recorded[contender.target][0][-1][: len(batch.noise)]
            level, _ = interval(psnr(setting.draw(batch), truth))
            self.qualities[key] = [level, setting.spent()[0]]
            self.journal.write_text(json.dumps(self.qualities, indent=1))
        return self.qualities[key]


def record(guided: Guided, x: Tensor, steps: int, order: int) -> tuple[list[Tensor], list[Tensor]]:
    """States before each step and after the last, and outputs, of a run that computes every step."""
    rule = multistep.polynomial(range(steps), steps, order, integral)
    states, outputs = [], []

    def recording(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        output, difference = guided(x, t)
        states.append(x)
        outputs.append(output)
        return output, difference

    last = rule.sample(recording, x)
    return [*states, last], outputs
