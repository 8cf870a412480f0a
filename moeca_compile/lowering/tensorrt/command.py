"""The same engines with TensorRT's own command: to look at them, or to time them on the machine that is to run them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from moeca_compile.lowering.tensorrt.build import profile
from moeca_compile.runtime.bundle.bundle import Bundle


def trtexec_lines(bundle: Bundle, batch: Sequence[int] = (1, 2, 8)) -> list[str]:
    """A `trtexec` line for each variant. Precision is the graph's: `--stronglyTyped`, which TensorRT 11 always is."""
    return [_line(bundle, i, batch) for i in range(len(bundle.manifest.variants))]


def _line(bundle: Bundle, number: int, batch: Sequence[int]) -> str:
    spec = bundle.manifest.variants[number]
    words = ["trtexec", f"--onnx={bundle.path / spec.file}", f"--saveEngine={spec.name}.plan", "--stronglyTyped"]
    shapes = profile(bundle, spec, batch)
    for i, side in enumerate(("min", "opt", "max")):
        said = ",".join(f"{name}:{'x'.join(map(str, sizes[i]))}" for name, sizes in shapes.items())
        words += [f"--{side}Shapes={said}"] if said else []
    return shlex.join([*words, "--timingCacheFile=timing.cache"])
