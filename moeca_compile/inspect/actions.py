"""What an action does with a region, in words: pages, grids and legends say the same."""

from __future__ import annotations

from moeca_compile.schedule import Act, Action, Partial

EXPERTS = "experts"  # the kind of a region whose branches can be computed one by one
_WHOLE = {Action.COMPUTE: "computed", Action.REUSE: "skipped, reused", Action.FORECAST: "skipped, forecast"}


def does(act: Act, kind: str = EXPERTS) -> str:
    """What a step does with a region.

    Args:
        act: the action.
        kind: of the region. Only experts have branches; elsewhere PARTIAL computes tokens alone.

    Returns:
        Words that complete "this region is", such as `skipped, forecast`.
    """
    if isinstance(act, Action):
        return _WHOLE[act]
    parts = [f"{_percent(act.rho)} of the tokens"] if act.rho else []
    if kind == EXPERTS and act.tau and act.rho < 1:
        beyond = "beyond them " if parts else ""
        parts.append(f"{beyond}{_percent(act.tau)} of the expert branches")
    shared = "; the shared experts of all tokens are computed" if kind == EXPERTS and act.shared else ""
    if not parts:
        return _WHOLE[Action.FORECAST] + shared
    return f"computed in part: {' and '.join(parts)}, chosen at each step; the others are skipped, forecast{shared}"


def legend(act: Act) -> str:
    """An action in a legend of a grid: its name, and for PARTIAL what it computes."""
    name = act.name.lower() if isinstance(act, Action) else str(act).lower()
    return f"{name}, {does(act)}" if isinstance(act, Partial) else name


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"
