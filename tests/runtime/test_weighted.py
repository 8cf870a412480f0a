"""Sums of a model's outputs in numpy: those of the torch engine, for every dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moeca_compile.engine.output_program import _polynomial, _Step, _weighted
from moeca_compile.exporting.arrays import to_numpy
from moeca_compile.runtime.bundle.bfloat16 import from_stored
from moeca_compile.runtime.weighted import polynomial, weighted

TERMS, WEIGHTS = ("y0", "y3", "x", "d1"), (1.5, -0.25, 0.5, 0.125)
DTYPES = ["float16", "bfloat16", "float32", "float64"]


def outputs_of(dtype: str) -> list[torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 2, 2, generator=dice).to(getattr(torch, dtype)) for _ in range(4)]


def close(found: Any, dtype: str, wanted: torch.Tensor) -> None:
    tolerance = {"float16": 1e-3, "bfloat16": 1e-2}.get(dtype, 1e-6)
    assert (found.dtype, found.shape) == (to_numpy(wanted).dtype, tuple(wanted.shape))
    torch.testing.assert_close(
        torch.from_numpy(from_stored(found, dtype)).double(), wanted.double(), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("latent_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rule_s_sum(dtype: str, latent_dtype: str) -> None:
    values, latent = outputs_of(dtype), outputs_of(latent_dtype)[0][:, :2]
    before = [value.clone() for value in values]
    found = weighted(TERMS, WEIGHTS, [*map(to_numpy, values)], dtype, to_numpy(latent), latent_dtype)
    close(found, dtype, _weighted(_Step((), (), TERMS, WEIGHTS, (0.0, 0.0), latent), values))
    assert all(map(torch.equal, values, before))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_polynomial(dtype: str) -> None:
    values = outputs_of(dtype)
    close(polynomial([*map(to_numpy, values)], dtype, (0.5, -0.25)), dtype, _polynomial(values, (0.5, -0.25)))


def test_whole_numbers_are_copied() -> None:
    value = torch.arange(4)
    found = polynomial([to_numpy(value), to_numpy(value)], "int64", (0.5, 0.0))
    assert found.tolist() == [0, 1, 2, 3]
    assert found is not to_numpy(value)
    found[0] = 9
    assert value[0] == 0
