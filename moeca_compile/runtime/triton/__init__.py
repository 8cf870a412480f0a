"""A bundle as a model repository of NVIDIA's Triton inference server. No torch."""

from __future__ import annotations

from moeca_compile.runtime.triton.repository import write_repository

__all__ = ["write_repository"]
