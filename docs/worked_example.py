"""The graphs on the page "How it works", from its own model: `python -m docs.worked_example`.

A line of a dump is shortened: no types, no namespace of operators, no freed names.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parent / "explanation" / "how-it-works.md"
CAPTURED, REUSED = "captured", "v1"


def first_block() -> str:
    """The page's own code: the model, and a call of `explain` that writes the dump."""
    found = re.search(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def graphs() -> dict[str, str]:
    """The captured graph, and the variant that computes no region, as short texts."""
    import torch

    import moeca_compile as moeca

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        code = first_block().replace('dump="graphs"', f"dump={folder!r}").replace("print(report)", "")
        exec(code, {"torch": torch, "moeca": moeca})
        captured = min(Path(folder).glob("*_drop_noops.after.txt")).read_text()
        return {CAPTURED: shortened(captured), REUSED: shortened((Path(folder) / "variant_v1.txt").read_text())}


def shortened(dump: str) -> str:
    """The forward of a dump, one short line for each operator."""
    body = dump[dump.index("    def forward(") :]
    body = re.sub(r': "[^"]*"|;  [\w =]+ = None|torch\.ops\.|^ +#.*\n', "", body, flags=re.MULTILINE)
    body = re.sub(r"(\w+)\.(?:default|Tensor|Scalar|int|using_ints|dim)\(", r"\1(", body)
    lines = [line[4:] for line in body.splitlines() if line.strip()]
    return "\n".join([lines[0].replace("(self, ", "("), *lines[1:]]) + "\n"


if __name__ == "__main__":
    for name, text in graphs().items():
        sys.stdout.write(f"# {name}\n{text}\n")
