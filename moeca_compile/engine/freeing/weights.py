"""Weights of one handle that were moved to the host, or dropped.

Dynamo checks at every call that each weight is the tensor that it traced: shape, strides, dtype, device. So during a
call of the handle a freed weight holds a stand-in with all of these, whose memory all stand-ins of a device share.
Between calls it holds its values on the host, or nothing (shape [0]) if it was dropped.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeca_compile.engine.freeing.state_dict import refuse_state_dicts
from moeca_compile.errors import StateError
from moeca_compile.graph.content import needs_device_sync

HOST, DROP = "host", "drop"


@dataclass(frozen=True)
class _Freed:
    """One freed weight.

    Attributes:
        weight: the tensor in the model.
        home: what it holds between calls: its values on the host, or an empty tensor.
        stand_in: what it holds during a call.
    """

    weight: weakref.ref[Tensor]
    home: Tensor
    stand_in: Tensor

    @property
    def is_dropped(self) -> bool:
        return not self.home.numel()

    @property
    def bytes(self) -> int:
        return self.stand_in.numel() * self.stand_in.element_size()

    def holds(self, weight: Tensor, value: Tensor) -> bool:
        """Whether `weight` holds `value`, which was put there: nobody else put another tensor there since."""
        return (weight.shape, weight.device) == (value.shape, value.device) and weight.data_ptr() == value.data_ptr()


class FreedWeights:
    """The freed weights of one handle.

    Args:
        mode: `host` or `drop`; "": nothing will be freed.
        moved: called with the address that each freed weight has during calls from now on, by id.

    Attributes:
        models: that the handle runs.
    """

    def __init__(self, mode: str, moved: Callable[[dict[int, int]], None]) -> None:
        self.mode, self._moved = mode, moved
        self.models: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._entries: dict[int, _Freed] = {}  # by id of the weight
        self._scratch: dict[torch.device, Tensor] = {}
        self._calls = 0  # calls of the handle in progress
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._entries)

    @property
    def bytes(self) -> int:
        """Bytes of device memory that were freed: those of the weights, less what their stand-ins share."""
        with self._lock:
            freed = sum(entry.bytes for entry in self._entries.values() if entry.weight() is not None)
            return max(0, freed - sum(scratch.numel() for scratch in self._scratch.values()))

    def can_free(self, value: Any) -> bool:
        """Whether the memory of a weight can be freed: a plain tensor that fills its storage and is no stand-in."""
        if type(value) not in (Tensor, torch.nn.Parameter) or value.is_inference() or self._entry(value) is not None:
            return False
        if self.mode == HOST and not needs_device_sync(value):
            return False
        size = value.numel() * value.element_size()
        return bool(size) and not value.is_sparse and value.untyped_storage().nbytes() == size

    def free(self, weights: Sequence[Tensor]) -> None:
        """Free weights, for each of which `can_free` is true."""
        addresses = {}
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for weight in weights:
                stand_in, home = self._stand_in(weight), self._home(weight)
                self._entries[id(weight)] = _Freed(weakref.ref(weight), home, stand_in)
                weight.data = stand_in if self._calls else home
                addresses[id(weight)] = stand_in.data_ptr()
        if self.mode == DROP:
            refuse_state_dicts(self.models, {key: self._entries[key].stand_in.shape for key in addresses})
        self._moved(addresses)

    def enter(self) -> None:
        """Begin a call of the handle. A weight that somebody has put another tensor into isn't freed any more."""
        with self._lock:
            self._calls += 1
            if self._calls == 1 and self._entries:
                self._put("home", "stand_in")

    def leave(self) -> None:
        """End a call of the handle."""
        with self._lock:
            self._calls -= 1
            if not self._calls and self._entries:
                self._put("stand_in", "home")

    def restore(self) -> None:
        """Put the values of all weights on the host back where they were."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for key, entry in list(self._entries.items()):
                weight = entry.weight()
                if entry.is_dropped and weight is not None:
                    continue
                if weight is not None and (entry.holds(weight, entry.home) or entry.holds(weight, entry.stand_in)):
                    weight.data = entry.home.to(entry.stand_in.device)
                del self._entries[key]

    def has(self, value: Any) -> bool:
        """Whether an argument of a graph is a freed weight."""
        return self._entry(value) is not None

    def values(self, args: Sequence[Any]) -> Sequence[Any]:
        """Arguments of a graph with the values of freed weights, copied to the device.

        Raises:
            StateError: one of the weights was dropped.
        """
        return [self.value(arg) for arg in args] if self._entries else args

    def value(self, arg: Any) -> Any:
        """One argument of a graph; a freed weight as its values, copied to the device.

        Raises:
            StateError: the weight was dropped.
        """
        entry = self._entry(arg)
        if entry is None:
            return arg
        if entry.is_dropped:
            raise StateError(
                f"free_hoisted='drop': a call needs a weight of shape {list(entry.stand_in.shape)} that was dropped. "
                "Only calls with the timesteps and the conditioning that came before can be computed. For other ones "
                "load the model's weights again and compile it, or use free_hoisted='host'"
            )
        return entry.home.to(entry.stand_in.device, non_blocking=True)

    def stored(self, args: Sequence[Any]) -> list[Any]:
        """Arguments of a graph with freed weights as they are stored, on the host; None for dropped ones."""
        found = []
        for arg in args:
            entry = self._entry(arg)
            found.append(arg if entry is None else None if entry.is_dropped else entry.home)
        return found

    def _entry(self, value: Any) -> _Freed | None:
        entry = self._entries.get(id(value))
        return entry if entry is not None and entry.weight() is value else None

    def _put(self, before: str, after: str) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for key, entry in list(self._entries.items()):
                weight = entry.weight()
                if weight is not None and entry.holds(weight, getattr(entry, before)):
                    weight.data = getattr(entry, after)
                else:
                    del self._entries[key]

    def _home(self, weight: Tensor) -> Tensor:
        if self.mode == DROP:
            return torch.empty(0, dtype=weight.dtype, device=weight.device)
        home = torch.empty_like(weight.data, device="cpu", pin_memory=weight.device.type == "cuda")
        return home.copy_(weight.data)

    def _stand_in(self, weight: Tensor) -> Tensor:
        """A tensor like the weight, full of NaN, in memory that all stand-ins of the device share."""
        size = weight.numel() * weight.element_size()
        scratch = self._scratch.get(weight.device)
        if scratch is None or scratch.numel() < size:
            scratch = torch.full((-(-size // 16) * 16,), 255, dtype=torch.uint8, device=weight.device)
            self._scratch[weight.device] = scratch
        return scratch[:size].view(weight.dtype).as_strided(weight.shape, weight.stride())
