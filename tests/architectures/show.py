"""Print a generated model and what is found in it: `python -m tests.architectures.show SEED`."""

from __future__ import annotations

import sys

import torch

from tests.architectures.check import find
from tests.architectures.parts import draw


def main() -> None:
    torch.set_num_threads(1)
    finding = find(draw(int(sys.argv[1])))
    regions = finding.regions
    sys.stdout.write(f"{finding.model}\n\nparts: {finding.parts}\n\nexpected\n{finding.expected}\n\nfound\n")
    for region in regions:
        weights = ", ".join(name for name, shape in region.parameters if len(shape) >= 2)
        sys.stdout.write(f"{region.key}: {region.kind} ({len(region.outputs)}): {weights}\n")
    for miss in regions.rejected:
        sys.stdout.write(f"left alone: {miss}\n")
    sys.stdout.write("\n" + ("\n".join(finding.differences) or "as expected") + "\n")


if __name__ == "__main__":
    main()
