"""What a task states of itself, as data: read by commands, lists, reports and comparisons with no model at hand.

A new task fills these in, in its own file, and appears everywhere by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["share", "count", "number"]
"""How a metric reads: a share of 1 (shown in percent), a count, or a number in a unit of its own."""

PROMPT_SETTINGS = ("fewshot_as_multiturn", "description", "system_instruction")
"""Entries of a spec's `settings` that say how prompts were written, shown below the table."""

SettingValue = str | int | bool | None | list[str] | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HubDataset:
    """The data set of a task on the hub."""

    id: str
    """`org/name`."""
    title: str
    split: str


@dataclass(frozen=True, slots=True)
class TaskSetting:
    """A setting of a task: a flag of its command, a keyword of `evaluate`, an entry of the spec's `settings`."""

    name: str
    """The flag is the same with dashes."""
    kind: Literal["text", "flag", "switch", "count", "names"]
    """`names` is a list, written with commas on the command line; `switch` is on, off or, by default, neither."""
    help: str
    default: SettingValue = None
    minimum: int | None = None
    """`count`: smallest value."""
    maximum: int | None = None
    required: bool = False
    changes_metric: bool = False
    """Runs that differ in it measure something else, and are not compared."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A task under one protocol and with the settings it is known for."""

    name: str
    """In `all`, and of its run folder there."""
    protocol: str = ""
    settings: Mapping[str, SettingValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NumberPanel:
    """Numbers of one sample that are to be compared with each other."""

    title: str
    unit: Literal["nats", "reward"]
    rows: tuple[tuple[int, int, int, int], ...]
    """(request, continuation, choice, good): where the number stands in the outputs, which choice it is of (-1: none,
    its continuation names it), and whether that one is right (1, 0; -1: not known)."""


@dataclass(frozen=True, slots=True)
class MetricGroup:
    """Metrics that a report shows below each other, in one plot."""

    title: str
    metrics: tuple[str, ...]
    baselines_at: int | None = None
    """Place among `metrics` before which the rules with no model stand; None leaves them out."""
    full_names: bool = False
    """Show `group/metric` whole, and not only what stands behind the slash."""
    compact: bool = False
    profile: tuple[str, ...] = ()
    """Metrics to be drawn as a profile too."""
    profile_title: str = ""
