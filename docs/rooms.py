"""The drawing of the rooms and the way of the data (docs/explanation/rooms.svg); `python -m docs.pictures rooms`."""

from __future__ import annotations

WIDTH, HEIGHT = 960, 500
COMPILING, RUNNING, DATA, AROUND = "#e8effb", "#e9f6ec", "#fdf3df", "#f3f3f5"
CALLED = ("what people call: compile, trajectory, explain, stats, calibrate, export; the moeca command",)
LEGEND = {
    COMPILING: "while compiling",
    RUNNING: "while images are made",
    DATA: "data and operators",
    AROUND: "around it",
}
NOTE = (
    "Arrows show the way of the data. Every room may import the three at the bottom. schedule and runtime import "
    "without torch."
)

# x, y, width, height, color, name, what it does
BOXES = (
    (30, 20, 900, 46, AROUND, "api, options, errors; cli", CALLED),
    (30, 96, 150, 84, COMPILING, "frontend", ("what torch.compile", "calls: whose call it is,", "graph breaks")),
    (30, 210, 150, 70, COMPILING, "expert_dispatch", ("a dispatch becomes", "one operator, proven")),
    (215, 96, 150, 84, COMPILING, "passes / analysis",
     ("timestep, latent,", "attention, routers,", "experts, regions")),
    (400, 96, 150, 84, COMPILING, "passes / transform",
     ("row by row: state in,", "forecast, dead code out,", "hoisting, verifying")),
    (585, 96, 150, 84, COMPILING, "lowering", ("inductor, onnx,", "experts, tensorrt")),
    (780, 96, 150, 84, RUNNING, "engine", ("the torch executor:", "programs, prologues,", "trajectories, steps")),
    (215, 210, 150, 70, AROUND, "inspect", ("prints reports,", "draws pictures, pages")),
    (400, 210, 150, 70, COMPILING, "planner, comparison", ("calibrate: estimates,", "samples; compare")),
    (585, 210, 150, 70, COMPILING, "exporting", ("writes a bundle", "and checks it")),
    (780, 210, 150, 84, RUNNING, "runtime", ("no torch: clock, rows,", "bundles, sessions,", "providers, triton")),
    (30, 324, 290, 66, DATA, "schedule", ("what runs when: actions, rows, coefficients,", "the file. Data, no torch")),
    (335, 324, 290, 66, DATA, "graph", ("the captured graph: capture, helpers for fx graphs,", "regions, variants")),
    (640, 324, 290, 66, DATA, "ops", ("the moeca:: operators: experts, packed weights,", "branch slots")),
)  # fmt: skip

# from x, y to x, y
ARROWS = (
    (180, 138, 213, 138), (365, 138, 398, 138), (550, 138, 583, 138), (735, 138, 778, 138),
    (105, 210, 105, 182), (290, 182, 290, 208), (475, 210, 475, 182), (660, 182, 660, 208),
    (735, 245, 778, 245), (855, 210, 855, 182),
)  # fmt: skip
LABELS = ((507, 200, "schedule"), (756.5, 240, "bundle"), (893, 200, "clock, rows"))  # of arrows


def svg() -> str:
    """The drawing."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        'font-size="13" role="img" aria-label="The rooms of the package and the way of the data">',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#445"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>',
    ]
    for x, y, width, height, color, name, does in BOXES:
        middle = x + width / 2
        lines += [
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{color}" stroke="#889"/>',
            _text(middle, y + 19, name, 'font-weight="bold" fill="#112"'),
        ]
        for number, text in enumerate(does):
            lines.append(_text(middle, y + 36 + 15 * number, text, 'font-size="11" fill="#334"'))
    for x1, y1, x2, y2 in ARROWS:
        lines.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#445" stroke-width="1.4" marker-end="url(#a)"/>'
        )
    for x, y, text in LABELS:
        lines.append(_text(x, y, text, 'font-size="11" fill="#445"'))
    lines.append(_text(WIDTH / 2, 418, NOTE, 'font-size="12" fill="#445"'))
    for number, (color, text) in enumerate(LEGEND.items()):
        x = 150 + 180 * number
        lines += [
            f'<rect x="{x}" y="441" width="16" height="16" rx="3" fill="{color}" stroke="#889"/>',
            f'<text x="{x + 24}" y="453" fill="#334" font-size="12">{text}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" {style}>{text}</text>'
