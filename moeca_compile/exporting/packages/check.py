"""Nothing is believed before it ran: a written package against the golden steps of eager torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from moeca_compile.dtypes import name_of
from moeca_compile.engine.packages.model import LoadedModel
from moeca_compile.engine.step import run_step
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.engine.trajectory_state import TrajectoryState
from moeca_compile.errors import LoweringError
from moeca_compile.exporting.golden import TOLERANCE, WRONG, Step
from moeca_compile.exporting.request import Captured
from moeca_compile.runtime.bundle.verify import relative_error
from moeca_compile.runtime.packages.package import Package


def error_of(folder: Path, golden: Sequence[Sequence[Step]], captures: Sequence[Captured]) -> float:
    """The largest error of a package in the golden steps, relative to the largest value of a result.

    Args:
        folder: of the package.
        golden: for each size, inputs and outputs of the first steps of a trajectory.
        captures: one for each size.

    Raises:
        LoweringError: it gives something else than torch.
    """
    model = LoadedModel(Package.open(folder))
    worst = 0.0
    for program, steps, captured in zip(model.programs, golden, captures, strict=True):
        trajectory = Trajectory([], stream="golden")
        running = TrajectoryState(trajectory)
        given = [i for i, source in enumerate(captured.inputs) if source.name in captured.places]
        for number, (inputs, expected) in enumerate(steps):
            args = list(captured.args)
            for position, tensor in zip(given, inputs, strict=True):
                args[position] = tensor
            outputs = run_step(program.compiled_schedule, running, args, trajectory)
            results = [output for output in outputs if isinstance(output, torch.Tensor)]
            for value, reference in zip(results, expected, strict=True):
                error = relative_error(value.double().numpy(), reference.double().numpy())
                if not error <= WRONG * TOLERANCE.get(name_of(reference.dtype), 1.0):
                    raise LoweringError(
                        f"step {number} of the native code differs from torch by {error:.1e} of the largest value: the "
                        "package is wrong, and wasn't kept. Please report it"
                    )
                worst = max(worst, error)
    return worst
