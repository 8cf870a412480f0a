"""What the passes on the way to ONNX know beside the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import GraphModule, Node

from moeca_compile.lowering.experts.choose import Lowering


@dataclass(frozen=True)
class OnnxRequest:
    """One variant to be written.

    Attributes:
        graphs: the same variant, captured at each of `batches`; a single one gives a graph for its one batch only.
        weights: by placeholder name: these become constants.
        experts: the form of the routed experts.
        parameters: by placeholder name, what the model calls the weight; those that it has no name for are left out.
        opset: of the standard ONNX domain.
        hoisted: by placeholder name, the nodes of the prologues' graphs that compute the hoisted values.
    """

    graphs: tuple[GraphModule, ...]
    batches: tuple[int, ...]
    weights: Mapping[str, Tensor]
    experts: Lowering
    parameters: Mapping[str, str] = field(default_factory=dict)
    opset: int = 20
    hoisted: Mapping[str, Node] = field(default_factory=dict)
