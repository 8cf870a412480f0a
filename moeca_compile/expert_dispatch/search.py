"""Which family rewrites a module's dispatches: each candidate is proven, the first that agrees is installed."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from torch import nn

from moeca_compile.errors import InvariantError
from moeca_compile.expert_dispatch.families.family import Family
from moeca_compile.expert_dispatch.families.registry import families
from moeca_compile.expert_dispatch.module_code import ModuleCode
from moeca_compile.expert_dispatch.patch import Installed, install, installed, replaced
from moeca_compile.expert_dispatch.proof.anatomy import CHANGED
from moeca_compile.expert_dispatch.proof.any_experts import AnyExperts, recognize
from moeca_compile.expert_dispatch.proof.candidate import NOT_NEEDED, Candidate, Rank, Unproven, raised
from moeca_compile.expert_dispatch.proof.experts import ExpertBody, ModuleExperts, Recognizer, barred, members
from moeca_compile.expert_dispatch.proof.harness import Harness, ModuleHarness
from moeca_compile.expert_dispatch.proof.packed_experts import PackedHarness, readings, shapes_of
from moeca_compile.expert_dispatch.proof.pinned import pinned
from moeca_compile.expert_dispatch.proof.traceable import blocker
from moeca_compile.expert_dispatch.rewrite.one_loop import reaches
from moeca_compile.expert_dispatch.source.loop import Loop

_PLAIN = (bool, int, float, str, type(None))


@dataclass
class Search:
    """One `prepare` call. Remembers what was proven for a class, since a model repeats a layer many times."""

    recognizer: Recognizer = field(default_factory=Recognizer)
    proven: dict[Hashable, Candidate] = field(default_factory=dict)
    refused: dict[Hashable, Unproven] = field(default_factory=dict)
    without: set[Hashable] = field(default_factory=set)  # structures of modules in which no family found a dispatch

    def outcomes(self, code: ModuleCode) -> Iterator[tuple[Loop, Installed | str]]:
        """What became of each dispatch in a module, those that inference doesn't reach left out. One whose experts have
        changed since is proven anew; if that can't be, its patch stays, which leaves the original code to compilers."""
        module = code.module
        stale = {n: vars(module)[n] for n, note in installed(module).items() if note.condition(module) == CHANGED}
        for name in stale:
            del module.__dict__[name]
        if not any(note.rewrite.source.helpers for note in installed(module).values()):
            yield from self._outcomes(code)
        for name, patch in stale.items():
            if not installed(module):
                module.__dict__[name] = patch

    def _outcomes(self, code: ModuleCode) -> Iterator[tuple[Loop, Installed | str]]:
        """One method with its helpers put in may hold all dispatches of the module: the others are tried without it."""
        structure = _structure(code.module)
        places = {} if structure in self.without else _claimed(code)
        if not places:
            self.without.add(structure)
            return
        combined = [loop for loop in places if loop in code.combined]
        tried = [(loop, self._attempt(code.module, places[loop], loop)) for loop in combined]
        reported = [(loop, outcome) for loop, outcome in tried if outcome is not None]
        yield from [(loop, outcome) for loop, outcome in reported if isinstance(outcome, Installed)] or reported[:1]
        if not installed(code.module):
            for loop, family in places.items():
                outcome = self._attempt(code.module, family, loop) if loop not in combined else None
                if outcome is not None:
                    yield loop, outcome

    def _attempt(self, module: nn.Module, family: Family, loop: Loop) -> Installed | str | None:
        """Install a patch and say which; or why not; or None where there is nothing to rewrite."""
        if loop.name in installed(module):
            return None
        if replaced(module, loop.name):
            return f"{loop.name} was replaced on this instance (offloading or adapter hooks?): prepare before that"
        harness = self._harness(module, loop)
        if isinstance(harness, str):
            return None if loop.combined else harness  # a forward with helpers in it may be that of any model
        candidate = self._candidate(family, harness, loop)
        if isinstance(candidate, Unproven):
            return None if candidate is NOT_NEEDED else family.explain(loop, candidate)
        install(module, candidate.rewrite, family.name, verified=not harness.on_meta)
        return installed(module)[loop.name]

    def _harness(self, module: nn.Module, loop: Loop) -> Harness | str:
        """The module with the experts that the loop dispatches to, or why these can't be taken."""
        if loop.packed:
            fitting = list(readings(module))
            if not fitting:
                return f"its packed weights {shapes_of(module)} don't chain into a (gated) MLP"
            return PackedHarness(module, fitting[0], fitting)
        experts = members(module, loop.stack)
        body = self.recognizer.body_of(experts)
        if isinstance(body, ExpertBody):
            return ModuleHarness(module, ModuleExperts(loop.stack, body))
        if barred(experts):
            return body
        any_body = recognize(loop.stack, experts)
        return ModuleHarness(module, any_body) if isinstance(any_body, AnyExperts) else f"{body}; {any_body}"

    def _candidate(self, family: Family, harness: Harness, loop: Loop) -> Candidate | Unproven:
        """A proven candidate. What was proven for another instance is checked for this one, not searched again."""
        module = harness.module
        settings = _settings(module)
        # Which labels a proof of straightened branches was run with depends on settings.
        key: Hashable = (type(module), family, loop.name, loop.line, loop.source, harness.experts)
        key = (key, settings if loop.combined else None)
        proven = self.proven.get(key)
        if proven is not None:
            held = harness.holding(proven.rewrite.experts)
            if not held.disagreement(proven, seeds=(1, 2)) and reaches(held, loop, proven.entry):
                return held.disagreement_on_own_weights(proven) or proven
        exact = (key, settings)  # what was refused may be right under other settings
        if exact in self.refused:
            return self.refused[exact]
        try:
            candidate = _first_proven(family, harness, loop)
        except Exception as error:  # a copy of somebody's module, or somebody's family
            candidate = raised(f"the family {family.name} can't try it out", error)
        if isinstance(candidate, Candidate):
            candidate = self.proven[key] = pinned(harness.holding(candidate.rewrite.experts), candidate, loop)
        elif candidate.rank is not Rank.OWN_WEIGHTS:  # another instance has others
            self.refused[exact] = candidate
        return candidate


def _claimed(code: ModuleCode) -> dict[Loop, Family]:
    """Each dispatch in a module, and the first family that matches it."""
    claimed: dict[Loop, Family] = {}
    for family in families():
        try:
            loops = list(family.match(code))
        except Exception as error:
            raise InvariantError(
                f"the dispatch family {family.name} raised while it matched {type(code.module).__name__} "
                f"({type(error).__name__}: {error}). Mend its match, or leave it out: unregister({family.name!r})"
            ) from error
        for loop in loops:
            claimed.setdefault(loop, family)
    return claimed


def _first_proven(family: Family, harness: Harness, loop: Loop) -> Candidate | Unproven:
    furthest = NOT_NEEDED
    for proposal in family.propose(harness, loop):
        refutation = proposal if isinstance(proposal, Unproven) else _refutation(harness, proposal)
        if refutation is None:
            return proposal
        if furthest is NOT_NEEDED or refutation.rank > furthest.rank:
            furthest = refutation
    return furthest


def _refutation(harness: Harness, candidate: Candidate) -> Unproven | None:
    """What speaks against a candidate, None if it is proven."""
    held = harness.holding(candidate.rewrite.experts)
    difference = held.disagreement(candidate) or held.disagreement_on_own_weights(candidate)
    if difference is None and candidate.to_capture:
        place = blocker(held, candidate.rewrite.source, candidate.entry, candidate.rewrite)
        if place:
            reason = f"{place} still reads a size or a value out of a tensor in the rewritten method"
            return Unproven(reason, Rank.READS_BACK)
    return difference


def _structure(module: nn.Module) -> Hashable:
    """All that families read of a module: classes and plain attributes of the module and all in it, hooks, and the
    shapes of its own parameters. Equal blocks have one structure."""
    parts = []
    for path, part in module.named_modules():
        values = tuple([(k, v if isinstance(v, _PLAIN) else type(v)) for k, v in vars(part).items()])
        parts.append((path, type(part), values, bool(part._forward_hooks), bool(part._forward_pre_hooks)))
    return tuple(parts), tuple((name, p.shape) for name, p in module._parameters.items() if p is not None)


def _settings(module: nn.Module) -> Hashable:
    """The plain attributes of a module and all in it."""
    return tuple(
        (path, k, v) for path, m in module.named_modules() for k, v in vars(m).items() if isinstance(v, _PLAIN)
    )
