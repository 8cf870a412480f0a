"""The answer that the generator knows, and how what was found differs from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from moeca_compile.graph.regions import Region, Rejected

# What a miss's reason says, in a word.
SORTS = {
    "a residual around": "around",
    "doesn't depend on the latent": "step only",
    "a residual written as": "written otherwise",
}


Router = tuple[str, int, int]


@dataclass(frozen=True)
class Wanted:
    """A region: its kind, the matrices that it multiplies by (`weights` all, `maybe` some), how many outputs it has.

    `router` is its choice (token, expert, head), among how many, and how many it takes. `attends` is its attention's
    kind; '' where that isn't asked.
    """

    kind: str
    weights: frozenset[str]
    outputs: int = 1
    maybe: frozenset[str] = frozenset()
    router: Router | None = None
    attends: str = ""


@dataclass
class Expected:
    """What must be found, and how many misses of which sort."""

    regions: list[Wanted] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{one.kind} ({one.outputs}): {', '.join(sorted(one.weights))}" for one in self.regions]
        return "\n".join([*lines, f"misses {dict(+self.rejected)}"])


def matrices(prefix: str, *modules: tuple[str, nn.Module | None]) -> frozenset[str]:
    """Names of the matrices in the modules of these names under `prefix`; vectors (norms, biases) aren't counted."""
    return frozenset(
        f"{prefix}.{name}.{inner}"
        for name, module in modules
        if module is not None
        for inner, parameter in module.named_parameters()
        if parameter.dim() >= 2
    )


def differences(expected: Expected, regions: Sequence[Region], rejected: Sequence[Rejected]) -> list[str]:
    """Every way in which regions and misses aren't as expected, in words; empty if they are."""
    return [*_of_regions(expected.regions, regions), *_of_misses(expected, rejected)]


def _of_regions(wanted: Sequence[Wanted], found: Sequence[Region]) -> Iterator[str]:
    left = list(found)
    for one in wanted:
        match = next((region for region in left if one.weights <= _multiplied(region) <= one.weights | one.maybe), None)
        if match is None:
            yield f"not found: {one.kind} of {', '.join(sorted(one.weights))}"
            continue
        left.remove(match)
        if match.kind != one.kind:
            yield f"{match.key} is called {match.kind}, not {one.kind}"
        if len(match.outputs) != one.outputs:
            yield f"{match.key} has {len(match.outputs)} outputs, not {one.outputs}"
        routers = [(router.choice, router.num_experts, router.top_k) for router in match.routers]
        if routers != ([one.router] if one.router else []):
            yield f"{match.key} has the routers {routers}, not {one.router}"
        kinds = {attention.kind for attention in match.attention}
        if one.attends and kinds != {one.attends}:
            yield f"the attention of {match.key} is {kinds}, not {one.attends}"
    for region in left:
        yield f"false region: {region.key}, {region.kind} of {', '.join(sorted(_multiplied(region)))}"


def _of_misses(expected: Expected, rejected: Sequence[Rejected]) -> Iterator[str]:
    found = Counter(sort_of(miss) for miss in rejected)
    for sort in {*found, *expected.rejected}:
        if found[sort] != expected.rejected[sort]:
            reasons = "; ".join(str(miss) for miss in rejected if sort_of(miss) == sort)
            yield f"{found[sort]} misses of sort '{sort}', not {expected.rejected[sort]}: {reasons}"
    yield from (f"a miss without a place: {miss.reason}" for miss in rejected if not miss.node)


def sort_of(miss: Rejected) -> str:
    return next((sort for words, sort in SORTS.items() if words in miss.reason), f"new: {miss.reason}")


def _multiplied(region: Region) -> frozenset[str]:
    return frozenset(name for name, shape in region.parameters if len(shape) >= 2)
