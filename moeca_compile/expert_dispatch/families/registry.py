"""The families in the order in which they are asked, and those of one's own."""

from __future__ import annotations

from moeca_compile.errors import OptionError
from moeca_compile.expert_dispatch.families.family import Family
from moeca_compile.expert_dispatch.families.gshard import GShard
from moeca_compile.expert_dispatch.families.masked_branches import MaskedBranches
from moeca_compile.expert_dispatch.families.nonzero_loop import NonzeroLoop
from moeca_compile.expert_dispatch.families.numpy_loop import NumpyLoop

FAMILIES: tuple[Family, ...] = (
    MaskedBranches(),  # NOTE: first; a loop of any kind may stand behind such a branch
    GShard(),  # NOTE: before numpy_loop; its capacity comes from the same counts
    NumpyLoop(),  # NOTE: before nonzero_loop; its code may use where() as well
    NonzeroLoop(),
)

_asked: list[Family] = list(FAMILIES)


def families() -> tuple[Family, ...]:
    """All families, in the order in which they are asked."""
    return tuple(_asked)


def register(family: Family, before: str = "", after: str = "") -> Family:
    """Ask a family of your own for dispatches in all models that are prepared from now on.

    Args:
        family: an object of a subclass of `Family`. Reports call it by its `name`.
        before: the name of the family that is asked next.
        after: the name of the family that was asked last. With neither, `family` is asked last of all: it gets the
            places that no other family matches.

    Returns:
        `family`, unchanged.

    Raises:
        OptionError: no `Family`, a name that is missing or taken, an unknown `before` or `after`, or both of them.
    """
    names = [other.name for other in _asked]
    if not isinstance(family, Family):
        raise OptionError(f"register: expected an object of a subclass of Family, and got {family!r}")
    if not family.name:
        raise OptionError(f"register: {type(family).__name__} has no name. Set the class attribute `name`")
    if family.name in names:
        raise OptionError(f"register: there is a family {family.name} already. Give this one another name")
    if before and after:
        raise OptionError(f"register({family.name}): give before={before!r} or after={after!r}, not both")
    neighbor = before or after
    if neighbor and neighbor not in names:
        raise OptionError(f"register({family.name}): no family {neighbor!r}; there are {', '.join(names)}")
    place = names.index(neighbor) + bool(after) if neighbor else len(names)
    _asked.insert(place, family)
    return family


def unregister(name: str) -> None:
    """Leave a registered family out of models that are prepared from now on. What it has rewritten stays.

    Args:
        name: the family's name.

    Raises:
        OptionError: no family of this name is registered. The built-in ones stay.
    """
    registered = [family for family in _asked if family not in FAMILIES]
    for family in registered:
        if family.name == name:
            _asked.remove(family)
            return
    raise OptionError(f"unregister: no family {name!r} is registered; registered are {[f.name for f in registered]}")
