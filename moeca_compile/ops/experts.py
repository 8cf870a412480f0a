"""`moeca::experts`: the routed experts of one MoE layer as one opaque operator, before gate weighting.

    y[t,k] = down_e(act(gate_e(x_t)) * up_e(x_t))    for e = idx[t,k]; without gates down_e(act(up_e(x_t)))

It is the node that every pass anchors on, so it must never decompose: Dynamo, `make_fx` and `torch.export` see one
call whose result has a static shape. Each target lowers it its own way; the kernels here are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeca_compile.errors import UserError
from moeca_compile.ops.even_rows import most, parts
from moeca_compile.ops.packed import PackedExperts, current

Weights = Sequence[Tensor]
WeightLists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]

# Each works in place where it can: at these sizes a temporary costs more than the arithmetic.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda h: F.silu(h, inplace=True),
    "gelu": lambda h: torch.ops.aten.gelu_(h),
    "gelu_tanh": lambda h: torch.ops.aten.gelu_(h, approximate="tanh"),
    "quick_gelu": lambda h: h.mul_(torch.sigmoid(1.702 * h)),
    "relu": lambda h: h.relu_(),
    "relu2": lambda h: h.relu_().square_(),
    "sigmoid": lambda h: h.sigmoid_(),
    "identity": lambda h: h,
}
ACTIVATIONS = tuple(_ACTIVATIONS)

_LIBRARY = torch.library.Library("moeca", "DEF")
_LIBRARY.define(
    "experts(Tensor x, Tensor idx, Tensor[] up, Tensor[] down, Tensor[] gate, "
    "Tensor[] up_bias, Tensor[] down_bias, Tensor[] gate_bias, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),  # any strides will do: rows are gathered first
)


def activate_(h: Tensor, name: str) -> Tensor:
    """Apply an activation, in place where possible.

    Args:
        h: floating point, any shape; overwritten.
        name: one of `ACTIVATIONS`.

    Returns:
        The result, in the shape and dtype of `h`.

    Raises:
        UserError: a name that isn't in `ACTIVATIONS`.
    """
    if name not in _ACTIVATIONS:
        raise UserError(f"moeca::experts: unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return _ACTIVATIONS[name](h)


def segments(
    x: Tensor, idx: Tensor, up: Weights, down: Weights, gate: Weights,
    up_bias: Weights, down_bias: Weights, gate_bias: Weights, activation: str,
) -> Tensor:  # fmt: skip
    """Run the operator `moeca::experts`: sort the branches by expert and run each expert on its contiguous rows.

    y[t, k] = down_e(act(gate_e(x_t)) * up_e(x_t)) for e = idx[t, k]; without gates down_e(act(up_e(x_t))). One host
    sync, for the counts.

    Args:
        x: tokens [T, D], floating point.
        idx: expert ids [T, K], int64, each in [0, E).
        up, gate: E weights [I, D]; `gate` may be empty.
        down: E weights [D_out, I].
        up_bias, gate_bias: E biases [I], or none.
        down_bias: E biases [D_out], or none.
        activation: one of `ACTIVATIONS`.

    Returns:
        y [T, K, D_out], contiguous, in the dtype of `x`, before gate weighting.

    Raises:
        UserError: an id outside [0, E), an unknown activation, or a stream capture (the counts need a sync).
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UserError(
            f"moeca::experts reads token counts back to the host in {x.dtype}, which a CUDA graph can't hold: "
            "use bfloat16 with sizes that are multiples of 8, or compile without CUDA graphs"
        )
    tokens, top_k = idx.shape
    order, counts = _sort(idx, len(up))
    rows = x.index_select(0, order.div(top_k, rounding_mode="floor"))
    outputs = run_experts(rows, counts, up, down, gate, up_bias, down_bias, gate_bias, activation)
    return torch.empty_like(outputs).index_copy_(0, order, outputs).view(tokens, top_k, outputs.shape[1])


def run_experts(
    rows: Tensor, counts: Sequence[int], up: Weights, down: Weights, gate: Weights,
    up_bias: Weights, down_bias: Weights, gate_bias: Weights, activation: str,
) -> Tensor:  # fmt: skip
    """Run each expert on its contiguous rows, with packed weights where `Packs` are active.

    Args:
        rows: [R, D], one expert's after the other's, `counts[e]` of them.
        up, down, gate, up_bias, down_bias, gate_bias, activation: as in `segments`.

    Returns:
        [R, D_out], in the order of `rows`.
    """
    outputs = rows.new_empty(len(rows), down[0].shape[0])
    weights = (up, down, gate, up_bias, down_bias, gate_bias)
    packs = current()
    packed = packs.of(*weights) if packs is not None else None
    if packed is not None:
        _run_packed(packed, rows, counts, activation, outputs)
    else:
        _run(rows, counts, *weights, activation, outputs)
    return outputs


def _run(
    rows: Tensor, counts: Sequence[int], up: Weights, down: Weights, gate: Weights,
    up_bias: Weights, down_bias: Weights, gate_bias: Weights, activation: str, out: Tensor,
) -> None:  # fmt: skip
    """Each expert on its rows, `counts[e]` of them, one expert's after the other's."""
    # One pair of buffers for all experts: it stays in the cache.
    hidden = rows.new_empty(most(counts), up[0].shape[0])
    gates = torch.empty_like(hidden) if gate else hidden
    for e, part, result in parts(rows, counts, out):
        h = hidden[: len(part)]
        _linear(part, up[e], up_bias[e] if up_bias else None, out=h)
        if gate:
            g = gates[: len(part)]
            _linear(part, gate[e], gate_bias[e] if gate_bias else None, out=g)
            h.mul_(activate_(g, activation))
        else:
            h = activate_(h, activation)
        _linear(h, down[e], down_bias[e] if down_bias else None, out=result)


def _run_packed(experts: PackedExperts, rows: Tensor, counts: Sequence[int], activation: str, out: Tensor) -> None:
    for e, part, result in parts(rows, counts, out):
        h = experts.up[e](part)
        h = h.mul_(activate_(experts.gate[e](part), activation)) if experts.gate else activate_(h, activation)
        result.copy_(experts.down[e](h))


def grouped(
    x: Tensor, idx: Tensor, up: Weights, down: Weights, gate: Weights,
    up_bias: Weights, down_bias: Weights, gate_bias: Weights, activation: str,
) -> Tensor:  # fmt: skip
    """The same as `segments` through grouped matrix multiplies over stacked weights, without a host sync.

    Weights that already lie evenly spaced in one storage are used where they are; others are stacked on every call.
    An id outside [0, E) is an error of `scatter_add_`, on CUDA a device-side assertion.

    Args and result are those of `segments`, in bfloat16 and with sizes that `can_group` takes.
    """
    tokens, top_k = idx.shape
    flat = idx.reshape(-1)
    order = flat.argsort()
    counts = torch.zeros(len(up), dtype=torch.int32, device=x.device)
    offsets = counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
    expert_of = flat.index_select(0, order)
    rows = x.index_select(0, order.div(top_k, rounding_mode="floor"))

    def multiply(source: Tensor, weights: Weights, biases: Weights) -> Tensor:
        product = F.grouped_mm(source, stacked(weights).transpose(1, 2), offs=offsets)
        return product.add_(stacked(biases).index_select(0, expert_of)) if biases else product

    h = multiply(rows, up, up_bias)
    h = h.mul_(activate_(multiply(rows, gate, gate_bias), activation)) if gate else activate_(h, activation)
    outputs = multiply(h, down, down_bias)
    return torch.empty_like(outputs).index_copy_(0, order, outputs).view(tokens, top_k, outputs.shape[1])


def stacked(tensors: Weights) -> Tensor:
    """Give E tensors of one shape as one.

    Returns:
        [E, ...]: a view where they lie evenly spaced in one storage, else a copy.
    """
    first, last = tensors[0], tensors[-1]
    places = list(map(Tensor.data_ptr, tensors))  # at every call, for every layer: what costs least
    step = places[1] - places[0] if len(places) > 1 else first.numel() * first.element_size()
    in_place = (
        step > 0
        and step % first.element_size() == 0
        and all(place == places[0] + e * step for e, place in enumerate(places))
        and all(tensor.stride() == first.stride() for tensor in tensors)
        and last.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()  # then all between them do
    )
    if in_place:
        return first.as_strided((len(tensors), *first.shape), (step // first.element_size(), *first.stride()))
    return torch.stack(list(tensors))


def can_group(x: Tensor, up: Weights, down: Weights) -> bool:
    """Whether `grouped` takes these: bfloat16 (all that torch's fake kernel accepts), rows of whole 16 bytes."""
    sizes = (x.shape[1], up[0].shape[0], down[0].shape[0])
    return x.dtype == torch.bfloat16 and x.shape[0] > 0 and all(size % 8 == 0 for size in sizes)


def _sort(idx: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Positions of the flat ids in expert order, and how many branches each expert has."""
    flat = idx.reshape(-1)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    if len(counts) > num_experts:
        raise UserError(f"moeca::experts: expert id {len(counts) - 1}, but there are {num_experts} experts")
    return flat.argsort(), counts


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _check(x: Tensor, idx: Tensor, groups: Sequence[Weights], activation: str) -> None:
    up, down, gate, *biases = groups
    if x.dim() != 2 or idx.dim() != 2 or idx.dtype != torch.int64:
        raise UserError(
            "moeca::experts takes x [T, D] and int64 ids [T, K], "
            f"not {tuple(x.shape)} and {idx.dtype} {tuple(idx.shape)}"
        )
    if not up or len(down) != len(up) or any(len(group) not in (0, len(up)) for group in (gate, *biases)):
        counts = [len(group) for group in groups]
        raise UserError(f"moeca::experts: one weight per expert in each list, not {counts} (up, down, gate, biases)")
    if activation not in _ACTIVATIONS:
        raise UserError(f"moeca::experts: unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    other = {w.dtype for group in groups for w in group} - {x.dtype}
    if other:
        raise UserError(f"moeca::experts: x is {x.dtype} and a weight {other.pop()}; convert the one or the other")


def _kernel(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def kernel(x: Tensor, idx: Tensor, *rest: Any) -> Tensor:
        *given, activation = rest
        groups = [weights or [] for weights in given]  # AOTInductor passes an empty list as None
        _check(x, idx, groups, activation)
        # There is no backward: without this the kernel's own in-place work would be recorded.
        with torch._C._AutoDispatchBelowAutograd():
            return form(x, idx, *groups, activation)

    return kernel


def _cuda(x: Tensor, idx: Tensor, up: Weights, down: Weights, *rest: Any) -> Tensor:
    return (grouped if can_group(x, up, down) else segments)(x, idx, up, down, *rest)


def _fake(x: Tensor, idx: Tensor, *rest: Any) -> Tensor:
    *groups, activation = rest
    _check(x, idx, groups, activation)
    torch._check(x.shape[0] == idx.shape[0], lambda: f"x has {x.shape[0]} tokens and ids {idx.shape[0]}")
    return x.new_empty((idx.shape[0], idx.shape[1], groups[1][0].shape[0]))


def _autocast(device: str, key: str) -> Callable[..., Tensor]:
    """As for `linear`: the ambient dtype, for everything but float64."""
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(x: Tensor, idx: Tensor, *rest: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(tensor: Tensor) -> Tensor:
            return tensor if tensor.dtype in (dtype, torch.float64) else tensor.to(dtype)

        *groups, activation = rest
        with torch._C._ExcludeDispatchKeyGuard(below):
            result: Tensor = torch.ops.moeca.experts(cast(x), idx, *([cast(w) for w in g] for g in groups), activation)
            return result

    return kernel


_LIBRARY.impl("experts", _kernel(segments), "CompositeExplicitAutograd")
_LIBRARY.impl("experts", _kernel(_cuda), "CUDA")
_LIBRARY.impl("experts", _autocast("cpu", "AutocastCPU"), "AutocastCPU")
_LIBRARY.impl("experts", _autocast("cuda", "AutocastCUDA"), "AutocastCUDA")
torch.library.register_fake("moeca::experts", _fake, lib=_LIBRARY)
