"""A bundle in a few lines: what `print(bundle)` and `moeca info` show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moeca_compile.runtime.bundle.manifest import FUSED, Manifest, PrologueSpec

if TYPE_CHECKING:
    from moeca_compile.runtime.bundle.bundle import Bundle

_QUALITIES = {  # see `moeca_compile.calibrate`
    "psnr_db": "PSNR {:.1f} dB",
    "psnr_db_holdout": "{:.1f} dB for seeds that its search didn't see",
    "quality": "quality {:.4g}",
    "quality_holdout": "{:.4g} for seeds that its search didn't see",
}
VARIANT_COLUMNS = ("variant", "computes", "reads", "writes", "MACs", "of the full one")


def visible(text: str) -> str:
    """The text with what a terminal would obey instead of showing (control characters, escapes, marks that turn the
    direction of writing) spelled out; line ends stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def facts(bundle: Bundle) -> dict[str, str]:
    """What is in it, by name; several lines where there are several."""
    manifest = bundle.manifest
    parts = "its output cached" if manifest.caches_output else f"{manifest.regions} regions"
    without_graph = f", {manifest.steps.count(None)} of them without a graph" if manifest.caches_output else ""
    lines = {
        "model": f"{manifest.model.name}, {parts}, {manifest.dtype}",
        "inputs": "\n".join(map(str, manifest.inputs)),
        "batches": f"{manifest.batch[0]} to {manifest.batch[1]}" if manifest.batch else "",
        "outputs": "\n".join(map(str, manifest.outputs)),
        "other sizes": "\n".join(", ".join(map(str, size.inputs)) for size in manifest.sizes),
        "baked in": ", ".join(f"{k}={v}" for k, v in manifest.model.baked.items()),
        "schedule": f"{bundle.schedule.made_by}, {len(bundle.schedule.rows)} rows{without_graph}",
        "predicted": _quality(bundle.schedule.predicted),
        "weights": _exchanged(manifest),
        "state": f"{len(manifest.state)} tensors",
        "prologues": "\n".join(_of_prologue(spec) for spec in manifest.prologues),
        "experts": manifest.expert_lowering,
        "for": ", ".join(manifest.targets),
        "engines": "\n".join(sorted({engine.folder for engine in manifest.engines})),
        "graphs": f"ONNX opset {manifest.opset}" + (f", also {FUSED}" if manifest.fused else ""),
        "made with": ", ".join(f"{k} {v}" for k, v in manifest.made_with.items()),
        "size": f"{bundle.bytes / 2**20:.1f} MiB",
    }
    return {name: value for name, value in lines.items() if value}


def _exchanged(manifest: Manifest) -> str:
    if manifest.base is None:
        return ""
    return f"exchanged in {manifest.base[:12]}; the golden steps are {manifest.golden.by}'s"


def _quality(predicted: Mapping[str, float]) -> str:
    """What the schedule's maker measured of it: images against uncached ones."""
    parts = [text.format(predicted[name]) for name, text in _QUALITIES.items() if name in predicted]
    return ", ".join(parts)


def _of_prologue(spec: PrologueSpec) -> str:
    return f"{spec.file}, once a {'timestep' if spec.per == 'step' else spec.per}: {len(spec.gives)} values"


def variants(bundle: Bundle) -> list[tuple[str, ...]]:
    """A line for each, under `VARIANT_COLUMNS`."""
    every = bundle.manifest.variants
    full = max(variant.macs for variant in every) or 1
    return [
        (
            variant.name, f"{variant.row.count('C')} of {len(variant.row)}",
            str(len(variant.reads)), str(len(variant.writes)),
            f"{variant.macs / 1e6:.1f} M", f"{variant.macs / full:.1%}",
        )
        for variant in every
    ]  # fmt: skip


def summary(bundle: Bundle) -> str:
    lines = [f"bundle       {bundle.path}"]
    for name, value in facts(bundle).items():
        lines += [f"{name:<13}{value.replace(chr(10), chr(10) + ' ' * 13)}"]
    table = [VARIANT_COLUMNS, *variants(bundle)]
    wide = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, wide, strict=True)).rstrip() for line in table]
    return visible("\n".join(lines))
