"""Give every recognized expert dispatch in a model its traceable form, in place."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from moeca_compile.expert_dispatch.module_code import ModuleCode
from moeca_compile.expert_dispatch.patch import Installed, installed, uninstall
from moeca_compile.expert_dispatch.proof.anatomy import hooks
from moeca_compile.expert_dispatch.proof.any_experts import AnyExperts
from moeca_compile.expert_dispatch.proof.experts import ExpertBody, ModuleExperts, change, members
from moeca_compile.expert_dispatch.report import PreparedModule, PrepareReport
from moeca_compile.expert_dispatch.search import Search
from moeca_compile.graph.regions import Rejected

_Dispatch = tuple[str, str, str]  # the path of a module, that of the experts, why it is left as it is

_REMEDY = (
    "Left as it is: Dynamo breaks its graph there. Write it as a method f(self, x[T,D], ids[T,K], weights[T,K]) that "
    "returns the weighted sum over (gated) MLP experts, or call torch.ops.moeca.experts in it"
)


def prepare(model: nn.Module) -> PrepareReport:
    """Find expert dispatches that Dynamo can't trace and let compilers see `moeca::experts` in their place.

    Recognized by structure and proven by running both forms on small random tensors; nothing is replaced on faith.
    Plain eager calls, and modules in training mode, run the original code bit for bit. Parameters, buffers and the
    state dict stay as they are, later changes of the weights are followed, and `copy.deepcopy` gives a prepared copy
    with its own weights. Adapters and quantized weights that are on the experts, or are put there later, are followed
    too: every expert then runs on every token, by its own forward. Experts with hooks (offloading, casting layer by
    layer), or replaced by other ones, run the original code until the model is prepared again.

    Args:
        model: any module; changed in place. Preparing it again changes nothing.

    Returns:
        What was changed, which experts run by their own forward, and what looked like a dispatch and was left alone,
        each with the reason.
    """
    search = Search()
    changed: list[PreparedModule] = []
    rejected: list[Rejected] = []
    left_alone: dict[_Dispatch, Rejected] = {}
    innermost: dict[str, str] = {}  # by path of the experts: the innermost module with a method that dispatches to them
    followed: list[Rejected] = []
    for path, module in model.named_modules():
        code = ModuleCode(module)
        for loop, outcome in search.outcomes(code):
            experts = ".".join((path, *loop.stack)).strip(".")
            innermost[experts] = path
            if isinstance(outcome, Installed):
                changed.append(_describe(path, module, outcome))
            else:
                remedy = "" if any(True for _ in hooks(module)) else f". {_REMEDY}"
                reason = f"the expert dispatch in {type(module).__name__}.{loop.name}: {outcome}{remedy}"
                left_alone.setdefault((path, experts, outcome), Rejected(reason, path or "(root)", loop.where))
        followed += _followed(path, module)
        for name, function, place in code.hidden():
            reason = (
                f"{type(module).__name__}.{name} gives its experts' weights to {function}, an autograd function that "
                f"reads numbers of rows out of a tensor. {_REMEDY}"
            )
            rejected.append(Rejected(reason, path or "(root)", place))
        for name, stack in code.unreadable().items():
            if isinstance(search.recognizer.body_of(members(module, stack)), ExpertBody):
                reason = f"{type(module).__name__}.{name} uses experts but has no source that can be read. {_REMEDY}"
                rejected.append(Rejected(reason, path or "(root)"))
    # A block around the layer holds the same dispatch with its helpers put in.
    nearest = [miss for (path, experts, _), miss in left_alone.items() if innermost[experts] == path]
    return PrepareReport(tuple(changed), (*nearest, *rejected), tuple(followed))


def _followed(path: str, module: nn.Module) -> Iterator[Rejected]:
    for note in installed(module).values():
        experts = note.rewrite.experts
        if isinstance(experts, (ModuleExperts, AnyExperts)):
            reason = change(members(module, experts.stack))
            if reason:
                yield Rejected(reason, path or "(root)")


def unprepare(model: nn.Module) -> int:
    """Take back what `prepare` did.

    Args:
        model: any module; changed in place.

    Returns:
        How many methods were restored.
    """
    return sum(uninstall(module) for module in model.modules())


def prepared(model: nn.Module) -> tuple[PreparedModule, ...]:
    """The modules that `prepare` has changed.

    Args:
        model: any module.

    Returns:
        Their reports, in module order; empty, so false, where there are none.
    """
    reports: list[PreparedModule] = []
    for path, module in model.named_modules():
        reports += [_describe(path, module, note) for note in installed(module).values()]
    return tuple(reports)


def _describe(path: str, module: nn.Module, note: Installed) -> PreparedModule:
    experts, dense = note.rewrite.experts, note.rewrite.experts.exhaustive or note.rewrite.routed is None
    count = experts.count(module)
    return PreparedModule(path, note.family, count, experts.activation, experts.gated, note.verified, dense)
