"""Whether a method can be captured as it is: run on fake tensors, which have shapes and dtypes but no values."""

from __future__ import annotations

import traceback
import types

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from moeca_compile.expert_dispatch.proof.candidate import Entry, Rewrite, raised
from moeca_compile.expert_dispatch.proof.harness import Harness
from moeca_compile.expert_dispatch.proof.probe import isolated, seed, shadow
from moeca_compile.expert_dispatch.source.method_source import Source

_BLOCKERS = (DataDependentOutputException, DynamicOutputShapeException)


def blocker(harness: Harness, source: Source, entry: Entry, rewrite: Rewrite | None = None) -> str | None:
    """Where a method reads a value or a size out of a tensor ("moe.py:12"), "" where it doesn't, None if unknown."""
    with isolated():
        try:
            module = shadow(harness.module)
            if rewrite is not None:
                module.__dict__[rewrite.name] = types.MethodType(rewrite.fitting(module).function(), module)
            arguments = entry.arguments(harness, 1, harness.experts.dtype(harness.module))
            with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
                values = [a.to("meta") if harness.on_meta else a for a in arguments]
                fakes = [fake.from_tensor(value, static_shapes=True) for value in values]
                seed()
                getattr(module, entry.method)(*fakes, **dict(entry.flags))
        except _BLOCKERS as error:
            return _line(error, source)
        except Exception as error:  # whatever somebody's module can raise; the comparison of values is still there
            raised(f"{entry.method} can't be run on fake tensors", error)
            return None
    return ""


def _line(error: BaseException, source: Source) -> str:
    """The innermost line of the method's file, or of any file that isn't torch's."""
    frames = traceback.extract_tb(error.__traceback__)
    of_method = [f for f in frames if f.filename == source.file]
    of_model = [f for f in frames if "/torch/" not in f.filename and "moeca_compile/" not in f.filename]
    frame = (of_method or of_model or frames)[-1]
    return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
