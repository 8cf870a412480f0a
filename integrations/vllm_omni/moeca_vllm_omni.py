"""The cache backend `moeca` for vLLM-Omni: its interface is a class with `enable`, `refresh` and `is_enabled`.

vLLM-Omni chooses backends in one function, `get_cache_backend`, and has no registry for others. `register`, which it
calls in every process as a plug-in, puts a function before it that knows one more name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import moeca_compile as moeca

NAME = "moeca"
PREFIX = "moeca_"  # of options in cache_config: moeca_schedule, moeca_granularity, ...
TRANSFORMERS = ("transformer", "transformer_2")
SELECT = "get_cache_backend"


def register() -> None:
    """Let vLLM-Omni know `cache_backend="moeca"`. It may be called more than once."""
    from vllm_omni.diffusion.cache import selector

    choose = selector.get_cache_backend
    if getattr(choose, "knows_moeca", False):
        return
    wrapped = _or_moeca(choose)
    for name, module in list(sys.modules.items()):  # the runner may have imported the function already
        if name.startswith("vllm_omni.") and getattr(module, SELECT, None) is choose:
            setattr(module, SELECT, wrapped)


def _or_moeca(choose: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A function that makes the backend `moeca`, and leaves other names to `choose`."""

    def get_cache_backend(cache_backend: str | None, cache_config: Any) -> Any:
        if cache_backend == NAME:
            return backend_class()(cache_config)
        return choose(cache_backend, cache_config)

    get_cache_backend.knows_moeca = True  # type: ignore[attr-defined]
    return get_cache_backend


def backend_class() -> type:
    """The backend, as a subclass of vLLM-Omni's own base class, which is imported when it is needed."""
    from vllm_omni.diffusion.cache.base import CacheBackend

    class MoecaBackend(CacheBackend):  # type: ignore[misc, valid-type]
        """Compiles a pipeline's transformers with moeca and starts each request cold."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.enabled = False
            self.options = options_of(config)
            moeca.Options.from_backend_options(
                self.options
            ).resolved_schedule()  # a mistake is said now, not at the first request

        def enable(self, pipeline: Any) -> None:
            """Compile the transformers and set them on the pipeline."""
            names = [name for name in TRANSFORMERS if getattr(pipeline, name, None) is not None]
            if not names:
                raise moeca.MoecaError(
                    f"cache_backend 'moeca': {type(pipeline).__name__} has neither of {', '.join(TRANSFORMERS)}"
                )
            for name in names:
                setattr(pipeline, name, moeca.compile(getattr(pipeline, name), **self.options))
            self.enabled = True

        def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
            """Drop the state of the last request."""
            for name in TRANSFORMERS:
                if getattr(pipeline, name, None) is not None:
                    moeca.reset(getattr(pipeline, name))

        def is_enabled(self) -> bool:
            """Whether `enable` was called."""
            return self.enabled

    return MoecaBackend


def options_of(config: Any) -> dict[str, Any]:
    """The options of moeca in a cache configuration: entries that begin with `moeca_`, without that. vLLM-Omni's own
    configuration keeps entries that it doesn't know in a mapping among its attributes."""
    if config is None:
        return {}
    entries = dict(config) if isinstance(config, Mapping) else dict(vars(config))
    for value in list(entries.values()):
        if isinstance(value, Mapping):
            entries |= value
    return {name.removeprefix(PREFIX): value for name, value in entries.items() if name.startswith(PREFIX)}
