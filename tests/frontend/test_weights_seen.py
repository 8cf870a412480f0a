"""Whether a model has other weights than it had, however they were put there."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import nn

from moeca_compile.frontend.owner import WeightsSeen, parameters_of


def block() -> nn.Sequential:
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    return nn.Sequential(inner, nn.Linear(2, 2, bias=False), inner)


def _parameter(model: nn.Sequential) -> None:
    model[1].weight = nn.Parameter(torch.zeros(2, 2))


def _buffer(model: nn.Sequential) -> None:
    model[0][1].running_mean = torch.zeros(2)


def _child(model: nn.Sequential) -> None:
    model[0][0] = nn.Linear(2, 2)


def _dictionary(model: nn.Sequential) -> None:
    model[1]._parameters = OrderedDict(weight=nn.Parameter(torch.zeros(2, 2)))


def _added(model: nn.Sequential) -> None:
    model[1].register_parameter("bias", nn.Parameter(torch.zeros(2)))


def _removed(model: nn.Sequential) -> None:
    model[0][0].bias = None


@pytest.mark.parametrize("change", [_parameter, _buffer, _child, _dictionary, _added, _removed])
def test_other_weights_are_noticed(change: Callable[[nn.Sequential], None]) -> None:
    model = block()
    seen = WeightsSeen(model)
    assert seen.hold(model)
    assert [*map(id, seen.tensors)] == [*map(id, parameters_of(model))]
    change(model)
    assert not seen.hold(model)
    assert WeightsSeen(model).hold(model)


def test_the_same_weights_under_other_modules_hold() -> None:
    model = block()
    seen = WeightsSeen(model)
    again = nn.Linear(2, 2, bias=False)
    again.weight = model[1].weight
    model[1] = again
    assert seen.hold(model)


def test_values_are_not_looked_at() -> None:
    model = block()
    seen = WeightsSeen(model)
    with torch.no_grad():
        model[1].weight.add_(1)  # its version counter tells that
    assert seen.hold(model)


def test_a_torchscript_module_is_looked_at_anew_each_time() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.Linear(2, 2))
    seen = WeightsSeen(model)
    assert seen.hold(model)
    model[1].weight = nn.Parameter(torch.zeros(2, 2))
    assert not seen.hold(model)


def test_it_does_not_keep_the_model_alive() -> None:
    model = block()
    seen, gone = WeightsSeen(model), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert seen.tensors
