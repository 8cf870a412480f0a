"""Give every recognised expert dispatch in a model its traceable form, in place."""

from __future__ import annotations

from collections.abc import Hashable

from torch import nn

from moeca_compile.canonical import nonzero_loop, numpy_loop, packed
from moeca_compile.canonical.attempt import ModuleStand, Proposal, Stand
from moeca_compile.canonical.dispatch import find_loops, unreadable
from moeca_compile.canonical.experts import ExpertBody, ModuleExperts, Recogniser, members
from moeca_compile.canonical.family import Family
from moeca_compile.canonical.inline import reaches
from moeca_compile.canonical.loop import Loop
from moeca_compile.canonical.patch import Installed, install, installed, replaced, uninstall
from moeca_compile.canonical.report import PreparedModule, PrepareReport
from moeca_compile.canonical.routed import Experts
from moeca_compile.regions import Miss

FAMILIES = (
    numpy_loop.FAMILY,  # sorted segments, counts on the host; first, because its code may use where() as well
    nonzero_loop.FAMILY,  # a mask per expert
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
        for name, stack in unreadable(module).items():
            if isinstance(worker.recogniser.body_of(members(module, stack)), ExpertBody):
                reason = f"{type(module).__name__}.{name} uses experts but has no source that can be read. {_REMEDY}"
                misses.append(Miss(reason, path or "(root)"))
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
        self.proven: dict[Hashable, Proposal] = {}
        self.refused: dict[Hashable, str | None] = {}

    def prepare(self, module: nn.Module, loop: Loop) -> Installed | str | None:
        """Install a patch and say which; or why not; or None where inference doesn't reach the loop."""
        if replaced(module, loop.name):
            return f"{loop.name} was replaced on this instance (offloading or adapter hooks?): prepare before that"
        family = next(family for family in FAMILIES if family.claims(loop))
        found = self._propose(family, module, loop)
        if not isinstance(found, tuple):
            return found
        stand, proposal = found
        on_meta = any(p.is_meta for p in module.parameters())
        problem = "" if on_meta else stand.disagreement_on_own_weights(proposal)
        if problem:
            return f"{problem} (on its own weights)"
        install(module, proposal.rewrite, family.name, verified=not on_meta)
        return installed(module)[loop.name]

    def _propose(self, family: Family, module: nn.Module, loop: Loop) -> tuple[Stand, Proposal] | str | None:
        experts: ModuleExperts | None = None
        if not loop.packed:
            body = self.recogniser.body_of(members(module, loop.stack))
            if isinstance(body, str):
                return body
            experts = ModuleExperts(loop.stack, body)
        key = (type(module), loop.name, loop.line, experts)
        known = self.proven.get(key)
        if known is not None:
            stand = _stand(module, known.rewrite.routed.experts)
            if not stand.disagreement(known, seeds=(1, 2)) and reaches(stand, loop, known.entry):
                return stand, known
        # What was refused may be right under other settings.
        exact = (*key, _settings(module))
        if exact not in self.refused:
            found = _search(family, module, loop, experts)
            if isinstance(found, Proposal):
                self.proven[key] = found
                return _stand(module, found.rewrite.routed.experts), found
            self.refused[exact] = found
        return self.refused[exact]


def _settings(module: nn.Module) -> Hashable:
    """The plain attributes of a module and all in it."""
    plain = (bool, int, float, str, type(None))
    return tuple((path, k, v) for path, m in module.named_modules() for k, v in vars(m).items() if isinstance(v, plain))


def _search(family: Family, module: nn.Module, loop: Loop, experts: ModuleExperts | None) -> Proposal | str | None:
    try:
        if experts is None:
            return packed.propose(module, loop, family.layouts)
        return family.propose(ModuleStand(module, experts), loop, family.layouts)
    except Exception as error:  # whatever a copy of somebody's module can raise
        return f"no copy of it can be tried out ({type(error).__name__}: {error})"


def _stand(module: nn.Module, experts: Experts) -> Stand:
    return ModuleStand(module, experts) if isinstance(experts, ModuleExperts) else packed.PackedStand(module, experts)


def _describe(path: str, module: nn.Module, note: Installed) -> PreparedModule:
    experts = note.rewrite.routed.experts
    return PreparedModule(path, note.family, experts.count(module), experts.activation, experts.gated, note.verified)
