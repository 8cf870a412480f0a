"""Toy models compiled with moeca, and sampling loops as generators: a test can stop them and let them take turns.

Every loop yields what each of its model calls returned. A model takes (x, t, y); the loop moves x by Euler's method
along the returned velocity, with time t / 1000.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.runtime.stats import StepRecord
from tests.models import DiT

Model = Callable[..., Any]
Loop = Iterator[Tensor]
Enter = Callable[[str], AbstractContextManager[Any]]

TIMES = tuple(1000.0 - 80 * i for i in range(10))
ALWAYS = range(1000)
NULL = 10  # the label of classifier-free guidance's unconditional branch


def _nowhere(stream: str) -> AbstractContextManager[Any]:
    return nullcontext()


def plain(
    model: Model, seed: int = 0, label: int = 3, times: Sequence[float] = TIMES, batch: int = 2,
    size: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.float32, enter: Enter = _nowhere,
) -> Loop:  # fmt: skip
    """One call a step."""
    x = noise(seed, batch, size).to(dtype)
    for t, dt in _steps(times):
        v = _call(model, x, t, [label] * batch, enter("only"))
        yield v
        x = x - v * dt


def cfg_batched(
    model: Model, seed: int = 0, label: int = 3, times: Sequence[float] = TIMES, guided: Container[int] = ALWAYS
) -> Loop:
    """Guidance with both branches in one call; steps outside `guided` call the conditional branch alone."""
    x = noise(seed, 1)
    for step, (t, dt) in enumerate(_steps(times)):
        v = _call(model, torch.cat([x, x]) if step in guided else x, t, [label, NULL] if step in guided else [label])
        yield v
        x = x - (v[1:] + 2 * (v[:1] - v[1:]) if step in guided else v) * dt


def cfg_calls(
    model: Model, seed: int = 0, label: int = 3, times: Sequence[float] = TIMES, guided: Container[int] = ALWAYS,
    enter: Enter = _nowhere,
) -> Loop:  # fmt: skip
    """Guidance with two calls a step."""
    x = noise(seed, 2)
    for step, (t, dt) in enumerate(_steps(times)):
        v = _call(model, x, t, [label] * 2, enter("cond"))
        yield v
        if step in guided:
            null = _call(model, x, t, [NULL] * 2, enter("null"))
            yield null
            v = null + 2 * (v - null)
        x = x - v * dt


def in_place(model: Model, seed: int = 0, times: Sequence[float] = TIMES) -> Loop:
    """`plain` by a sampler that overwrites what it gave and what it got; yields copies."""
    x = noise(seed, 2)
    for t, dt in _steps(times):
        v = _call(model, x, t, [3, 3])
        yield v.clone()
        x -= v * dt
        v.fill_(1e6)


def heun(model: Model, seed: int = 0, times: Sequence[float] = TIMES, enter: Enter = _nowhere) -> Loop:
    """Second order: after each Euler step the slope at its end, so that inner timesteps are visited twice."""
    x = noise(seed, 2)
    for (t, dt), after in zip(_steps(times), [*times[1:], None], strict=True):
        v = _call(model, x, t, [3, 3], enter("predict"))
        yield v
        if after is not None:
            end = _call(model, x - v * dt, after, [3, 3], enter("correct"))
            yield end
            v = (v + end) / 2
        x = x - v * dt


# -- models -----------------------------------------------------------------------------------------------------------


def dit(seed: int = 0, style: str = "numpy", depth: int = 1) -> DiT:
    torch.manual_seed(seed)
    return DiT(style, depth=depth, num_experts=3, shared=False).eval().requires_grad_(False)


def compiled(module: nn.Module, **options: Any) -> nn.Module:
    """Prepared, and compiled with one computed step in three; nothing is handed to Inductor."""
    moeca.prepare(module)
    return torch.compile(module, backend="moeca", options={"schedule": "uniform:3", "inner": "eager", **options})


def uncached(module: nn.Module) -> nn.Module:
    """The truth for a call that has to be computed in full: the schedule that keeps no state."""
    return compiled(module, schedule="full")


def records(model: nn.Module) -> tuple[StepRecord, ...]:
    return moeca.stats(model).steps


def streams(model: nn.Module) -> Enter:
    """One named trajectory a stream, entered again for each call."""
    opened: dict[str, AbstractContextManager[Any]] = {}
    return lambda stream: opened.setdefault(stream, moeca.trajectory(model, stream=stream))


# -- running them -----------------------------------------------------------------------------------------------------


def under_compile_lock(model: nn.Module, loop: Callable[[Model], Loop]) -> list[Tensor]:
    """The truth for a whole loop: run it by itself, with nothing kept from before or for later."""
    moeca.reset(model)
    outputs = run(loop(model))
    moeca.reset(model)
    return outputs


def run(loop: Loop, calls: int | None = None) -> list[Tensor]:
    """All outputs of a loop, or those of its first `calls` calls."""
    return list(islice(loop, calls))


def take_turns(loops: Sequence[Loop], turns: Sequence[int] | None = None) -> list[list[Tensor]]:
    """Run loops in turns, call by call (or as the numbers in `turns` say, then the rest); the outputs of each."""
    outputs: list[list[Tensor]] = [[] for _ in loops]
    for number in turns or ():
        outputs[number].append(next(loops[number]))
    open_ = dict(enumerate(loops))
    while open_:
        for number, loop in list(open_.items()):
            found = list(islice(loop, 1))
            outputs[number] += found
            if not found:
                del open_[number]
    return outputs


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Bit by bit, call by call."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Taped:
    """A model that remembers its calls: `inputs` and `outputs`."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.inputs: list[tuple[Any, ...]] = []
        self.outputs: list[Tensor] = []

    def __call__(self, *inputs: Any) -> Any:
        out = self.model(*inputs)
        self.inputs.append(tuple(one.clone() for one in inputs))
        self.outputs.append(out)
        return out

    def equals(self, other: Model, calls: Sequence[int] | None = None) -> bool:
        """Whether `other` gives the same for the inputs of (these of) the calls, called in the same order."""
        wanted = range(len(self.inputs)) if calls is None else calls
        with torch.no_grad():
            return all(torch.equal(other(*self.inputs[i]), self.outputs[i]) for i in wanted)


def noise(seed: int, batch: int, size: tuple[int, int] = (8, 8)) -> Tensor:
    return torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed))


def _steps(times: Sequence[float]) -> list[tuple[float, float]]:
    return [(t, (t - after) / 1000) for t, after in zip(times, [*times[1:], 0.0], strict=True)]


@torch.no_grad()
def _call(
    model: Model, x: Tensor, t: float, labels: list[int], where: AbstractContextManager[Any] | None = None
) -> Tensor:
    with where or nullcontext():
        return model(x, torch.full((x.shape[0],), t), torch.tensor(labels))
