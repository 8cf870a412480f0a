"""What a schedule's columns are: every region by itself, or one span of consecutive blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moeca_compile.errors import OptionError

FORMS = "'region', 'stack', 'blocks:START:STOP' (a Python slice of the blocks), 'skip:KEPT'"


@dataclass(frozen=True, slots=True)
class Granularity:
    """`kind` is `region`, `blocks` or `skip`.

    `start` and `stop` slice the model's blocks. With `relative` what is kept is the change that the blocks make to what
    enters them, so that the blocks before them go on to matter; else it is what leaves them. `kept` is how many outer
    blocks on each side of a long skip stay computed: the span is what lies between that skip's ends (Skip-DiT,
    arXiv 2411.17616).
    """

    kind: str
    start: int | None = None
    stop: int | None = None
    relative: bool = False
    kept: int = 0

    @classmethod
    def parse(cls, text: str) -> Granularity:
        """Read `region`, `stack`, `blocks:2:-2`, `skip:1`.

        Raises:
            OptionError: another text.
        """
        if text == "region":
            return cls("region")
        if text == "stack":
            return cls("blocks")
        if found := re.fullmatch(r"blocks:(-?\d+)?:(-?\d+)?", text):
            start, stop = (int(one) if one else None for one in found.groups())
            return cls("blocks", start, stop, relative=True)
        if found := re.fullmatch(r"skip:([1-9]\d*)", text):
            return cls("skip", kept=int(found[1]))
        raise OptionError(f"granularity={text!r} is not understood; use {FORMS}")
