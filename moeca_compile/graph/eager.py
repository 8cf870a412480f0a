"""Dynamo's graph, run as eager runs it, so that `capture` can trace it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from moeca_compile.graph.constants import Number, takes_sizes
from moeca_compile.graph.copying import Copying


class Eager(Interpreter):
    """Runs Dynamo's graph with the dtypes that eager has: while tracing, torch only records where an autocast region
    begins and ends; here it is entered too. Else a `float()` behind a linear would look like no change, and be lost.

    `constants` are numbers that the model reads out of tensors, known beforehand: no fake tensor could tell them.
    `copying` copies blocks that were traced before."""

    def __init__(self, gm: GraphModule, constants: Mapping[Node, Number], copying: Copying) -> None:
        super().__init__(gm)
        self.constants, self.copying = constants, copying

    def run_node(self, n: Node) -> Any:
        if self.copying.begin(n, self.env):
            return self.env[n]
        with self.copying.noting(n, self.env):
            self.env[n] = self._value(n)
        self.copying.end(n, self.env)
        return self.env[n]

    def _value(self, n: Node) -> Any:
        if n.target == "item" and n in self.constants:
            return self.constants[n]
        return super().run_node(n)

    def map_nodes_to_values(self, args: Any, n: Node) -> Any:
        if not self.constants or not takes_sizes(n):
            return super().map_nodes_to_values(args, n)
        return map_arg(args, lambda source: self.constants.get(source, self.env[source]))

    def run(self, *args: Any, **keywords: Any) -> Any:
        self.regions: list[torch.autocast] = []
        try:
            return super().run(*args, **keywords)
        finally:
            while self.regions:  # only after an error
                self.regions.pop().__exit__(None, None, None)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is _enter_autocast:
            device, dtype, enabled, *_ = args
            self.regions.append(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
            return self.regions[-1].__enter__()
        if target is _exit_autocast:
            return self.regions.pop().__exit__(None, None, None)
        return super().call_function(target, args, kwargs)
