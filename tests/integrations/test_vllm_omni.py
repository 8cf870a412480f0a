"""The plug-in for vLLM-Omni, against a stub of the interface that its README names."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import moeca_compile as moeca
from tests import toy

PLUGIN = Path(__file__).parents[2] / "integrations" / "vllm_omni" / "moeca_vllm_omni.py"
if not PLUGIN.exists():
    pytest.skip("needs the checkout", allow_module_level=True)
CONFIG = {"moeca_schedule": "uniform:2", "moeca_order": 1, "moeca_inner": "eager"}


class CacheBackend:
    def __init__(self, config: Any) -> None:
        self.config = config
        self.enabled = False


class CacheConfig:
    """As theirs: known entries are attributes, others lie in a mapping."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self.rel_l1_thresh = 0.2
        self.extra = entries


class Pipeline(torch.nn.Module):
    def __init__(self, transformers: int = 1) -> None:
        super().__init__()
        for name in ("transformer", "transformer_2")[:transformers]:
            setattr(self, name, toy.model().eval().requires_grad_(False))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plug-in, with a stub of vLLM-Omni in which the runner has imported the function already."""

    def get_cache_backend(cache_backend: str | None, cache_config: Any) -> Any:
        if cache_backend in (None, "none"):
            return None
        raise ValueError(f"Unsupported cache backend: {cache_backend}")

    names = (
        "",
        ".diffusion",
        ".diffusion.cache",
        ".diffusion.cache.base",
        ".diffusion.cache.selector",
        ".diffusion.run",
    )
    modules = {name: types.ModuleType(f"vllm_omni{name}") for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"vllm_omni{name}", module)
        if name:
            parent, _, attribute = name.rpartition(".")
            setattr(modules[parent], attribute, module)
    base: Any = modules[".diffusion.cache.base"]
    base.CacheBackend = CacheBackend
    for holder in (".diffusion.cache.selector", ".diffusion.run"):
        modules[holder].get_cache_backend = get_cache_backend  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("moeca_vllm_omni", PLUGIN)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def chosen(name: str | None, config: Any) -> Any:
    return sys.modules["vllm_omni.diffusion.run"].get_cache_backend(name, config)  # type: ignore[attr-defined]


def test_register_adds_one_name_and_keeps_the_others(plugin: Any) -> None:
    plugin.register()
    plugin.register()
    assert chosen(None, {}) is None
    assert isinstance(chosen("moeca", {}), CacheBackend)
    with pytest.raises(ValueError, match="Unsupported cache backend: deep"):
        chosen("deep", {})


@pytest.mark.parametrize(
    "config",
    [pytest.param(CONFIG, id="dict", marks=pytest.mark.slow), pytest.param(CacheConfig(CONFIG), id="object")],
)
def test_requests_are_cached_and_start_cold(plugin: Any, config: Any) -> None:
    plugin.register()
    backend, pipeline = chosen("moeca", config), Pipeline()
    assert not backend.is_enabled()
    backend.enable(pipeline)
    assert backend.is_enabled()
    results = []
    for _ in range(2):
        backend.refresh(pipeline, 8)
        with torch.inference_mode():
            results.append(toy.sample(pipeline.transformer, 0))
        stats = moeca.stats(pipeline.transformer)
        assert len(stats.steps) == 8
        assert stats.mac_fraction < 1
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.slow
def test_full_is_the_plain_model(plugin: Any) -> None:
    plugin.register()
    backend, pipeline = chosen("moeca", {"moeca_schedule": "full", "moeca_inner": "eager"}), Pipeline(2)
    with torch.inference_mode():
        plain = [toy.sample(pipeline.transformer, 1), toy.sample(pipeline.transformer_2, 1)]
        backend.enable(pipeline)
        backend.refresh(pipeline, 8)
        cached = [toy.sample(pipeline.transformer, 1), toy.sample(pipeline.transformer_2, 1)]
    for before, after in zip(plain, cached, strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_mistakes_are_said_when_the_worker_starts(plugin: Any) -> None:
    plugin.register()
    with pytest.raises(moeca.MoecaError, match="schedul"):
        chosen("moeca", {"moeca_schedul": "uniform:2"})
    with pytest.raises(moeca.MoecaError, match="unifrom"):
        chosen("moeca", {"moeca_schedule": "unifrom:2"})
    with pytest.raises(moeca.MoecaError, match="Pipeline has neither of transformer, transformer_2"):
        chosen("moeca", {}).enable(Pipeline(0))
