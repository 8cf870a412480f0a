"""The page in headless Chromium: slider, colors of regions, search, graphs, images, width, names for readers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moeca_compile.graph.regions import Rejected
from moeca_compile.inspect.html.measured import Measured
from moeca_compile.inspect.report import Report
from tests.inspect.reported import report, row

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("the page isn't looked at: no Chromium (apt-get install chromium)", allow_module_level=True)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page isn't looked at: no playwright (pip install playwright)"
)

pytestmark = pytest.mark.filterwarnings("default")  # what the browser's driver warns of is not ours
HOSTILE = "<b id=hostile>&amp;"
WIDTHS = (400, 1280)


def shown(folder: Path) -> Report:
    """12 steps of four kinds, with times, a rejected candidate and a calibration's figures."""
    base = report(str(folder / "graphs.html"))
    rows = tuple(map(row, ("CCCC", "FFFF", "RCFC", "FaFa"))) * 3
    predicted = {"mac_fraction": 0.4, "psnr_db": 50.0, "tried order-1": 50.0, "tried order-2": 49.0}
    made_by = "calibrated for macs:0.4 on 2 seeds: order-1, granularity region"
    schedule = replace(base.schedule, rows=rows, period=0, predicted=predicted, made_by=made_by)
    variants = tuple(replace(base.variants[0], name=f"v{i}", macs=base.total_macs // (i + 1)) for i in range(4))
    call = {"stream": "0", "overhead_ms": 0.5, "macs": 1, "dropped": 0, "full_macs": 1}
    calls = tuple(
        {**call, "step": s, "variant": f"v{s % 4}", "ms": 2.0, "cold": s == 5, "timestep": 1000.0 - s, "row": s % 4}
        for s in range(12)
    )
    rejected = (Rejected("too odd " + HOSTILE, "add_1", "dit.py:7", "x = x + y"),)
    return replace(base, schedule=schedule, variants=variants, calls=calls, rejected=rejected, model=HOSTILE)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    from PIL import Image

    folder = tmp_path_factory.mktemp("report")
    images = [Image.new("L", (8, 8), value) for value in (100, 110)]
    measured = Measured({"all": [float("nan"), *[0.1 * (i + 1) for i in range(11)]]}, {"order-1": [(0.5, 52.0)]})
    path = shown(folder).to_html(folder / "report.html", uncached=images[:1], cached=images[1:], measured=measured)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page at 1280 pixels; at the end it has logged nothing and asked for nothing."""
    opened = browser.new_page(viewport={"width": 1280, "height": 800})
    logged: list[str] = []
    requested: list[str] = []
    opened.on("console", lambda message: logged.append(message.text))
    opened.on("pageerror", lambda error: logged.append(str(error)))
    opened.on("request", lambda request: requested.append(request.url))
    opened.goto(address)
    yield opened
    assert logged == []
    assert [url for url in requested if not url.startswith(("file:", "data:"))] == []
    opened.close()


def actions(page: Any) -> list[str]:
    return [str(node.get_attribute("data-action")) for node in page.query_selector_all(".region")]


def move(page: Any, step: int) -> None:
    page.evaluate(
        "step => { const s = document.getElementById('slider'); s.value = step; s.dispatchEvent(new Event('input')); }",
        step,
    )


def test_the_slider_colors_the_regions(page: Any) -> None:
    assert actions(page) == ["compute"] * 4
    colors = {}
    for step, expected in ((1, ["forecast"] * 4), (2, ["reuse", "compute", "forecast", "compute"]),
                           (3, ["forecast", "partial", "forecast", "partial"])):  # fmt: skip
        move(page, step)
        assert actions(page) == expected
        for node in page.query_selector_all(".region"):
            color = node.evaluate(
                "node => { node.style.transition = 'none'; return getComputedStyle(node).backgroundColor; }"
            )
            colors[node.get_attribute("data-action")] = color
    assert len(set(colors.values())) == 4


def test_the_keyboard_moves_the_step(page: Any) -> None:
    page.focus("#slider")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#where") == "2 / 11"
    page.keyboard.press("End")
    assert page.inner_text("#where") == "11 / 11"
    page.click("#previous")
    assert page.inner_text("#where") == "10 / 11"
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#where") == "9 / 11"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"


def test_a_step_is_said_in_words(page: Any) -> None:
    move(page, 1)
    said = page.inner_text("#told")
    assert "Step 1 · timestep 999 · program v1" in said
    assert "experts skipped, forecast: layers 0, 1 (4 experts each)" in said
    move(page, 5)
    assert "cold: no state was there, so everything was computed" in page.inner_text("#told")
    assert actions(page) == ["compute"] * 4


def test_the_search_finds_the_experts_that_a_step_skips(page: Any) -> None:
    page.fill("#search", "skipped experts step 9")
    assert page.inner_text("#where") == "9 / 11"
    hits = [node.get_attribute("title") for node in page.query_selector_all(".region.hit")]
    assert hits == ["blocks.0.moe", "blocks.1.moe"]
    assert page.inner_text("#hits").startswith("2 regions")
    assert len(page.query_selector_all("#regions tbody tr:not([hidden])")) == 2
    page.fill("#search", "")
    assert page.query_selector_all(".region.hit, .region.dim") == []


@pytest.mark.parametrize(
    ("asked", "step", "answer"),
    [
        ("which experts are skipped at step 8?", 8, "no experts are skipped at step 8: everything is computed"),
        ("attention in part at step 7", 7, "no attention is computed in part at step 7: they are skipped, forecast"),
        ("experts computed step 9", 9, "no experts are computed at step 9: they are skipped, forecast"),
        ("what is reused at step 4", 4, "no region is reused at step 4: everything is computed"),
        ("partial experts in step 1", 1, "no experts are computed in part at step 1: they are skipped, forecast"),
    ],
)
def test_a_search_for_what_a_step_does_not_do_says_so(page: Any, asked: str, step: int, answer: str) -> None:
    page.fill("#search", asked)
    assert page.inner_text("#where") == f"{step} / 11"
    assert page.inner_text("#hits") == answer
    shown = "attention" if "attention" in asked else "experts" if "experts" in asked else ""
    faded = [str(node.get_attribute("aria-label")) for node in page.query_selector_all(".region.dim")]
    assert all(f", {shown}:" not in label for label in faded) if shown else faded == []


def test_a_question_finds_what_a_step_skips(page: Any) -> None:
    page.fill("#search", "Which experts are skipped at step 9?")
    assert [node.get_attribute("title") for node in page.query_selector_all(".region.hit")] == [
        "blocks.0.moe", "blocks.1.moe",
    ]  # fmt: skip
    page.fill("#search", "which step 99")
    assert page.inner_text("#hits") == "there is no step 99: the last one shown is 11"
    assert page.inner_text("#where") == "9 / 11"


def test_a_part_is_explained_and_counts_as_skipped(page: Any) -> None:
    for asked in ("experts skipped at step 3", "partial experts at step 3", "experts forecast step 3"):
        page.fill("#search", asked)
        hits = [node.get_attribute("title") for node in page.query_selector_all(".region.hit")]
        assert hits == ["blocks.0.moe", "blocks.1.moe"], asked
    says = (
        "computed in part: 10 % of the tokens and beyond them 20 % of the expert branches, chosen at each step; "
        "the others are skipped, forecast"
    )
    assert f"experts {says}: layers 0, 1" in page.inner_text("#told")
    assert says in page.inner_text("#step .legend")
    assert "An expert branch is one expert's output for one token" in page.inner_text("#step")


def test_the_search_finds_rejected_candidates_and_nodes_of_graphs(page: Any) -> None:
    page.fill("#search", "too odd")
    assert page.inner_text("#hits") == "0 regions, 1 rejected candidate, 0 passes"
    page.fill("#search", "softmax")
    found = page.query_selector_all(".pass:not([hidden])")
    assert 0 < len(found) < len(page.query_selector_all(".pass"))
    assert all("found" in node.inner_text() for node in found)


def test_a_pass_shows_what_it_changed(page: Any) -> None:
    details = page.query_selector("details[data-pass='v1 drop_dead']")
    details.query_selector("summary").click()
    page.wait_for_selector("details[data-pass='v1 drop_dead'] .graph .removed")
    removed = [node.inner_text() for node in details.query_selector_all(".graph .removed")]
    added = details.query_selector_all(".graph .added")
    assert len(removed) > len(added)
    assert any("torch.ops.aten.scaled_dot_product_attention" in line for line in removed)
    details.query_selector("button:text('Before and after')").click()
    before, after = (
        len(side.query_selector_all(".graph > div")) for side in details.query_selector_all(".sides > div")
    )
    assert after < before


def test_the_difference_of_images_is_drawn(page: Any) -> None:
    page.click("text=Show differences")
    pixel = page.evaluate("[...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 1, 1).data]")
    assert pixel == [80, 80, 80, 255]


def test_plots_are_drawn_and_described(page: Any) -> None:
    labels = [str(node.get_attribute("aria-label")) for node in page.query_selector_all("svg[role=img]")]
    assert len(labels) == 4
    assert any(label.startswith("Drift by step") for label in labels)
    assert "NaN" not in page.inner_html("#main")


def test_controls_and_regions_have_names(page: Any) -> None:
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, img, canvas, svg, .region, .scroll, section')].filter(node => "
        "!(node.getAttribute('aria-label') || node.getAttribute('aria-labelledby') || node.alt || node.innerText || "
        "(node.labels && node.labels.length))).map(node => node.outerHTML.slice(0, 80))"
    )
    assert unnamed == []


def test_the_granularity_is_named_once(page: Any) -> None:
    assert page.inner_text("#subtitle").count("granularity region") == 1


def test_names_of_the_model_are_no_markup(page: Any) -> None:
    assert page.inner_text("h1") == HOSTILE
    assert page.query_selector("#hostile") is None


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.fill("#search", "which experts are skipped at step 8?")
    page.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true; })")
    page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate("[...document.querySelectorAll('svg')].map(node => node.getBoundingClientRect().right)")
    assert max(sizes) <= width
