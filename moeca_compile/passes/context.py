"""What passes know beside the graph. Finders return a context with their facts added; rewriters only read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from moeca_compile.graph.capture import Input
from moeca_compile.graph.regions import AttentionInfo, ExpertsInfo, HoistedValue, RegionMap, Rejected, RouterInfo
from moeca_compile.graph.variant import StateSlot
from moeca_compile.schedule import Control, Row
from moeca_compile.schedule.granularity import Granularity


@dataclass(frozen=True)
class Roles:
    """What the model's own inputs mean, by placeholder name; '' or () where there is none.

    `timestep` feeds the sinusoid; `latent` is what the sampler moves; `condition` are the others (labels, prompts).
    """

    timestep: str = ""
    latent: str = ""
    condition: tuple[str, ...] = ()


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
class Context:
    """Facts about one capture, and for rewriters what they need of the schedule: the row to build and the state that it
    keeps, the order of its forecast and the control of its PARTIAL rows; of a prologue the hoisted values that it
    gives. `indices`: while the captured graph is put in order, the call's one-dimensional indices and masks."""

    inputs: tuple[Input, ...]
    granularity: Granularity = Granularity("region")
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    roles: Roles = Roles()
    dependence: tuple[tuple[str, str], ...] = ()
    attention: tuple[AttentionInfo, ...] = ()
    routers: tuple[RouterInfo, ...] = ()
    experts: tuple[ExpertsInfo, ...] = ()
    branches: tuple[Branch, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    macs: tuple[tuple[str, int], ...] = ()
    regions: RegionMap = RegionMap(())
    hoisted: tuple[HoistedValue, ...] = ()
    row: Row = ()
    layout: tuple[StateSlot, ...] = ()
    order: int = 1
    control: Control = field(default_factory=Control)
    gives: tuple[int, ...] = ()
