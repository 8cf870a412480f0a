"""A module in TensorRT's place for the process that builds: `MOECA_FAKE` says what its builder does."""

from __future__ import annotations

import enum
import os
import signal
from types import SimpleNamespace
from typing import Any

__version__ = "11.4.0"
DOES = os.environ["MOECA_FAKE"]

if DOES == "raise":
    raise RuntimeError("no driver")


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


class ILogger:
    Severity = enum.Enum("Severity", "ERROR INTERNAL_ERROR")


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class Config:
    def __init__(self, log: Any) -> None:
        self.cache = b""

    def add_optimization_profile(self, profile: Any) -> int:
        return -1 if DOES == "refuse the profile" else 0

    def create_timing_cache(self, data: bytes) -> Any:
        return None if DOES == "refuse the cache" else SimpleNamespace(serialize=lambda: data + b"timings")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return not ignore_mismatch

    def get_timing_cache(self) -> Any:
        return self.cache


class Builder:
    def __init__(self, log: Any) -> None:
        self.log = log

    def create_network(self, flags: int) -> Any:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return SimpleNamespace()

    def create_builder_config(self) -> Config:
        return Config(self.log)

    def create_optimization_profile(self) -> Any:
        return SimpleNamespace(set_shape=lambda name, least, usual, largest: None)

    def build_serialized_network(self, network: Any, config: Config) -> Any:
        if DOES == "die building":
            die()
        if DOES == "give no plan":
            self.log.log(ILogger.Severity.ERROR, "no kernel for the_Relu")
            return None
        return b"a plan"


class OnnxParser:
    def __init__(self, network: Any, log: Any) -> None:
        self.num_errors = 1

    def supports_operator(self, name: str) -> bool:
        return name == "Relu"

    def parse(self, graph: bytes, path: str) -> bool:
        if DOES == "die parsing":
            die()
        return DOES != "refuse the graph"

    def get_error(self, i: int) -> Any:
        return SimpleNamespace(
            node_operator=lambda: "Relu", node_name=lambda: "the_Relu", desc=lambda: "nothing to like about it"
        )
