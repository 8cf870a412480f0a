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

from moeca_compile.expert_dispatch.proof.candidate import Arguments, Entry
from moeca_compile.expert_dispatch.proof.harness import Harness, length, tokens_of
from moeca_compile.expert_dispatch.proof.layouts import direct_entries
from moeca_compile.expert_dispatch.proof.pinned import parameters
from moeca_compile.expert_dispatch.source.loop import Loop
from moeca_compile.expert_dispatch.source.method_source import Source, methods_of, read

_BATCH = 2
_EXTRA = ("vector", "labels", "tokens", "mask", "token mask")
_MOST_EXTRA = 2


def entries(harness: Harness, loop: Loop) -> Iterator[Entry]:
    """Ways to run the module's dispatch: through `forward` first, then the loop's own method.

    Args:
        harness: the module.
        loop: the dispatch.

    Returns:
        Calls, each with another reading of what the method's arguments are.
    """
    methods = methods_of(type(harness.module))
    for name in dict.fromkeys(("forward", loop.name)):
        source = read(methods[name]) if name in methods else None
        if source is None or not source.required or len(source.required) - 1 > _MOST_EXTRA:
            continue
        makers = _makers(len(source.required) - 1, specials(harness, loop.source) | specials(harness, source))
        for maker in makers:
            yield Entry(name, maker)
        if name == loop.name:  # what its callers pass: then only calls that pass the same run the rewritten method
            for parameter, _ in parameters(source.function):
                if type(parameter.default) is bool:
                    flags = ((parameter.name, not parameter.default),)
                    yield from (Entry(name, maker, flags) for maker in makers)
    yield from direct_entries(harness, loop)


def _makers(extra: int, special: set[int]) -> list[_Maker]:
    """Tokens alone come as [B, T, D] and as [T, D]; with `extra` arguments every kind of each is tried: no annotation
    tells a label from a mask."""
    values = tuple(sorted(special))
    makers = [_Maker(kinds, False, values) for kinds in product(_EXTRA, repeat=extra)]
    return makers if extra else [*makers, _Maker((), True, values)]


def specials(harness: Harness, source: Source) -> set[int]:
    """Numbers that the code compares something with: written out, or an attribute of the module."""
    numbers: set[int] = set()
    for node in ast.walk(source.tree):
        for part in (node.left, *node.comparators) if isinstance(node, ast.Compare) else ():
            value = part.value if isinstance(part, ast.Constant) else None
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                value = vars(harness.module).get(part.attr) if part.value.id == source.self_name else None
            if type(value) is int and value >= 0:
                numbers.add(value)
    return numbers


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
        self, kind: str, own_seed: int, seed: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        if kind in ("vector", "tokens"):
            shape = (_BATCH, width) if kind == "vector" else (_BATCH, tokens, width)
            return tokens_of(own_seed, shape, device, dtype)
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
        generator = torch.Generator().manual_seed(own_seed)
        some = torch.rand(_BATCH, tokens, generator=generator) < 0.5
        return (some if seed not in (2, 3) else picked[:, None].expand(_BATCH, tokens)).to(device)
