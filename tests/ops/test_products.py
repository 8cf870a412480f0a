"""The few computed rows of kept branches: each expert on its own rows, in C++."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moeca_compile.ops import branches
from moeca_compile.ops.experts import run_experts
from moeca_compile.ops.native_branches import address, addresses, library

pytestmark = pytest.mark.slow  # the C++ is compiled

COUNTS = (0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 0, 70)  # rows that fill vectors of 8 or 16, and some that don't


def few_rows(rows: Tensor, counts: Sequence[int], weights: Sequence[Sequence[Tensor]], activation: str) -> Tensor:
    (hidden, width), outs = weights[0][0].shape, len(weights[1][0])
    out, numbers = rows.new_empty(len(rows), outs), torch.tensor(counts)
    library().few_rows(
        address(rows), address(numbers), addresses(weights), branches.ACTIVATIONS.index(activation),
        len(counts), width, hidden, outs, address(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("activation", branches.ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("width", "hidden", "outs"), [(1, 1, 2), (7, 5, 7), (96, 72, 96), (24, 130, 11)])
def test_it_is_each_expert_on_its_rows(
    width: int, hidden: int, outs: int, bias: bool, activation: str, gated: bool
) -> None:
    torch.manual_seed(0)
    shapes = ((hidden, width), (outs, hidden), (hidden, width), (hidden,), (outs,), (hidden,))
    there = (True, True, gated, bias, bias, bias and gated)
    weights = [
        [torch.randn(shape) / shape[-1] ** 0.5 for _ in COUNTS] if wanted else []
        for shape, wanted in zip(shapes, there, strict=True)
    ]
    rows, before = 3 * torch.randn(sum(COUNTS), width), torch.get_num_threads()
    expected = run_experts(rows, COUNTS, *weights, activation)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found = few_rows(rows, COUNTS, weights, activation)
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_a_row_s_bits_do_not_depend_on_its_neighbors() -> None:
    torch.manual_seed(0)
    shapes = ((9, 20), (20, 9), (9, 20))
    weights = (*([torch.randn(shape) for _ in range(2)] for shape in shapes), [], [], [])
    rows = torch.randn(40, 20)
    found = few_rows(rows, [40, 0], weights, "silu")
    for first, last in ((0, 1), (3, 20), (31, 40)):
        alone = few_rows(rows[first:last].clone(), [last - first, 0], weights, "silu")
        assert torch.equal(alone, found[first:last])


@pytest.mark.parametrize("activation", branches.ACTIVATIONS)
def test_activations_of_extreme_numbers(activation: str) -> None:
    x = torch.tensor(
        [-1e30, -200.0, -88.0, -50.0, -1e-6, -0.0, 0.0, 1e-6, 50.0, 88.0, 200.0, float("inf"), float("nan")]
    )
    one = [torch.ones(1, 1)]
    expected = run_experts(x[:, None], [len(x)], one, one, [], [], [], [], activation)
    found = few_rows(x[:, None], [len(x)], (one, one, [], [], [], []), activation)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-30, equal_nan=True)
