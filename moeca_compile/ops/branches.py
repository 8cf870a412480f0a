"""`moeca::branches_`: one step of a MoE layer whose expert branches are kept, on a CPU, in one operator.

It does what `passes/partial/insert_branches.py` writes out in torch's operators, for rows without chosen tokens: choose
the branches to compute, compute them, forecast the others, and sum them up by their gates. What was computed is kept in
place, in the slot where it lies: a step reads each kept branch once and writes what it computed, no more. So a slot's
number means nothing, as the order of a token's experts means nothing.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeca_compile.errors import UserError
from moeca_compile.ops.even_rows import are_even
from moeca_compile.ops.experts import Weights, run_experts
from moeca_compile.ops.native_branches import address, addresses, library

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # of branches that the kernel sums up
# Rows an expert, on average, up to which the kernel's own product is ahead of torch's and of packed weights. Seen on a
# thread with AVX2: ahead with 13 rows of 384 x 1536 numbers and 52 of 96 x 72, behind with 50 and 500.
FEW = 32
# Those that the kernel has, by its numbers. `gelu` needs the error function: torch's.
ACTIVATIONS = ("identity", "silu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid")

Tensors = Sequence[Tensor | None]
WeightTuple = tuple[Weights, Weights, Weights, Weights, Weights, Weights]

_LIBRARY = torch.library.Library("moeca", "FRAGMENT")
_LIBRARY.define(
    "branches_(Tensor x, Tensor ids, Tensor gates, Tensor? scores, Tensor now, Tensor(a!) held, Tensor(b!) kept, "
    "Tensor(c!) y, Tensor(d!) at, Tensor(e!)? d1, Tensor(f!)? d2, Tensor(g!)? before, Tensor(h!)? error, "
    "Tensor(i!)? drift, Tensor(j!)? seen, Tensor? sensitivity, Tensor? threshold, Tensor? quota, Tensor[] up, "
    "Tensor[] down, Tensor[] gate, Tensor[] up_bias, Tensor[] down_bias, Tensor[] gate_bias, str activation, "
    "SymInt count, int order, bool copy) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "branches_.at(Tensor x, Tensor ids, Tensor gates, Tensor? scores, Tensor now, Tensor(a!) held, Tensor(b!) kept, "
    "Tensor(c!) y, Tensor(d!) at, Tensor(e!)? d1, Tensor(f!)? d2, Tensor(g!)? before, Tensor(h!)? error, "
    "Tensor(i!)? drift, Tensor(j!)? seen, Tensor? sensitivity, Tensor? threshold, Tensor? quota, Tensor weights, "
    "int hidden, str activation, SymInt count, int order, bool copy) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "forecast_branches(Tensor ids, Tensor gates, Tensor now, Tensor held, Tensor kept, Tensor y, Tensor at, "
    "Tensor? d1, Tensor? d2, Tensor? before, int order, bool copy, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "keep_branches_(Tensor fresh, Tensor ids, Tensor gates, Tensor? scores, Tensor now, Tensor(a!) held, "
    "Tensor(b!) kept, Tensor(c!) y, Tensor(d!) at, Tensor(e!)? d1, Tensor(f!)? d2, Tensor(g!)? before, "
    "Tensor(h!)? error, Tensor(i!)? drift, Tensor(j!)? seen, int order) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def branches_(
    x: Tensor, ids: Tensor, gates: Tensor, scores: Tensor | None, now: Tensor, held: Tensor, kept: Tensor, y: Tensor,
    at: Tensor, d1: Tensor | None, d2: Tensor | None, before: Tensor | None, error: Tensor | None,
    drift: Tensor | None, seen: Tensor | None, sensitivity: Tensor | None, threshold: Tensor | None,
    quota: Tensor | None, up: Sequence[Tensor], down: Sequence[Tensor], gate: Sequence[Tensor],
    up_bias: Sequence[Tensor], down_bias: Sequence[Tensor], gate_bias: Sequence[Tensor], activation: str, count: int,
    order: int, copy: bool,
) -> Tensor:  # fmt: skip
    """Run one step of a layer's kept branches.

    B samples, N tokens, K branches a token, D channels, E experts.

    Args:
        x: what the experts read, float32 or bfloat16 [B N, D].
        ids: routed now, int64 [B, N, K].
        gates: the weights of these branches, float32 [B, N, K].
        scores: the router's, float32 [B, N, E]; None where no drift is kept.
        now: step + 1, float32 scalar.
        held: expert + 1 by slot, int64 [B, N, K]. Changed in place, as all that follow up to `seen`.
        kept: last gate by slot, float32 [B, N, K].
        y: the kept branches, [B, N, K, D] in the dtype of `x`, or narrow: in bfloat16.
        at: their stamps, float32 [B, N, K].
        d1, d2: differences, float32 [B, N, K, D], or narrow: bfloat16; None beyond the order.
        before: the stamps before, float32 [B, N, K]; None beyond the order.
        error: of the last forecasts, float32 [B, N, K]; None where drift is kept.
        drift: of the scores, float32 [B, N, K]; None where errors are kept.
        seen: the last scores, float32 [B, N, E]; None where errors are kept.
        sensitivity, threshold, quota: as in `pick`.
        up, down, gate, up_bias, down_bias, gate_bias, activation: as in `moeca::experts`.
        count: how many branches of a sample are computed; 0: nothing is computed, and nothing changed.
        order: of the forecast.
        copy: what isn't computed is taken as it was.

    Returns:
        The sum of each token's branches by their gates, [B N, D], in the dtype of `x`.

    Raises:
        UserError: an id outside [0, E), or no C++ compiler (`library` tells before).
    """
    weights = (up, down, gate, up_bias, down_bias, gate_bias)
    read, tables = (x, ids, gates, scores), (sensitivity, threshold, quota)
    state = (y, at, d1, d2, before, held, kept, error, drift, seen)
    fits = activation in ACTIVATIONS and all(map(Tensor.is_contiguous, itertools.chain(*weights)))
    if fits and are_few(x, y.shape[0] * count, len(up)):
        table, hidden = addresses(weights), len(up[0])
        return _in_one(read, tables, state, table, len(up), hidden, activation, float(now), order, copy, count)
    return _in_torch(read, tables, state, weights, activation, float(now), order, copy, count)


def branches_at_(
    x: Tensor, ids: Tensor, gates: Tensor, scores: Tensor | None, now: Tensor, held: Tensor, kept: Tensor, y: Tensor,
    at: Tensor, d1: Tensor | None, d2: Tensor | None, before: Tensor | None, error: Tensor | None,
    drift: Tensor | None, seen: Tensor | None, sensitivity: Tensor | None, threshold: Tensor | None,
    quota: Tensor | None, weights: Tensor, hidden: int, activation: str, count: int, order: int, copy: bool,
) -> Tensor:  # fmt: skip
    """The same with the addresses of the weights: handing over some tens of tensors takes as long as the products.

    Args:
        x: what the experts read, float32 [B N, D].
        weights: the addresses of float32 weights that are contiguous and that somebody holds, int64 [6 E]: up, down,
            gate, up_bias, down_bias, gate_bias, each by expert; 0 where there is none.
        hidden: channels inside an expert.
        activation: one of `ACTIVATIONS`.
        ids, gates, scores, now, held, kept, y, at, d1, d2, before, error, drift, seen: as in `branches_`.
        sensitivity, threshold, quota, count, order, copy: as in `branches_`.

    Returns:
        As `branches_`.

    Raises:
        UserError: an id outside [0, E), or no C++ compiler (`library` tells before).
    """
    read, tables = (x, ids, gates, scores), (sensitivity, threshold, quota)
    state = (y, at, d1, d2, before, held, kept, error, drift, seen)
    experts = len(weights) // 6
    if are_few(x, y.shape[0] * count, experts):
        table = address(weights)
        return _in_one(read, tables, state, table, experts, hidden, activation, float(now), order, copy, count)
    given = _tensors_at(weights, x.shape[-1], hidden, y.shape[-1])
    return _in_torch(read, tables, state, given, activation, float(now), order, copy, count)


def are_few(x: Tensor, rows: int, experts: int) -> bool:
    """Whether the kernel multiplies so many rows of `x`. Else torch does: other dtypes, many rows, and where bits must
    not depend on how many there are."""
    return x.dtype == torch.float32 and rows <= FEW * experts and not are_even()


def _tensors_at(addresses: Tensor, width: int, hidden: int, outs: int) -> WeightTuple:
    """The weights as tensors over the memory where they lie."""
    shapes = ((hidden, width), (outs, hidden), (hidden, width), (hidden,), (outs,), (hidden,))

    def tensor(at: int, shape: tuple[int, ...]) -> Tensor:
        numbers = ctypes.c_float * math.prod(shape)
        return torch.frombuffer(numbers.from_address(at), dtype=torch.float32).view(shape)

    groups = zip(addresses.view(6, -1).tolist(), shapes, strict=True)
    up, down, gate, *biases = ([tensor(at, shape) for at in group if at] for group, shape in groups)
    return up, down, gate, biases[0], biases[1], biases[2]


def _in_one(
    read: Tensors, tables: Tensors, state: Tensors, weights: Any, experts: int, hidden: int, activation: str,
    now: float, order: int, copy: bool, count: int,
) -> Tensor:  # fmt: skip
    """The C++ `step`. `read`: x, ids, gates, scores; `tables`: sensitivity, threshold, quota; `state`: as `_merge`;
    `weights`: where the addresses of the weights lie."""
    read = [None if one is None else one.contiguous() for one in read]
    x, y = read[0], state[0]
    assert x is not None
    assert y is not None
    *sizes, width = y.shape
    out = x.new_empty(len(x), width)
    outside: int = _library().step(
        *map(address, (*read, *tables, *state)), weights, now, order, copy, y.dtype != x.dtype,
        ACTIVATIONS.index(activation), *sizes, experts, x.shape[-1], hidden, width, count, address(out),
        torch.get_num_threads(),
    )  # fmt: skip
    _refuse(outside, experts)
    return out


def _in_torch(
    read: Tensors, tables: Tensors, state: Tensors, weights: WeightTuple, activation: str, now: float, order: int,
    copy: bool, count: int,
) -> Tensor:  # fmt: skip
    """The same with torch's products between the C++ functions."""
    read = [None if one is None else one.contiguous() for one in read]
    (x, ids, gates, scores), (y, at, *_, held, _, error, drift, seen) = read, state
    assert x is not None
    assert y is not None
    native, name, threads = _library(), DTYPES[x.dtype], torch.get_num_threads()
    batch, tokens, top_k, _ = y.shape
    positions, place = torch.empty(2, batch * count, dtype=torch.int64).unbind()
    counts = torch.empty(len(weights[0]), dtype=torch.int64)
    native.choose(
        *map(address, (ids, gates, held, error if drift is None else drift, at, scores, seen, *tables)), now, order,
        batch, tokens, top_k, len(counts), count, address(positions), None, threads,
    )  # fmt: skip
    rows = x.new_empty(batch * count, x.shape[-1])
    outside: int = getattr(native, f"gather_{name}")(
        *map(address, (x, ids, positions)), batch, tokens, top_k, x.shape[-1], len(counts), count,
        *map(address, (rows, counts, place)), threads,
    )  # fmt: skip
    _refuse(outside, len(counts))
    fresh = run_experts(rows, counts.tolist(), *weights, activation)
    out = x.new_empty(len(x), y.shape[-1])
    _merge(x.dtype, (ids, gates, scores, positions, place, fresh), state, now, order, copy, True, count, out)
    return out


def _refuse(outside: int, experts: int) -> None:
    if outside == -2:
        raise UserError("moeca::branches_: there are no weights at these addresses")
    if outside >= 0:
        raise UserError(f"moeca::branches_: expert id {outside}, but there are {experts} experts")


def forecast_branches(
    ids: Tensor, gates: Tensor, now: Tensor, held: Tensor, kept: Tensor, y: Tensor, at: Tensor, d1: Tensor | None,
    d2: Tensor | None, before: Tensor | None, order: int, copy: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Sum up the forecasts of a layer's kept branches. Nothing is computed, and nothing changed.

    Args:
        ids, gates, now, held, kept, y, at, d1, d2, before, order, copy: as in `branches_`.
        dtype: that of `x` there.

    Returns:
        [B N, D], in `dtype`.

    Raises:
        UserError: no C++ compiler (`library` tells before).
    """
    out = y.new_empty(y.shape[0] * y.shape[1], y.shape[3], dtype=dtype)
    state = (y, at, d1, d2, before, held, kept, None, None, None)
    step = (ids.contiguous(), gates.contiguous(), None, None, None, None)
    _merge(dtype, step, state, float(now), order, copy, False, 0, out)
    return out


def keep_branches_(
    fresh: Tensor, ids: Tensor, gates: Tensor, scores: Tensor | None, now: Tensor, held: Tensor, kept: Tensor,
    y: Tensor, at: Tensor, d1: Tensor | None, d2: Tensor | None, before: Tensor | None, error: Tensor | None,
    drift: Tensor | None, seen: Tensor | None, order: int,
) -> None:  # fmt: skip
    """Keep the branches of a step that computed all of them, in place.

    Args:
        fresh: the branches, float32 or bfloat16 [B, N, K, D].
        ids, gates, scores, now, held, kept, y, at, d1, d2, before, error, drift, seen, order: as in `branches_`.

    Raises:
        UserError: no C++ compiler (`library` tells before).
    """
    state = (y, at, d1, d2, before, held, kept, error, drift, seen)
    scores = None if scores is None else scores.contiguous()
    step = (ids.contiguous(), gates.contiguous(), scores, None, None, fresh.contiguous())
    _merge(fresh.dtype, step, state, float(now), order, False, True, 0, None)


def _merge(
    dtype: torch.dtype, step: Tensors, state: Tensors, now: float, order: int, copy: bool, keeps: bool,
    count: int, out: Tensor | None,
) -> None:  # fmt: skip
    """The C++ `merge`. `dtype`: of what is computed; `step`: ids, gates, scores, positions, place, fresh; `state`: y,
    at, d1, d2, before, held, kept, error, drift, seen."""
    (y, _, d1, *_), scores = state, step[2]
    assert y is not None
    is_narrow = y.dtype != dtype or (d1 is not None and d1.dtype == torch.bfloat16)
    getattr(_library(), f"merge_{DTYPES[dtype]}" + "_narrow" * is_narrow)(
        *map(address, (*step, *state)), now, order, copy, keeps, *y.shape, 0 if scores is None else scores.shape[-1],
        count, address(out), torch.get_num_threads(),
    )  # fmt: skip


def _library() -> Any:
    native = library()
    if native is None:
        raise UserError("moeca::branches_ needs a C++ compiler; `moeca doctor` tells what is missing")
    return native


def _fake(x: Tensor, ids: Tensor, gates: Tensor, scores: Any, now: Tensor, held: Tensor, kept: Tensor, y: Tensor,
          *rest: Any) -> Tensor:  # fmt: skip
    return x.new_empty((y.shape[0] * y.shape[1], y.shape[3]))


def _fake_forecast(ids: Tensor, gates: Tensor, now: Tensor, held: Tensor, kept: Tensor, y: Tensor,
                   *rest: Any) -> Tensor:  # fmt: skip
    return y.new_empty((y.shape[0] * y.shape[1], y.shape[3]), dtype=rest[-1])


def _below_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """There is no backward: without this the kernel's own work would be recorded."""

    def kernel(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return function(*args)

    return kernel


# What runs for each overload on a CPU. `ops/direct.py` calls them without torch's dispatcher.
KERNELS = {
    "branches_.default": _below_autograd(branches_),
    "branches_.at": _below_autograd(branches_at_),
    "keep_branches_.default": _below_autograd(keep_branches_),
    "forecast_branches.default": _below_autograd(forecast_branches),
}
for _name, _kernel in KERNELS.items():
    _LIBRARY.impl(_name.removesuffix(".default"), _kernel, "CPU")
torch.library.register_fake("moeca::branches_", _fake, lib=_LIBRARY)
torch.library.register_fake("moeca::branches_.at", _fake, lib=_LIBRARY)
torch.library.register_fake("moeca::keep_branches_", lambda *args: None, lib=_LIBRARY)
torch.library.register_fake("moeca::forecast_branches", _fake_forecast, lib=_LIBRARY)
BRANCHES = torch.ops.moeca.branches_.default
BRANCHES_AT = torch.ops.moeca.branches_.at
KEEP = torch.ops.moeca.keep_branches_.default
FORECAST = torch.ops.moeca.forecast_branches.default
