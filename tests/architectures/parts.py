"""The choices that make one random model, drawn from a seed: everything about it but its weights."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

DIM, HEADS, TOKENS, GRID, CHANNELS = 16, 4, 16, 4, 2  # width, heads, tokens of the latent, their grid, its channels
PROMPT, PROMPT_DIM = 3, 12  # tokens of the prompt, their width

LAYOUTS = ("one stream", "one stream", "one stream", "two streams", "two streams, then one", "linear in and out")
NORM_PLACES = ("pre", "pre", "pre", "post", "sandwich", "none")
NORMS = ("layer", "layer, no weights", "rms", "rms by hand")
GATES = ("zero", "zero", "tanh", "scale only", "layer scale", "none")
MODULATIONS = ("each block", "each block", "shared table")
ARRANGEMENTS = ("in turn", "in turn", "in turn", "in turn", "x + a + b", "x + (a + b)", "x + (ga + gb)")
JOINS = ("x + y", "x + y", "y + x", "x += y", "torch.add", "in float32", "float32 stream", "flat")
ODD_JOINS = ("addcmul", "lerp", "alpha", "minus")
PROJECTIONS = ("fused", "separate", "fused, no bias")
CORES = ("sdpa", "sdpa", "matmul", "@", "einsum", "bmm", "baddbmm")
QK_NORMS = ("none", "none", "layer", "rms", "l2")
ROPES = ("none", "none", "halves", "pairs", "complex")
GROUPS = ("none", "none", "repeat", "expand", "enable_gqa")
MASKS = ("none", "none", "bool", "relative bias")
MLPS = ("gelu", "gelu tanh", "swiglu", "geglu packed", "relu squared", "conv", "conv with a residual")
DISPATCHES = ("dense", "gather", "expert choice", "numpy", "nonzero", "where", "inline")
SCORES = ("softmax", "sigmoid", "cosine")
SELECTIONS = ("plain", "bias", "groups")
WEIGHTINGS = ("plain", "renormalised", "scaled")
TIMES = ("cos, sin", "sin, cos", "fourier", "learned fourier")
CONDITIONS = ("label", "pooled prompt", "none")
SKIPS = ("none", "none", "none", "concat", "added", "added, weighted")
OUTERS = ("none", "none", "none", "residual", "preconditioned")


@dataclass(frozen=True)
class Parts:
    """One model. `odd` is a branch whose join the finder only names as a miss: (block, "attn" or "mlp", how)."""

    seed: int
    depth: int
    layout: str
    norm_place: str
    norm: str
    gate: str
    modulation: str
    arrangement: str
    join: str
    odd: tuple[int, str, str] | None
    projection: str
    core: str
    qk_norm: str
    rope: str
    groups: str
    mask: str
    mixture_of_heads: bool
    mlp: str
    dispatch: str  # "" where the model has no experts
    moe_blocks: tuple[int, ...]
    scores: str
    selection: str
    weighting: str
    shared: int
    expert: str  # "swiglu" or "gelu"
    cross: bool
    registers: int
    skip: str
    outer: str
    time: str
    time_residual: bool
    condition: str
    guidance: bool
    tokens_in: bool
    patch: str
    dropout: bool
    dtype: str

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in asdict(self).items())


def draw(seed: int) -> Parts:
    """The choices of one seed. What can't go together isn't drawn together; why is said where it is so."""
    r = random.Random(seed)
    pick = r.choice
    depth, layout = pick((2, 2, 3)), pick(LAYOUTS)
    two, packed = layout.startswith("two"), layout == "linear in and out"
    skip = "none" if two else pick(SKIPS)
    depth = 3 if skip != "none" or layout == "two streams, then one" else depth
    join = pick(JOINS)
    gate = pick(GATES)
    arrangement = "in turn" if two else pick(ARRANGEMENTS)
    if arrangement == "x + (ga + gb)" and gate not in ("zero", "tanh"):
        arrangement = "x + (a + b)"
    core = pick(CORES)
    registers = pick((0, 0, 0, 2)) if not two else 0
    mlp = pick(MLPS)
    with_experts = not packed and r.random() < 0.6
    moe_blocks = tuple(i for i in range(depth) if r.random() < 0.7) or (depth - 1,)
    odd = (r.randrange(depth), pick(("attn", "mlp")), pick(ODD_JOINS)) if r.random() < 0.1 else None
    return Parts(
        seed=seed,
        depth=depth,
        layout=layout,
        norm_place=pick(NORM_PLACES),
        norm=pick(NORMS),
        gate=gate,
        modulation=pick(MODULATIONS),
        arrangement="one linear" if packed else arrangement,
        # a skip that is changed in place afterwards is another model; a stream in float32 is one for 16 bits
        join="x + y" if join == "x += y" and skip != "none" else join,
        odd=odd if arrangement == "in turn" and not two and not packed else None,
        projection=pick(PROJECTIONS),
        core=core,
        qk_norm=pick(QK_NORMS),
        rope=pick(ROPES) if registers == 0 and not two else "none",  # tables are for the latent's tokens alone
        groups=pick(GROUPS if core == "sdpa" else GROUPS[:4]) if not two and not packed else "none",
        mask=pick(MASKS) if not two and not packed else "none",
        # with experts in the same branch a region would have two routers
        mixture_of_heads=not two and not packed and arrangement != "x + (a + b)" and r.random() < 0.15,
        mlp=mlp,
        dispatch=pick(DISPATCHES) if with_experts else "",
        moe_blocks=moe_blocks if with_experts else (),
        scores=pick(SCORES),
        selection=pick(SELECTIONS),
        weighting=pick(WEIGHTINGS),
        shared=pick((0, 1, 1, 2)),
        expert=pick(("swiglu", "gelu")),
        cross=not two and not packed and r.random() < 0.3,
        registers=registers,
        skip=skip,
        outer=pick(OUTERS),
        time=pick(TIMES),
        time_residual=r.random() < 0.15,
        condition=pick(CONDITIONS),
        guidance=r.random() < 0.2,
        tokens_in=r.random() < 0.3,
        patch=pick(("conv", "linear")),
        dropout=r.random() < 0.3,
        # casts are only there to see where the model isn't in float32
        dtype="bfloat16" if join in ("in float32", "float32 stream") else "float32",
    )
