"""The frozen records that travel through a run.

A task yields `Sample`s; each gives `LoglikelihoodRequest`s (or conversations); an engine answers with
`ContinuationScore`s (or `Completion`s); `Score` is what the task made of them; `SampleRecord` is what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

JSONObject = dict[str, Any]
"""A JSON object as `json` reads it."""

JSONMapping = Mapping[str, Any]
"""A JSON object that is only read."""

Outputs = JSONObject
"""What a model gave for one sample, as JSON: `loglikelihoods`, `rewards` or `completions`."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str

    def to_dict(self) -> dict[str, str]:
        """The form that chat templates and OpenAI-compatible endpoints read."""
        return {"role": self.role, "content": self.content}


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One item of a benchmark, independent of any model or prompt."""

    id: str
    """Unique in its task and stable between versions of the data: runs resume and pair on it."""
    context: Conversation
    """The dialogue so far, or the question as a single user turn."""
    choices: tuple[str, ...]
    gold: int
    """Index of the right choice."""
    cluster: str
    """Samples with the same cluster are not independent (same context): intervals are clustered by it."""
    group: str = ""
    """Category or subject."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What `Task.score` needs beyond `gold`; JSON, stored with the sample."""


@dataclass(frozen=True, slots=True)
class LoglikelihoodRequest:
    """All continuations of one context travel together, so that the context is read once."""

    context: str
    continuations: tuple[str, ...]
    rolling: bool = False
    """True to score the whole of the one continuation, however long, in windows of the model's context (perplexity):
    one score for each window."""
    token_ids: tuple[tuple[int, ...], ...] = ()
    """Ids of each continuation, where they were sampled: its text, encoded anew, may be other tokens. Empty: encode the
    texts."""


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """log p(continuation | context)."""

    logprob: float
    """Sum over the continuation's tokens, nats."""
    is_greedy: bool
    """True where every token of the continuation is the model's most likely next token."""
    n_tokens: int
    """Tokens of the continuation."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled or greedy continuation of a conversation."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """`stop` (end token or stop string) or `length` (the token budget ran out)."""
    reasoning: str = ""
    """A thought that an endpoint delivered in a field of its own; a thought in the text stays there."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a task makes of one sample's outputs."""

    value: float | None
    """The headline metric of this sample; None means unscored, which is counted and never a number."""
    reason: str | None = None
    """Why it is unscored, or what was unusual: `non_finite`, `all_tied`, `tied`, `context_too_long`, ..."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """Every per-sample metric by name, the headline included."""


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One line of `samples.jsonl`."""

    sample: Sample
    outputs: Outputs
    score: Score
    prompt_tokens_truncated: int = 0
    """Tokens of whole few-shot examples that were dropped to fit the context; nothing is ever cut mid-way."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A mean with its uncertainty. `None` where nothing could be scored."""

    value: float | None
    stderr: float | None
    ci95: tuple[float, float] | None
    n: int
    """Samples that were scored."""
    unscored: int = 0
    """Samples that were not; they are not in `value`."""

    def to_dict(self) -> dict[str, Any]:
        """The form of `results.json`."""
        return {
            "value": self.value,
            "stderr": self.stderr,
            "ci95": list(self.ci95) if self.ci95 else None,
            "n": self.n,
            "unscored": self.unscored,
        }


@dataclass(slots=True)
class EngineReport:
    """What an engine did in a run: stored in `results.json` under `engine`."""

    path: str = ""
    """`shared-prefix` or `plain`."""
    tokens_plain: int = 0
    """Token positions a request-by-request run would compute."""
    tokens_in_trie: int = 0
    """Distinct prefixes over all requests: the fewest positions that can be computed."""
    tokens_computed: int = 0
    """Token positions the plan computes; a resumed run reports the plan of the whole run."""
    rounding: JSONObject | None = None
    """In half precision with shared prefixes: see `hf_rounding.measure_rounding`."""
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> JSONObject:
        """JSON, with the two ratios people ask for."""
        return {
            "path": self.path,
            "tokens_plain": self.tokens_plain,
            "tokens_in_trie": self.tokens_in_trie,
            "tokens_computed": self.tokens_computed,
            "computed_over_trie": self.tokens_computed / self.tokens_in_trie if self.tokens_in_trie else None,
            "plain_over_computed": self.tokens_plain / self.tokens_computed if self.tokens_computed else None,
            **({"rounding": self.rounding} if self.rounding else {}),
            "warnings": list(self.warnings),
        }
