"""Whether a sample gets the same bits in a batch as alone: a property of a runtime's kernels, which is tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeca_compile.errors import BundleError
from moeca_compile.runtime.batched.joining import batch_axis
from moeca_compile.runtime.batched.together import Together
from moeca_compile.runtime.bundle.bfloat16 import stored_dtype
from moeca_compile.runtime.bundle.feeds import admit, arrays_of
from moeca_compile.runtime.bundle.manifest import TensorSpec
from moeca_compile.runtime.bundle.signature import signature_of
from moeca_compile.runtime.session import Session


def refuse_if_batches_differ(session: Session, together: Together, max_batch: int) -> None:
    """Run each graph for single samples, and for 2, 3 and `max_batch` of them in one call.

    Inputs are the bundle's recorded ones, state and hoisted values standard normal numbers.

    Raises:
        BundleError: the bits of a sample differ.
    """
    batches = sorted({batch for batch in (2, 3, max_batch) if 1 < batch <= max_batch})
    recorded = _samples(session)
    rng = np.random.default_rng(0)
    graphs = {loaded.spec.file: loaded for loaded in (*session.variants, *(loaded for _, loaded in session.prologues))}
    for loaded in graphs.values():
        takes, _ = signature_of(loaded.spec, session.manifest)
        feeds = [_feeds(takes, recorded[n % len(recorded)], rng) for n in range(max(batches, default=0))]
        for name, spec in takes.items():
            if batch_axis(spec) is None:  # one value holds for a call
                feeds = [one | {name: feeds[0][name]} for one in feeds]
        alone = [together.run(loaded, [one], [1])[0] for one in feeds]
        for batch in batches:
            joint = together.run(loaded, feeds[:batch], [1] * batch)
            for expected, values in zip(alone, joint, strict=False):
                if any(a.tobytes() != b.tobytes() for a, b in zip(expected, values, strict=True)):
                    raise BundleError(
                        f"{session.runtime.version()} gives a sample other bits in a batch of {batch} than alone "
                        f"({loaded.spec.file}): exact=False accepts the difference in rounding, and so does a session "
                        "of threads=1 where threads are the reason"
                    )


def _samples(session: Session) -> list[dict[str, Any]]:
    """The recorded inputs, sample by sample."""
    manifest, samples = session.manifest, []
    for call in session.bundle.golden()[0]:
        feeds, batch = admit(manifest, arrays_of(manifest, call))
        samples += [
            {spec.name: _sample(spec, feeds[spec.name], number) for spec in manifest.inputs} for number in range(batch)
        ]
    return samples


def _sample(spec: TensorSpec, array: Any, number: int) -> Any:
    axis = batch_axis(spec)
    if axis is None:
        return array
    size = spec.sizes(1)[axis]
    return np.ascontiguousarray(array.take(range(number * size, (number + 1) * size), axis))


def _feeds(takes: Mapping[str, TensorSpec], recorded: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    feeds = {}
    for name, spec in takes.items():
        if name in recorded:
            feeds[name] = recorded[name]
            continue
        stored = stored_dtype(spec.dtype)
        values = rng.standard_normal(spec.sizes(1)) if stored.kind == "f" else np.zeros(spec.sizes(1))
        feeds[name] = values.astype(stored)
    return feeds
