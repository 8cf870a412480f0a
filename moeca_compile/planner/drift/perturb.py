"""What stale experts cost: experts made stale one at a time, and the quality of the samples."""

from __future__ import annotations

from moeca_compile.planner.drift.stale import PRICE, PerturbationResult, stale_samples
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.study import Study


def perturb_experts(study: Study) -> None:
    """Make the requested number of experts stale, in order of falling drift; the store keeps the results."""
    stored, seed = study.store.drift(), study.request.seeds[0]
    records = [] if stored is None else stored[1]["experts"]
    drifts = {(record["region"], record["expert"]): record["forecast"] for record in records}
    experts = []
    for region in study.sampled.program.regions:
        for info in region.experts:
            count = info.router.num_experts if info.router is not None else 0
            measured = [expert for expert in range(count) if (region.key, expert) in drifts]
            experts += [(drifts[region.key, expert], region, info, expert) for expert in measured]
    experts.sort(key=lambda entry: -entry[0])
    done = {(result.region, result.expert, result.seed) for result in study.store.perturbations()}
    remaining = [
        (region, info, expert)
        for _, region, info, expert in experts[: study.request.perturb]
        if (region.key, expert, seed) not in done
    ]
    cost = f"{len(remaining)} experts stale, one by one: about {PRICE * len(remaining)} uncached trajectories"
    begin = study.sampled.seconds
    for number, (region, info, expert) in enumerate(remaining):
        study.report_progress(f"{cost} of {study.uncached:.2g} s", 0.4 + 0.1 * number / len(remaining))
        samples = stale_samples(study.sampled, seed, region, info, expert)
        study.sampled.uncached.pop()  # a perturbed run takes longer
        errors = study.errors_to(study.truth[seed], samples)
        study.store.add_perturbation(
            PerturbationResult(region.key, region.layer, expert, seed, mean_psnr([errors], study.data_range))
        )
    study.spend("perturb", study.sampled.seconds - begin)
