"""Which form of the experts a bundle's graphs have: one that all its targets run, the best of them if it can be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from moeca_compile.errors import LoweringError, OptionError

# What each target runs, best first. On CPUs the order is that of benchmarks/results/expert_forms.json (float32, one
# thread with AVX-512, six layers): of the exact forms segments came first on both runtimes, but for one layer of 128
# tokens on OpenVINO. Elsewhere nothing was measured: NonZero waits for the host (CUDA) or isn't there (TensorRT).
FORMS = {
    "onnx": ("segments", "dense", "capacity", "moe"),
    "openvino": ("segments", "dense", "capacity"),
    "cuda": ("moe", "dense", "capacity", "segments"),
    "tensorrt": ("dense", "capacity"),
}
_NBITS = ("onnx", "openvino")  # that run com.microsoft.MatMulNBits; on CUDA it wasn't tried
_EVEN = Fraction(2)  # times the rows of an even routing: the default of "capacity"


@dataclass(frozen=True, slots=True)
class Lowering:
    """`factor`: for "capacity", times the rows that an even routing gives an expert. `has_nbits`: whether all targets
    run `com.microsoft.MatMulNBits`."""

    name: str
    factor: Fraction = Fraction(0)
    has_nbits: bool = True

    def __str__(self) -> str:
        return f"{self.name}:{float(self.factor):g}" if self.factor else self.name


def choose(experts: str, targets: Sequence[str], moe_unfit: str = "") -> tuple[Lowering, str]:
    """The lowering that `experts` asks for, or with "auto" the best that all targets run and that is exact.

    Args:
        experts: "auto", "segments", "dense", "moe", "capacity" or "capacity:1.25".
        targets: of `FORMS`.
        moe_unfit: what keeps `com.microsoft.MoE` from the model's experts; "" if nothing does.

    Returns:
        The lowering, and what is slower for it ("" if nothing is).

    Raises:
        OptionError: no such lowering.
        LoweringError: a target, or the model, that the asked one doesn't fit.
    """
    if experts != "auto":
        asked = _parse(experts)
        for target in targets:
            if asked.name not in FORMS[target]:
                raise LoweringError(f"experts={experts!r}: target {target!r} runs {', '.join(FORMS[target])} only")
        if asked.name == "moe" and moe_unfit:
            raise LoweringError(f"experts='moe': onnxruntime's operator doesn't take {moe_unfit}. Use experts='auto'")
        return replace(asked, has_nbits=_has_nbits(targets)), ""
    # a capacity may drop branches: never without being asked for
    unfit = {"capacity"} | ({"moe"} if moe_unfit else set())
    exact = {target: [form for form in FORMS[target] if form not in unfit] for target in targets}
    shared = [form for form in exact[targets[0]] if all(form in forms for forms in exact.values())]
    chosen = min(shared, key=lambda form: sum(forms.index(form) for forms in exact.values()))
    slower = [f"{target} would run {forms[0]!r} faster" for target, forms in exact.items() if forms[0] != chosen]
    return Lowering(chosen, has_nbits=_has_nbits(targets)), ", ".join(slower)


def _has_nbits(targets: Sequence[str]) -> bool:
    return all(target in _NBITS for target in targets)


def _parse(text: str) -> Lowering:
    match = re.fullmatch(r"(segments|dense|moe|capacity)(?::(\d+(?:\.\d+)?))?", text)
    factor = Fraction(match[2]) if match and match[2] else Fraction(0)
    if not match or (match[2] and (match[1] != "capacity" or not factor)):
        raise OptionError(
            f"experts={text!r}: expected 'auto', 'segments', 'dense', 'moe', 'capacity' or 'capacity:1.25'"
        )
    return Lowering(match[1], factor or (_EVEN if match[1] == "capacity" else factor))
