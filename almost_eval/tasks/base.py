"""What a task is: samples, requests, a score for each sample, metrics over all of them, and what it states of itself.

A task is pure but for reading its data: `score` and `metrics` work from stored outputs alone, so a finished run can
be recomputed (`almost-eval verify`) with no model and no data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, ClassVar, Literal

from almost_eval.data.prompt_sets import PromptSet, load_prompt_set
from almost_eval.data.sources import DataSource
from almost_eval.engines.base import SamplingParams
from almost_eval.errors import InputError
from almost_eval.models.chat import ChatTemplate, load_template, special_tokens
from almost_eval.stats import mean_metric
from almost_eval.tasks.facts import HubDataset, MetricGroup, NumberPanel, Preset, TaskSetting, Unit
from almost_eval.types import (
    ContinuationScore,
    Conversation,
    LoglikelihoodRequest,
    Metric,
    Outputs,
    Sample,
    SampleRecord,
    Score,
)

Requires = Literal["loglikelihood", "generation", "reward"]
ReasoningRule = Literal["strip", "keep", "refuse"]
"""What becomes of a thought that a model wrote before its answer: see `run.interview`."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt to continue."""

    prompt: str
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Prompting:
    """How a task's prompts become text: chosen once, recorded in every result."""

    prompt_set: PromptSet | None = None
    """Named `lm-eval`, and empty, for tasks that take lm-eval's own prompts."""
    template: ChatTemplate | None = None
    """None sends prompts as they are."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    is_chosen: bool = True
    """False where `--template auto` chose the template."""

    @property
    def document_template(self) -> ChatTemplate | None:
        """The template for few-shot documents, which hold no turns: only one that was chosen."""
        return self.template if self.is_chosen else None

    def prompt(self, name: str) -> str:
        """A prompt of the set by name."""
        if self.prompt_set is None:
            raise InputError("this task was built without a prompt set, so it has no prompts to render")
        return self.prompt_set.prompts[name]


class Task(ABC):
    """A benchmark under one protocol.

    The class states what can be told with no model and no data; commands, lists, reports and comparisons read it there.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    """For people; empty is the name."""
    short_title: ClassVar[str] = ""
    """Heading of a narrow column; empty is the title."""
    usage: ClassVar[str] = ""
    """Help of its command: a sentence, then examples."""
    dataset: ClassVar[HubDataset | None] = None
    """None where it has several, or one of its own."""
    unit: ClassVar[Unit] = "share"
    """Of its metrics."""
    protocols: ClassVar[tuple[str, ...]] = ()
    """In words."""
    metric_names: ClassVar[tuple[str, ...]] = ()
    metric_titles: ClassVar[Mapping[str, str]] = {}
    """For people, of metrics whose name says too little; what stands before a comma is the short form."""
    task_settings: ClassVar[tuple[TaskSetting, ...]] = ()
    """What, besides model, data and limit, one may choose."""
    presets: ClassVar[tuple[Preset, ...]] = ()
    """How `all` runs it; none leaves it out."""
    comparison: ClassVar[Preset | None] = None
    """How `tax` and `parity` run it; None leaves it out."""
    is_preference: ClassVar[bool] = False
    """Its headline says which answers people prefer, so it stands for preference where over-optimisation is judged."""
    headline_alone: ClassVar[bool] = True
    """The headline speaks for the task; else its metrics are measures of their own, each to be listed."""
    label_shows_protocol: ClassVar[bool] = True
    context_is_text: ClassVar[bool] = False
    """The cluster of a sample is its text, worth showing."""

    protocol: str
    data: DataSource
    prompting: Prompting
    version: int = 1
    """Raised whenever the same model and data would give another number."""
    unfit_is_unscored: bool = False
    """Whether a run goes on where no sample fits the model's context: for samples that took work to make. Else it is
    refused before a weight is loaded."""
    keeps_tokens: bool = False
    """Whether a run stores the ids of what was generated."""
    headline: str = "accuracy"
    requires: Requires = "loglikelihood"
    reasoning: ReasoningRule = "keep"
    """Where it has the model write."""
    max_shots: int = 0
    """Few-shot examples that may be dropped, last resort first, where a prompt does not fit."""
    single_token_labels: bool = False
    """True where every continuation must be one token, as the protocol reads next-token probabilities."""

    @classmethod
    def build(
        cls, protocol: str, settings: Mapping[str, Any], data: DataSource, prompting: Prompting | None = None
    ) -> Task:
        """The task that a request or a spec describes.

        Args:
            protocol: one of its protocols, where it has several to choose from.
            settings: values of `task_settings` and `limit`; what `settings()` returned will do.
            data: where its data comes from.
            prompting: prompt set and template; may be set later, before the first request.

        Raises:
            InputError: an unknown protocol, or a value that a setting does not take.
        """
        raise InputError(f"{cls.name} cannot be built by name; construct it")

    @property
    def own_prompts(self) -> bool:
        """Whether all its prompts are few-shot documents, so that the official words are lm-eval's."""
        return False

    @classmethod
    def main_metrics(cls, names: Sequence[str]) -> list[str]:
        """Those of a run's metrics that a table for another document shows."""
        return list(names)

    @classmethod
    def metric_unit(cls, metric: str) -> Unit:
        """How a metric reads."""
        return cls.unit

    @classmethod
    def metric_groups(
        cls, names: Sequence[str], means: Mapping[str, float], records: Sequence[SampleRecord]
    ) -> list[MetricGroup]:
        """What a report shows of the metrics, in which order.

        Args:
            names: metrics of all runs, in the order they were computed.
            means: metric -> mean over the runs that have a value.
            records: of all runs.
        """
        shares = tuple(name for name in names if cls.metric_unit(name) == "share")
        return [MetricGroup("Metrics", shares, baselines_at=len(shares), full_names=True)] if shares else []

    @classmethod
    def number_panels(cls, protocol: str, settings: Mapping[str, Any], record: SampleRecord) -> list[NumberPanel]:
        """The numbers of one sample that are to be compared with each other."""
        table = record.outputs.get("loglikelihoods") or []
        rows = tuple((r, c, -1, -1) for r, row in enumerate(table) for c in range(len(row)))
        return [NumberPanel("continuations", "nats", rows)] if rows else []

    def check_prompting(self) -> None:
        """Raise InputError for settings that do not go with the template or the prompt set, both known by now."""
        return

    @abstractmethod
    def samples(self) -> list[Sample]:
        """All samples, in a fixed order. Reads the data.

        Raises:
            DataError: absent or malformed data.
        """

    def requests(self, sample: Sample, shots: int) -> list[LoglikelihoodRequest]:
        """What to ask the model about a sample (`requires == "loglikelihood"`), with at most `shots` examples."""
        raise InputError(f"{self.name} ({self.protocol}) asks for no log-likelihoods")

    def conversations(self, sample: Sample) -> list[Conversation]:
        """What to ask a reward model about a sample (`requires == "reward"`)."""
        raise InputError(f"{self.name} ({self.protocol}) asks for no rewards")

    def generation(self, sample: Sample, shots: int) -> GenerationRequest:
        """What to have the model write for a sample (`requires == "generation"`)."""
        raise InputError(f"{self.name} ({self.protocol}) asks for no text")

    @abstractmethod
    def score(self, sample: Sample, outputs: Outputs) -> Score:
        """Score one sample from what is stored of it. Pure."""

    @abstractmethod
    def metrics(self, records: Sequence[SampleRecord]) -> dict[str, Metric]:
        """Metrics over all records. Pure."""

    def baselines(self, records: Sequence[SampleRecord]) -> dict[str, Metric]:
        """What a rule with no model would score on the same samples."""
        return {}

    def details(self, records: Sequence[SampleRecord]) -> dict[str, float | int]:
        """Counts and rates worth a line beside the metrics."""
        return {}

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What, beyond name and protocol, changes the number: stored in the spec, and enough to rebuild the task."""

    @abstractmethod
    def data_fingerprint(self) -> str:
        """sha256 over the rows the samples were made from."""


def loglikelihood_outputs(scores: Sequence[Sequence[ContinuationScore]]) -> Outputs:
    """Stored form of a sample's scores: nested lists, requests x continuations, nats; non-finite values as None."""
    return {
        "loglikelihoods": [[_finite(s.logprob) for s in row] for row in scores],
        "is_greedy": [[s.is_greedy for s in row] for row in scores],
        "n_tokens": [[s.n_tokens for s in row] for row in scores],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def reward_outputs(rewards: Sequence[float]) -> Outputs:
    """Stored form of a sample's rewards, raw logits; non-finite values as None."""
    return {"rewards": [_finite(value) for value in rewards]}


def choice_score(values: Sequence[float | None], gold: int, *, all_tied: float | None = None) -> Score:
    """1 where `values[gold]` is the one largest, else 0; the gold answer gains nothing from its place.

    A tie for the largest shares the credit among the tied. Where every value is the same the model said nothing:
    the sample is unscored, unless `all_tied` names its worth. A value that is not finite leaves it unscored too.
    """
    if any(value is None or not math.isfinite(value) for value in values):
        return Score(None, "non_finite")
    known = [value for value in values if value is not None]
    best = max(known)
    winners = [i for i, value in enumerate(known) if value == best]
    if len(winners) == len(known) and len(known) > 1:
        return Score(all_tied, "all_tied")
    if gold not in winners:
        return Score(0.0)
    return Score(1.0 / len(winners), "tied" if len(winners) > 1 else None)


def accuracy(records: Sequence[SampleRecord]) -> Metric:
    """The mean of the scores, with its interval by cluster."""
    return mean_metric([r.score.value for r in records], [r.sample.cluster for r in records])


def resolve_prompting(
    data: DataSource, prompt_set: str | None, template: str, tokenizer: Any, *, own_prompts: bool
) -> Prompting:
    """What `--prompt-set` and `--template` mean for a task.

    The official set is the default on real data, the built-in one on nano; `own_prompts` says that all prompts are
    few-shot documents, whose official words are lm-eval's. `auto` sends official prompts and documents as they are,
    and renders built-in dialogues with the tokenizer's own template. Nothing is guessed from a model's name.
    """
    name = prompt_set or ("builtin" if data.name == "nano" else "official")
    if own_prompts and name == "official":
        chosen = PromptSet.of("lm-eval", {"version": metadata.version("lm_eval")})
    else:
        chosen = load_prompt_set(name, data)
    auto = template == "auto"
    as_is = auto and (name == "official" or own_prompts)
    resolved = None if as_is else load_template(template, tokenizer)
    named = {} if tokenizer is None else special_tokens(tokenizer)  # an engine of one's own may have none
    return Prompting(chosen, resolved, named, is_chosen=not auto)
