"""The pictures of the documentation that no benchmark draws.

python -m docs.pictures            # all of them; about a minute
python -m docs.pictures imports    # one of them
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from docs import rooms

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "img"
ROOMS = ROOT / "docs" / "explanation" / "rooms.svg"
SCHEDULE = ROOT / "examples" / "schedules" / "digits_34.json"
DIGITS_SCHEDULE = ROOT / "benchmarks" / "results" / "schedules" / "digits_fitted_regions_34.json"  # as in the demo
DIGITS, FIRST_SEED = 10, 2000  # no seed of the calibration
REPORT_STEP = 18


def draw_digits(path: Path) -> float:
    """Ten digits, uncached in the upper row and cached in the lower one; their mean PSNR in dB."""
    from matplotlib.figure import Figure

    import moeca_compile as moeca
    from examples import digits

    def sampled(schedule: object) -> object:
        model = moeca.compile(digits.load_model(), schedule=schedule, inner="eager")
        return digits.sample(model, seed=FIRST_SEED, n=DIGITS)

    plain, cached = sampled("full"), sampled(DIGITS_SCHEDULE)
    figure = Figure(figsize=(DIGITS * 0.6, 1.3))
    for row, images in enumerate((plain, cached)):
        for column in range(DIGITS):
            axes = figure.add_axes((column / DIGITS, 0.5 - 0.5 * row, 0.98 / DIGITS, 0.48))
            axes.imshow(images[column, 0].numpy(), cmap="gray", vmin=-1, vmax=1)  # type: ignore[index]
            axes.axis("off")
    figure.savefig(path, dpi=120)
    return float(digits.psnr(cached, plain).mean())


def draw_schedule(path: Path) -> None:
    """The grid of a calibrated schedule: a column for each step, a line for each region."""
    from moeca_compile.inspect import plots
    from moeca_compile.schedule import Schedule

    plots.schedule_grid(Schedule.load(SCHEDULE)).savefig(path, dpi=90, bbox_inches="tight")


def draw_report(path: Path) -> None:
    """The head of the report's page, at a step that skips all regions. Chromium takes the picture."""
    import shutil
    import subprocess
    import tempfile

    from PIL import Image

    import moeca_compile as moeca
    from examples import digits

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("the picture of the report needs Chromium")
    model = moeca.compile(digits.load_model(), schedule=SCHEDULE, inner="eager")
    for _ in range(2):  # the first time the variants are made
        digits.sample(model, seed=FIRST_SEED, n=2)
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder) / "report.html", Path(folder) / "report.png"
        moeca.explain(model, html=page)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1080"]
        address = f"{page.as_uri()}#step={REPORT_STEP}"
        subprocess.run([chromium, *options, f"--screenshot={picture}", address], check=True, capture_output=True)
        Image.open(picture).convert("RGB").quantize(48).save(path, optimize=True)


def import_order() -> list[tuple[str, str]]:
    """Rooms and modules from the first to the last, with what the test of the structure says of each."""
    text = (ROOT / "tests" / "test_structure.py").read_text()
    order = re.search(r"^ORDER = \((.*?)^\)", text, re.MULTILINE | re.DOTALL)
    assert order is not None
    names = {"__init__": "the package's own names"}
    lines = re.findall(r'^ +"(\w+)",(?: +# (.*))?$', order[1], re.MULTILINE)
    return [(names.get(name, name), said) for name, said in lines]


def draw_imports(path: Path) -> None:
    """The rooms from bottom to top; each may import those below it."""
    rooms = import_order()[::-1]
    height, width, pitch = 34 + 26 * len(rooms), 640, 26
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" '
        'font-size="13" role="img" aria-label="The order of imports between rooms">',
        f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>',
        '<text x="16" y="20" font-size="11" fill="#334">Each room may import the rooms below it.</text>',
    ]
    for place, (name, said) in enumerate(rooms):
        y = 28 + place * pitch
        lines += [
            f'<rect x="12" y="{y}" width="{width - 24}" height="22" rx="4" fill="#e8effb" stroke="#889"/>',
            f'<text x="22" y="{y + 15}" font-weight="bold" fill="#112">{name}</text>',
            f'<text x="210" y="{y + 15}" font-size="12" fill="#334">{said.replace("&", "&amp;").replace(">", "&gt;")}'
            "</text>",
        ]
    path.write_text("\n".join([*lines, "</svg>"]) + "\n")


def main(names: list[str]) -> None:
    """Draw the pictures that are named, or all."""
    IMAGES.mkdir(exist_ok=True)
    if not names or "rooms" in names:
        ROOMS.write_text(rooms.svg())
    if not names or "imports" in names:
        draw_imports(IMAGES / "imports.svg")
    if not names or "schedule" in names:
        draw_schedule(IMAGES / "schedule.png")
    if not names or "report" in names:
        draw_report(IMAGES / "report.png")
    if not names or "digits" in names:
        sys.stdout.write(f"digits: {draw_digits(IMAGES / 'digits.png'):.1f} dB\n")


if __name__ == "__main__":
    main(sys.argv[1:])
