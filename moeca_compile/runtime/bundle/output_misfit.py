"""What must hold in a bundle that caches the model's output."""

from __future__ import annotations

from moeca_compile.errors import ScheduleError
from moeca_compile.runtime.bundle.manifest import Manifest, StateSpec, TensorSpec
from moeca_compile.schedule import Action, Schedule
from moeca_compile.schedule.granularity import OUTPUT


def output_misfit(manifest: Manifest, schedule: Schedule) -> str:
    """Why the manifest's entries about the model's output don't fit the schedule, or one another; "" if they do."""
    if (schedule.granularity == OUTPUT) != manifest.caches_output:
        return f"the schedule is for granularity {schedule.granularity!r}, and the bundle isn't"
    if not manifest.caches_output:
        return "latent: it is for bundles of granularity 'output'" if manifest.latent is not None else ""
    if manifest.fused is not None:
        return "a fused graph is for schedules whose every row is a graph"
    if schedule.adaptive is not None or not all(isinstance(row[0], Action) for row in schedule.rows):
        return "a model's output has no parts that could be recomputed, and no drift metric"
    if not all(_is_kept(spec, manifest) for spec in manifest.state):
        return "the state isn't made of the outputs"
    latent = next((spec for spec in manifest.inputs if spec.name == manifest.latent), None)
    if manifest.latent is not None and not _is_changed_by(latent, manifest.outputs[0]):
        return f"the latent {manifest.latent!r} is no input with the sizes of the first output"
    return _rule_misfit(schedule, latent is not None)


def _rule_misfit(schedule: Schedule, has_latent: bool) -> str:
    rule = schedule.output
    if rule is None:
        return ""
    if "x" in rule.terms and not has_latent:
        return "the schedule weighs the latent, and no input is named as the latent"
    try:
        rule.check_history(schedule.rows)
    except ScheduleError as error:
        return str(error)
    return ""


def _is_kept(spec: StateSpec, manifest: Manifest) -> bool:
    """Whether a state has what the output has that it belongs to; every output has its states."""
    if spec.output >= len(manifest.outputs) or manifest.state[-1].output != len(manifest.outputs) - 1:
        return False
    output = manifest.outputs[spec.output]
    return (spec.dtype, spec.shape) == (output.dtype, output.shape)


def _is_changed_by(latent: TensorSpec | None, output: TensorSpec) -> bool:
    """Whether the output has the latent's sizes, but perhaps more channels."""
    if latent is None or not 2 <= len(latent.shape) == len(output.shape):
        return False
    channels, of_output = latent.shape[1], output.shape[1]
    fewer = isinstance(channels, int) and isinstance(of_output, int) and channels <= of_output
    alike = (latent.shape[0], *latent.shape[2:]) == (output.shape[0], *output.shape[2:])
    return alike and (fewer or channels == of_output) and "float" in latent.dtype
