"""Ways to make a module run one of its methods on random arguments, when nothing says what they are.

Tokens come first, whatever their name. Further arguments are tried as a conditioning vector per sample, further tokens,
labels per sample and masks. Labels take the values that the code itself compares with; there are inputs where all of
them are such a special one, some are, and none is, so that a branch on either kind is taken and left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from moeca_compile.expert_dispatch.dispatch import methods
from moeca_compile.expert_dispatch.families import method
from moeca_compile.expert_dispatch.proof.attempt import Arguments, Entry, Harness, length, tokens_of
from moeca_compile.expert_dispatch.proof.pins import optional
from moeca_compile.expert_dispatch.source.loop import Loop
from moeca_compile.expert_dispatch.source.method_source import Source, read

_BATCH = 2
_EXTRA = ("vector", "labels", "tokens", "mask", "token mask")
_MOST_EXTRA = 2


def entries(harness: Harness, loop: Loop) -> Iterator[Entry]:
    """Through `forward` first, then the loop's own method."""
    own = methods(harness.module)
    for name in dict.fromkeys(("forward", loop.name)):
        source = read(own[name]) if name in own else None
        if source is None or not source.required:
            continue
        extra = len(source.required) - 1
        if extra > _MOST_EXTRA:
            continue
        special = tuple(sorted(specials(harness, loop.source) | specials(harness, source)))
        ways = [
            _Maker(kinds, flat, special)
            for flat, kinds in product((False, True), product(_EXTRA, repeat=extra))
            if not (flat and extra)
        ]
        yield from (Entry(name, way) for way in ways)
        if name == loop.name:  # what its callers pass: then only calls that pass the same run the rewritten method
            turned = [((one.name, not one.default),) for one in optional(source.function) if type(one.default) is bool]
            yield from (Entry(name, way, flags) for flags in turned for way in ways)
    yield from method.entries(harness, loop)


def specials(harness: Harness, source: Source) -> set[int]:
    """Numbers that the code compares something with: written out, or an attribute of the module."""
    found: set[int] = set()
    for node in ast.walk(source.tree):
        for part in (node.left, *node.comparators) if isinstance(node, ast.Compare) else ():
            value = part.value if isinstance(part, ast.Constant) else None
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                value = vars(harness.module).get(part.attr) if part.value.id == source.self_name else None
            if type(value) is int and value >= 0:
                found.add(value)
    return found


class _Maker:
    """Makes the arguments of one entry."""

    def __init__(self, kinds: tuple[str, ...], flat: bool, special: tuple[int, ...]) -> None:
        self.kinds, self.flat, self.special = kinds, flat, special

    def __call__(self, harness: Harness, seed: int, dtype: torch.dtype) -> Arguments:
        tokens, width = length(seed, harness.num_experts), harness.experts.in_features
        shape = (tokens, width) if self.flat else (_BATCH, tokens, width)
        made = [tokens_of(seed, shape, harness.device, dtype)]
        for i, kind in enumerate(self.kinds):
            made.append(self._extra(kind, seed + 10 * (i + 1), seed, tokens, width, harness.device, dtype))
        return tuple(made)

    def _extra(
        self, kind: str, own: int, seed: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        if kind in ("vector", "tokens"):
            shape = (_BATCH, width) if kind == "vector" else (_BATCH, tokens, width)
            return tokens_of(own, shape, device, dtype)
        picked = torch.zeros(_BATCH, dtype=torch.bool)
        picked[: {2: _BATCH, 3: 0}.get(seed, _BATCH // 2)] = True
        if kind == "labels":
            values = torch.arange(1, _BATCH + 1)
            while self.special and bool(torch.isin(values, torch.tensor(self.special)).any()):
                values = values + 1
            chosen = max(self.special) if self.special else 0
            return torch.where(picked, torch.tensor(chosen), values).to(device)
        if kind == "mask":
            return picked.to(device)
        generator = torch.Generator().manual_seed(own)
        some = torch.rand(_BATCH, tokens, generator=generator) < 0.5
        return (some if seed not in (2, 3) else picked[:, None].expand(_BATCH, tokens)).to(device)
