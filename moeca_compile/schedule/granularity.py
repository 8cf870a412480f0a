"""Granularity: whether the columns of a schedule are single regions or one span of consecutive blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moeca_compile.errors import OptionError

OUTPUT = "output"
FORMS = "'region', 'stack', 'output', 'blocks:START:STOP' (a Python slice of the blocks), 'skip:KEPT'"


@dataclass(frozen=True, slots=True)
class Granularity:
    """What is cached as one unit.

    Attributes:
        kind: `region`, `blocks`, `skip` or `output` (what the whole model returns).
        start, stop: slice of the model's blocks, for `blocks`.
        relative: cache the change that the blocks make to their input, so that the blocks before the span still affect
            the result. If False, the output of the blocks is cached.
        outer: number of outer blocks on each side of a long skip connection that stay computed, for `skip`. The span
            lies between the ends of that skip connection (Skip-DiT, arXiv 2411.17616).
    """

    kind: str
    start: int | None = None
    stop: int | None = None
    relative: bool = False
    outer: int = 0

    @classmethod
    def parse(cls, text: str) -> Granularity:
        """Read `region`, `stack`, `blocks:2:-2`, `skip:1`, `output`.

        Raises:
            OptionError: the text has another form.
        """
        if text == "region":
            return cls("region")
        if text == OUTPUT:
            return cls(OUTPUT)
        if text == "stack":
            return cls("blocks")
        if match := re.fullmatch(r"blocks:(-?\d+)?:(-?\d+)?", text):
            start, stop = (int(bound) if bound else None for bound in match.groups())
            return cls("blocks", start, stop, relative=True)
        if match := re.fullmatch(r"skip:([1-9]\d*)", text):
            return cls("skip", outer=int(match[1]))
        raise OptionError(f"granularity={text!r} is not understood; use {FORMS}")
