"""THE ORACLE, second half: regions that are recomputed in part. One record a token or branch, in plain dictionaries.

Nothing here is a tensor program: which items are chosen, what stands for the others and what is remembered is decided
item by item, in the words of docs/branch-caching.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeca_compile.schedule import Control

Forecast = Callable[[Sequence[tuple[int, Tensor]], int, int], Tensor]


@dataclass
class Item:
    """What is known of one token's value, or of one branch."""

    history: list[tuple[int, Tensor]] = field(default_factory=list)  # oldest first
    error: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    drift: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    gate: Tensor = field(default_factory=lambda: torch.tensor(0.0))

    def compute(self, step: int, value: Tensor, order: int, forecast: Forecast) -> None:
        expected = forecast(self.history, step, order) if self.history else torch.zeros_like(value)
        self.error = (value - expected).abs().mean().float()
        self.drift = torch.tensor(0.0)
        self.history.append((step, value.clone()))

    def overdue(self, step: int, order: int) -> Tensor:
        age = torch.tensor(float(step - self.history[-1][0]))
        return self.error * (age if order == 0 else age * age)


@dataclass
class Tokens:
    """The values [B, N, D] of a region or of shared experts, each token for itself."""

    order: int
    forecast: Forecast
    items: dict[tuple[int, int], Item] = field(default_factory=dict)
    seen: Tensor | None = None

    def due(self, step: int, control: Control, entering: Tensor | None) -> dict[tuple[int, int], Tensor]:
        if control.score == "error" or entering is None or self.seen is None:
            return {at: item.overdue(step, self.order) for at, item in self.items.items()}
        moved = distance(entering, self.seen)
        return {(b, n): item.drift + moved[b, n] for (b, n), item in self.items.items()}

    def value(
        self, step: int, full: Tensor, chosen: set[tuple[int, int]], copy: bool, entering: Tensor | None
    ) -> Tensor:
        """`full` [B, N, D] where it counts; what is chosen is remembered."""
        result = full.clone()
        moved = None if entering is None or self.seen is None else distance(entering, self.seen)
        for b in range(full.shape[0]):
            for n in range(full.shape[1]):
                item = self.items.setdefault((b, n), Item())
                if moved is not None and chosen:
                    item.drift = item.drift + moved[b, n]
                if (b, n) in chosen:
                    item.compute(step, full[b, n], self.order, self.forecast)
                else:
                    result[b, n] = self.forecast(item.history, step, 0 if copy else self.order)
        if chosen and entering is not None:
            self.seen = entering.float()
        return result


Key = tuple[int, int]  # expert, and its number among equal ids of the token


@dataclass
class Branches:
    """The branch cache: for each token its K slots, by expert."""

    order: int
    forecast: Forecast
    control: Control
    sensitivity: Sequence[float] | None
    threshold: Sequence[float] | None
    quota: Sequence[float] | None
    slots: dict[tuple[int, int], dict[Key, Item]] = field(default_factory=dict)
    scores: Tensor | None = None

    def weigh(self, expert: int, gate: Tensor) -> Tensor:
        return gate.float().abs() * (1.0 if self.sensitivity is None else torch.tensor(self.sensitivity[expert]))

    def token_due(self, step: int, at: tuple[int, int], by_branch: bool, scores: Tensor | None = None) -> Tensor:
        """A token's weight: its branches' gates x sensitivities, and with `by_branch` times what is due in each."""
        moved = distance(scores[at], self.scores[at]) if scores is not None and self.scores is not None else 0.0
        total = torch.tensor(0.0)
        for (expert, _), item in self.slots[at].items():
            due = item.drift + moved if self.control.score == "drift" else item.overdue(step, self.order)
            total = total + self.weigh(expert, item.gate) * (due if by_branch else 1.0)
        return total

    def value(
        self, step: int, full: Tensor, ids: Tensor, gates: Tensor, scores: Tensor,
        tokens: set[tuple[int, int]], extra: int, everything: bool, copy: bool,
    ) -> Tensor:  # fmt: skip
        """full, ids, gates: [B, N, K, ..], all branches of now. Returns what counts for each, [B, N, K, D]."""
        batch, length, top_k, _ = full.shape
        moved = None if self.scores is None else distance(scores, self.scores)
        result, computes = full.clone(), everything or bool(tokens) or extra > 0
        for b in range(batch):
            chosen = self._chosen(step, b, ids[b], gates[b], moved, tokens, extra, everything)
            for n in range(length):
                keys = keys_of(ids[b, n])
                slots = self.slots.setdefault((b, n), {})
                there = [k for k, key in enumerate(keys) if key in slots or (n, k) in chosen]
                old = {key: self.forecast(one.history, step, 0 if copy else self.order) for key, one in slots.items()}
                for k, key in enumerate(keys):
                    if key in slots and (n, k) not in chosen:
                        result[b, n, k] = old[key]
                share = sum(gates[b, n, k] for k in there)
                for k in set(range(top_k)) - set(there):
                    if there:
                        result[b, n, k] = sum(gates[b, n, j] * result[b, n, j] for j in there) / share
                    else:
                        last = sum(one.gate * old[key] for key, one in slots.items())
                        result[b, n, k] = last / gates[b, n].sum()
                if computes:
                    self._remember(
                        step, slots, keys, chosen, n, full[b, n], gates[b, n], None if moved is None else moved[b, n]
                    )
        if computes:
            self.scores = scores.float()
        return result

    def _chosen(
        self, step: int, b: int, ids: Tensor, gates: Tensor, moved: Tensor | None, tokens: set[tuple[int, int]],
        extra: int, everything: bool,
    ) -> set[tuple[int, int]]:  # fmt: skip
        """(token, k) of what this sample computes."""
        length, top_k = ids.shape
        every = [(n, k) for n in range(length) for k in range(top_k)]
        if everything:
            return set(every)
        chosen = {(n, k) for n, k in every if (b, n) in tokens}
        rank: dict[tuple[int, int], float] = {}
        wanted: dict[int, list[float]] = {}  # of each expert, its held branches'
        for n, k in every:
            key, weight = keys_of(ids[n])[k], self.weigh(int(ids[n, k]), gates[n, k])
            item = self.slots[b, n].get(key)
            if item is not None:
                if self.control.score == "drift":
                    assert moved is not None
                    due = item.drift + moved[b, n]
                else:
                    due = item.overdue(step, self.order)
                weight = weight * due
                wanted.setdefault(int(ids[n, k]), []).append(float(due))
            rank[n, k] = float((0.0 if item is not None else 4.0) + weight / (1 + weight))
        past = self._past(wanted)
        for n, k in every:
            if rank[n, k] < 2 and int(ids[n, k]) in past:
                rank[n, k] += 2.0
        if self.quota is not None:
            used: Counter[int] = Counter()
            for n, k in sorted(every, key=lambda at: -rank[at]):
                expert = int(ids[n, k])
                used[expert] += 1
                if used[expert] > round(self.quota[expert] * extra):
                    rank[n, k] -= 6.0
        left = sorted((at for at in every if at not in chosen), key=lambda at: -rank[at])
        return chosen | set(left[:extra])

    def _past(self, wanted: dict[int, list[float]]) -> set[int]:
        """The experts whose mean drift reached its threshold."""
        if self.threshold is None:
            return set()
        return {expert for expert, due in wanted.items() if sum(due) / len(due) >= self.threshold[expert]}

    def _remember(
        self, step: int, slots: dict[Key, Item], keys: list[Key], chosen: set[tuple[int, int]], n: int, full: Tensor,
        gates: Tensor, moved: Tensor | None,
    ) -> None:  # fmt: skip
        """A computed transition takes the slot of an expert that isn't routed any more, lowest last gate first."""
        for item in slots.values():
            item.drift = item.drift + (0.0 if moved is None else moved)
        idle = sorted((key for key in slots if key not in keys), key=lambda key: float(slots[key].gate))
        for k, key in enumerate(keys):
            if key not in slots and (n, k) in chosen:
                if idle:
                    del slots[idle.pop(0)]
                slots[key] = Item()
            if key in slots:
                slots[key].gate = gates[k].clone()
            if (n, k) in chosen:
                slots[key].compute(step, full[k], self.order, self.forecast)


def keys_of(ids: Tensor) -> list[Key]:
    """A token's routed experts, repeated ones numbered."""
    seen: Counter[int] = Counter()
    keys = []
    for one in ids.tolist():
        keys.append((one, seen[one]))
        seen[one] += 1
    return keys


def distance(now: Tensor, then: Tensor) -> Tensor:
    """L1 distance along the last axis, in float32."""
    return (now.float() - then.float()).abs().sum(-1)


def most_due(due: dict[tuple[int, int], Tensor], count: int) -> set[tuple[int, int]]:
    """The `count` most due tokens of each sample."""
    chosen: set[tuple[int, int]] = set()
    for b in {at[0] for at in due}:
        mine = sorted((at for at in due if at[0] == b), key=lambda at: -float(due[at]))
        chosen.update(mine[:count])
    return chosen
