"""Random architectures: what must be found is found, nothing else is, and what is cached follows the oracle."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from moeca_compile.graph.regions import Rejected
from moeca_compile.schedule import Action, Schedule
from tests.architectures import parts as choices
from tests.architectures import show
from tests.architectures.check import Finding, find
from tests.architectures.expected import differences
from tests.architectures.experts import DISPATCHES, TRACEABLE
from tests.architectures.generate import build, generate
from tests.architectures.parts import draw
from tests.following import Runner, Subject, assert_follows_the_oracle

SEEDS, QUICK, EVERY = 240, 5, 4
ANY = 0


def seeds(step: int = 1) -> list[Any]:
    """Parameters: every `step`-th seed; all but the first few are slow."""
    return [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= QUICK)) for seed in range(0, SEEDS, step)]


@pytest.fixture(scope="module", params=seeds(EVERY))
def running(request: pytest.FixtureRequest) -> tuple[Finding, Subject]:
    """One model for several tests."""
    finding = find(draw(request.param))
    if not len(finding.regions):
        pytest.skip("nothing to cache was found: the test of what must be found says so")
    return finding, finding.subject


@pytest.mark.parametrize("seed", seeds())
def test_what_must_be_found_is_found_and_nothing_else(seed: int) -> None:
    finding = find(draw(seed))
    assert not finding.differences, str(finding)


def schedule(finding: Finding, text: str) -> Schedule:
    return Schedule.parse(text, order=1).bind(finding.regions.keys, finding.regions.fingerprint)


def test_everything_computed_is_the_model_itself(running: tuple[Finding, Subject]) -> None:
    """Bit by bit, but for expert dispatches that were given another form."""
    finding, one = running
    full = schedule(finding, "full")
    (result,) = Runner(one, full)(full.rows[0], one.call(1))
    exact = finding.parts.dispatch in ("", *TRACEABLE)
    near = 0.0 if exact else 0.02 if finding.parts.dtype == "bfloat16" else 1e-5
    torch.testing.assert_close(result, one.eager(1), rtol=near, atol=near, msg=lambda text: f"{finding}\n{text}")


def test_every_second_step_forecast_is_what_the_oracle_says(running: tuple[Finding, Subject]) -> None:
    finding, one = running
    second = schedule(finding, "uniform:2")
    assert_follows_the_oracle(one, Runner(one, second), second.rows[:2] * 3)


def test_a_skipped_region_saves_what_it_says_it_costs(running: tuple[Finding, Subject]) -> None:
    """Or more: keys and values of a prompt that only a skipped attention reads go with it."""
    finding, one = running
    runner = Runner(one, schedule(finding, "uniform:2"))
    skipped, _ = runner.variant((Action.FORECAST,) * len(finding.regions))
    bodies = {name for region in finding.regions for name in region.body}
    macs = dict(finding.analysis.facts.macs)
    assert skipped.macs <= finding.regions.total_macs - sum(macs.get(name, 0) for name in bodies)


# -- the generator itself ---------------------------------------------------------------------------------------------


def test_every_choice_of_every_part_is_drawn() -> None:
    drawn = [draw(seed) for seed in range(SEEDS)]
    for name, options in vars(choices).items():
        if name.isupper() and isinstance(options, tuple):
            seen = {getattr(one, field.name) for one in drawn for field in fields(one)}
            odd = {one.odd[2] for one in drawn if one.odd}
            assert set(options) <= seen | odd, name
    used = Counter(one.dispatch for one in drawn)
    assert set(used) == {"", *DISPATCHES}


def test_a_seed_always_gives_the_same_model() -> None:
    (one, inputs, expected), (other, again, same) = generate(5), generate(5)
    assert expected == same
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    for left, right in zip(inputs(3).values(), again(3).values(), strict=True):
        assert left is right is None or torch.equal(left, right)


def test_every_matrix_of_a_block_is_expected_in_one_region_or_is_no_region_s() -> None:
    for seed in range(QUICK):
        model, _, expected = build(replace(draw(seed), odd=None))
        named = [name for region in expected.regions for name in region.weights | region.maybe]
        assert len(set(named)) == len(named)
        own = {name for name, value in model.blocks.named_parameters(prefix="blocks") if value.dim() >= 2}
        left = {name for name in own - set(named) if "modulation" not in name}
        assert all(".text.out." in name for name in left), f"seed {seed}: {left}"  # dropped in the last block


@pytest.mark.slow
def test_a_wrong_finding_is_told() -> None:
    finding = find(draw(ANY))
    regions, rejected, expected = finding.regions.regions, finding.regions.rejected, finding.expected
    assert differences(expected, regions, rejected) == []
    assert "not found" in differences(expected, regions[1:], rejected)[0]
    (extra,) = differences(replace(expected, regions=expected.regions[1:]), regions, rejected)
    assert extra.startswith("false region")
    renamed = replace(regions[0], kind="span")
    assert f"{renamed.key} is called span" in differences(expected, (renamed, *regions[1:]), rejected)[0]
    assert (
        "outputs" in differences(expected, (replace(regions[0], cuts=regions[0].cuts * 5), *regions[1:]), rejected)[0]
    )
    (new,) = differences(expected, regions, (*rejected, Rejected("unheard of", "add_1")))
    assert "unheard of" in new


@pytest.mark.slow
def test_show_prints_what_was_found_against_what_was_expected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["show", str(ANY)])
    show.main()
    text = capsys.readouterr().out
    assert f"seed={ANY}" in text
    assert text.endswith("as expected\n")
