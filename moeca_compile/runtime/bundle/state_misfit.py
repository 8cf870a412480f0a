"""Which state a schedule needs, and what each of its rows writes and may read: what a bundle must have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moeca_compile.graph.variant import KEYS, MODEL, SLOTS, Slot, item_slots
from moeca_compile.runtime.bundle.manifest import Manifest, StateSpec
from moeca_compile.schedule import Act, Action, Partial, Row, Schedule

Place = tuple[int, int, str]  # region, output, slot


def state_misfit(manifest: Manifest, schedule: Schedule) -> str:
    """Why the manifest's state isn't what the schedule needs; "" if it is."""
    by_region: dict[int, list[StateSpec]] = {}
    for spec in manifest.state:
        by_region.setdefault(spec.region, []).append(spec)
    places: list[Place] = []
    for region in range(manifest.regions):
        needed = _items if schedule.partials(region) else _outputs
        pairs = needed(schedule, region, by_region.get(region, []))
        places += [(region, output, slot.value) for output, slot in pairs]
    if schedule.adaptive is not None:
        places += [(MODEL, 0, slot.value) for slot in (*item_slots(schedule.order), Slot.FIGURE)]
    if [(spec.region, spec.output, spec.slot) for spec in manifest.state] != places:
        return "state and schedule differ"
    names = [f"state_{i:03d}" for i in range(len(manifest.state))]
    return "" if [spec.name for spec in manifest.state] == names else "state has other names than its places"


def _outputs(schedule: Schedule, region: int, specs: Sequence[StateSpec]) -> Iterator[tuple[int, Slot]]:
    """Of a region that is computed or cached as a whole: its last outputs."""
    depth = schedule.depth(region)
    for output in range(max((spec.output + 1 for spec in specs), default=1 if depth else 0)):
        for slot in SLOTS[:depth]:
            yield output, slot


def _items(schedule: Schedule, region: int, specs: Sequence[StateSpec]) -> Iterator[tuple[int, Slot]]:
    """Of a region that some row recomputes in part: what is kept of each token, or of each expert branch and of each
    token of what lies beside the branches. How many parts it has is the model's."""
    has, value = {(spec.output, spec.slot) for spec in specs}, item_slots(schedule.order)
    by_drift = schedule.control.score == "drift"
    if (0, Slot.HELD) not in has:
        score = (Slot.DRIFT, Slot.ENTERED) if by_drift else (Slot.ERROR,)
        keys = [slot for slot in KEYS if (0, slot) in has]
        for slot in (*value, *score, *keys):
            yield 0, slot
        return
    score = (Slot.DRIFT, Slot.SCORES) if by_drift else (Slot.ERROR,)
    for slot in (Slot.HELD, Slot.GATES, *value, *score):
        yield 0, slot
    for output in range(1, 1 + max(spec.output for spec in specs)):
        for slot in value:
            yield output, slot


def written(manifest: Manifest, schedule: Schedule, row: Row) -> tuple[str, ...]:
    """The states that the variant of a row writes."""
    has_branches = {spec.region for spec in manifest.state if spec.slot == Slot.HELD}
    names = []
    is_full = all(act is Action.COMPUTE for act in row)
    for spec in manifest.state:
        act = row[spec.region]
        if spec.region == MODEL:
            writes = is_full or spec.slot == Slot.FIGURE
        elif not schedule.partials(spec.region):
            writes = act is Action.COMPUTE and spec.slot == Slot.Y0
        else:
            writes = _writes_items(act, spec.region in has_branches, spec.output)
        if writes:
            names.append(spec.name)
    return tuple(names)


def _writes_items(act: Act, has_branches: bool, output: int) -> bool:
    if not isinstance(act, Partial):
        return act is Action.COMPUTE
    if not has_branches:
        return act.rho > 0
    return act.rho > 0 or (act.shared if output else act.tau > 0)


def readable(manifest: Manifest, schedule: Schedule, row: Row) -> set[str]:
    """The states that the variant of a row may read."""
    names = set()
    for spec in manifest.state:
        if spec.region == MODEL:
            reads = spec.slot != Slot.FIGURE
        else:
            reads = bool(schedule.partials(spec.region)) or row[spec.region] is not Action.COMPUTE
        if reads:
            names.add(spec.name)
    return names
