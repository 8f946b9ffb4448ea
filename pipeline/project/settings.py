"""The sections of `params.yaml` that are no stage's: tracking, promotion, judge and flow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from gpt.model.config import Positive, Seed


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class TrackingParams:
    """What happens to a stage while MLflow does not answer.

    Attributes:
        unreachable: `stop`: it does not start, and one that has begun ends as a failure that the
            same command goes on from. `later`: it runs, and is logged when MLflow answers again.
    """

    unreachable: Literal["stop", "later"] = "stop"


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class PromotionParams:
    """The promotion rule: the score that is compared, and the required improvement."""

    classifier: Literal["accuracy", "f1_macro"] = "accuracy"
    assistant: Literal["loss", "rouge_l", "chrf"] = "loss"
    at_least: Annotated[float, Field(ge=0)] = 0.0
    """The difference to the champion must be larger than this, in the score's unit."""
    sure: bool = True
    """Require this of the whole confidence interval of the difference."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    resamples: Annotated[int, Field(gt=0, le=1_000_000)] = 2000
    seed: Seed = 123

    def score(self, model: str) -> str:
        """The score that a model is compared by; a base by its loss on the validation text."""
        return "loss" if model == "base" else str(getattr(self, model))


_VARIABLE_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class EndpointParams:
    """Where the server is, and how it is asked."""

    url: str
    """The base address: `http://localhost:11434/v1` is Ollama's."""
    key_env: str | None = None
    """Names the environment variable that holds the key; without it none is sent."""
    concurrency: Annotated[int, Field(gt=0, le=64)] = 4
    """The number of concurrent requests."""
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 60
    """Seconds for one request, from its connection to the last byte of its answer."""
    retries: Annotated[int, Field(ge=0, le=20)] = 3
    """How many times a request is retried if the connection fails or the server is busy."""

    def __post_init__(self) -> None:
        import httpx

        # None of these messages shows the value: it may hold a key, put into the wrong place.
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL:
            url = httpx.URL("")
        plain = url.host and (url.port or 0) <= 65535 and url.scheme in ("http", "https")
        if not plain or url.userinfo or url.query or url.fragment:
            raise ValueError(
                "url must be an address such as http://localhost:11434/v1, and hold no user, "
                "password or query; name the variable that holds the key in key_env"
            )
        if self.key_env is not None and not _VARIABLE_NAME.fullmatch(self.key_env):
            raise ValueError(
                "key_env must be the name of an environment variable, in capitals such as "
                "OPENAI_API_KEY, and not the key itself"
            )


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class JudgeParams(EndpointParams):
    """The judge: the model at an endpoint, asked at temperature 0."""

    model: Annotated[str, Field(min_length=1)]
    """As the server calls it."""
    max_tokens: Positive = 16
    """Of a reply. A model that reasons before it replies needs hundreds or thousands."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 123


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class FlowParams:
    """How often a stage is tried, and how long it may take. No output depends on it."""

    retries: Annotated[int, Field(ge=0, le=100)] = 3
    """How many times a stage is retried after a temporary fault: a network error, or a killed
    process, whose training resumes from its last state. Invalid input is never retried."""
    wait: Annotated[float, Field(ge=0, le=86_400)] = 10.0
    """Seconds before the first retry; doubled for each further one."""
    time_limits: Mapping[str, Annotated[float, Field(gt=0, le=1_000_000)]] = field(
        default_factory=dict
    )
    """Time limits in minutes, by stage name; a stage stopped at its limit keeps its state."""
