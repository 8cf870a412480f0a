"""A model on the meta device: shapes without data, so that it is explained at its full size on any machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo import config
from torch._subclasses.fake_tensor import fake_tensor_tls

from moeca_compile.frontend.reporting.equal_calls import equal_calls_copied


def is_dry(model: Any) -> bool:
    """Whether the model has parameters, and all of them are on the meta device."""
    parameters = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    return bool(parameters) and all(p.is_meta for p in parameters)


@contextmanager
def traced_dry(model: Any) -> Iterator[None]:
    """Let Dynamo trace the constants that a model on the meta device makes in its forward.

    `torch.tensor(..., device="meta")` gives an ordinary tensor under a fake mode, where other devices give a fake one.
    And where a graph broke at a number that is read from a tensor, there would be no number to go on with.
    """
    if not is_dry(model):
        yield
        return
    before = fake_tensor_tls.allow_non_fake_inputs_override
    fake_tensor_tls.allow_non_fake_inputs_override = True
    try:
        with config.patch(capture_scalar_outputs=True), equal_calls_copied(model):
            yield
    finally:
        fake_tensor_tls.allow_non_fake_inputs_override = before
