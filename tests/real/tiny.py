"""How a tiny random model of diffusers is built and called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """One real model.

    Attributes:
        build: a tiny random one, in eval mode, its parameters without gradients.
        inputs: the keyword arguments of a step, as the pipeline passes them; neighbouring steps are alike.
        timestep, latent: the names of those inputs.
        regions: what must be found, in order; `x2`: with two outputs, for two streams.
        attention: the kind of each attention in the graph, in order; `fixed`: its keys depend on the prompt alone.
        misses: a piece of the reason of each miss.
        in_parts: why it can't be one graph; '' for the others.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Arguments]
    timestep: str
    latent: str
    regions: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    in_parts: str = ""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moving(step: int, *shape: int) -> Tensor:
    """A latent that a sampler moves a little each step."""
    return normal(*shape) + 0.1 * step * normal(*shape, seed=1) + 0.01 * step**2 * normal(*shape, seed=2)


def time(step: int, batch: int = 2, scale: float = 1.0) -> Tensor:
    return torch.full((batch,), (900.0 - 40 * step) * scale)


def tiny(cls: Any, **config: Any) -> nn.Module:
    """Random weights everywhere: gates and output layers that start at zero would hide their whole block."""
    torch.manual_seed(0)
    model: nn.Module = cls(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:  # packed experts and tables
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)
