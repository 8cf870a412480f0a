"""A range of batches: tried at its ends when it is exported, and held to when it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import moeca_compile as moeca
from moeca_compile.errors import BundleError, LoweringError, OptionError
from moeca_compile.exporting.capture import batch_range
from moeca_compile.lowering.tensorrt.build import EngineRequest, batches_of
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.fused import FusedSession
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import EACH_PROVIDER, call_of, edit_manifest, named, small_model
from tests.models import DiT

LEAST, LARGEST = 3, 9


@pytest.fixture(scope="module")
def ranged(model: DiT, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("ranged") / "b"
    return moeca.export(model, call_of(2), "uniform:2", path, dynamic_batch=(LEAST, LARGEST), fused=True)


@pytest.mark.parametrize("provider", EACH_PROVIDER)
@pytest.mark.parametrize("batch", [LEAST, 5, LARGEST])
def test_batches_of_the_range(ranged: Bundle, model: DiT, provider: str, batch: int) -> None:
    call = call_of(batch, seed=1)
    result = Session.open(ranged.path, provider, threads=1).run(named(call))["output"]
    np.testing.assert_allclose(result, model(*call).numpy(), atol=1e-4)


@pytest.mark.parametrize("batch", [1, LEAST - 1, LARGEST + 1])
def test_batches_outside_are_refused(ranged: Bundle, batch: int) -> None:
    says = f"the inputs have batch {batch}; the bundle was exported for batches {LEAST} to {LARGEST}"
    session, call = Session.open(ranged.path, threads=1), named(call_of(batch))
    with pytest.raises(BundleError, match=says):
        session.run(call)
    for kind in (session, FusedSession.open(ranged.path, threads=1)):
        with kind.trajectory() as trajectory:
            with pytest.raises(BundleError, match=says):
                trajectory.run(call)
            trajectory.run(named(call_of(LEAST)))  # the refused call was no step
            assert len(trajectory.records) == 1


def test_the_bundle_says_so(ranged: Bundle, exported: Bundle) -> None:
    assert ranged.manifest.batch == (LEAST, LARGEST)
    assert f"{LEAST} to {LARGEST}" in str(ranged)
    assert exported.manifest.batch is None
    assert len(ranged.golden()[0][0]["x"]) == LEAST


class AnotherFromEight(nn.Module):
    """A model that does something else with large batches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x, t, y)
        return out.relu() if len(x) > 8 else out


@pytest.mark.slow
def test_a_model_that_changes_within_the_range(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"at batch 2 isn't the one at batch 12.*branches on its batch"):
        moeca.export(AnotherFromEight().eval(), call_of(2), "uniform:2", tmp_path / "b", dynamic_batch=(1, 12))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("wrong", [(0, 4), (4, 2), (4, 4), (1,), (1, 2, 3), (1.0, 2), "1:8", 4, None, (True, 4)])
def test_ranges_that_are_none(wrong: Any, model: DiT, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"dynamic_batch=.*or the least and the largest batch, such as \(1, 8\)"):
        moeca.export(model, call_of(2), "full", tmp_path / "b", dynamic_batch=wrong)


@pytest.mark.parametrize("asked", [True, (1, 2), (1, 8), (4, 16), (8, 9)])
def test_captures_prove_a_line_and_end_at_the_largest(asked: Any) -> None:
    batches = batch_range(asked)
    assert batches is not None
    assert len(set(batches.captured)) == 3
    assert min(batches.captured) >= 2
    if batches.largest is not None:
        assert batches.least <= batches.captured[0] <= batches.largest <= batches.captured[2]
        assert {batches.least, batches.largest} <= set(batches.tried)
        assert all(batches.least <= batch <= batches.largest for batch in batches.tried)


def test_engines_are_for_the_range(ranged: Bundle) -> None:
    manifest = ranged.manifest
    assert batches_of(manifest, EngineRequest()) == (LEAST, LEAST, LARGEST)
    assert batches_of(msgspec.structs.replace(manifest, batch=(1, 16)), EngineRequest()) == (1, 2, 16)
    assert batches_of(msgspec.structs.replace(manifest, batch=None), EngineRequest()) == (1, 2, 8)
    assert batches_of(manifest, EngineRequest(batch=(4, 5, 6))) == (4, 5, 6)
    for batch in ((1, 4, 9), (3, 4, 10)):
        with pytest.raises(OptionError, match=rf"the bundle was exported for batches {LEAST} to {LARGEST}"):
            batches_of(manifest, replace(EngineRequest(), batch=batch))


def test_a_sealed_range_that_is_none(copy: Path) -> None:
    edit_manifest(copy, lambda data: data.update(batch=[8, 2]))
    with pytest.raises(BundleError, match="the range of batches is none"):
        Bundle.open(copy)
