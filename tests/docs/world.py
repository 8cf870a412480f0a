"""What code blocks find: a tiny model, its inputs, a sampler and a pipeline, under the names that the pages use."""

from __future__ import annotations

import logging
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_compile as moeca
from tests.models import DiT
from tests.packages.conftest import interpret

STEPS = 8


class Pipeline:
    """Stands for one of diffusers: `transformer`, and a call that samples."""

    def __init__(self) -> None:
        self.transformer = model()

    @classmethod
    def from_pretrained(cls, name: str, **keywords: Any) -> Pipeline:
        return cls()

    def __call__(
        self, prompt: str = "", num_inference_steps: int = STEPS, guidance_scale: float = 1.0, generator: Any = None
    ) -> Any:
        seed = 0 if generator is None else generator.initial_seed()
        images = sample(self.transformer, seed, num_inference_steps)
        return types.SimpleNamespace(images=list(images))

    def to(self, *where: Any) -> Pipeline:
        return self


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    made = DiT(depth=1, dim=8, heads=2, num_experts=4, top_k=2, hidden=8, size=4, channels=2)
    return made.eval().requires_grad_(False)


def sample(model: Any, seed: int = 0, steps: int = STEPS) -> Tensor:
    """The images of one seed [3, 2, 4, 4]."""
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        x = x - model(x, torch.full((3,), 1000.0 * (1 - step / steps)), torch.tensor([1, 2, 3])) / steps
    return x


def namespace(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names for the blocks of one page. Whatever a block asks for, variants run without a compiler."""
    made = moeca.Options.__init__

    def without_compiler(self: Any, **given: Any) -> None:
        made(self, **{**given, "inner": "eager", "inner_options": {}, "mode": None})

    monkeypatch.setattr(moeca.Options, "__init__", without_compiler)
    interpret(monkeypatch)
    log = logging.getLogger("moeca_compile")
    monkeypatch.setattr(log, "setLevel", lambda level: None)  # it would hold for every later test
    diffusers: Any = types.ModuleType("diffusers")
    diffusers.DiffusionPipeline = Pipeline
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    x, t, y = torch.randn(3, 2, 4, 4), torch.full((3,), 1000.0), torch.tensor([1, 2, 3])
    return {
        "__name__": "page", "torch": torch, "moeca": moeca, "model": model(), "pipe": Pipeline(), "sample": sample,
        "inputs": (x, t, y), "x": x, "t": t, "y": y, "labels": y, "steps": STEPS,
        "timesteps": [torch.full((3,), 1000.0 * (1 - step / STEPS)) for step in range(STEPS)],
    }  # fmt: skip
