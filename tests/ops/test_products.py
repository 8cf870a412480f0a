"""The products of kept branches: each expert's linear map on its own rows, in C++."""

from __future__ import annotations

import pytest
import torch

from moeca_compile.ops import branches

pytestmark = pytest.mark.slow  # the C++ is compiled

COUNTS = (0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 0, 70)  # rows that fill vectors of 8 or 16, and some that don't


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("width", "outs"), [(1, 1), (7, 5), (16, 6), (24, 11), (96, 72), (130, 13)])
def test_it_is_each_expert_s_linear_map(width: int, outs: int, bias: bool, threads: int) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(outs, width) for _ in COUNTS]
    biases = [torch.randn(outs) for _ in COUNTS] if bias else []
    rows, before = torch.randn(sum(COUNTS), width), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = branches._product(rows, torch.tensor(COUNTS), weights, biases)
    finally:
        torch.set_num_threads(before)
    parts = zip(rows.split(COUNTS), weights, biases or [None] * len(weights), strict=True)
    expected = [torch.nn.functional.linear(part, weight, one) for part, weight, one in parts]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5 * width**0.5)
