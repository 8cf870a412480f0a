"""Hold what the package finds in a generated model against the answer."""

from __future__ import annotations

from dataclasses import dataclass

import moeca_compile as moeca
from moeca_compile.graph.capture import capture
from moeca_compile.graph.regions import RegionMap
from moeca_compile.pipeline import Analysis, analyze
from tests.architectures.expected import Expected, differences
from tests.architectures.generate import Inputs, build
from tests.architectures.model import Model
from tests.architectures.parts import Parts
from tests.following import Subject
from tests.tools import EAGER, Traced, trace_module, with_casts


@dataclass(frozen=True)
class Finding:
    """A generated model, and what was found in it."""

    parts: Parts
    model: Model
    inputs: Inputs
    expected: Expected
    traced: Traced
    analysis: Analysis

    @property
    def regions(self) -> RegionMap:
        return self.analysis.facts.regions

    @property
    def differences(self) -> list[str]:
        """How what was found isn't what was expected; empty if it is."""
        found = differences(self.expected, self.regions.regions, self.regions.rejected)
        roles = self.analysis.facts.roles
        if (roles.timestep, roles.latent) != ("t", "x"):
            found.append(f"timestep and latent are called {roles.timestep!r} and {roles.latent!r}, not 't' and 'x'")
        return found

    @property
    def subject(self) -> Subject:
        """The same for the oracle, which runs the captured graph."""
        captured = with_casts(capture(self.traced.gm, self.traced.args, self.traced.inputs))
        return Subject(self.model, self.inputs, captured, self.analysis, self.traced.args)

    def __str__(self) -> str:
        shown = f"python -m tests.architectures.show {self.parts.seed}"
        return "\n".join([shown, str(self.parts), *self.differences])


def find(parts: Parts) -> Finding:
    """Prepare, trace and analyze the model of these parts; nothing is compiled."""
    model, inputs, expected = build(parts)
    moeca.prepare(model)
    traced = trace_module(model, *inputs(0).values())
    analysis = analyze(traced.gm, traced.args, traced.inputs, EAGER)
    return Finding(parts, model, inputs, expected, traced, analysis)
