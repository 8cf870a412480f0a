"""Spans: which nodes a slice of the blocks or a long skip holds, what is read outside it, and why there is none."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import CaptureError, MoecaWarning
from moeca_compile.graph import fx
from moeca_compile.graph.capture import Capture, capture
from moeca_compile.graph.regions import Region
from moeca_compile.options import Options
from moeca_compile.pipeline import Analysis, analyze
from tests.following import Runner, assert_follows_the_oracle, subject_of
from tests.passes.blocks import DIM, Block, Mlp, Stack, TextOfItsOwn, Timed, TwoStreams, latent, times
from tests.tools import Traced, analyze_module, node, ops, row, schedule_of, trace_module, variant_of


class LongSkips(nn.Module):
    """Depth 6: blocks 0 to 2 hand a feature to 5 to 3, by concatenation and a projection, or by an addition."""

    def __init__(self, merge: str) -> None:
        super().__init__()
        self.blocks, self.merge = nn.ModuleList(Block("gate left") for _ in range(6)), merge
        self.norms = nn.ModuleList(nn.LayerNorm(2 * DIM) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(2 * DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        kept = []
        for i, block in enumerate(self.blocks):
            if i >= 3 and self.merge == "concat":
                x = self.linears[i - 3](self.norms[i - 3](torch.cat([x, kept.pop()], dim=-1)))
            elif i >= 3 and self.merge == "add":
                x = kept.pop() + x
            x = block(x, c)
            if i < 3:
                kept.append(x)
        return x


class TwoTowers(nn.Module):
    """Joint blocks over an image and a text stream; only the image comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoStreams(last=i == 2) for i in range(3))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        text = x[:, :3] * 0.1 + c.unsqueeze(1)
        for block in self.blocks:
            out = block(x, c, text)
            x, text = (out, text) if block.last else (out[:, :4], out[:, 4:])
        return x


class OneText(nn.Module):
    """Joint blocks over two images and one text, which is broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.text = nn.ModuleList([TextOfItsOwn(), TextOfItsOwn()]), nn.Parameter(torch.randn(1, 3, DIM))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        text: Tensor = self.text
        for block in self.blocks:
            out = block(x, text, c)
            x, text = out[:, :4], out[:, 4:]
        return x + text.mean(1, keepdim=True)


BODIES = {
    "plain": lambda: Stack(*(Block("gate left") for _ in range(4))),
    "post norm": lambda: Stack(*(Block("post norm") for _ in range(4))),
    "concat": lambda: LongSkips("concat"),
    "add": lambda: LongSkips("add"),
    "two streams": TwoTowers,
    "one text": OneText,
}


def module_of(body: str) -> nn.Module:
    torch.manual_seed(0)
    return Timed(BODIES[body]())


@cache
def traced(body: str) -> tuple[Traced, Capture]:
    trace = trace_module(module_of(body), latent(), times())
    return trace, capture(trace.gm, trace.args, trace.inputs)


@cache
def analyzed(body: str, granularity: str) -> Analysis:
    trace, captured = traced(body)
    options = Options(inner="eager", granularity=granularity)
    return analyze(trace.gm, trace.args, trace.inputs, options, captured)


def span_of(body: str, granularity: str) -> Region:
    (span,) = analyzed(body, granularity).facts.regions
    return span


# -- what is in it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "granularity", "key", "attentions"),
    [
        ("plain", "stack", "body.blocks.0..body.blocks.3", 4),
        ("plain", "blocks:1:-1", "body.blocks.1..body.blocks.2", 2),
        ("plain", "blocks:-1:", "body.blocks.3", 1),
        ("post norm", "blocks:1:3", "body.blocks.1..body.blocks.2", 2),
        ("concat", "skip:1", "body.blocks.1..body.blocks.4", 4),
        ("concat", "skip:2", "body.blocks.2..body.blocks.3", 2),
        ("add", "skip:1", "body.blocks.1..body.blocks.4", 4),
        ("add", "skip:2", "body.blocks.2..body.blocks.3", 2),
        ("two streams", "stack", "body.blocks.0..body.blocks.2", 3),
        ("two streams", "blocks:0:2", "body.blocks.0..body.blocks.1", 2),
    ],
)
def test_a_span_is_one_region_of_whole_blocks(body: str, granularity: str, key: str, attentions: int) -> None:
    span = span_of(body, granularity)
    assert (span.kind, span.key, len(span.attention)) == ("span", key, attentions)


@pytest.mark.parametrize(
    ("body", "granularity", "values"),
    [
        ("plain", "stack", 1),
        ("concat", "skip:1", 1),  # the inner skips begin and end in it
        ("add", "skip:2", 1),
        ("two streams", "blocks:0:2", 2),  # both streams go on
        ("two streams", "stack", 1),  # the text ends in it
        ("concat", "blocks:0:2", 2),  # the features of blocks 0 and 1 go to 5 and 4, and block 1's to block 2
    ],
)
def test_its_state_is_what_is_read_outside(body: str, granularity: str, values: int) -> None:
    assert len(span_of(body, granularity).outputs) == values


@pytest.mark.parametrize(
    ("body", "granularity", "left"),
    [("plain", "stack", 0), ("plain", "blocks:1:-1", 2), ("concat", "skip:1", 2), ("two streams", "blocks:0:2", 1)],
)
def test_a_reuse_runs_no_attention_of_the_span(body: str, granularity: str, left: int) -> None:
    variant = variant_of(analyzed(body, granularity), "R", order=0)
    assert ops(variant.gm)["aten.scaled_dot_product_attention.default"] == left


def test_a_reuse_still_runs_the_merge_with_the_fresh_skip() -> None:
    """Skip-Cache: the late blocks get what the early ones hand over now, and only the span between is old."""
    variant = variant_of(analyzed("concat", "skip:1"), "R", order=0)
    (merge,) = (n for n in variant.gm.graph.nodes if str(n.target) == "aten.cat.default" and fx.shape(n)[-1] == 2 * DIM)
    late, early = merge.args[0]
    assert late.op == "placeholder"
    assert early.target is fx.aten.add.Tensor


@pytest.mark.parametrize("body", ["plain", "post norm", "concat", "two streams"])
def test_a_slice_keeps_the_change_of_each_stream(body: str) -> None:
    """Each output is kept relative to what its own stream was before: image to image, text to text."""
    span = span_of(body, "blocks:0:2")
    gm = analyzed(body, "blocks:0:2").gm
    pairs = [(node(gm, cut.node), node(gm, cut.base)) for cut in span.cuts]
    assert pairs
    assert all(fx.shape(out) == fx.shape(base) for out, base in pairs)
    assert len({base for _, base in pairs}) == (2 if body == "two streams" else 1)


@pytest.mark.slow
def test_the_blocks_before_a_slice_go_on_to_matter_and_those_before_a_stack_s_end_don_t() -> None:
    assert not any(cut.base for cut in span_of("plain", "stack").cuts)
    module = module_of("plain")
    for granularity, matters in (("stack", False), ("blocks:1:", True)):
        options = Options(inner="eager", granularity=granularity)
        analysis = analyze_module(module, latent(), times(), options=options)
        variant = variant_of(analysis, "R", order=0)
        depends = "x" in {analysis.facts.inputs[i].label for i in variant.takes}
        assert depends is matters


def test_the_fingerprint_tells_granularities_apart() -> None:
    prints = {analyzed("plain", g).facts.regions.fingerprint for g in ("region", "stack", "blocks:1:-1")}
    assert len(prints) == 3


SPANS = [
    ("plain", "stack"), ("plain", "blocks:1:-1"), ("concat", "skip:2"), ("add", "skip:1"),
    ("two streams", "blocks:0:2"), ("one text", "blocks:0:1"),
]  # fmt: skip


# -- what it means ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "order"),
    [
        pytest.param(case, order, marks=[pytest.mark.slow] * (order != index % 3 or index % 2))
        for (index, case), order in product(enumerate(SPANS), (0, 1, 2))
    ],
)
def test_spans_follow_the_oracle(case: tuple[str, str], order: int) -> None:
    body, granularity = case
    module = module_of(body).double().requires_grad_(False)

    def inputs(step: int) -> dict[str, Tensor]:
        x = torch.randn(2, 4, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        return {"x": x * (1 - 0.05 * step), "t": torch.full((2,), 0.5 - 0.05 * step, dtype=torch.float64)}

    one = subject_of(module, inputs, Options(inner="eager", granularity=granularity))
    rows = ["C", "C", "C", "F" if order else "R", "C", "R", "R", "C", "F" if order else "R"]
    schedule = schedule_of(one.analysis, *rows, order=order)
    assert_follows_the_oracle(one, Runner(one, schedule), [row(text) for text in rows])


@pytest.mark.slow
def test_a_model_is_cached_by_the_span_end_to_end() -> None:
    model = moeca.compile(
        module_of("concat").eval(), schedule="uniform:2", order=0, granularity="skip:1", inner="eager"
    )
    with torch.no_grad(), moeca.trajectory(model):
        x = latent()
        results = [model(x + 0.01 * step, times() - 0.1 * step) for step in range(4)]
    stats = moeca.stats(model)
    assert [one.variant for one in stats.steps] == ["v0", "v1", "v0", "v1"]
    assert stats.state_bytes == 2 * 4 * DIM * 4
    assert not torch.equal(results[1], results[0])  # the early blocks' features are fresh


# -- why there is none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "granularity", "reason"),
    [
        ("plain", "skip:1", "keeps 1 outer blocks: this model has none"),
        ("concat", "skip:3", r"keeps 3 outer blocks: those in this model keep \[1, 2\]"),
        ("plain", "blocks:4:", "blocks 4:None are none of the 4 blocks, body.blocks.0 to body.blocks.3"),
    ],
)
def test_a_span_that_isn_t_there_is_refused_with_what_is(body: str, granularity: str, reason: str) -> None:
    module = module_of(body).eval()
    model = moeca.compile(module, granularity=granularity, inner="eager")
    with torch.no_grad(), pytest.warns(MoecaWarning, match=f"runs uncached.*{reason}"):
        assert torch.equal(model(x := latent(), times()), module(x, times()))
    with pytest.raises(CaptureError, match=reason):
        moeca.explain(model, latent(), times())


def test_a_span_of_which_an_index_is_read_outside_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.second = Mlp(), Mlp()

        def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            x = x + self.mlp(x)
            best = x.argmax(dim=-1)
            return x + self.second(x) * best.unsqueeze(-1), best

    analysis = analyze_module(Timed(Counting()), latent(), times(), options=Options(inner="eager", granularity="stack"))
    assert not len(analysis.facts.regions)
    assert "isn't a floating-point tensor of known size" in analysis.facts.rejected[-1].reason
