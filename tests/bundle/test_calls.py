"""What a session makes of the arrays of a call: equal values give equal results, or a refusal names the input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided

from moeca_compile.errors import BundleError
from moeca_compile.exporting.ranges import index_range
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.fused import FusedSession
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import call_of, named
from tests.tools import capture_module


def shifted(array: Any) -> Any:
    """At an address that no float begins at."""
    room = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    room[...] = array
    return room


def read_only(array: Any) -> Any:
    array = array.copy()
    array.flags.writeable = False
    return array


def odd_strides(array: Any) -> Any:
    """A size of 1 may have any stride."""
    return as_strided(array, array.shape, (4 if len(array) == 1 else array.strides[0], *array.strides[1:]))


SAME = {
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "little-endian": lambda x: x.astype(x.dtype.newbyteorder("<")),
    "read-only": read_only,
    "backwards": lambda x: x[..., ::-1].copy()[..., ::-1],
    "in Fortran's order": np.asfortranarray,
    "every second one": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "odd strides of a size of one": odd_strides,
    "unaligned": shifted,
    "a tensor": torch.from_numpy,
    "a masked array without a mask": np.ma.masked_array,
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("batch", [1, 2])
def test_how_an_array_lies_in_memory_changes_nothing(session: Session, name: str, batch: int) -> None:
    call = named(call_of(batch))
    wanted = session.run(call)["output"]
    for one in call:
        given = {**call, one: SAME[name](call[one])}
        np.testing.assert_array_equal(np.asarray(given[one]), call[one])
        np.testing.assert_array_equal(session.run(given)["output"], wanted)


def test_the_fused_graph_takes_them_too(exported: Bundle) -> None:
    session, call = FusedSession.open(exported.path, threads=1), named(call_of(2))
    with session.trajectory() as one, session.trajectory() as other:
        swapped = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in call.items()}
        np.testing.assert_array_equal(one.run(call)["output"], other.run(swapped)["output"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": None}, "input x has dtype object"),
        ({"x": torch.zeros(2, 4, 8, 8, requires_grad=True)}, "input x is no array: RuntimeError"),
        ({"x": [[1.0], [1.0, 2.0]]}, "input x is no array: ValueError"),
        ({"t": np.ma.masked_array(np.zeros(2, np.float32), [True, False])}, "input t is a masked array"),
        ({"y": np.array([0, -1])}, "input y has values from -1 to 0, and it indexes a table: the model takes 0 to 10"),
        ({"y": np.array([3, 11])}, "input y has values from 3 to 11"),
        ({7: np.zeros(2)}, r"inputs \['7', 't', 'x', 'y'\]: the model takes"),
    ],
)
def test_what_is_no_input_is_refused(session: Session, change: dict[Any, Any], says: str) -> None:
    with pytest.raises(BundleError, match=says):
        session.run({**named(call_of(2)), **change})


@pytest.mark.parametrize("inputs", [np.zeros((2, 4, 8, 8), np.float32), (np.zeros(2),), None])
def test_inputs_go_by_name(session: Session, inputs: Any) -> None:
    with pytest.raises(BundleError, match="expected arrays by name, got"), session.trajectory() as trajectory:
        trajectory.run(inputs)


def test_which_integers_index_a_table() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.other = torch.nn.Embedding(7, 4), torch.nn.Embedding(5, 4)

        def forward(self, x: Any, both: Any, whole: Any, place: Any, part: Any, mask: Any, count: Any) -> Any:
            rows = self.table(both.reshape(-1)) + self.other(both.int()) + self.table.weight[place]
            return x + rows + self.table(part[:1]) + torch.index_select(self.other.weight, 0, whole) * count + x[mask]

    ids = torch.zeros(2, dtype=torch.int64)
    args = torch.zeros(2, 4), ids, ids.clone(), ids.clone(), ids.clone(), torch.ones(2, dtype=torch.bool), ids[0]
    capture, given = capture_module(Model(), *args)
    found = {
        node.name: index_range(node)
        for node, value in zip(capture.gm.graph.find_nodes(op="placeholder"), given, strict=True)
        if any(value is one for one in args)
    }
    assert sorted(found.values(), key=str) == sorted([None, (0, 5), (0, 5), (-7, 7), None, None, None], key=str)
