"""What `save` takes, and what it refuses by name."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.engine.packages import program as loading
from moeca_compile.errors import BundleError, CaptureError, LoweringError, OptionError, StateError
from moeca_compile.ops import packed
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.action import Action, Partial
from tests.models import DiT
from tests.packages.conftest import call_at, compiled, sample, small_model

C, R, F = Action.COMPUTE, Action.REUSE, Action.FORECAST
Pair = namedtuple("Pair", ["sample", "extra"])


@dataclass
class Opaque:
    sample: Tensor


class Wrapped(nn.Module):
    """A model with keywords, defaults and a configuration, whose result is chosen by a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.config = small_model(), {"in_channels": 2, "kind": torch.float32}

    def forward(self, x: Tensor, *, added: dict[str, Tensor], scale: float = 1.0, as_pair: bool = False) -> Any:
        result = self.net(x, added["t"], added["y"]) * scale
        return (result, [x, None]) if as_pair else {"sample": result}


def added(step: int = 0) -> dict[str, Any]:
    x, t, y = call_at(step)
    return {"x": x, "added": {"t": t, "y": y}}


@pytest.mark.usefixtures("interpreted")
class TestWhatIsSaved:
    @pytest.mark.slow
    def test_prologues(self, tmp_path: Path) -> None:
        handle = compiled(small_model(), disable=())
        package = moeca.save(handle, tmp_path / "p", *call_at())
        assert [prologue.name for prologue in package.manifest.sizes[0].prologues] == ["prologue_step"]
        assert "prologue_step: " in str(package)
        torch.testing.assert_close(sample(moeca.load(tmp_path / "p")), sample(handle))

    @pytest.mark.slow
    def test_keywords_containers_constants_and_a_configuration(self, tmp_path: Path) -> None:
        model = Wrapped().eval()
        moeca.save(compiled(model), tmp_path / "p", **added(), other_sizes=[{**added(), "as_pair": True}])
        loaded = moeca.load(tmp_path / "p")
        with torch.no_grad():
            expected = model(**added())
        torch.testing.assert_close(loaded(**added())["sample"], expected["sample"])
        x = added()["x"]
        _, (handed_through, nothing) = loaded(**{**added(), "x": x}, as_pair=True)
        assert handed_through is x
        assert nothing is None
        assert loaded.config.in_channels == 2
        with pytest.raises(AttributeError, match="configuration has no entry 'kind'"):
            loaded.config.kind  # noqa: B018  JSON has no dtype
        with pytest.raises(BundleError, match=r"scale=2.0.*saved for .*scale=1.0"):
            loaded(**added(), scale=2.0)

    @pytest.mark.slow
    def test_packed_experts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(packed, "SMALLEST", 0)
        handle = compiled(small_model(), pack_experts=True)
        moeca.save(handle, tmp_path / "p", *call_at())
        loaded = moeca.load(tmp_path / "p")
        torch.testing.assert_close(sample(loaded), sample(handle))
        assert len(loaded.runtime.packs.layers) == 1

    @pytest.mark.slow
    def test_several_sizes_over_one_file_of_weights(self, tmp_path: Path) -> None:
        handle = compiled(small_model())
        package = moeca.save(handle, tmp_path / "p", *call_at(), other_sizes=[call_at(batch=2)])
        assert {"v0.pt2", "size_1_v0.pt2", "weights.pt"} <= set(package.manifest.files)
        loaded = moeca.load(tmp_path / "p")
        first, second = ([weight for weight in program._args if weight is not None] for program in loaded.programs)
        assert [one.data_ptr() for one in first] == [two.data_ptr() for two in second]
        with torch.no_grad():
            torch.testing.assert_close(loaded(*call_at(batch=2)), handle(*call_at(batch=2)))

    @pytest.mark.parametrize(
        "schedule",
        [
            pytest.param("adaptive:0.05", marks=pytest.mark.slow),
            Schedule(((C,), (Partial(0.25, 0.5),)), order=1, period=2),
            pytest.param(
                Schedule(((C,), (F,), (R,)), order=1, timesteps=(1000.0, 875.0, 750.0)), marks=pytest.mark.slow
            ),
        ],
    )
    def test_every_kind_of_schedule(self, tmp_path: Path, schedule: Any) -> None:
        handle = compiled(small_model(), schedule=schedule)
        moeca.save(handle, tmp_path / "p", *call_at())
        loaded, steps = moeca.load(tmp_path / "p"), 8 if not getattr(schedule, "timesteps", ()) else 3
        x, _, y = call_at()
        with torch.no_grad():
            for step in range(steps):
                t = torch.full((3,), 1000.0 - 125.0 * step)
                torch.testing.assert_close(loaded(x, t, y), handle(x, t, y))
                x = 0.9 * x
        assert [step.variant for step in loaded.stats().steps] == [step.variant for step in moeca.stats(handle).steps]

    def test_an_output_of_diffusers(self, tmp_path: Path) -> None:
        output = pytest.importorskip("diffusers.models.modeling_outputs").Transformer2DModelOutput

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = small_model()

            def forward(self, x: Tensor, t: Tensor, y: Tensor, return_dict: bool = True) -> Any:
                result = self.net(x, t, y)
                return output(sample=result) if return_dict else (result,)

        package = moeca.save(compiled(Model().eval()), tmp_path / "p", *call_at())
        assert package.manifest.model.modules == ("diffusers.models.modeling_outputs",)
        assert type(moeca.load(tmp_path / "p")(*call_at())) is output

    @pytest.mark.slow
    def test_the_handle_goes_on_as_it_was(self, tmp_path: Path) -> None:
        handle = compiled(small_model())
        before = sample(handle)
        records = moeca.stats(handle).steps
        moeca.save(handle, tmp_path / "p", *call_at())
        assert moeca.stats(handle).steps == records
        assert torch.equal(sample(handle), before)

    def test_a_folder_that_exists(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="exists already"):
            moeca.save(compiled(small_model()), tmp_path, *call_at())

    def test_native_code_that_is_wrong_is_not_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        right = loading.native_code
        monkeypatch.setattr(loading, "native_code", lambda file: lambda args: [1.5 * one for one in right(file)(args)])
        with pytest.raises(LoweringError, match=r"step 0 of the native code differs from torch"):
            moeca.save(compiled(small_model()), tmp_path / "p", *call_at())
        assert not list(tmp_path.iterdir())


class Returning(nn.Module):
    def __init__(self, result: str) -> None:
        super().__init__()
        self.net, self.result = small_model(), result
        self.register_buffer("table", torch.ones(2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        out = self.net(x, t, y)
        return {"opaque": Opaque(out), "pair": Pair(out, 1), "buffer": (out, self.table)}[self.result]


@pytest.mark.parametrize(
    ("model", "inputs", "error", "match"),
    [
        (lambda: small_model(), call_at(), StateError, "isn't compiled with moeca"),
        (lambda: compiled(small_model()).forward, call_at(), StateError, "expected a compiled module|isn't compiled"),
        (lambda: compiled(small_model()), (), OptionError, "inputs of one call are missing"),
        (lambda: compiled(small_model()), (1,), CaptureError, "can't be called with the example inputs"),
        (lambda: compiled(small_model(), granularity="output"), call_at(), LoweringError, "granularity='output'"),
        (lambda: compiled(small_model()).train(), call_at(), LoweringError, "in training mode"),
        (lambda: compiled(small_model().to("meta")), call_at(), LoweringError, "the model is on meta"),
        (lambda: compiled(Returning("opaque").eval()), call_at(), LoweringError, "returns a Opaque"),
        (lambda: compiled(Returning("pair").eval()), call_at(), LoweringError, "structure of the result can't be"),
        (lambda: compiled(Returning("buffer").eval()), call_at(), LoweringError, "its graph doesn't compute"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, interpreted: None, model: Any, inputs: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        moeca.save(model(), tmp_path / "p", *inputs)
    assert not list(tmp_path.iterdir())


def test_inputs_that_cannot_be_told_apart(tmp_path: Path, interpreted: None) -> None:
    handle, (x, t, y) = compiled(small_model()), call_at()
    with pytest.raises(OptionError, match="doesn't take these inputs"):
        moeca.save(handle, tmp_path / "p", x, t, z=y)
    with pytest.raises(OptionError, match="the same shapes, dtypes and constants twice"):
        moeca.save(handle, tmp_path / "p", x, t, y, other_sizes=[{"x": x + 1, "t": t, "y": y}])
    with pytest.raises(OptionError, match="expected tuples or mappings"):
        moeca.save(handle, tmp_path / "p", x, t, y, other_sizes=[x])

    class Twice(DiT):
        def forward(self, x: Tensor, t: Tensor, y: Tensor, again: Any = None, *more: Any) -> Tensor:
            return super().forward(x, t, y)

    other = compiled(Twice(depth=1, dim=16, heads=2, num_experts=4, top_k=2, hidden=12, size=4, channels=2).eval())
    with pytest.raises(OptionError, match="one tensor is given as two arguments"):
        moeca.save(other, tmp_path / "p", x, t, y, x)
    with pytest.raises(LoweringError, match="again is a object; a package takes"):
        moeca.save(other, tmp_path / "p", x, t, y, object())
    with pytest.raises(LoweringError, match="again is a complex64 tensor on cpu"):
        moeca.save(other, tmp_path / "p", x, t, y, x.to(torch.complex64))


@pytest.mark.slow
def test_a_graph_that_aotinductor_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **keywords: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuse)
    with pytest.raises(LoweringError, match=r"AOTInductor refused variant v0 .*no such thing"):
        moeca.save(compiled(small_model()), tmp_path / "p", *call_at())
    with pytest.raises(LoweringError, match="no options of Inductor"):
        moeca.save(compiled(small_model(), inner="inductor", inner_options={"x.y": 1}), tmp_path / "p", *call_at())
