"""A compiled function that closes over a model has the model's region keys, so its schedules fit the model's."""

from __future__ import annotations

import torch
from torch import Tensor

import moeca_compile as moeca
from moeca_compile.backend import ENTRIES
from tests.models import DiT


def test_a_function_over_a_model_has_the_model_s_regions() -> None:
    model = DiT(depth=1).eval()
    moeca.prepare(model)

    def guided(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = model(x, t, y)
        return out * 2

    inputs = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 900.0]), torch.tensor([1, 2])
    known = set(ENTRIES)
    with torch.no_grad():
        torch.compile(guided, backend="moeca", options={"inner": "eager"})(*inputs)
    (entry,) = set(ENTRIES) - known
    (program,) = entry.programs.values()
    whole = moeca.explain(model, *inputs, inner="eager")
    assert program.regions.keys == tuple(region.key for region in whole.regions)
    assert program.regions.fingerprint == whole.fingerprint
