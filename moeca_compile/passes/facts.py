"""What passes know beside the graph: the facts that finders learn, and for rewrites which row to build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from moeca_compile.graph.autocast import Casts
from moeca_compile.graph.capture import Input
from moeca_compile.graph.regions import AttentionInfo, ExpertsInfo, HoistedValue, RegionMap, Rejected, RouterInfo
from moeca_compile.graph.variant import StateSlot
from moeca_compile.schedule import Control, Row
from moeca_compile.schedule.granularity import Granularity


@dataclass(frozen=True)
class Roles:
    """What the model's own inputs mean, by placeholder name; '' or () where there is none.

    `timestep` feeds the sinusoid; `latent` is what the sampler moves; `condition` are the others (labels, prompts).
    `more_timesteps` are those of other tokens or modalities.
    """

    timestep: str = ""
    latent: str = ""
    condition: tuple[str, ...] = ()
    more_timesteps: tuple[str, ...] = ()

    @property
    def timesteps(self) -> tuple[str, ...]:
        """All timestep inputs, the one that schedules go by first."""
        return (self.timestep, *self.more_timesteps) if self.timestep else ()


@dataclass(frozen=True)
class Branch:
    """One residual branch: `join` = trunk + gate * `cut`; the body is what lies between, and `cut` is its last node.

    `reason`: why it can't be a region; '' where it can.
    """

    join: str
    trunk: str
    cut: str
    body: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True)
class Facts:
    """What is known of one capture. A finder returns the facts with its own added.

    Attributes:
        inputs: what each placeholder is, in order.
        granularity: what the schedule's columns are, as the options say.
        indices: the call's one-dimensional indices and masks, by placeholder; only while the captured graph is
            normalized.
        caches: placeholders that the model overwrites in place; their new values are the graph's last results.
        autocast: the autocasts under which the graph was captured; only until `materialize_casts` has written them
            into it.
        roles: what the model's own inputs mean.
        dependence: for each node what it depends on: `const`, `condition`, `step` or `latent`.
        attention, routers, experts: the anchors of regions.
        branches: the residual branches, in graph order.
        rejected: what looked like something to cache and was left alone.
        macs: multiply-accumulates of each node that has any.
        regions: what a schedule may reuse.
        hoisted: values that calls may share.
    """

    inputs: tuple[Input, ...]
    granularity: Granularity = Granularity("region")
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    caches: tuple[str, ...] = ()
    autocast: Casts = ()
    roles: Roles = Roles()
    dependence: Mapping[str, str] = field(default_factory=dict)
    attention: tuple[AttentionInfo, ...] = ()
    routers: tuple[RouterInfo, ...] = ()
    experts: tuple[ExpertsInfo, ...] = ()
    branches: tuple[Branch, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    macs: Mapping[str, int] = field(default_factory=dict)
    regions: RegionMap = RegionMap(())
    hoisted: tuple[HoistedValue, ...] = ()


@dataclass(frozen=True)
class RewriteRequest:
    """Which program a rewrite makes of the captured graph.

    Attributes:
        facts: of that graph.
        row: what each region does; () for a prologue.
        layout: the state that the schedule keeps.
        order: of the schedule's forecasts, 0 to 2.
        control: how PARTIAL rows choose what they recompute.
        gives: for a prologue, the positions in `facts.hoisted` of the values that it computes.
        in_place: kept branches may be changed where they lie: the program runs in this process, compiled.
    """

    facts: Facts
    row: Row = ()
    layout: tuple[StateSlot, ...] = ()
    order: int = 1
    control: Control = field(default_factory=Control)
    gives: tuple[int, ...] = ()
    in_place: bool = False
