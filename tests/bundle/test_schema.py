"""The manifest's schema is checked by our own small checker: word by word, and against what it must let through."""

from __future__ import annotations

from typing import Any

import pytest

from moeca_compile.errors import InvariantError
from moeca_compile.runtime.bundle.manifest import TensorSpec, batch_in, evaluate, expression
from moeca_compile.runtime.bundle.schema import check

CASES: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    ({"type": "integer"}, [1, -3], [True, 1.5, "1", None, float("nan")]),
    ({"type": "number"}, [1, 1.5], [False, float("inf"), float("nan"), "1"]),
    ({"type": "boolean"}, [True], [1, None]),
    ({"enum": ["a", 1]}, ["a", 1], ["b", [], {}]),
    ({"type": "string", "pattern": "^a+$"}, ["aa"], ["a\n", "b", ""]),
    ({"type": "string", "maxLength": 2}, ["ab"], ["abc"]),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, [[1]], [[], [1, 2, 3], ["1"]]),
    ({"type": "array", "uniqueItems": True}, [[1, 2]], [[1, 1]]),
    ({"type": "integer", "minimum": 0, "maximum": 3}, [0, 3], [-1, 4]),
    ({"anyOf": [{"type": "null"}, {"type": "integer"}]}, [None, 2], ["2"]),
    ({"type": "object", "required": ["a"], "additionalProperties": False, "properties": {"a": {"type": "null"}}},
     [{"a": None}], [{}, {"a": 1}, {"a": None, "b": 1}, []]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{"x": 1}], [{"x": "1"}]),
    ({"type": "object", "propertyNames": {"pattern": "^x"}}, [{"xy": 1}], [{"y": 1}]),
    ({"$ref": "#/$defs/one", "$defs": {"one": {"const": 1}}}, [1], [2]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: next(iter(case[0])) + str(CASES.index(case)))
def test_each_word(case: tuple[dict[str, Any], list[Any], list[Any]]) -> None:
    schema, good, bad = case
    for value in good:
        assert check(value, schema) is None
    for value in bad:
        assert str(check(value, schema)).startswith("manifest")


def test_an_unknown_word_is_an_error() -> None:
    with pytest.raises(InvariantError, match="multipleOf"):
        check(4, {"multipleOf": 2})


def test_where_it_is_wrong() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}}
    assert check({"a": [1, "2"]}, schema) == 'manifest.a[1] is "2", expected integer'


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
