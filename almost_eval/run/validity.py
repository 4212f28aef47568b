"""The gate: a headline stands only where what could not be scored is few enough to say so.

Allowed shares are of all samples. Nothing is dropped in silence: each count is stored and shown, blocked or not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from almost_eval.errors import InputError, did_you_mean
from almost_eval.types import JSONMapping, JSONObject, SampleRecord

ALLOWED = {"non_finite": 0.0, "all_tied": 0.01, "truncated": 0.01, "unparsed": 0.01, "missing": 0.01}
"""Check -> largest allowed share of the samples."""
ALLOWED_OF_TEXTS = {"thought_cut": 0.01, "thought": 0.01}
"""The same for checks of what a model wrote, which are there where they count something."""


@dataclass(frozen=True, slots=True)
class Validity:
    """Counts of what went wrong, and whether the headline stands."""

    n: int
    """Samples of the task."""
    counts: dict[str, int]
    allowed: dict[str, float]

    @property
    def blocking(self) -> list[str]:
        """Checks that are over their share."""
        # Divided, not multiplied: 0.29 * 100 is below 29, and exactly the allowed share must pass.
        return [name for name, count in self.counts.items() if self.n and count / self.n > self.allowed[name]]

    @property
    def passed(self) -> bool:
        """Whether the headline stands."""
        return not self.blocking and self.n > 0

    @property
    def reason(self) -> str | None:
        """Why the headline is withheld, in one line; None where it stands."""
        if self.passed:
            return None
        return "; ".join(
            f"{self.counts[name]} of {self.n} samples {_WORDS[name]} (allowed {self.allowed[name]:.1%})"
            for name in self.blocking
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        checks = {name: {"count": count, "allowed": self.allowed[name]} for name, count in self.counts.items()}
        return {"passed": self.passed, "reason": self.reason, "checks": checks}


_WORDS = {
    "non_finite": "have a score that is not a finite number",
    "all_tied": "have all choices tied",
    "truncated": "have a prompt that does not fit as a whole",
    "unparsed": "have a verdict that cannot be read",
    "missing": "are missing",
    "thought_cut": "hold a thought that was cut before an answer; allow more new tokens",
    "thought": "hold a thought, which --reasoning refuse does not score",
}


def check(records: Sequence[SampleRecord], n_samples: int, allowed: Mapping[str, float] = ALLOWED) -> Validity:
    """Count what is wrong with a run of `n_samples` samples."""
    reasons = [record.score.reason for record in records]
    counts = {
        "non_finite": reasons.count("non_finite"),
        "all_tied": reasons.count("all_tied"),
        "truncated": sum(r.prompt_tokens_truncated > 0 or r.score.reason == "context_too_long" for r in records),
        "unparsed": reasons.count("unparsed"),
        "missing": n_samples - len(records),
    }
    counts |= {name: count for name in ALLOWED_OF_TEXTS if (count := reasons.count(name))}
    return Validity(n_samples, counts, {**ALLOWED_OF_TEXTS, **allowed})


def parse_allowed(items: Sequence[str]) -> dict[str, float]:
    """`--allow truncated=0.05` -> the defaults with that one changed.

    Raises:
        InputError: an unknown check, or a share outside 0 to 1.
    """
    allowed = dict(ALLOWED)
    for item in items:
        name, _, share = item.partition("=")
        if name not in ALLOWED | ALLOWED_OF_TEXTS:
            raise InputError(
                f"--allow {item}: unknown check {name!r}; {did_you_mean(name, ALLOWED | ALLOWED_OF_TEXTS)}"
            )
        try:
            allowed[name] = float(share)
        except ValueError:
            allowed[name] = -1.0
        if not 0 <= allowed[name] <= 1:
            raise InputError(f"--allow {item}: give a share from 0 to 1, as in {name}=0.05")
    return allowed


# --- in words ---


def readable(name: str) -> str:
    """A metric or subject without its underscores."""
    return re.sub(r"_+", " ", name)


def gate_counts(results: JSONMapping) -> list[str]:
    """What the validity checks counted, in words."""
    checks: dict[str, JSONObject] = results["validity"]["checks"]
    return [f"{readable(name)} {check['count']}" for name, check in checks.items() if check["count"]]


def counted(results: JSONMapping) -> list[str]:
    """What the validity checks and the task counted, in words. A count of 0 says nothing, a share of 0 does."""
    details: dict[str, float | int] = results["details"]
    return gate_counts(results) + [
        f"{readable(name)} {value:.1%}" if isinstance(value, float) else f"{readable(name)} {value}"
        for name, value in details.items()
        if value or isinstance(value, float)
    ]
