"""Experts on even numbers of rows: a token gets the same bits whoever else is in the call."""

from __future__ import annotations

import torch

from moeca_compile.ops.even_rows import ROWS, are_even, even_rows
from moeca_compile.ops.experts import segments


def test_a_token_gets_the_same_bits_beside_others() -> None:
    """256 tokens of 24 numbers, at random beside others; without even rows some differ on the machines that were
    tried, but no machine must."""
    generator = torch.Generator().manual_seed(0)
    x, ids = torch.randn(256, 24, generator=generator), torch.randint(0, 3, (256, 2), generator=generator)
    up, gate, down = (
        [torch.randn(*sizes, generator=generator) for _ in range(3)] for sizes in ((40, 24),) * 2 + ((24, 40),)
    )
    plain = segments(x, ids, up, down, gate, [], [], [], "silu")
    with even_rows():
        assert are_even()
        whole = segments(x, ids, up, down, gate, [], [], [], "silu")
        torch.testing.assert_close(whole, plain)
        for count in (1, 2, 5, 40, ROWS, 100, 255):
            some = torch.randperm(256, generator=generator)[:count]
            assert torch.equal(segments(x[some], ids[some], up, down, gate, [], [], [], "silu"), whole[some])
    assert not are_even()
