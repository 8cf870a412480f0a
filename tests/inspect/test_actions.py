"""What actions are called in words."""

from __future__ import annotations

import pytest

from moeca_compile.inspect.actions import does, legend
from moeca_compile.schedule import Act, Action, Partial


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        (Action.COMPUTE, "mlp", "computed"),
        (Action.REUSE, "mlp", "skipped, reused"),
        (Partial(0, 0.04), "experts",
         "computed in part: 4 % of the expert branches, chosen at each step; the others are skipped, forecast"),
        (Partial(0, 0.04), "attention", "skipped, forecast"),
        (Partial(0.25, 0.04), "attention",
         "computed in part: 25 % of the tokens, chosen at each step; the others are skipped, forecast"),
        (Partial(0, 0, shared=True), "experts", "skipped, forecast; the shared experts of all tokens are computed"),
    ],
)  # fmt: skip
def test_an_action_is_said_in_words(act: Act, kind: str, words: str) -> None:
    assert does(act, kind) == words


def test_a_legend_names_the_action_and_explains_a_part() -> None:
    assert legend(Action.FORECAST) == "forecast"
    assert legend(Partial(0, 0.04)).startswith("partial(0, 0.04), computed in part: 4 % of the expert branches")
