"""The two small trained models that quality is told on, and one sampler for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples import digits, glyphs

GUIDANCE = 2.0


@dataclass(frozen=True)
class Task:
    """A trained rectified flow with labels.

    Attributes:
        name: in files and at the command line.
        classes: labels from 0; the label `classes` is the null label of guidance.
        load: the trained model, float32, on the CPU.
        noise: (seed, n) -> the first latents (n,1,H,W).
        regions: folder and beginning of the names of committed schedules of regions; None: they are calibrated too.
    """

    name: str
    classes: int
    load: Callable[[], nn.Module]
    noise: Callable[[int, int], Tensor]
    regions: str | None

    def results_of(self, benchmark: str) -> str:
        """The name of a benchmark's results: the digits' have the benchmark's own."""
        return benchmark if self is DIGITS else f"{benchmark}_{self.name}"

    def labels_of(self, seed: int, n: int) -> Tensor:
        """All labels in turn, going on from the seed before; (n,) int64."""
        return (torch.arange(n) + seed * n) % self.classes

    def sampler(
        self, n: int, steps: int, second_order: bool = False, guidance: float = GUIDANCE,
        timesteps: Sequence[float] = (),
    ) -> Callable[[Any, int], Tensor]:  # fmt: skip
        """The loop: Euler steps, or second-order Adams-Bashforth ones (the usual multistep solver of a flow).

        Args:
            n: samples.
            steps: of equal length.
            second_order: the solver.
            guidance: the scale of classifier-free guidance, both halves in one batch.
            timesteps: that Euler's steps begin at, as the model receives them; empty: steps of equal length.

        Returns:
            (model, seed) -> (n,1,H,W).
        """

        times = list(timesteps) or [1000.0 * (1 - step / steps) for step in range(steps)]

        def sample(model: Any, seed: int) -> Tensor:
            x, labels = self.noise(seed, n), self.labels_of(seed, n)
            both = torch.cat([labels, torch.full_like(labels, self.classes)])
            before = None
            for step, time in enumerate(times):
                t = torch.full((2 * n,), time)
                cond, uncond = model(torch.cat([x, x]), t, both).chunk(2)
                v = uncond + guidance * (cond - uncond)
                move = v if before is None or not second_order else 1.5 * v - 0.5 * before
                x = x - move * (time - (*times, 0.0)[step + 1]) / 1000 if timesteps else x - move / steps
                before = v
            return x

        return sample

    def committed(self, share: int) -> Path | None:
        """The file of the committed schedule of regions that computes `share` percent of the steps."""
        return None if self.regions is None else Path(f"{self.regions}_{share}.json")


DIGITS = Task("digits", digits.CLASSES, digits.load_model, digits.initial_noise, "examples/schedules/digits")
GLYPHS = Task("glyphs", glyphs.CLASSES, glyphs.load_model, glyphs.initial_noise, None)
TASKS = {task.name: task for task in (DIGITS, GLYPHS)}
