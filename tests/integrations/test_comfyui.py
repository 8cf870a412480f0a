"""The ComfyUI node, against a stub of the interface that its README names."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import toy

NODE = Path(__file__).parents[2] / "integrations" / "comfyui" / "__init__.py"
if not NODE.exists():
    pytest.skip("needs the checkout", allow_module_level=True)
LABELS = {"cond": torch.tensor([1, 2, 3]), "uncond": torch.tensor([4, 5, 6])}
STEPS = 6


class Executor:
    """Runs a function inside its wrappers, the first outermost; `class_obj` owns the function."""

    def __init__(self, function: Callable[..., Any], owner: Any, wrappers: list[Callable[..., Any]]) -> None:
        self.function, self.class_obj, self.wrappers = function, owner, wrappers

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if not self.wrappers:
            return self.function(*args, **keywords)
        return self.wrappers[0](Executor(self.function, self.class_obj, self.wrappers[1:]), *args, **keywords)


class Network(torch.nn.Module):
    """A transformer that takes options, and would be traced anew if it read what changes at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toy.model()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        scale = transformer_options.get("patches", {}).get("scale", 1.0)
        if "sigmas" in transformer_options:
            scale = scale * float(transformer_options["uuids"][0])
        return self.inner(x, t, y) * scale


class BaseModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = Network().eval().requires_grad_(False)

    def apply_model(self, x: Tensor, t: Tensor, y: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        return self.diffusion_model(x, t, y, transformer_options=transformer_options)


class Patcher:
    """ModelPatcher: clones share the model, each has wrappers of its own."""

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.wrappers: dict[str, dict[str, list[Callable[..., Any]]]] = {}

    def clone(self) -> Patcher:
        clone = Patcher(self.model)
        clone.wrappers = {
            place: {key: [*wrappers] for key, wrappers in keys.items()} for place, keys in self.wrappers.items()
        }
        return clone

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def add_wrapper_with_key(self, place: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(place, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, place: str, key: str) -> None:
        self.wrappers.get(place, {}).pop(key, None)

    def around(self, place: str, function: Callable[..., Any], owner: Any) -> Executor:
        return Executor(
            function, owner, [wrapper for wrappers in self.wrappers.get(place, {}).values() for wrapper in wrappers]
        )

    def sample(self, seed: int, guidance: str) -> Tensor:
        return self.around("outer_sample", self._sample, self)(seed, guidance)

    def _sample(self, seed: int, guidance: str) -> Tensor:
        """Euler steps; guidance "none", "joined" (one call of twice the batch) or "separate" (two calls)."""
        x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
        apply = self.around("apply_model", self.model.apply_model, self.model)
        for step in range(STEPS):
            options = {"sigmas": torch.tensor([1.0]), "uuids": [step], "cond_or_uncond": [0], "patches": {"scale": 1.0}}
            t = torch.full((3,), 1000.0 * (1 - step / STEPS))
            if guidance == "joined":
                both = apply(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([*LABELS.values()]), options)
                cond, uncond = both.chunk(2)
            else:
                cond = apply(x, t, LABELS["cond"], options)
                uncond = apply(x, t, LABELS["uncond"], options) if guidance == "separate" else cond
            x = x - (uncond + 2.0 * (cond - uncond)) / STEPS
        return x


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Any:
    comfy, extension = types.ModuleType("comfy"), types.ModuleType("comfy.patcher_extension")
    extension.WrappersMP = types.SimpleNamespace(OUTER_SAMPLE="outer_sample", APPLY_MODEL="apply_model")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", extension)
    spec = importlib.util.spec_from_file_location("moeca_comfyui", NODE)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded.NODE_CLASS_MAPPINGS["MoecaCompile"]()


def plain(network: Network) -> Patcher:
    """A patcher without the node, whose samples tell the truth: the options that change don't reach the network."""
    patcher = Patcher(BaseModel())
    patcher.model.diffusion_model = network
    patcher.add_wrapper_with_key("apply_model", "strip", lambda executor, *args: executor(*args[:-1], {}))
    return patcher


def test_the_node_is_described_as_comfyui_asks(node: Any) -> None:
    inputs = node.INPUT_TYPES()["required"]
    assert inputs["model"] == ("MODEL",)
    for name, (kind, *details) in inputs.items():
        if name != "model":
            default = details[0]["default"]
            assert default in kind if isinstance(kind, list) else isinstance(default, str)
    assert node.RETURN_TYPES == ("MODEL",)
    assert callable(getattr(node, node.FUNCTION))


@pytest.mark.parametrize("guidance", ["none", pytest.param("joined", marks=pytest.mark.slow), "separate"])
def test_full_samples_as_the_plain_model_does(node: Any, guidance: str) -> None:
    model = Patcher(BaseModel())
    truth = plain(model.model.diffusion_model).sample(0, guidance)
    (cached,) = node.apply(model, "full", "region", "auto", "eager")
    torch.testing.assert_close(cached.sample(0, guidance), truth, rtol=0, atol=0)


@pytest.mark.parametrize(("granularity", "guidance"), [("region", "none"), ("region", "separate"), ("output", "none")])
def test_samplings_are_cached_and_independent(node: Any, granularity: str, guidance: str) -> None:
    model = Patcher(BaseModel())
    original = model.model.diffusion_model
    (cached,) = node.apply(model, "uniform:2", granularity, "auto", "eager")
    first, second = cached.sample(0, guidance), cached.sample(0, guidance)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    truth = plain(original).sample(0, guidance)
    assert not torch.equal(first, truth)
    assert (first - truth).abs().max() < 0.5 * truth.abs().max()
    assert model.model.diffusion_model is original
    assert not model.wrappers


@pytest.mark.slow
def test_the_node_twice_leaves_one_cache(node: Any) -> None:
    (once,) = node.apply(Patcher(BaseModel()), "uniform:3", "region", "auto", "eager")
    (twice,) = node.apply(once, "full", "region", "auto", "eager")
    assert [len(keys["moeca"]) for keys in twice.wrappers.values()] == [1, 1]
    truth = plain(twice.model.diffusion_model).sample(0, "none")
    torch.testing.assert_close(twice.sample(0, "none"), truth, rtol=0, atol=0)


def test_an_error_in_a_call_puts_the_network_back(node: Any) -> None:
    model = Patcher(BaseModel())
    original = model.model.diffusion_model
    (cached,) = node.apply(model, "full", "region", "auto", "eager")

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cached.around("apply_model", broken, cached.model)(1)
    assert model.model.diffusion_model is original


def test_mistakes_are_shown_on_the_node(node: Any, tmp_path: Path) -> None:
    assert node.VALIDATE_INPUTS("uniform:3", "region", "auto", "eager") is True
    assert "unifrom" in node.VALIDATE_INPUTS("unifrom:3", "region", "auto", "eager")
    assert "can't be read" in node.VALIDATE_INPUTS(str(tmp_path / "no.json"), "region", "auto", "inductor")


def test_a_changed_schedule_file_runs_the_node_again(node: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    assert node.IS_CHANGED(None, str(path), "region", "auto", "eager") == ""
    path.write_text("{}")
    assert node.IS_CHANGED(None, str(path), "region", "auto", "eager") == str(path.stat().st_mtime_ns)
    assert node.IS_CHANGED(None, "full", "region", "auto", "eager") == ""
