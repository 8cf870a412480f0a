"""What pages say in sentences and tables of their own is what the committed results have."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.docs.pages import ROOT, text_of

if not (ROOT / "docs").exists():
    pytest.skip("needs the checkout", allow_module_level=True)

from benchmarks.peers.equal import page
from benchmarks.peers.equal.equal_time import steps_in_our_time
from benchmarks.tasks import TASKS
from examples import digits, glyphs

RESULTS = ROOT / "benchmarks/results"
COMPARED = "docs/explanation/compared.md"
FITTED, POLYNOMIAL, REGIONS = "output, fitted to uncached", "output, polynomial", "regions, polynomial"
OTHER_STEPS = {"25 steps", "40 steps", "100 steps"}


def result_of(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def says(page_name: str, sentence: str) -> bool:
    """Whether a page says so, wherever its lines end."""
    return sentence in " ".join(text_of(page_name).split())


def shown_leads() -> dict[tuple[str, str, str, int], str]:
    """Cells of the table of rivals, by task, truth, rival and count."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text_of(COMPARED).splitlines()
        if line.startswith(tuple(f"| {task} |" for task in TASKS))
    ]
    return {
        (task, truth, rival, count): cell
        for task, truth, rival, *cells in rows
        for count, cell in zip((25, 17, 13, 10), cells, strict=True)
    }


def measured_leads() -> dict[tuple[str, str, str, int], str]:
    """The same of all rivals, as docs/peers.md and docs/peers-glyphs.md have them."""
    return {
        (task.name, truth, line["name"], line["count"]): page._lead(line, truth)
        for task in TASKS.values()
        for line in page.marked(result_of(task.results_of("peers_equal"))["lines"])
        if line["kind"] != "moeca"
        for truth in page.TRUTHS
    }


def test_the_page_of_others_shows_the_measured_leads() -> None:
    shown, measured = shown_leads(), measured_leads()
    assert len(shown) >= 30
    assert {place: measured[place] for place in shown} == shown


def test_the_page_of_others_shows_every_rival_that_is_level() -> None:
    """Bold cells are the exceptions that the page names; all others are behind."""
    shown = {place for place, cell in shown_leads().items() if cell.startswith("**")}
    assert shown == {place for place, cell in measured_leads().items() if cell.startswith("**")}


def test_the_page_of_others_tells_the_steps_of_equal_time() -> None:
    timed = {name: result_of(task.results_of("peers_latency")) for name, task in TASKS.items()}
    steps = {name: round(steps_in_our_time(result, 17, 50)) for name, result in timed.items()}
    assert says(COMPARED, f"it computes {steps['digits']} steps on the digits and {steps['glyphs']} on the glyphs")
    for name, task in TASKS.items():
        leads = [line["lead_db"] for line in result_of(task.results_of("peers_equal_time"))["lines"]]
        ahead, behind = sum(mean > half for mean, half in leads), sum(mean < -half for mean, half in leads)
        level = len(leads) - ahead - behind
        assert says(COMPARED, f"ahead in {ahead}, level in {level} and behind in {behind} on the {name}")


def change(line: dict[str, Any], first: dict[str, Any], name: str) -> float:
    return float(line["psnr_db"][name][0] - first["psnr_db"][name][0])


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        (
            "transfer",
            "bfloat16 costs it more: {0} dB, where the schedule of regions loses {1} dB and the polynomial {2} dB. "
            "In all these cases the fitted schedule stays ahead of both.",
        ),
        (
            "transfer_glyphs",
            "bfloat16 costs the fitted schedule {0} dB, that of regions {1} dB, and the polynomial less than 0.1 dB.",
        ),
    ],
)
def test_what_another_condition_costs(file: str, sentence: str) -> None:
    first, *others = result_of(file)["lines"]
    lines = {line["condition"]: line for line in others if line["condition"] not in OTHER_STEPS}
    in_half = lines.pop("bfloat16")
    costs = [f"{-change(in_half, first, name):.1f}" for name in (FITTED, REGIONS, POLYNOMIAL)]
    assert says("docs/fitted.md", sentence.format(*costs))
    assert file == "transfer" or float(costs[2]) < 0.1
    for line in lines.values():
        apart = [change(line, first, FITTED) - change(line, first, name) for name in (REGIONS, POLYNOMIAL)]
        assert max(map(abs, apart)) < 2.05, line["condition"]
    assert all(mean - half > 0 for line in [*lines.values(), in_half] for mean, half in line["lead_db"].values())


def test_the_readme_tells_what_few_steps_gain() -> None:
    gains = few_steps("few_steps")
    assert says("README.md", f"3 of 4 steps come {gains[4, 3]:.1f} dB, 6 of 8 come {gains[8, 6]:.1f} dB nearer")


def test_the_list_of_benchmarks_has_every_command() -> None:
    listed = text_of("benchmarks/README.md")
    commands = [path for path in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert len(commands) > 20
    assert [path.name for path in commands if f"`{path.name}`" not in listed] == []


def few_steps(result: str) -> dict[tuple[int, int], float]:
    """By all and computed steps, how much nearer to the converged samples than the uncached run, in dB."""
    return {
        (table["steps"], line["computed"]): line["lead_db"]["converged"][0]
        for table in result_of(result)["tables"]
        for line in table["lines"]
        if line["name"] == "output, fitted to converged"
    }


def test_the_page_of_few_steps_tells_what_glyphs_gain() -> None:
    page, gains = "docs/few-steps.md", few_steps("few_steps_glyphs")
    assert says(page, f"6 of 8 steps come {gains[8, 6]:.1f} dB nearer to them than the uncached run")
    assert says(page, f"9 of 12 come {gains[12, 9]:.1f} and 6 of 12 come {gains[12, 6]:.1f} dB nearer")
    assert abs(gains[4, 3]) < 0.15
    assert max(gains[4, 2], gains[8, 4], gains[12, 4]) < 0


def test_the_page_of_few_steps_tells_what_the_graph_gives() -> None:
    computed = result_of("exact")["computed"]
    packed = computed["moeca, packed experts"]["speedup"]
    assert says("docs/few-steps.md", f"a computed step is {computed['moeca']['speedup']:.2f} times as fast")
    assert says("docs/few-steps.md", f"it was {packed:.2f} times as fast")


def gmacs(model: nn.Module, *inputs: torch.Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    return counter.get_total_flops() / 2e9


def test_a_call_of_the_glyphs_model_is_no_more_work() -> None:
    times = torch.full((2,), 500.0)  # one image with guidance
    of_digits = gmacs(digits.load_model(), digits.initial_noise(0, 2), times, digits.labels_of(2))
    of_glyphs = gmacs(glyphs.load_model(), glyphs.initial_noise(0, 2), times, glyphs.labels_of(2))
    assert of_glyphs < of_digits
    assert says(
        "docs/fitted.md",
        f"{of_glyphs:.3f} GMACs for an image with guidance, where the digits model takes {of_digits:.3f}",
    )
