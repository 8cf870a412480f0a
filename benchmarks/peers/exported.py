"""moeca's schedules as bundles on onnxruntime: the loop is numpy's, the process needs no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import moeca_compile as moeca
from benchmarks.peers import ours
from benchmarks.peers.way import Family
from benchmarks.peers.workload import Batch, Workload
from benchmarks.peers.workloads.trained_digits import QUICK, TrainedDigits
from examples import digits
from moeca_compile.runtime import Session
from moeca_compile.runtime.samplers import euler, guided, model_of


class Exported:
    """A bundle, exported now, in a folder that goes when this does."""

    def __init__(self, schedule: object, work: Workload) -> None:
        self.work, self.folder = work, tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "digits.moeca"
        small = TrainedDigits(QUICK)
        moeca.export(small.shipped(), small.inputs_of(small.batches()[0]), schedule, path, progress=False)
        self.session = Session.open(path, threads=torch.get_num_threads())
        self.spent, self.state = 1.0, 0

    def sample(self, batch: Batch) -> Tensor:
        labels, times = batch.labels.numpy(), np.linspace(1, 0, self.work.size.steps + 1)
        with self.session.trajectory(steps=self.work.size.steps) as trajectory:
            model = guided(model_of(trajectory), np.full_like(labels, digits.CLASSES), self.work.guidance)
            images = euler(model, batch.noise.numpy(), labels, times, time_scale=1000.0)
            stats = trajectory.stats()
        self.spent, self.state = stats.mac_fraction, stats.state_bytes
        return torch.from_numpy(images)

    def macs(self) -> float:
        return self.spent

    def state_bytes(self) -> int:
        return self.state

    def forget(self) -> None:
        """A trajectory's state goes with it."""


def family(budgets: tuple[str, ...] = ("34", "20")) -> Family:
    def opened(work: Workload) -> Mapping[str, Exported]:
        schedules = {"everything computed": "full", **{f"{one} %": ours.load(one) for one in budgets}}
        return {name: Exported(schedule, work) for name, schedule in schedules.items()}

    return Family("moeca calibrated, on onnxruntime", "moeca", "moeca.export and a Session; docs/deploy.md", opened)
