"""`moeca::top_k` chooses what `torch.topk` does, also where equal numbers or NaN leave the choice to the algorithm."""

from __future__ import annotations

import pytest
import torch

from moeca_compile.ops import top_k

NAN, INF = float("nan"), float("inf")


@pytest.mark.slow  # the C++ is compiled
@pytest.mark.parametrize(
    ("numbers", "k"), [(16, 4), (8, 2), (8, 8), (13, 3), (64, 6), (300, 8), (1, 1), (33, 1), (20, 9)]
)
@pytest.mark.parametrize("rows", [(1,), (3, 5), (100,)])
def test_it_chooses_what_torch_does(rows: tuple[int, ...], numbers: int, k: int) -> None:
    torch.manual_seed(0)
    x, some = torch.randn(*rows, numbers), torch.rand(*rows, numbers) < 0.3
    equal, masked, zeros = x.round(), torch.where(some, -INF, x), torch.where(some, 0.0, -0.0)
    for given in (x, x.mT.contiguous().mT, equal, masked, zeros, torch.where(some, NAN, x), torch.where(some, INF, x)):
        found, expected = top_k.top_k(given, k), torch.topk(given, k)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found[1], expected[1])


def test_what_the_kernel_does_not_take_is_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 12)
    for given, k in ((x.double(), 4), (x, 9), (x, 0), (x.bfloat16(), 2)):
        monkeypatch.setattr(top_k, "library", object)
        assert all(map(torch.equal, top_k.top_k(given, k), torch.topk(given, k)))
    monkeypatch.setattr(top_k, "library", lambda: None)
    assert all(map(torch.equal, top_k.top_k(x, 4), torch.topk(x, 4)))
