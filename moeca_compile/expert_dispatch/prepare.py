"""Give every recognised expert dispatch in a model its traceable form, in place."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace

from torch import nn

from moeca_compile.expert_dispatch.dispatch import find_loops, find_whole, hidden, unreadable
from moeca_compile.expert_dispatch.families import generic, gshard, masked_branches, nonzero_loop, numpy_loop, packed
from moeca_compile.expert_dispatch.families.family import Family
from moeca_compile.expert_dispatch.families.generic import AnyExperts
from moeca_compile.expert_dispatch.families.inline import reaches
from moeca_compile.expert_dispatch.patch import Installed, install, installed, replaced, uninstall
from moeca_compile.expert_dispatch.proof.anatomy import CHANGED, hooks
from moeca_compile.expert_dispatch.proof.attempt import Candidate, Harness, ModuleHarness
from moeca_compile.expert_dispatch.proof.experts import ExpertBody, ModuleExperts, Recogniser, barred, change, members
from moeca_compile.expert_dispatch.proof.passed import passed
from moeca_compile.expert_dispatch.report import PreparedModule, PrepareReport
from moeca_compile.expert_dispatch.routed import Experts
from moeca_compile.expert_dispatch.source.loop import GUARDED, Loop
from moeca_compile.expert_dispatch.source.method_source import loads
from moeca_compile.graph.regions import Rejected

FAMILIES = (
    masked_branches.FAMILY,  # branches on empty masks; first, because a loop of any kind may stand behind them
    gshard.FAMILY,  # capacity tensors, whose sizes come from the same counts as
    numpy_loop.FAMILY,  # sorted segments, counts on the host; first, because its code may use where() as well
    nonzero_loop.FAMILY,  # a mask per expert
)

_Dispatch = tuple[str, str, str]  # the path of a module, that of the experts, why it is left as it is

_COMBINED = (masked_branches.FAMILY, gshard.FAMILY)  # those that take a `forward` with its helpers put into it

_REMEDY = (
    "Left as it is: Dynamo breaks its graph there. Write it as a method f(self, x[T,D], ids[T,K], weights[T,K]) that "
    "returns the weighted sum over (gated) MLP experts, or call torch.ops.moeca.experts in it"
)


def prepare(model: nn.Module) -> PrepareReport:
    """Find expert dispatches that Dynamo can't trace and let compilers see `moeca::experts` in their place.

    Recognised by structure and proven by running both forms on small random tensors; nothing is replaced on faith.
    Plain eager calls, and modules in training mode, run the original code bit for bit. Parameters, buffers and the
    state dict stay as they are, later changes of the weights are followed, and `copy.deepcopy` gives a prepared copy
    with its own weights. Adapters and quantised weights that are on the experts, or are put there later, are followed
    too: every expert then runs on every token, by its own forward. Experts with hooks (offloading, casting layer by
    layer), or replaced by other ones, run the original code until the model is prepared again.

    Args:
        model: any module; changed in place. Preparing it again changes nothing.

    Returns:
        What was changed, which experts run by their own forward, and what looked like a dispatch and was left alone,
        each with the reason.
    """
    worker = _Worker()
    changed: list[PreparedModule] = []
    rejected: list[Rejected] = []
    left: dict[_Dispatch, Rejected] = {}
    nearest: dict[str, str] = {}  # by path of the experts: the innermost module with a method that dispatches to them
    followed: list[Rejected] = []
    for path, module in model.named_modules():
        for loop, outcome in worker.outcomes(module):
            experts = ".".join((path, *loop.stack)).strip(".")
            nearest[experts] = path
            if isinstance(outcome, Installed):
                changed.append(_describe(path, module, outcome))
            else:
                remedy = "" if any(True for _ in hooks(module)) else f". {_REMEDY}"
                reason = f"the expert dispatch in {type(module).__name__}.{loop.name}: {outcome}{remedy}"
                left.setdefault((path, experts, outcome), Rejected(reason, path or "(root)", loop.where))
        followed += _followed(path, module)
        for name, function, place in hidden(module):
            reason = (
                f"{type(module).__name__}.{name} gives its experts' weights to {function}, an autograd function that "
                f"reads numbers of rows out of a tensor. {_REMEDY}"
            )
            rejected.append(Rejected(reason, path or "(root)", place))
        for name, stack in unreadable(module).items():
            if isinstance(worker.recogniser.body_of(members(module, stack)), ExpertBody):
                reason = f"{type(module).__name__}.{name} uses experts but has no source that can be read. {_REMEDY}"
                rejected.append(Rejected(reason, path or "(root)"))
    # A block around the layer holds the same dispatch with its helpers put in.
    found = [miss for (path, experts, _), miss in left.items() if nearest[experts] == path]
    return PrepareReport(tuple(changed), (*found, *rejected), tuple(followed))


def _followed(path: str, module: nn.Module) -> Iterator[Rejected]:
    for note in installed(module).values():
        experts = note.rewrite.experts
        if isinstance(experts, (ModuleExperts, AnyExperts)):
            reason = change(members(module, experts.stack))
            if reason:
                yield Rejected(reason, path or "(root)")


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
        self.proven: dict[Hashable, Candidate] = {}
        self.refused: dict[Hashable, str | None] = {}

    def outcomes(self, module: nn.Module) -> Iterator[tuple[Loop, Installed | str]]:
        """What became of each dispatch in a module, those that inference doesn't reach left out. One whose experts have
        changed since is proven anew; if that can't be, its patch stays, which leaves the original code to compilers."""
        stale = {n: vars(module)[n] for n, note in installed(module).items() if note.condition(module) == CHANGED}
        for name in stale:
            del module.__dict__[name]
        yield from self._outcomes(module)
        for name, patch in stale.items():
            if not installed(module):
                module.__dict__[name] = patch

    def _outcomes(self, module: nn.Module) -> Iterator[tuple[Loop, Installed | str]]:
        if any(note.rewrite.source.helpers for note in installed(module).values()):
            return  # one method holds them all
        whole, plain = find_whole(module), find_loops(module)
        if any(GUARDED in loop.evidence for loop in whole) or not plain:
            tried = [(loop, self.prepare(module, loop)) for loop in whole if _family(loop) in _COMBINED]
            done = [(loop, outcome) for loop, outcome in tried if outcome is not None]
            yield from [one for one in done if isinstance(one[1], Installed)] or done[:1]
        if not installed(module):
            for loop in plain:
                outcome = self.prepare(module, loop)
                if outcome is not None:
                    yield loop, outcome

    def prepare(self, module: nn.Module, loop: Loop) -> Installed | str | None:
        """Install a patch and say which; or why not; or None where inference doesn't reach the loop."""
        if loop.name in installed(module):
            return None
        if replaced(module, loop.name):
            return f"{loop.name} was replaced on this instance (offloading or adapter hooks?): prepare before that"
        family = _family(loop)
        if family is None:
            return None
        found = self._propose(family, module, loop)
        if not isinstance(found, tuple):
            return found
        harness, candidate = found
        problem = harness.disagreement_on_own_weights(candidate)
        if problem:
            return f"{problem} (on its own weights)"
        install(module, candidate.rewrite, family.name, verified=not harness.on_meta)
        return installed(module)[loop.name]

    def _propose(self, family: Family, module: nn.Module, loop: Loop) -> tuple[Harness, Candidate] | str | None:
        experts = None if loop.packed else self._experts(module, loop.stack)
        if isinstance(experts, str):
            return None if loop.combined else experts  # a forward with helpers in it may be that of any model
        # Which labels a proof of straightened branches was run with depends on settings.
        settings = _settings(module) if loop.combined else None
        key: Hashable = (type(module), loop.name, loop.line, loop.source, experts, settings)
        known = self.proven.get(key)
        if known is not None:
            harness = _harness(module, known.rewrite.experts)
            if not harness.disagreement(known, seeds=(1, 2)) and reaches(harness, loop, known.entry):
                return harness, known
        # What was refused may be right under other settings.
        exact = (key, _settings(module))
        if exact not in self.refused:
            found = _search(family, module, loop, experts)
            if isinstance(found, Candidate):
                harness = _harness(module, found.rewrite.experts)
                found = self.proven[key] = _pinned(harness, found, loop)
                return harness, found
            self.refused[exact] = found
        return self.refused[exact]

    def _experts(self, module: nn.Module, stack: tuple[str, ...]) -> ModuleExperts | AnyExperts | str:
        experts = members(module, stack)
        body = self.recogniser.body_of(experts)
        if isinstance(body, ExpertBody):
            return ModuleExperts(stack, body)
        found = body if barred(experts) else generic.recognise(stack, experts)
        return found if isinstance(found, AnyExperts) else f"{body}; {found}" if found != body else body


def _pinned(stand: Harness, candidate: Candidate, loop: Loop) -> Candidate:
    """With the arguments that the proof depends on: numbers, flags and Nones that were the same in all of its runs, and
    that the loop reads; of flags of the entry's own method those whose other value the proof doesn't hold for."""
    entry, rewrite = candidate.entry, candidate.rewrite
    inside = set().union(*map(loads, loop.nest)) if loop.nest else set()
    pins = []
    for one in passed(stand, entry, loop.name):
        if type(one.value) is bool and entry.method == loop.name:
            turned = replace(entry, flags=tuple({**dict(entry.flags), one.name: not one.value}.items()))
            if stand.disagreement(replace(candidate, entry=turned), seeds=(1, 2, 3)):
                pins.append(one)
        elif type(one.value) is bool or one.name in inside:
            pins.append(one)
    return replace(candidate, rewrite=replace(rewrite, pins=tuple(pins)))


def _family(loop: Loop) -> Family | None:
    return next((family for family in FAMILIES if family.claims(loop)), None)


def _settings(module: nn.Module) -> Hashable:
    """The plain attributes of a module and all in it."""
    plain = (bool, int, float, str, type(None))
    return tuple((path, k, v) for path, m in module.named_modules() for k, v in vars(m).items() if isinstance(v, plain))


def _search(
    family: Family, module: nn.Module, loop: Loop, experts: ModuleExperts | AnyExperts | None
) -> Candidate | str | None:
    try:
        if experts is None:
            return packed.propose(module, loop, family.layouts)
        return family.propose(ModuleHarness(module, experts), loop, family.layouts)
    except Exception as error:  # whatever a copy of somebody's module can raise
        return f"no copy of it can be tried out ({type(error).__name__}: {error})"


def _harness(module: nn.Module, experts: Experts) -> Harness:
    if isinstance(experts, (ModuleExperts, AnyExperts)):
        return ModuleHarness(module, experts)
    return packed.PackedHarness(module, experts)


def _describe(path: str, module: nn.Module, note: Installed) -> PreparedModule:
    experts, dense = note.rewrite.experts, note.rewrite.experts.exhaustive or note.rewrite.routed is None
    count = experts.count(module)
    return PreparedModule(path, note.family, count, experts.activation, experts.gated, note.verified, dense)
