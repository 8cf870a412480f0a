"""`moeca::branches_` and `moeca::keep_branches_` against the form that they stand for; C++ that isn't there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from moeca_compile.errors import MoecaWarning, UserError
from moeca_compile.graph.variant import Slot
from moeca_compile.ops import branches, native_branches
from moeca_compile.ops.branches import BRANCHES, BRANCHES_AT, FORECAST, KEEP
from moeca_compile.ops.even_rows import even_rows
from moeca_compile.passes.partial.branches import updated_branches
from moeca_compile.passes.partial.insert_branches import _pick, _spread

NOW, EXPERTS = torch.tensor(5.0), 6
STATE = (Slot.HELD, Slot.GATES, Slot.Y, Slot.AT, Slot.D1, Slot.D2, Slot.BEFORE, Slot.ERROR, Slot.DRIFT, Slot.SCORES)
State = dict[Slot, Tensor]


def some_ids(batch: int, tokens: int, top_k: int) -> Tensor:
    return torch.rand(batch, tokens, EXPERTS).topk(top_k).indices


def state_of(order: int, score: str, dtype: torch.dtype, sizes: tuple[int, ...] = (2, 8, 3, 20)) -> State:
    """Slots as some steps leave them: every age from 1 to 4."""
    items = sizes[:-1]
    state = {
        Slot.HELD: some_ids(*items) + 1,
        Slot.GATES: torch.rand(items),
        Slot.Y: torch.randn(sizes).to(dtype),
        Slot.AT: torch.randint(1, 5, items).float(),
        Slot.D1: torch.randn(sizes),
        Slot.D2: torch.randn(sizes) / 10,
    }
    state[Slot.BEFORE] = state[Slot.AT] - 1
    for slot in (Slot.D1, Slot.D2, Slot.BEFORE)[{0: 0, 1: 1, 2: 3}[order] :]:
        del state[slot]
    if score == "error":
        return {**state, Slot.ERROR: torch.rand(items)}
    return {**state, Slot.DRIFT: torch.rand(items), Slot.SCORES: torch.rand(*items[:2], EXPERTS)}


def routing(state: State, twice: bool) -> dict[str, Tensor]:
    """What is routed now: half of the tokens as before, in another order; `twice`: an expert comes twice."""
    ids = torch.where(torch.rand(2, 8, 1) < 0.5, some_ids(2, 8, 3), state[Slot.HELD] - 1)
    ids = ids.gather(2, torch.rand(ids.shape).argsort(2))
    if twice:
        ids[:, ::2, 1] = ids[:, ::2, 0]
    return {"ids": ids, "gates": torch.rand(ids.shape), "scores": torch.rand(2, 8, EXPERTS)}


def weights_of(gated: bool, bias: bool, dtype: torch.dtype) -> list[list[Tensor]]:
    """up, down, gate and their biases: 20 channels, 13 inside."""
    shapes = ((13, 20), (20, 13), (13, 20), (13,), (20,), (13,))
    there = (True, True, gated, bias, bias, bias and gated)
    return [
        [torch.randn(shape).to(dtype) / 4 for _ in range(EXPERTS)] if wanted else []
        for shape, wanted in zip(shapes, there, strict=True)
    ]


def written_out(
    x: Tensor, routed: dict[str, Tensor], state: State, weights: Any, count: int, order: int, copy: bool, tables: Any
) -> tuple[Tensor, State]:
    shape = state[Slot.Y].shape
    computed = {"fresh": state[Slot.Y], "chosen": torch.zeros(shape[:-1], dtype=torch.bool)}
    if count:
        picked = _pick(
            **routed, x=x, now=NOW, order=order, count=count, tokens=None, state=state, sensitivity=tables[0],
            threshold=tables[1], quota=tables[2],
        )  # fmt: skip
        rows = torch.ops.moeca.experts(picked["rows"], picked["experts"], *weights, "silu")
        computed = _spread(rows, picked["positions"], tuple(shape))
    after = updated_branches(**computed, **routed, now=NOW, order=order, copy=copy, state=state)
    values = after.pop("branches").float()
    return (values * routed["gates"][..., None]).sum(2).view(-1, shape[-1]), after


def by_expert(state: State) -> State:
    """The slots in the order of what they hold: where one lies means nothing."""
    order = state[Slot.HELD].argsort(dim=-1, stable=True)
    return {
        name: slot
        if name == Slot.SCORES
        else slot.gather(2, order if slot.dim() == 3 else order[..., None].expand_as(slot))
        for name, slot in state.items()
    }


@pytest.fixture
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.slow
@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("score", ["error", "drift"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "copy"), [(0, False), (0, True), (1, False), (9, False), (24, False)])
def test_it_gives_and_keeps_what_the_written_out_form_does(
    order: int, score: str, dtype: torch.dtype, count: int, copy: bool
) -> None:
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for gated, bias, with_tables in ((True, False, False), (False, True, True), (True, True, True)):
        state, weights = state_of(order, score, dtype), weights_of(gated, bias, dtype)
        tables = (torch.rand(EXPERTS) + 0.5, torch.rand(EXPERTS), torch.tensor([2, 2, 2, 1, 1, 0]))
        given = tables if with_tables and count else (None, None, None)
        x, routed = torch.randn(16, 20).to(dtype), routing(state, twice=False)
        wanted, after = written_out(x, routed, state, weights, count, order, copy, given)
        before = {name: slot.clone() for name, slot in state.items()}
        scores = routed["scores"] if score == "drift" else None
        slots = list(map(state.get, STATE))
        routes = routed["ids"], routed["gates"]
        found = FORECAST(*routes, NOW, *slots[:7], order, copy, dtype) if not count else BRANCHES(
            x, *routes, scores, NOW, *map(state.get, STATE), *given, *weights, "silu", count,
            order, copy,
        )  # fmt: skip
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), wanted, **close)
        if not count:
            after = before  # nothing is computed, so nothing is kept
        left, right = by_expert(state), by_expert(after)
        for name in left:
            torch.testing.assert_close(
                left[name].float(), right[name].float(), **close, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.slow
@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("score", ["error", "drift"])
def test_a_step_that_computes_all_keeps_all(order: int, score: str) -> None:
    state = state_of(order, score, torch.float32)
    routed, fresh = routing(state, twice=False), torch.randn(2, 8, 3, 20)
    chosen = torch.ones(2, 8, 3, dtype=torch.bool)
    after = updated_branches(fresh, chosen, **routed, now=NOW, order=order, copy=False, state=state)
    del after["branches"]
    scores = routed["scores"] if score == "drift" else None
    KEEP(fresh, routed["ids"], routed["gates"], scores, NOW, *map(state.get, STATE), order)
    left, right = by_expert(state), by_expert(after)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_in_16_bits_is_the_exact_state_rounded(order: int, dtype: torch.dtype) -> None:
    values = (Slot.Y, Slot.D1, Slot.D2)
    narrow, weights = state_of(order, "error", torch.bfloat16), weights_of(True, True, dtype)
    narrow = {name: one.bfloat16() if name in values else one for name, one in narrow.items()}
    routed, x, none = routing(narrow, twice=False), torch.randn(16, 20).to(dtype), (None, None, None)
    routes, fresh = (routed["ids"], routed["gates"]), torch.randn(2, 8, 3, 20).to(dtype)

    def every(state: State) -> list[Tensor]:
        """What each operator returns, and leaves in the state, which the next one takes rounded."""
        found = []
        for call in (
            lambda slots: FORECAST(*routes, NOW, *slots[:7], order, False, dtype),
            lambda slots: BRANCHES(x, *routes, None, NOW, *slots, *none, *weights, "silu", 9, order, False),
            lambda slots: KEEP(fresh, *routes, None, NOW + 1, *slots, order),
        ):
            returned = call([state.get(slot) for slot in STATE])
            found += [one.clone() for one in (returned, *state.values()) if one is not None]
            state = {name: one.bfloat16().to(one.dtype) if name in values else one for name, one in state.items()}
        return found

    exact = {name: one.clone() for name, one in narrow.items()}
    for name in set(values) & set(exact):
        exact[name] = exact[name].to(dtype if name is Slot.Y else torch.float32)
    for left, right in zip(every(narrow), every(exact), strict=True):
        torch.testing.assert_close(left, right.to(left.dtype), rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("score", ["error", "drift"])
def test_with_torch_s_products_it_gives_the_same(score: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state, weights = state_of(1, score, torch.float32), weights_of(True, True, torch.float32)
    routed, x = routing(state, twice=False), torch.randn(16, 20)
    scores = routed["scores"] if score == "drift" else None
    found = []
    for few in (branches.FEW, 0):
        monkeypatch.setattr(branches, "FEW", few)
        slots = {name: slot.clone() for name, slot in state.items()}
        given = (x, routed["ids"], routed["gates"], scores, NOW, *map(slots.get, STATE), None, None, None, *weights)
        found.append([BRANCHES(*given, activation, 9, 1, False), *slots.values()])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True), (True, True)])
def test_with_the_addresses_of_the_weights_it_gives_the_same_bits(gated: bool, bias: bool, even: bool) -> None:
    state, weights = state_of(1, "error", torch.float32), weights_of(gated, bias, torch.float32)
    routed, x = routing(state, twice=False), torch.randn(16, 20)
    table = torch.tensor([one.data_ptr() if one is not None else 0 for group in weights for one in group or [None] * 6])
    found = []
    for operator, given in ((BRANCHES, weights), (BRANCHES_AT, (table, 13))):
        slots = {name: slot.clone() for name, slot in state.items()}
        read = (x, routed["ids"], routed["gates"], None, NOW, *map(slots.get, STATE), None, None, None)
        with even_rows() if even else nullcontext():
            found.append([operator(*read, *given, "silu", 9, 1, False), *slots.values()])
    assert all(map(torch.equal, *found))
    with pytest.raises(UserError, match="no weights"):
        BRANCHES_AT(*read, torch.zeros(36, dtype=torch.int64), 13, "silu", 9, 1, False)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 5, 40, 63, 64])
@pytest.mark.parametrize("quota", [None, 3])
def test_the_largest_are_chosen_and_of_equal_ones_the_first(count: int, quota: int | None) -> None:
    generator = torch.Generator().manual_seed(count)
    gates = torch.randint(0, 9, (2, 32, 2), generator=generator) / 4.0
    gates[0, 5, 1], gates[1, 0, 0], gates[1, 31, 1] = torch.nan, torch.inf, torch.nan
    ids, held = torch.arange(2).expand(2, 32, 2).contiguous(), torch.zeros(2, 32, 2, dtype=torch.int64)
    numbers, found = torch.zeros(2, 32, 2), torch.full((2, count), -1)
    allowed = None if quota is None else torch.tensor([quota, 64])
    at = native_branches.address
    native_branches.library().choose(
        at(ids), at(gates), at(held), at(numbers), at(numbers), None, None, None, None, at(allowed), 5.0, 1, 2, 32, 2,
        2, count, at(found), None, 1,
    )  # fmt: skip
    rank = (4 + gates / (1 + gates)).flatten(1).nan_to_num(nan=9.0)
    if quota is not None:
        order = rank.argsort(dim=1, descending=True, stable=True)
        for sample in range(2):
            of_the_first = [i for i in order[sample].tolist() if i % 2 == 0]
            rank[sample, of_the_first[quota:]] -= 6
    wanted = rank.argsort(dim=1, descending=True, stable=True)[:, :count]
    assert torch.equal(found, wanted.sort(dim=1).values)


@pytest.mark.slow
@pytest.mark.usefixtures("_seeded")
def test_an_expert_that_is_named_twice_is_two_branches() -> None:
    state, weights = state_of(1, "error", torch.float32), weights_of(True, False, torch.float32)
    routed, x = routing(state, twice=True), torch.randn(16, 20)
    none = (None, None, None)
    wanted, _ = written_out(x, routed, state, weights, 9, 1, False, none)
    slots = map(state.get, STATE)
    found = BRANCHES(x, routed["ids"], routed["gates"], None, NOW, *slots, *none, *weights, "silu", 9, 1, False)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("_seeded")
def test_an_expert_that_there_is_not_is_named() -> None:
    state, weights = state_of(1, "error", torch.float32), weights_of(True, False, torch.float32)
    ids, slots = torch.full((2, 8, 3), EXPERTS), [state.get(slot) for slot in STATE]
    given = (torch.randn(16, 20), ids, torch.rand(2, 8, 3), None, NOW, *slots, None, None, None, *weights, "silu")
    with pytest.raises(UserError, match="expert id 6, but there are 6 experts"):
        BRANCHES(*given, 9, 1, False)


@pytest.mark.usefixtures("_seeded")
def test_without_a_compiler_a_warning_says_so_and_the_operator_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.codecache import CppCodeCache

    def refuse(code: str, extra_flags: Sequence[str]) -> None:
        raise RuntimeError("g++: not found")

    native_branches.library.cache_clear()
    monkeypatch.setattr(CppCodeCache, "load", refuse)
    try:
        with pytest.warns(MoecaWarning, match=r"can't be compiled \(g\+\+: not found\)"):
            assert native_branches.library() is None
        assert native_branches.library() is None, "said once"
        state, weights = state_of(0, "error", torch.float32), weights_of(True, False, torch.float32)
        routed, slots = routing(state, twice=False), [state.get(slot) for slot in STATE]
        with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
            KEEP(state[Slot.Y], routed["ids"], routed["gates"], None, NOW, *slots, 0)
        with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
            BRANCHES(
                torch.randn(16, 20), routed["ids"], routed["gates"], None, NOW, *slots, None, None, None, *weights,
                "silu", 1, 0, False,
            )  # fmt: skip
    finally:
        native_branches.library.cache_clear()
