"""Describes the graph breaks of a model: the source line of each break, Dynamo's reason, and a remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_LISTED = 5  # breaks that a message lists

_READS = ("item()", "tolist", "data-dependent", "data dependent", "dynamic shape", "dynamic slicing", "nonzero")
_REMEDIES = (
    (_READS, "The host reads a tensor's value there. Choose with torch.where, or pass the number as an argument"),
    (("disable", "skipped", "skip inlining", "marked as skip"), "Something excludes that code from tracing, such as a "
     "hook of accelerate or peft. Remove the hook, or take the exclusion away"),
    (("print", "logging", "warnings.warn"), "Remove the output from the model's forward"),
    (("attribute mutation", "setattr", "store_attr"), "The model stores an attribute there. Set it outside forward"),
)  # fmt: skip
_OTHER = "TORCH_LOGS=graph_breaks prints Dynamo's whole reason"


@dataclass(frozen=True, slots=True)
class GraphBreak:
    """One place where Dynamo ended a graph.

    Attributes:
        where: file:line; empty if Dynamo doesn't say, as for a whole function that it gave up on.
        line: text of that line.
        reason: Dynamo's.
    """

    where: str
    line: str
    reason: str

    @property
    def remedy(self) -> str:
        """What the user can do about a break for this reason."""
        reason = self.reason.lower()
        for words, remedy in _REMEDIES:
            if any(word in reason for word in words):
                return remedy
        return _OTHER

    def __str__(self) -> str:
        return f"{self.where}: `{self.line}`: {self.reason}. {self.remedy}"


def describe(parts: int, breaks: Sequence[GraphBreak], dispatches: Sequence[object] = ()) -> str:
    """The message about a broken graph.

    Args:
        parts: number of graphs that the call ran.
        breaks: between them.
        dispatches: expert dispatches that `prepare` left alone, each with its reason.
    """
    lines = [
        f"graph break: {parts} part{'s' * (parts != 1)}. The model runs in parts as torch.compile made them, uncached"
    ]
    lines += [f"  {graph_break}" for graph_break in breaks[:MAX_LISTED]]
    if not breaks:
        lines.append(f"  Dynamo gave up on a whole function. {_OTHER}")
    if len(breaks) > MAX_LISTED:
        lines.append(f"  and {len(breaks) - MAX_LISTED} more")
    lines += [f"  expert dispatch left alone: {dispatch}" for dispatch in dispatches[:MAX_LISTED]]
    return "\n".join(lines)


def break_after(graph: Any) -> GraphBreak | None:
    """The graph break at the end of Dynamo's graph; None: the graph ends where its function returns."""
    reason = getattr(graph, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    text = reason.reason.strip().partition("\n")[0]
    if not reason.user_stack:
        return GraphBreak("", "", text)
    place = reason.user_stack[-1]
    return GraphBreak(f"{place.filename}:{place.lineno}", (place.line or "").strip(), text)
