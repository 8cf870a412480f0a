"""Running a module's own code on small random tensors without leaving a trace in it."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# What two evaluations of the same sum may differ by, relative to the largest value.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@contextmanager
def isolated() -> Iterator[None]:
    """No gradients, no autocast, a fixed seed, and the random state put back after."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with (
        torch.random.fork_rng(devices),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        seed()
        yield


def seed() -> None:
    """Unlike `torch.manual_seed`, this leaves no seed behind for a CUDA that isn't initialised yet."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


def shadow(module: nn.Module, parameters: dict[int, Tensor] | None = None) -> nn.Module:
    """A deep copy in eval mode that shares the parameters, or has those given by `id` in their place.

    Raises:
        Exception: whatever an attribute that can't be deep-copied raises.
    """
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    memo.update(parameters or {})
    return copy.deepcopy(module, memo).eval()


def random_parameters(module: nn.Module, device: torch.device, skip: Collection[int] = ()) -> dict[int, Tensor]:
    """float32 stand-ins by `id`: weights of unit gain, vectors around one. Freshly built models may be all zero."""
    generator = torch.Generator(device).manual_seed(1)
    made: dict[int, Tensor] = {}
    for p in module.parameters():
        if p.is_floating_point() and id(p) not in skip:
            value = torch.empty(p.shape, device=device, dtype=torch.float32)
            if p.dim() < 2:
                value.uniform_(0.5, 1.5, generator=generator)
            else:
                bound = (3 / max(1, math.prod(p.shape[1:]))) ** 0.5
                value.uniform_(-bound, bound, generator=generator)
            made[id(p)] = nn.Parameter(value, requires_grad=False)
    return made


def compute_device(module: nn.Module) -> torch.device:
    """Where the module's parameters are; the CPU for the meta device."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def close(a: object, b: object) -> bool:
    """Whether two results agree: the same structure, shapes and dtypes, values to float tolerance.

    What isn't a tensor, number, text or container of those is not compared.
    """
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and _close_tensors(a, b)
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, (bool, int, float, str, type(None))):
        return type(a) is type(b) and (a == b or a != a)
    return type(a) is type(b)


def relative_error(result: Tensor, expected: object) -> float:
    """Largest difference relative to the largest expected value; infinite for another shape or not a number."""
    if not isinstance(expected, Tensor) or result.shape != expected.shape:
        return math.inf
    error = float((result - expected).abs().max() / expected.abs().max())
    return math.inf if math.isnan(error) else error


def differing_state(a: nn.Module, b: nn.Module) -> str:
    """The name of a buffer or attribute in which two copies of a module differ, or ''."""
    theirs = {path: _state(module) for path, module in b.named_modules()}
    for path, module in a.named_modules():
        ours, other = _state(module), theirs.get(path, {})
        for name in dict.fromkeys((*ours, *other)):
            if not close(ours.get(name), other.get(name)):
                return f"{path}.{name}" if path else name
    return ""


def _state(module: nn.Module) -> dict[str, object]:
    elsewhere = ("_modules", "_parameters", "_buffers")
    plain = {name: value for name, value in vars(module).items() if name not in elsewhere and not callable(value)}
    return {**plain, **module._buffers}


def _close_tensors(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    limit = _TOLERANCE.get(a.dtype, 1e-4)
    finite = a[a.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(a.double(), b.double(), rtol=0.0, atol=limit * scale, equal_nan=True)
