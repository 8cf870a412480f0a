"""moeca's schedules as bundles on onnxruntime."""

from __future__ import annotations

import inspect
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import moeca_compile as moeca
from benchmarks.peers import ours
from benchmarks.peers.way import Family
from benchmarks.peers.workload import Batch, Workload
from moeca_compile.runtime import Session
from moeca_compile.runtime.trajectory import Trajectory


class Exported:
    """A bundle, exported now, in a folder that goes when this does."""

    def __init__(self, schedule: object, work: Workload, order: int) -> None:
        self.work, folder = work, tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        path = Path(folder) / "model.moeca"
        model, inputs = work.shipped(), work.inputs_of(work.batches()[0])
        self.names = list(inspect.signature(model.forward).parameters)[: len(inputs)]
        moeca.export(model, inputs, schedule, path, order=order, dynamic_batch=not work.fixed_batch, progress=False)
        self.session = Session.open(path, threads=torch.get_num_threads())
        self.spent, self.state = 1.0, 0

    def sample(self, batch: Batch) -> Tensor:
        with self.session.trajectory(steps=self.work.size.steps) as trajectory:
            images = self.work.draw(lambda *inputs: self._call(trajectory, inputs), batch)
            stats = trajectory.stats()
        self.spent, self.state = stats.mac_fraction, stats.state_bytes
        return images

    def _call(self, trajectory: Trajectory, inputs: tuple[Tensor, ...]) -> Tensor:
        """The solver's tensors are the session's arrays: nothing is copied."""
        given = {name: one.numpy() for name, one in zip(self.names, inputs, strict=True)}
        return torch.from_numpy(trajectory.run(given)[self.session.outputs[0].name])

    def macs(self) -> float:
        return self.spent

    def state_bytes(self) -> int:
        return self.state

    def forget(self) -> None:
        """A trajectory's state goes with it."""


def calibrated(budgets: tuple[str, ...] = ("34", "20")) -> Family:
    return _family("calibrated", {f"{one} %": ours.load(one) for one in budgets})


def uniform(intervals: tuple[int, ...]) -> Family:
    return _family("uniform, order 1", {f"N={one}": f"uniform:{one}:warmup=2" for one in intervals})


def _family(name: str, schedules: Mapping[str, object]) -> Family:
    def opened(work: Workload) -> Mapping[str, Exported]:
        return {
            name: Exported(one, work, order=1) for name, one in {"everything computed": "full", **schedules}.items()
        }

    note = "moeca.export and a Session; docs/deploy.md"
    return Family(f"moeca {name}, on onnxruntime", "moeca", note, opened)
