"""Give every recognised expert dispatch in a model its traceable form, in place."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from moeca_compile.canonical import nonzero_loop, numpy_loop
from moeca_compile.canonical.attempt import ModuleStand, Proposal, Stand
from moeca_compile.canonical.dispatch import Loop, find_loops
from moeca_compile.canonical.experts import ModuleExperts, Recogniser, walk
from moeca_compile.canonical.patch import Installed, install, installed, replaced, uninstall
from moeca_compile.canonical.report import PreparedModule, PrepareReport
from moeca_compile.canonical.routed import Experts
from moeca_compile.regions import Miss


class Family(Protocol):
    """One kind of dispatch; a module of this package with these names."""

    NAME: str

    def claims(self, loop: Loop) -> bool: ...

    def propose(self, stand: Stand, loop: Loop) -> Proposal | str | None: ...


FAMILIES: tuple[Family, ...] = (
    numpy_loop,  # sorted segments, counts on the host; first, because its code may use where() as well
    nonzero_loop,  # a mask per expert
)

_REMEDY = (
    "Left as it is: Dynamo breaks its graph there. Write it as a method f(self, x[T,D], ids[T,K], weights[T,K]) that "
    "returns the weighted sum over (gated) MLP experts, or call torch.ops.moeca.experts in it"
)


def prepare(model: nn.Module) -> PrepareReport:
    """Find expert dispatches that Dynamo can't trace and let compilers see `moeca::experts` in their place.

    Recognised by structure and proven by running both forms on small random tensors; nothing is replaced on faith.
    Plain eager calls, and modules in training mode, run the original code bit for bit. Parameters, buffers and the
    state dict stay as they are, later changes of the weights are followed, and `copy.deepcopy` gives a prepared copy
    with its own weights. Hooks put on expert modules afterwards are not seen by compiled graphs.

    Args:
        model: any module; changed in place. Preparing it again changes nothing.

    Returns:
        What was changed, and what looked like a dispatch and was left alone, with the reason.
    """
    worker = _Worker()
    changed: list[PreparedModule] = []
    misses: list[Miss] = []
    for path, module in model.named_modules():
        for loop in find_loops(module):
            if loop.name in installed(module):
                continue
            outcome = worker.prepare(module, loop)
            if isinstance(outcome, Installed):
                changed.append(_describe(path, module, outcome))
            elif outcome is not None:
                reason = f"the expert dispatch in {type(module).__name__}.{loop.name}: {outcome}. {_REMEDY}"
                misses.append(Miss(reason, path or "(root)", loop.where))
    return PrepareReport(tuple(changed), tuple(misses))


def unprepare(model: nn.Module) -> int:
    """Take back what `prepare` did to `model`; how many methods were restored."""
    return sum(uninstall(module) for module in model.modules())


def prepared(model: nn.Module) -> tuple[PreparedModule, ...]:
    """The modules in `model` that `prepare` has changed; empty, so false, where there are none."""
    found = ((path, m, note) for path, m in model.named_modules() for note in installed(m).values())
    return tuple(_describe(path, module, note) for path, module, note in found)


class _Worker:
    """One `prepare` call. Remembers what it found for a class, since a model repeats a layer many times."""

    def __init__(self) -> None:
        self.recogniser = Recogniser()
        self.known: dict[tuple[type, str, int, Experts], Proposal | str | None] = {}

    def prepare(self, module: nn.Module, loop: Loop) -> Installed | str | None:
        """Install a patch and say which; or why not; or None where inference doesn't reach the loop."""
        if replaced(module, loop.name):
            return f"{loop.name} was replaced on this instance (offloading or adapter hooks?): prepare before that"
        body = self.recogniser.body_of(list(walk(module, loop.stack)._modules.values()))
        if isinstance(body, str):
            return body
        stand = ModuleStand(module, ModuleExperts(loop.stack, body))
        family = next(family for family in FAMILIES if family.claims(loop))
        proposal = self._propose(family, stand, loop)
        if not isinstance(proposal, Proposal):
            return proposal
        on_meta = any(p.is_meta for p in module.parameters())
        problem = "" if on_meta else stand.disagreement_on_own_weights(proposal)
        if problem:
            return f"{problem} (on its own weights)"
        install(module, proposal.rewrite, family.NAME, verified=not on_meta)
        return installed(module)[loop.name]

    def _propose(self, family: Family, stand: Stand, loop: Loop) -> Proposal | str | None:
        key = (type(stand.module), loop.name, loop.line, stand.experts)
        known = self.known.get(key)
        if isinstance(known, Proposal) and stand.disagreement(known, seeds=(1, 2)):
            known = None  # the same code under other settings
            del self.known[key]
        if key not in self.known:
            try:
                self.known[key] = family.propose(stand, loop)
            except Exception as error:
                self.known[key] = f"can't be copied for a trial run ({type(error).__name__}: {error})"
        return self.known[key]


def _describe(path: str, module: nn.Module, note: Installed) -> PreparedModule:
    experts = note.rewrite.routed.experts
    return PreparedModule(
        path, note.family, experts.count(module), experts.activation, experts.gated, note.verified
    )
