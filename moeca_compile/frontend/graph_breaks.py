"""Where Dynamo broke a model's graph, in words: the source line of each break, Dynamo's reason, and what helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 5  # breaks that a message lists

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
    """One place where Dynamo ended a graph. `where`: file:line, and `line` its text; empty where Dynamo says nothing,
    as for a function that it gave up on as a whole."""

    where: str
    line: str
    reason: str

    @property
    def remedy(self) -> str:
        """What helps against a break for this reason."""
        text = self.reason.lower()
        return next((remedy for words, remedy in _REMEDIES if any(word in text for word in words)), _OTHER)

    def __str__(self) -> str:
        return f"{self.where}: `{self.line}`: {self.reason}. {self.remedy}"


def in_words(parts: int, breaks: Sequence[GraphBreak], dispatches: Sequence[object] = ()) -> str:
    """The message about a broken graph. `dispatches`: the expert dispatches that `prepare` left alone, each with its
    reason."""
    lines = [
        f"graph break: {parts} part{'s' * (parts != 1)}. The model runs in parts as torch.compile made them, uncached"
    ]
    lines += [f"  {one}" for one in breaks[:SHOWN]]
    if not breaks:
        lines.append(f"  Dynamo gave up on a whole function. {_OTHER}")
    if len(breaks) > SHOWN:
        lines.append(f"  and {len(breaks) - SHOWN} more")
    lines += [f"  expert dispatch left alone: {one}" for one in dispatches[:SHOWN]]
    return "\n".join(lines)


def break_after(graph: Any) -> GraphBreak | None:
    """Where and why Dynamo ended this graph; None: its function returned."""
    reason = getattr(graph, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    text = reason.reason.strip().partition("\n")[0]
    if not reason.user_stack:
        return GraphBreak("", "", text)
    place = reason.user_stack[-1]
    return GraphBreak(f"{place.filename}:{place.lineno}", (place.line or "").strip(), text)
