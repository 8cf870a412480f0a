"""Sizes that depend on the batch."""

from __future__ import annotations

import pytest

from moeca_compile.runtime.bundle.dims import batch_in, evaluate, expression
from moeca_compile.runtime.bundle.manifest import TensorSpec


@pytest.mark.parametrize("pair", [(0, 7), (1, 0), (16, 0), (1, 1), (2, -1)])
def test_sizes_that_depend_on_the_batch(pair: tuple[int, int]) -> None:
    dim = expression(*pair)
    for batch in (1, 2, 9):
        size = evaluate(dim, batch)
        assert size == pair[0] * batch + pair[1]
        assert batch_in(dim, size) == (batch if pair[0] else -1)
    if pair[0] > 1:
        assert batch_in(dim, evaluate(dim, 3) + 1) is None


def test_a_tensors_batch() -> None:
    spec = TensorSpec("h", "float32", ("2*batch", 4, "batch"))
    assert spec.batch_of((6, 4, 3)) == 3
    assert spec.batch_of((6, 4, 2)) is None
    assert spec.batch_of((6, 4)) is None
    assert spec.batch_of((0, 4, 0)) is None
    assert TensorSpec("h", "float32", (4,)).batch_of((4,)) == -1
    assert TensorSpec("h", "float32", (4,)).batch_of((5,)) is None
