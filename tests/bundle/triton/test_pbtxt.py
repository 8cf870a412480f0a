"""Protobuf's text format, both ways."""

from __future__ import annotations

import pytest

from moeca_compile.errors import BundleError
from moeca_compile.runtime.triton.pbtxt import Name, dumps, loads, many


def test_what_is_written_is_read() -> None:
    message = {
        "name": 'a "quoted" name',
        "max_batch_size": 0,
        "input": [{"name": "x", "dims": [-1, 4]}, {"name": "t", "data_type": Name("TYPE_FP32"), "dims": [-1]}],
        "sequence_batching": {"oldest": {"max_candidate_sequences": 64}, "empty": {}},
        "zero_data": True,
    }
    found = loads(dumps(message))
    assert found == message
    assert isinstance(found["input"][1]["data_type"], Name)


def test_other_ways_to_write_it() -> None:
    text = """
        # a comment
        input [ { name: "x", dims: [ 1, 2 ] }, { name: "y" } ]
        dims: 3   # one by one
        dims: 4
        rate: 1.5
        flag: false
    """
    assert loads(text) == {
        "input": [{"name": "x", "dims": [1, 2]}, {"name": "y"}], "dims": [3, 4], "rate": 1.5, "flag": False,
    }  # fmt: skip
    assert many(loads("a { b: 1 }"), "a") == [{"b": 1}]
    assert many({}, "a") == []


@pytest.mark.parametrize(
    "text", ["name", "name:", "{", "a { b: 1", "a: [1, 2", "a: }", "a: [1 ] ]", 'a: "open', "a: 1e", "a: 012x", "a: $"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(BundleError, match=r"config\.pbtxt"):
        loads(text)
