"""What a run's files hold, as types: a file that somebody edited is refused when it is read, not half-way through.

Only what other commands read is named here; tasks and judges add what they like.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from almost_eval.errors import StoreError
from almost_eval.types import JSONObject


class Shape(BaseModel):
    """An object with these fields, and any others."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _Named(Shape):
    """A template, a set of prompts, or a judged system."""

    name: str
    digest: str | None = None


class _Data(Shape):
    """Where the questions are from."""

    source: str
    fingerprint: str


class _Systems(Shape):
    """The two sides of a judged run."""

    model: _Named | None = None
    baseline: _Named | None = None


class _Settings(Shape):
    """The task's own settings."""

    limit: int | None = None
    systems: _Systems | None = None


class StoredSpec(Shape):
    """`spec.json`."""

    task: str
    protocol: str
    settings: _Settings
    engine: dict[str, Any]
    data: _Data
    n_samples: int
    model_name: str | None = None
    weight_digest: str | None = None
    template: _Named | None = None
    prompt_set: _Named | None = None
    versions: dict[str, str] = {}
    command: list[str] = []


class _Metric(Shape):
    """One figure, with its interval."""

    value: float | None
    stderr: float | None = None
    ci95: Annotated[list[float | None], Field(min_length=2, max_length=2)] | None = None
    n: int
    unscored: int = 0


class _Check(Shape):
    """How many samples a check of validity counts, and the fraction that it allows."""

    count: int
    allowed: float


class _Validity(Shape):
    """Whether the headline may be shown."""

    passed: bool
    reason: str | None = None
    checks: dict[str, _Check] = {}


class _Work(Shape):
    """What the engine did."""

    tokens_computed: int = 0
    tokens_in_trie: int = 0
    tokens_plain: int = 0
    warnings: list[str]


class _Timing(Shape):
    """How long it took."""

    seconds: float | None = None
    samples_computed_now: int = 0


class StoredResults(Shape):
    """`results.json`."""

    task: str
    protocol: str
    headline: str
    metrics: dict[str, _Metric]
    baselines: dict[str, _Metric] = {}
    details: dict[str, Any] = {}
    validity: _Validity
    engine: _Work
    provenance: dict[str, Any]
    timing: _Timing | None = None

    @model_validator(mode="after")
    def _has_headline(self) -> StoredResults:
        if self.headline not in self.metrics:
            raise ValueError(f"the headline {self.headline!r} is none of its metrics")
        return self


def check_shape(value: JSONObject, shape: type[Shape], file: Path, mend: str) -> JSONObject:
    """`value`, which `file` holds and which has this shape; `mend` is the end of an error: what to do.

    Raises:
        StoreError: it has another; the first field that is wrong is named.
    """
    try:
        shape.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise StoreError(f"{file} is not a run's: {f'{field} ' if field else ''}{what}; {mend}") from None
    return value
