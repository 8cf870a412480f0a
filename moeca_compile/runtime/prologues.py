"""Hoisted values of one stream of a bundle: what doesn't depend on the latent, computed by graphs of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeca_compile.runtime.bundle.manifest import PrologueSpec
from moeca_compile.runtime.providers.provider import Loaded

Prologue = tuple[PrologueSpec, Loaded]


class HoistedValues:
    """The hoisted values of one stream. A prologue runs when a step needs its values and an input that it takes isn't
    the one of its last run: in a denoising loop once a trajectory, or once a timestep.

    Args:
        prologues: of the bundle, in an order in which each comes after those whose values it takes.
    """

    def __init__(self, prologues: Sequence[Prologue]) -> None:
        self._prologues = prologues
        self._values: dict[str, Any] = {}
        self._inputs: dict[str, dict[str, Any]] = {}  # by prologue, copies of the inputs of its last run

    def of(self, names: Sequence[str], feeds: Mapping[str, Any]) -> dict[str, Any]:
        """The values of these names for a call, by the names of a graph's inputs.

        Args:
            names: of hoisted values.
            feeds: the call's inputs, as a runtime stores them.
        """
        for spec, loaded in self.needed(names):
            if self.is_stale(spec, feeds):
                self.put(spec, feeds, loaded.run(self.feeds(spec, feeds)))
        return {f"{name}_in": self._values[name] for name in names}

    def needed(self, names: Sequence[str]) -> list[Prologue]:
        """The prologues that these values come from, in the order in which they run."""
        needed = set(names)
        for spec, _ in reversed(self._prologues):
            if not needed.isdisjoint(spec.gives):
                needed.update(spec.hoists)
        return [(spec, loaded) for spec, loaded in self._prologues if not needed.isdisjoint(spec.gives)]

    def is_stale(self, spec: PrologueSpec, feeds: Mapping[str, Any]) -> bool:
        """Whether a prologue must run for a call: it never did, or took other inputs."""
        last = self._inputs.get(spec.name)
        return last is None or not all(np.array_equal(last[name], feeds[name]) for name in spec.takes)

    def feeds(self, spec: PrologueSpec, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """What a prologue takes: inputs of the call, and values of the prologues before it."""
        return {name: feeds[name] for name in spec.takes} | {f"{name}_in": self._values[name] for name in spec.hoists}

    def put(self, spec: PrologueSpec, feeds: Mapping[str, Any], results: Sequence[Any]) -> None:
        """Keep what a prologue gave for a call."""
        self._values |= dict(zip(spec.gives, results, strict=True))
        for other, _ in self._prologues:
            if not set(other.hoists).isdisjoint(spec.gives):  # its values are of older ones
                self._inputs.pop(other.name, None)
        self._inputs[spec.name] = {name: feeds[name].copy() for name in spec.takes}
