"""A proposed rewriting of a dispatch, and the proof that it computes what the original does.

The proof runs both on random tokens with the experts replaced by stand-ins that differ per expert, so that it says
nothing about any weight and costs nothing however large the model is. Routing that piles all tokens on few experts is
among the inputs: a dispatch with a capacity drops tokens there and doesn't pass.
"""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from moeca_compile.expert_dispatch.proof import probe
from moeca_compile.expert_dispatch.proof.any_experts import AnyExperts
from moeca_compile.expert_dispatch.proof.candidate import Arguments, Candidate, Entry, Rank, Unproven, raised
from moeca_compile.expert_dispatch.proof.experts import ModuleExperts, members
from moeca_compile.expert_dispatch.proof.probe import (
    close,
    compute_device,
    differing_state,
    isolated,
    random_parameters,
    shadow,
)
from moeca_compile.expert_dispatch.routed import Experts, Routed

CROWD = 10  # the seed of a run with many tokens, all to few experts: a capacity must show


class Harness(ABC):
    """A module under test; it is never run itself, only copies of it are.

    Args:
        module: holds the dispatch.
        experts: where its experts are and how wide tokens and results are.
    """

    def __init__(self, module: nn.Module, experts: Experts) -> None:
        self.module, self.experts = module, experts
        self.readings: Sequence[Experts] = (experts,)  # which experts it may be, where trying tells
        self.device = compute_device(module)
        self.num_experts = experts.count(module)
        self.extra = experts.extra if isinstance(experts, AnyExperts) else ()  # widths of what else experts take
        self.on_meta = any(p.is_meta for p in module.parameters())
        self._fresh: dict[int, Tensor] | None = None

    def copy(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A private float32 copy with random parameters; where it can be, experts answer in `dtype`."""
        if self._fresh is None:
            self._fresh = self.parameters()
        return shadow(self.module, self._fresh)

    @abstractmethod
    def parameters(self) -> dict[int, Tensor]:
        """What a copy has in place of the module's parameters, by `id`."""

    def routed(self, real: Routed) -> Routed:
        """What a rewritten copy calls."""
        return real

    def observed(self, entry: Entry, name: str, function: Callable[..., object], seed: int = 1) -> nn.Module:
        """A copy that has run `entry` with `function` in place of its method `name`.

        Raises:
            Exception: whatever somebody's method raises for arguments that aren't its own.
        """
        with isolated():
            module = self.copy()
            module.__dict__[name] = types.MethodType(function, module)
            run(module, entry, entry.arguments(self, seed, torch.float32))
        return module

    def holding(self, experts: Experts) -> Harness:
        """The harness for another reading of the same experts."""
        return self if experts is self.experts else type(self)(self.module, experts)

    def disagreement(self, candidate: Candidate, seeds: Sequence[int] = (1, 2, 3, 4, CROWD)) -> Unproven | None:
        """Why original and rewritten method differ with stand-in experts, in float32; None where they agree."""
        real = candidate.rewrite.routed
        function = candidate.rewrite.function(self.routed(real) if real is not None else None)
        return self._compare(candidate, function, self.copy, torch.float32, seeds)

    def disagreement_on_own_weights(self, candidate: Candidate, seeds: Sequence[int] = (1, 2)) -> Unproven | None:
        """Why they differ with the module's own weights, in its own dtype and through the real operator.

        Weights on the meta device can't be run: no difference is known then.
        """
        if self.on_meta:
            return None
        dtype = self.experts.dtype(self.module)
        function = candidate.rewrite.fitting(self.module).function()
        difference = self._compare(candidate, function, lambda: shadow(self.module), dtype, seeds)
        return Unproven(f"{difference.reason} (on its own weights)", Rank.OWN_WEIGHTS) if difference else None

    def _compare(
        self,
        candidate: Candidate,
        function: types.FunctionType,
        copy: Callable[[], nn.Module],
        dtype: torch.dtype,
        seeds: Sequence[int],
    ) -> Unproven | None:
        name, entry, calls = candidate.rewrite.name, candidate.entry, list[str]()

        def rewritten(*args: object, **kwargs: object) -> object:
            calls.append(name)
            return function(*args, **kwargs)

        for seed in seeds:
            with isolated():
                attempted = "no copy of it can be tried out"
                try:
                    ours, theirs = copy(), copy()
                    ours.__dict__[name] = types.MethodType(rewritten, ours)
                    arguments = entry.arguments(self, seed, dtype)
                    attempted = "the original can't be run on random tokens"
                    expected = run(theirs, entry, arguments)
                    attempted = "the canonical form can't be run in its place"
                    result = run(ours, entry, arguments)
                    attempted = "results and state can't be compared"
                    agree, changed = close(expected, result), differing_state(theirs, ours)
                except Exception as error:  # whatever somebody's module can raise
                    return raised(attempted, error)
            if not calls:
                return Unproven(f"{entry.method} doesn't call {name}, so nothing was compared", Rank.NOT_RUN)
            if not agree and candidate.rewrite.routed is None:
                return Unproven("its result is not the same without the branch", Rank.DIFFERENT)
            if not agree:
                return Unproven("its result is not the gate-weighted sum of each token's experts", Rank.DIFFERENT)
            if changed:
                reason = f"it changes the module's own state ({changed}), which a compiled graph would drop"
                return Unproven(reason, Rank.DIFFERENT)
        return None


class ModuleHarness(Harness):
    """Stands in for the experts too: with a function that differs per expert, whatever their size."""

    def __init__(self, module: nn.Module, experts: ModuleExperts | AnyExperts) -> None:
        super().__init__(module, experts)
        self.stack = experts.stack

    def copy(self, dtype: torch.dtype | None = None) -> nn.Module:
        twin = super().copy()
        for e, expert in enumerate(members(twin, self.stack)):
            expert.__dict__["forward"] = stand_in(e, self.experts.out_features, dtype)
        return twin

    def parameters(self) -> dict[int, Tensor]:
        experts = members(self.module, self.stack)
        stood_in_for = {id(p) for expert in experts for p in expert.parameters()}
        return random_parameters(self.module, self.device, skip=stood_in_for)

    def routed(self, real: Routed) -> Routed:
        return _StandInRouted(*(getattr(real, f.name) for f in fields(real)))


@dataclass(frozen=True)
class _StandInRouted(Routed):
    def branches(self, owner: nn.Module, tokens: Tensor, ids: Tensor, *extra: Tensor) -> Tensor:
        assert isinstance(self.experts, (ModuleExperts, AnyExperts))
        y = tokens.new_empty(*ids.shape, self.experts.out_features)
        for e, expert in enumerate(members(owner, self.experts.stack)):
            chosen = ids == e
            rows = (value.unsqueeze(1).expand(*ids.shape, -1)[chosen] for value in (tokens, *extra))
            y[chosen] = expert(*rows)
        return y


def stand_in(e: int, out_features: int, dtype: torch.dtype | None) -> Callable[..., Tensor]:
    """A row-wise function that is another one for every expert: bounded, not linear, not zero at zero. Of each further
    argument it depends in another way."""

    def forward(x: Tensor, *extra: Tensor) -> Tensor:
        columns = torch.arange(out_features, device=x.device)
        y = torch.sin(x[..., columns % x.shape[-1]] * (1.0 + 0.01 * e) + (e + columns))
        for i, value in enumerate(extra):
            y = y + torch.sin(value[..., columns % value.shape[-1]] * (0.7 + i) + (e - columns))
        return y.to(dtype or x.dtype)

    return forward


def run(module: nn.Module, entry: Entry, arguments: Arguments) -> object:
    """Call the entry's method with copies of the arguments, from the same random state each time."""
    probe.seed()
    return getattr(module, entry.method)(*(a.clone() for a in arguments), **dict(entry.flags))


def length(seed: int, num_experts: int) -> int:
    """How many tokens a sample has."""
    return 512 if seed == CROWD else 4 + seed + num_experts // 2


def tokens_of(seed: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random tokens; nearly the same one everywhere for even seeds, so that the router sends all to few experts."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    if seed % 2 == 0:
        x = x.reshape(-1, shape[-1])[:1] + 0.01 * x
    return x.to(device, dtype)
