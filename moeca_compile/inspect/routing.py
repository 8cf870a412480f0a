"""What a region attends to and who chooses its experts, in words."""

from __future__ import annotations

from moeca_compile.graph.regions import Region


def attending(region: Region) -> str:
    """What a region's attention attends to; `fixed keys` depend on the prompt alone."""
    if region.kind != "attention":
        return ""
    return "; ".join(attention.kind + (", fixed keys" if attention.invariant else "") for attention in region.attention)


def routing(region: Region) -> str:
    """How a region's experts are chosen, and whether its branches can be told apart."""
    if region.kind == "span":
        return ""
    routers = {experts.router for experts in region.experts}
    texts = []
    for router in region.routers:
        k, n = router.top_k, router.num_experts
        says = {
            "token": f"{k} of {n} experts a token",
            "expert": f"{k} tokens a sample for each of {n} experts",
            "step": f"{k} of {n} experts, the same at a step whatever the latent",
            "batch": f"{n} experts choose over the whole batch: samples depend on their neighbours",
            "head": f"{k} of {n} heads",
        }[router.choice]
        texts.append(says if router in routers else f"{says}, cached as a whole")
    return "; ".join(texts)
