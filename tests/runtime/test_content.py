"""What a tensor holds, told by its bits: equal contents are one, and every way of writing makes another."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moeca_compile.graph import content
from moeca_compile.graph.content import CHUNK, MOST, SHARES, Contents, Stamp

DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64,
    torch.int64, torch.int32, torch.uint8, torch.bool,
)  # fmt: skip


def same(a: Tensor, b: Tensor) -> bool:
    contents = Contents()
    return contents.number(a) == contents.number(b)


# -- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_content_is_of_the_values(dtype: torch.dtype) -> None:
    a, b = torch.tensor([0, 1, 1, 0]).to(dtype), torch.tensor([0, 1, 0, 1]).to(dtype)
    assert same(a, a.clone())
    assert not same(a, b)  # a permutation
    assert not same(a[:1], a[1:2])
    assert not same(a[0], a[1])
    assert not same(a[0], a[:1])  # nor are shapes alike


def test_rows_in_another_order_differ() -> None:
    prompts, contents = torch.randn(3, 5, 4), Contents()
    assert len({contents.number(prompts[list(order)]) for order in ((0, 1, 2), (0, 2, 1), (2, 1, 0))}) == 3


def test_strides_grad_and_conjugation_make_no_difference() -> None:
    matrix, wave = torch.arange(6.0).view(2, 3), torch.tensor([1 + 2j])
    assert same(matrix, matrix.t().contiguous().t())
    assert same(matrix, matrix.clone().requires_grad_())
    assert same(wave.conj(), torch.tensor([1 - 2j]))


def test_bits_count_and_not_what_they_compare_as() -> None:
    nan = torch.tensor([math.nan])
    assert same(nan, nan.clone())
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same(torch.tensor([1]), torch.tensor([1], dtype=torch.int32))
    assert not same(torch.empty(0, 3), torch.empty(3, 0))


def test_contents_that_were_not_met_for_long_are_new() -> None:
    contents = Contents()
    first = contents.number(torch.tensor([0]))
    for i in range(1, MOST):
        contents.number(torch.tensor([i]))
        assert contents.number(torch.tensor([0])) == first
    for i in range(MOST):
        contents.number(torch.tensor([MOST + i]))
    assert contents.number(torch.tensor([0])) != first


def test_what_is_not_kept_is_forgotten() -> None:
    contents = Contents()
    a, b = (contents.number(torch.tensor([i])) for i in range(2))
    contents.keep([b])
    assert contents.number(torch.tensor([1])) == b
    assert contents.number(torch.tensor([0])) not in (a, b)


@pytest.mark.parametrize("mode", [False, True], ids=["plain", "inference"])
def test_nobody_waits_for_a_tensor_that_seems_untouched(monkeypatch: pytest.MonkeyPatch, mode: bool) -> None:
    """On an accelerator: what was written past its version counter is told by the next call but one."""
    monkeypatch.setattr(content, "needs_device_sync", lambda value: True)
    with torch.inference_mode(mode):
        contents, value = Contents(), torch.zeros(3)
        first, _ = contents.likely_number(value)
        monkeypatch.setattr(Contents, "number", None)
        assert contents.likely_number(value) == (first, False)
        monkeypatch.undo()
        monkeypatch.setattr(content, "needs_device_sync", lambda value: True)
        if not mode:
            value.add_(1)
            second, was_wrong = contents.likely_number(value)
            assert second != first
            assert not was_wrong
            value.sub_(1)
            assert contents.likely_number(value) == (first, False)
        value.data.fill_(7)
        contents.likely_number(value)
        third, was_wrong = contents.likely_number(value)
        assert third != first
        assert was_wrong
        assert contents.likely_number(value) == (third, False)


@pytest.mark.gpu
def test_on_an_accelerator_order_and_value_count_too() -> None:
    contents = Contents()
    rows = [torch.tensor(row, device="cuda") for row in ([1, 1], [10, 10], [1, 10], [10, 1])]
    assert len({contents.number(row) for row in rows}) == 4
    kept, flags = contents.ask(rows[2].clone())
    assert contents.answer(rows[2], kept, [float(flag) for flag in flags]) == contents.number(rows[2])


# -- weights ----------------------------------------------------------------------------------------------------------


def by_address(tensor: Tensor) -> None:
    """As code does that torch knows nothing of."""
    ctypes.memset(tensor.data_ptr(), 0x77, tensor.element_size())


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8]),
    st.integers(1, 3 * CHUNK),
    st.integers(0, 1),
    st.data(),
)
def test_a_write_to_any_element_shows_in_the_stamp(
    dtype: torch.dtype, size: int, offset: int, data: st.DataObject
) -> None:
    weight = (torch.arange(size + offset) % 100 - 50).to(dtype)[offset:]
    stamp = Stamp(weight)
    assert stamp.matches(weight)
    assert stamp.matches(weight.clone())
    place = data.draw(st.integers(0, size - 1))
    by_address(weight[place : place + 1])
    assert not stamp.matches(weight)


def test_values_that_change_places_or_signs_show_in_the_stamp() -> None:
    weight = torch.randn(256, 256)
    stamp = Stamp(weight)
    assert not stamp.matches(weight.flip(0))
    assert not stamp.matches(weight.flip(1))
    assert not stamp.matches(-weight)
    assert not stamp.matches(torch.randn(300, 300))
    assert not stamp.matches(torch.randn(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [1, 2, 4], ids=["all", "second", "fourth"])
def test_a_change_of_signs_shows_in_the_stamp(dtype: torch.dtype, step: int) -> None:
    """Of the last element of every word too, whose sign is the word's highest bit."""
    weight = torch.randn(8, CHUNK).to(dtype)
    stamp = Stamp(weight)
    weight.view(-1)[step - 1 :: step].neg_()
    assert not stamp.matches(weight)


def test_a_sample_shows_what_changes_a_whole_weight_at_once_and_an_element_in_turn() -> None:
    weight = torch.randn(20 * CHUNK + 3)
    stamp = Stamp(weight)
    assert all(stamp.sample_matches(weight, turn) for turn in range(SHARES))
    assert not any(stamp.sample_matches(weight + 1, turn) for turn in range(SHARES))
    weight[30 * 100] += 1
    assert 0 < sum(not stamp.sample_matches(weight, turn) for turn in range(SHARES)) < SHARES


def test_a_tensor_that_is_made_of_others_has_their_stamps() -> None:
    class Pair(Tensor):
        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["one", "other"], None

    pair = Tensor._make_subclass(Pair, torch.zeros(2))
    pair.one, pair.other = torch.zeros(2), torch.ones(3)
    stamp = Stamp(pair)
    assert stamp.matches(pair)
    pair.other.data[2] = 5
    assert not stamp.matches(pair)
