"""What must hold for the prologues of a bundle."""

from __future__ import annotations

from moeca_compile.runtime.bundle.manifest import Manifest


def prologue_misfit(manifest: Manifest) -> str:
    """Why the manifest's prologues don't fit its other entries, or one another; "" if they do."""
    if (manifest.fused is not None or manifest.engines or manifest.caches_output) and manifest.prologues:
        return "prologues are for bundles whose variants run one by one, as ONNX graphs"
    names = [spec.per for spec in manifest.prologues]
    if names not in ([], ["trajectory"], ["step"], ["trajectory", "step"]):
        return "the prologues aren't one a trajectory and one a step, in this order"
    inputs, before = {spec.name for spec in manifest.inputs}, set[str]()
    given = [name for spec in manifest.prologues for name in spec.gives]
    if given != [spec.name for spec in manifest.hoisted] or len(set(given)) != len(given):
        return "the hoisted values aren't those that the prologues give"
    for spec in manifest.prologues:
        if not (_unlike(spec.takes) and _unlike(spec.hoists) and spec.gives):
            return f"{spec.name}: a name appears twice, or it gives nothing"
        if not (inputs.issuperset(spec.takes) and before.issuperset(spec.hoists)):
            return f"{spec.name} takes values that aren't there when it runs"
        before.update(spec.gives)
    for variant in manifest.variants:
        if not (_unlike(variant.hoists) and before.issuperset(variant.hoists)):
            return f"variant {variant.name} takes hoisted values that no prologue gives"
    return ""


def _unlike(names: tuple[str, ...]) -> bool:
    return len(set(names)) == len(names)
