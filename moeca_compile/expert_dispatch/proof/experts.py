"""What one expert computes, read off its Linear layers and proven by running it.

An expert is a MLP `down(act(up(x)))` or a gated one `down(act(gate(x)) * up(x))`. Names don't count: every assignment
of its two or three Linear layers to these roles, every half of a fused projection and every activation is a candidate,
and a copy of the expert with random weights says which one it is. That also settles code that splits the weights into
slices and sums (`pretraining_tp`): it is the same function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, nn

from moeca_compile.expert_dispatch.proof.anatomy import (
    SAME,
    Anatomy,
    adapters,
    anatomy_of,
    beneath_adapters,
    compare,
    compute_dtype,
    hooks,
    is_adapter,
    remedy,
    values_of,
)
from moeca_compile.expert_dispatch.proof.probe import (
    compute_device,
    isolated,
    random_parameters,
    relative_error,
    shadow,
)
from moeca_compile.expert_dispatch.routed import operator
from moeca_compile.ops.experts import ACTIVATIONS, WeightLists, segments

Rows = tuple[int | None, int | None, int | None]  # start, stop, step of a slice of output features
ALL_ROWS: Rows = (None, None, None)
RANKS = (2, 3)  # of the tokens that an expert is tried with: [n, D], and [1, n, D] as a capacity's chunk has it
_PROBE_TOKENS = 5
_TOLERANCE = 1e-4  # float32, relative; the nearest wrong candidate, tanh for erf GELU, is about there: so the best wins


@dataclass(frozen=True, slots=True)
class Part:
    """Some output rows of one Linear inside an expert; `path` are the names to walk from the expert to it."""

    path: tuple[str, ...]
    rows: Rows = ALL_ROWS

    def tensors(self, expert: nn.Module) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] and bias [out] as they are now: views, and no copies but of quantized weights."""
        linear = walk(expert, self.path)
        weight, bias = values_of(linear.weight), linear.bias
        if self.rows == ALL_ROWS:
            return weight, bias
        rows = slice(*self.rows)
        return weight[rows], None if bias is None else bias[rows]


@dataclass(frozen=True, slots=True)
class ExpertBody:
    """Which Linear plays which role, and the activation: `down(act(gate(x)) * up(x))`, or without a gate."""

    up: Part
    down: Part
    gate: Part | None
    activation: str
    in_features: int
    out_features: int
    anatomy: Anatomy
    rank: int = 2  # of the tokens that its own forward takes

    def weights(self, experts: Sequence[nn.Module]) -> WeightLists:
        """The six weight lists that `moeca::experts` takes, from the expert modules as they are now."""
        lists: list[list[Tensor]] = []
        biases: list[list[Tensor]] = []
        for part in (self.up, self.down, self.gate):
            pairs = [part.tensors(expert) for expert in experts] if part is not None else []
            lists.append([weight for weight, _ in pairs])
            biases.append([bias for _, bias in pairs if bias is not None])
        return lists[0], lists[1], lists[2], biases[0], biases[1], biases[2]


@dataclass(frozen=True, slots=True)
class ModuleExperts:
    """Experts that are modules in a container; `stack` is the path from the MoE module to it."""

    stack: tuple[str, ...]
    body: ExpertBody

    @property
    def in_features(self) -> int:
        return self.body.in_features

    @property
    def out_features(self) -> int:
        return self.body.out_features

    @property
    def activation(self) -> str:
        return self.body.activation

    @property
    def gated(self) -> bool:
        return self.body.gate is not None

    @property
    def exhaustive(self) -> bool:
        return False

    def condition(self, owner: nn.Module) -> int:
        worst = SAME
        for expert in members(owner, self.stack):
            worst = max(worst, compare(expert, self.body.anatomy))
        return worst

    def branches(self, owner: nn.Module, tokens: Tensor, ids: Tensor, *extra: Tensor) -> Tensor:
        return operator(tokens, ids, self.body.weights(members(owner, self.stack)), self.activation)

    def dtype(self, owner: nn.Module) -> torch.dtype:
        return compute_dtype(members(owner, self.stack)[0], owner)

    def count(self, owner: nn.Module) -> int:
        return len(walk(owner, self.stack)._modules)


def walk(module: nn.Module, path: Sequence[str]) -> Any:
    """The descendant at `path`; Dynamo follows this where it would not follow `get_submodule`, and guards no more."""
    for name in path:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def members(owner: nn.Module, stack: Sequence[str]) -> list[nn.Module]:
    """The experts in the container at `stack`, in order."""
    return list(walk(owner, stack)._modules.values())


def run_expert(expert: nn.Module, rank: int, *rows: Tensor) -> Any:
    """An expert's own forward on rows [n, D]: given to it as they are, or as one sample [1, n, D]."""
    result: Any = expert(*rows) if rank == 2 else expert(*(row.unsqueeze(0) for row in rows))
    return result if rank == 2 or not isinstance(result, Tensor) else result.squeeze(0)


class Recognizer:
    """Recognizes expert stacks; remembers the bodies it has proven, since a model repeats one many times."""

    def __init__(self) -> None:
        self._bodies: list[tuple[list[object], ExpertBody | str]] = []

    def body_of(self, experts: Sequence[nn.Module]) -> ExpertBody | str:
        """The body that all `experts` share, or why they can't be given to `moeca::experts`."""
        bodies: list[ExpertBody] = []
        problem = barred(experts)
        if problem:
            return problem
        for e, expert in enumerate(map(_stripped, experts)):
            problem = _unfit(expert)
            if problem:
                return f"expert {e} {problem}"
            body = self._body(expert)
            if isinstance(body, str):
                return f"expert {e} {body}"
            bodies.append(body)
            if body != bodies[0]:
                return f"experts 0 and {e} compute different functions"
        return bodies[0]

    def _body(self, expert: nn.Module) -> ExpertBody | str:
        facts = _facts(expert)
        for facts_of_body, body in self._bodies:
            if facts_of_body == facts:
                return body
        body = _identify(expert)
        self._bodies.append((facts, body))
        return body


def barred(experts: Sequence[nn.Module]) -> str:
    """Why experts can't be taken in any form, or ''."""
    for e, expert in enumerate(experts):
        for name, what in hooks(expert):
            return f"expert {e} has {what} on {name or 'itself'}: {remedy(what)}"
    first = _shapes(_stripped(experts[0]))
    for e, expert in enumerate(experts):
        if _shapes(_stripped(expert)) != first:
            return f"experts 0 and {e} have weights of different shapes or dtypes"
    return ""


def change(experts: Sequence[nn.Module]) -> str:
    """What stands before the experts' own weights, the first of it, or ''."""
    for e, expert in enumerate(experts):
        for name, what in adapters(expert):
            return f"expert {e} has {what} on {name or 'itself'}"
    return ""


def _stripped(expert: nn.Module) -> nn.Module:
    """The expert without its adapter layers: itself, or a copy that shares its parameters."""
    if not any(map(is_adapter, expert.modules())):
        return expert
    twin = beneath_adapters(shadow(expert))
    for module in list(twin.modules()):
        for name, child in module._modules.items():
            module._modules[name] = None if child is None else beneath_adapters(child)
    return twin


def _unfit(expert: nn.Module) -> str:
    linears = dict(_linears(expert))
    owned = {id(p) for linear in linears.values() for p in linear.parameters()}
    for name, module in expert.named_modules():
        if next(module.buffers(recurse=False), None) is not None:
            return f"keeps a buffer in {name or 'itself'}: only stateless experts are recognized"
    for name, p in expert.named_parameters():
        if id(p) not in owned:
            return f"has a parameter outside its Linear layers ({name}): only MLP and gated MLP bodies are recognized"
    if len(linears) not in (2, 3):
        return f"has {len(linears)} Linear layers, not the 2 or 3 of a (gated) MLP"
    return ""


def _linears(expert: nn.Module) -> Iterator[tuple[tuple[str, ...], nn.Linear]]:
    for name, module in expert.named_modules():
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            yield tuple(name.split(".")), module


def _facts(expert: nn.Module) -> list[object]:
    """Class, settings and shapes of an expert and all its parts: where they are equal, so is the function."""
    elsewhere = ("training", "_modules", "_parameters", "_buffers")
    return [
        (
            name,
            type(module),
            {
                k: v
                for k, v in vars(module).items()
                if k not in elsewhere and isinstance(v, (bool, int, float, str, type))
            },
            {k: getattr(module, k) for k, v in vars(module).items() if callable(v)},
            {k: None if p is None else (p.shape, p.dtype) for k, p in module._parameters.items()},
        )
        for name, module in expert.named_modules()
    ]


def _shapes(expert: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, p.shape, p.dtype) for name, p in expert.named_parameters()]


def _candidates(expert: nn.Module) -> Iterator[tuple[Part, Part, Part | None]]:
    """Every (up, down, gate) whose shapes fit."""
    linears = dict(_linears(expert))
    for order in permutations(linears):
        up, down = linears[order[0]], linears[order[1]]
        if len(order) == 3:
            gate = linears[order[2]]
            if (gate.in_features, gate.out_features) == (up.in_features, up.out_features) and (
                down.in_features == up.out_features
            ):
                yield Part(order[0]), Part(order[1]), Part(order[2])
        elif down.in_features == up.out_features:
            yield Part(order[0]), Part(order[1]), None
        elif 2 * down.in_features == up.out_features:
            for up_rows, gate_rows in halves(down.in_features):
                yield Part(order[0], up_rows), Part(order[1]), Part(order[0], gate_rows)


def halves(half: int) -> Iterator[tuple[Rows, Rows]]:
    """How a fused projection of 2 * `half` features can hold (up, gate): one after the other, or interleaved."""
    for first, second in (((None, half, None), (half, None, None)), ((None, None, 2), (1, None, 2))):
        yield second, first
        yield first, second


def _identify(expert: nn.Module) -> ExpertBody | str:
    candidates = list(_candidates(expert))
    if not candidates:
        shapes = [(linear.in_features, linear.out_features) for _, linear in _linears(expert)]
        return f"has Linear layers {shapes} that don't chain into a (gated) MLP"
    device = compute_device(expert)
    problem = ""
    with isolated():
        widths = dict.fromkeys(walk(expert, up.path).in_features for up, *_ in candidates)
        for rank, width in product(RANKS, widths):
            try:
                twin = shadow(expert, random_parameters(expert, device))
                # Large enough that the activations differ: near zero all are a straight line.
                x = 3.0 * torch.randn(_PROBE_TOKENS, width, device=device, dtype=torch.float32)
                expected = run_expert(twin, rank, x.clone())
            except Exception as error:
                problem = problem or f"can't be run on tokens [n, D] ({type(error).__name__}: {error})"
                continue
            if not isinstance(expected, Tensor):
                return f"returns a {type(expected).__name__}, not one tensor"
            bodies = list(_bodies(twin, anatomy_of(expert), candidates, rank))
            errors = [_error(twin, x, expected, body) for body in bodies]
            if min(errors) < _TOLERANCE:
                return bodies[errors.index(min(errors))]
            problem = f"computes something other than a (gated) MLP with an activation of {', '.join(ACTIVATIONS)}"
    return problem


def _bodies(
    expert: nn.Module, anatomy: Anatomy, roles: list[tuple[Part, Part, Part | None]], rank: int
) -> Iterator[ExpertBody]:
    for up, down, gate in roles:
        d_in, d_out = walk(expert, up.path).weight.shape[1], walk(expert, down.path).weight.shape[0]
        for activation in ACTIVATIONS:
            yield ExpertBody(up, down, gate, activation, d_in, d_out, anatomy, rank)


def _error(expert: nn.Module, x: Tensor, expected: Tensor, body: ExpertBody) -> float:
    """Largest difference between the expert's own output and `body`'s, relative to the largest output."""
    if body.in_features != x.shape[1] or expected.shape != (len(x), body.out_features):
        return math.inf
    ids = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
    return relative_error(segments(x, ids, *body.weights([expert]), body.activation).squeeze(1), expected)
