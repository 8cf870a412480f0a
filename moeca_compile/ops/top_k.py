"""`moeca::top_k`: a router's choice on a CPU, without jumps that depend on data.

`torch.topk` sorts a part of each row, and a processor guesses wrong which way the comparisons go: 0.2 to 0.3
microseconds a token. In C++ as many rows as a vector has lanes go through the same comparisons.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeca_compile.ops.native_branches import address, library

MOST = 8  # numbers chosen of a row: as many vectors are at hand

_LIBRARY = torch.library.Library("moeca", "FRAGMENT")
_LIBRARY.define("top_k(Tensor x, int k) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose the `k` largest numbers of each row: the same ones as `torch.topk`, the largest first.

    Where equal numbers or NaN leave it open which ones to take, or in which order, `torch.topk` decides the row.

    Args:
        x: floating point, [..., E].
        k: how many, at most E.

    Returns:
        The numbers [..., k], in the dtype of `x`, and where they stand in their rows, int64 [..., k].
    """
    native = library() if x.device.type == "cpu" and x.dtype == torch.float32 and 0 < k <= MOST else None
    if native is None:
        return torch.topk(x, k)
    x, threads = x.contiguous(), torch.get_num_threads()
    (*_, numbers), (values, indices) = x.shape, _results(x, k)
    rows = x.numel() // numbers
    given = (address(x), rows, numbers, k, address(values), address(indices))
    count = native.top_k(*given, None, threads)
    if count:  # seldom: only then is it asked which ones
        these = torch.empty(count, dtype=torch.int64)
        native.top_k(*given, address(these), threads)
        values.view(-1, k)[these], indices.view(-1, k)[these] = torch.topk(x.view(-1, numbers)[these], k)
    return values, indices


def _results(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


_LIBRARY.impl("top_k", top_k, "CompositeExplicitAutograd")
torch.library.register_fake("moeca::top_k", _results, lib=_LIBRARY)
TOP_K = torch.ops.moeca.top_k.default
