"""What the finders see: plain data about parts of a graph, by node NAME.

Names, not nodes: a region survives a graph copy, a pickle, a golden file; `fx.resolve` looks it up again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from moeca_compile.errors import InvariantError

KINDS = ("attention", "experts", "mlp", "span")
CHOICES = ("token", "expert", "step", "batch", "head")


@dataclass(frozen=True, slots=True)
class Rejected:
    """A part of the model that looked like something to cache and was left alone.

    Attributes:
        reason: why.
        node: the node's or the module's name; "" where there is none.
        where: the source line, or the module; "" where it isn't known.
        code: the text of the source line; "" where it isn't known.
    """

    reason: str
    node: str = ""
    where: str = ""
    code: str = field(default="", compare=False)

    def __str__(self) -> str:
        at = " ".join(part for part in (self.node, f"({self.where})" if self.where else "") if part)
        return f"{at}: {self.reason}" if at else self.reason


@dataclass(frozen=True, slots=True)
class RouterInfo:
    """One routing: the choice `topk` of the largest `scores`, among `num_experts`; `steers` are the nodes it acts on.

    `choice` says who chooses, and what that means for a cache:
    token: each token takes `top_k` experts; expert: each expert takes `top_k` tokens of a sample;
    step: nothing of the latent is in the scores, so the routing is a constant of the step;
    batch: what is chosen couples the samples of a batch (or has no fixed number, `top_k` 0); head: of attention heads.
    """

    topk: str
    scores: str
    num_experts: int
    top_k: int
    choice: str = "token"
    steers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise InvariantError(f"router {self.topk}: choice {self.choice!r} is none of {CHOICES}")


@dataclass(frozen=True, slots=True)
class ExpertsInfo:
    """The routed part of one MoE layer: `node` is the `moeca::experts` call, y [T, K, D] before gate weighting."""

    node: str
    ids: str
    router: RouterInfo | None


@dataclass(frozen=True, slots=True)
class AttentionInfo:
    """One attention: `node` is the SDPA call or the second matmul of softmax(QK^T)V.

    `kind`: the keys come from the stream of the queries (self), from another one (cross), or from several, the queries'
    own among them (joint). `invariant`: keys and values depend on the prompt alone, so no step changes them.
    """

    node: str
    query: str
    key: str
    value: str
    kind: str = "self"
    invariant: bool = False


@dataclass(frozen=True, slots=True)
class Value:
    """What a node gives: `shape` and `dtype` as it is kept in a state."""

    node: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class BranchesInfo:
    """The routed branches of an experts region, each of which can be recomputed for itself.

    Attributes:
        value: the branches [B, N, K, D], before their gates.
        gates: the node of their weights, [B * N, K, 1].
        scores: the node of the router's scores, [B * N, E].
        num_experts: E.
        total: the node of their sum by gates.
    """

    value: Value
    gates: str
    scores: str
    num_experts: int
    total: str = ""


@dataclass(frozen=True, slots=True)
class Divisible:
    """How a region is taken apart: N tokens a sample, each of which can be recomputed for itself.

    Attributes:
        batch: samples B.
        tokens: tokens a sample N.
        parts: what is kept token by token, [B, N, D]: an attention's or mlp's output; for experts what lies beside the
            routed branches (the shared experts).
        body: the nodes that are run again for some tokens, in graph order; the router isn't among them.
        axes: of these and of what enters them: (node, axis of its tokens, whether that is batch and tokens in one).
        enters: the stream [B, N, D] that a part of the region is recomputed from; None for experts.
        keys: an attention's keys and values, of which every token reads all.
        branches: the routed branches of experts; None for others.
    """

    batch: int
    tokens: int
    parts: tuple[Value, ...]
    body: tuple[str, ...] = ()
    axes: tuple[tuple[str, int, bool], ...] = ()
    enters: Value | None = None
    keys: tuple[Value, ...] = ()
    branches: BranchesInfo | None = None


@dataclass(frozen=True, slots=True)
class Indivisible:
    """A region that is recomputed as a whole or not at all.

    Attributes:
        reason: why.
    """

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Cut:
    """An output of a region: the node at which a cached value takes the place of a computed one.

    It lies before the adaLN gate, so that a cached value meets the current step's gate.

    Attributes:
        node: the output.
        shape: of the output.
        dtype: of the output, as torch names it without the prefix.
        device: of the output.
        bytes: of one kept copy.
        base: the node whose value is subtracted before the output is kept; a span of blocks keeps the change that it
            makes. "": the output is kept as it is.
    """

    node: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    bytes: int = 0
    base: str = ""


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the graph with one purpose whose outputs can be taken from an earlier step.

    Attributes:
        key: the region's name, made of parameter names; a column of a schedule.
        kind: `attention`, `experts`, `mlp` or `span`.
        layer: the number of its block, from 0.
        cuts: its outputs, one or more.
        body: the nodes that only a COMPUTE runs, in graph order.
        parameters: names and shapes of the parameters that the body reads.
        macs: multiply-accumulates of the body, for one call.
        experts: its routed experts.
        attention: its attention operators.
        routers: its routers.
        division: how a part of the region is recomputed, or why that can't be done.

    Raises:
        InvariantError: an unknown kind.
    """

    key: str
    kind: str
    layer: int
    cuts: tuple[Cut, ...]
    body: tuple[str, ...]
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()
    macs: int = 0
    experts: tuple[ExpertsInfo, ...] = ()
    attention: tuple[AttentionInfo, ...] = ()
    routers: tuple[RouterInfo, ...] = ()
    division: Divisible | Indivisible = Indivisible()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvariantError(f"region {self.key}: kind {self.kind!r} is none of {KINDS}")

    @property
    def outputs(self) -> tuple[str, ...]:
        """The nodes of the outputs."""
        return tuple(cut.node for cut in self.cuts)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the outputs."""
        return tuple(cut.shape for cut in self.cuts)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the outputs, as torch names them without the prefix."""
        return tuple(cut.dtype for cut in self.cuts)

    @property
    def state_bytes(self) -> int:
        """Bytes of one kept copy of the outputs."""
        return sum(cut.bytes for cut in self.cuts)

    def divisible(self) -> Divisible:
        """Give how a part of the region is recomputed.

        Returns:
            The division.

        Raises:
            InvariantError: it can't be done.
        """
        if isinstance(self.division, Indivisible):
            raise InvariantError(f"region {self.key} can't be taken apart: {self.division.reason}")
        return self.division


@dataclass(frozen=True, slots=True)
class HoistedValue:
    """A value that several calls share, computed outside the variants.

    Attributes:
        value: the node's name in the captured graph.
        level: `invariant` (the same at all steps of a trajectory) or `step` (the same for all latents at a timestep).
        bytes: its size.
    """

    value: str
    level: str
    bytes: int


@dataclass(frozen=True)
class RegionMap:
    """All regions of one graph in graph order, the misses, the graph's total cost (MACs of one call), and the stream
    that an adaptive schedule watches."""

    regions: tuple[Region, ...]
    rejected: tuple[Rejected, ...] = ()
    total_macs: int = 0
    signal: Value | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for region in self.regions:
            if region.key in seen:
                raise InvariantError(f"two regions have the key {region.key!r}")
            seen[region.key] = region.kind
        object.__setattr__(self, "fingerprint", fingerprint(self.regions))

    def __iter__(self) -> Iterator[Region]:
        return iter(self.regions)

    def __len__(self) -> int:
        return len(self.regions)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(region.key for region in self.regions)


def fingerprint(regions: tuple[Region, ...]) -> str:
    """Hash of the ordered (key, kind, parameter shapes, output count): the same for every batch size and dtype."""
    facts = [[r.key, r.kind, [list(shape) for _, shape in r.parameters], len(r.outputs)] for r in regions]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
