"""The section `flow` of `params.yaml`: what the flow does about stages that fail or take long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class FlowParams:
    """How often a stage is tried, and how long it may take. No output depends on it."""

    retries: Annotated[int, Field(ge=0, le=100)] = 3
    """So often a stage is tried again after a fault that may pass: of the network, or a process
    that was killed, whose training goes on from its last state. Bad input never is."""
    wait: Annotated[float, Field(ge=0, le=86_400)] = 10.0
    """Seconds before the first of these; they double."""
    time_limits: Mapping[str, Annotated[float, Field(gt=0, le=1_000_000)]] = field(
        default_factory=dict
    )
    """Minutes a stage may run, by its name; it is then stopped, and its state kept."""
