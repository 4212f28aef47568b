"""TruthfulQA, multiple choice: 817 questions whose popular answers are wrong (Lin et al., arXiv 2109.07958).

Metrics: `mc1` and `mc2` as lm-eval's `truthfulqa_mc1` / `truthfulqa_mc2` define them (each choice's log-likelihood
after six fixed question-answer shots; lm-eval's own task definition renders the prompt), and `mc1_true_prompt`, the
form of ALMoST's evaluation code (each choice in a true-or-false prompt; the choice with the highest P(true)).

Departures: in the data the right answer of `mc1` always comes first, and lm-eval and the official code take the first
of equal scores: a model that says nothing, or NaN, is then always right. Here it is unscored, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from almost_eval.data.sources import DataSource, fingerprint, malformed
from almost_eval.errors import InputError, did_you_mean
from almost_eval.models.chat import render_prompt
from almost_eval.stats import mean_metric
from almost_eval.tasks.base import Prompting, Task, choice_score
from almost_eval.tasks.facts import HubDataset, MetricGroup, NumberPanel, Preset, TaskSetting
from almost_eval.types import LoglikelihoodRequest, Message, Metric, Outputs, Sample, SampleRecord, Score

DATASET = "truthfulqa/truthful_qa"
METRICS = ("mc1", "mc2", "mc1_true_prompt")
_SHOTS = 6
_REASONS = ("non_finite", "all_tied", "tied")
"""Gravest first: a sample has one reason, and the gate counts the first two."""


class TruthfulQA(Task):
    """TruthfulQA's multiple-choice metrics.

    Args:
        metrics: any of `mc1`, `mc2`, `mc1_true_prompt`; the first is the headline.
        data: where the data set comes from.
        prompting: prompt set and template.
        limit: questions, or None for all.

    Raises:
        InputError: an unknown metric, or none.
    """

    name = "truthfulqa"
    title = "TruthfulQA"
    usage = """TruthfulQA, multiple choice: mc1 and mc2 as lm-eval defines them, and the official true-or-false form.

    \b
    Example:
      almost-eval truthfulqa --model ./my-checkpoint --metrics mc1,mc2,mc1_true_prompt
    """
    dataset = HubDataset(DATASET, "TruthfulQA (multiple choice)", "validation")
    protocols = ("likelihood", "true or false")
    metric_names = METRICS
    metric_titles: ClassVar[Mapping[str, str]] = {
        "mc1": "mc1, the one true answer is likeliest",
        "mc2": "mc2, probability on true answers",
        "mc1_true_prompt": "mc1, true-or-false prompt",
    }
    task_settings = (TaskSetting("metrics", "names", "mc1, mc2, mc1_true_prompt.", ("mc1", "mc2")),)
    presets = (Preset("truthfulqa", settings={"metrics": METRICS}),)
    comparison = Preset("truthfulqa", "likelihood", {"metrics": ("mc1", "mc2")})
    headline_alone = False
    label_shows_protocol = False  # it lists the metrics, which stand below each other anyway
    context_is_text = True
    max_shots = _SHOTS

    def __init__(
        self,
        metrics: Sequence[str],
        data: DataSource,
        prompting: Prompting | None = None,
        *,
        limit: int | None = None,
    ) -> None:
        self.check_metrics(metrics)
        self.wanted = tuple(dict.fromkeys(metrics))
        self.protocol = "+".join(self.wanted)
        self.headline = self.wanted[0]
        self.data = data
        self.prompting = prompting or Prompting()
        self.limit = limit

    @staticmethod
    def check_metrics(metrics: Sequence[str]) -> None:
        """Refuse an unknown metric, or none."""
        for metric in metrics:
            if metric not in METRICS:
                raise InputError(f"unknown metric {metric!r}; {did_you_mean(metric, METRICS)}")
        if not metrics:
            raise InputError(f"no metric chosen; known: {', '.join(METRICS)}")

    @classmethod
    def build(
        cls, protocol: str, settings: Mapping[str, Any], data: DataSource, prompting: Prompting | None = None
    ) -> TruthfulQA:
        """See `Task.build`."""
        return cls(settings["metrics"], data, prompting, limit=settings.get("limit"))

    @property
    def own_prompts(self) -> bool:
        """All but the true-or-false form are lm-eval's documents."""
        return "mc1_true_prompt" not in self.wanted

    @classmethod
    def metric_groups(
        cls, names: Sequence[str], means: Mapping[str, float], records: Sequence[SampleRecord]
    ) -> list[MetricGroup]:
        """All metrics, then the rules."""
        return [MetricGroup("Multiple choice", tuple(names), len(names))]

    @classmethod
    def number_panels(cls, protocol: str, settings: Mapping[str, Any], record: SampleRecord) -> list[NumberPanel]:
        """A panel for each chosen metric."""
        meta, gold, metrics = record.sample.metadata, record.sample.gold, settings["metrics"]
        by_answer = [metric for metric in ("mc1", "mc2") if metric in metrics]
        used = sorted({choice for metric in by_answer for choice in meta[metric]})
        panels = []
        for metric in by_answer:
            right = [int(choice == gold) for choice in meta["mc1"]]
            good = meta["mc2_labels"] if metric == "mc2" else right
            rows = tuple((0, used.index(choice), choice, ok) for choice, ok in zip(meta[metric], good, strict=True))
            panels.append(NumberPanel(metric, "nats", rows))
        if "mc1_true_prompt" in metrics:
            first = int(bool(by_answer))
            rows = tuple((first + at, 0, choice, int(choice == gold)) for at, choice in enumerate(meta["mc1"]))
            panels.append(NumberPanel("mc1, true-or-false prompt", "nats", rows))
        return panels

    @property
    def _reads_answers(self) -> bool:
        return bool({"mc1", "mc2"} & set(self.wanted))

    def samples(self) -> list[Sample]:
        """One sample a question; `choices` are those of mc1 and mc2 without repeats."""
        rows = self.data.read(DATASET, "multiple_choice", "validation")[: self.limit]
        self._fingerprint = fingerprint(rows)
        return [_sample(number, row) for number, row in enumerate(rows)]

    def requests(self, sample: Sample, shots: int) -> list[LoglikelihoodRequest]:
        """First all choices after the question (mc1, mc2), then one true-or-false prompt for each mc1 choice."""
        requests = []
        if self._reads_answers:
            used = self._read_choices(sample)
            continuations = tuple(f" {sample.choices[i]}" for i in used)
            requests.append(LoglikelihoodRequest(self._question(sample, shots), continuations))
        if "mc1_true_prompt" in self.wanted:
            prompt = self.prompting.prompt("truthfulQA_prompt")
            for i in sample.metadata["mc1"]:
                values = {"question": sample.context[0].content, "answer": sample.choices[i]}
                text = render_prompt(prompt, values, self.prompting.template, self.prompting.special_tokens)
                requests.append(LoglikelihoodRequest(text, (" true",)))
        return requests

    def _read_choices(self, sample: Sample) -> list[int]:
        """Indices of the choices that the chosen metrics need, in order."""
        needed: set[int] = set()
        for metric in {"mc1", "mc2"} & set(self.wanted):
            needed |= set(sample.metadata[metric])
        return sorted(needed)

    def _question(self, sample: Sample, shots: int) -> str:
        question = sample.context[0].content
        if self.prompting.prompt_set is not None and self.prompting.prompt_set.name == "builtin":
            header = self.prompting.prompt("truthfulQA_shots")
            text = header + self.prompting.prompt("truthfulQA_question").replace("{question}", question)
        else:
            text = self._lm_eval_task.doc_to_text({"question": question})
        if shots < _SHOTS:
            # The prompt is seven blocks: six shots, then the question (which may itself hold a blank line).
            blocks = text.split("\n\n", _SHOTS)
            text = "\n\n".join(blocks[_SHOTS - shots :])
        if self.prompting.document_template is None:
            return text
        return self.prompting.document_template.render(
            (Message("user", text.removesuffix("\nA:")),),
            response_prefix="A:",
            special_tokens=self.prompting.special_tokens,
        )

    @cached_property
    def _lm_eval_task(self) -> Any:
        from almost_eval.tasks.harness import load_lm_eval_tasks

        return load_lm_eval_tasks(["truthfulqa_mc1"], self.data)["truthfulqa_mc1"]

    def score(self, sample: Sample, outputs: Outputs) -> Score:
        """Every chosen metric; the score's value is the first of them."""
        table = list(outputs["loglikelihoods"])
        scores: dict[str, Score] = {}
        meta = sample.metadata
        if self._reads_answers:
            by_choice = dict(zip(self._read_choices(sample), table.pop(0), strict=True))
            if "mc1" in self.wanted:
                scores["mc1"] = choice_score([by_choice[i] for i in meta["mc1"]], meta["mc1_gold"])
            if "mc2" in self.wanted:
                scores["mc2"] = true_mass([by_choice[i] for i in meta["mc2"]], meta["mc2_labels"])
        if "mc1_true_prompt" in self.wanted:
            scores["mc1_true_prompt"] = choice_score([row[0] for row in table], meta["mc1_gold"])
        reason = next((r for r in _REASONS if any(s.reason == r for s in scores.values())), None)
        values = {name: scores[name].value for name in self.wanted}
        return Score(values[self.headline], reason, values)

    def metrics(self, records: Sequence[SampleRecord]) -> dict[str, Metric]:
        """A mean for each chosen metric."""
        clusters = [r.sample.cluster for r in records]
        return {name: mean_metric([r.score.metrics.get(name) for r in records], clusters) for name in self.wanted}

    def details(self, records: Sequence[SampleRecord]) -> dict[str, float | int]:
        """Ties for the best answer, which share the credit."""
        return {"tied": sum(r.score.reason == "tied" for r in records)}

    def data_fingerprint(self) -> str:
        """See `Task.data_fingerprint`."""
        return self._fingerprint

    def settings(self) -> dict[str, Any]:
        """See `Task.settings`."""
        return {"metrics": list(self.wanted), "limit": self.limit}


def true_mass(values: Sequence[float | None], labels: Sequence[int]) -> Score:
    """mc2: the share of probability on the true answers, sum_true p / sum p, with p = exp(log-likelihood).

    Computed relative to the largest value, so that long answers do not underflow to 0 / 0 as they can in lm-eval.
    """
    known = [v for v in values if v is not None and math.isfinite(v)]
    if len(known) < len(values):
        return Score(None, "non_finite")
    if len(known) > 1 and min(known) == max(known):
        return Score(None, "all_tied")
    top = max(known)
    weights = [math.exp(v - top) for v in known]
    true = math.fsum(w for w, label in zip(weights, labels, strict=True) if label == 1)
    return Score(true / math.fsum(weights))


def _sample(number: int, row: dict[str, Any]) -> Sample:
    def fail(problem: str) -> InputError:
        return malformed(DATASET, "multiple_choice", number + 1, problem)

    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise fail("`question` is not a text")
    choices: dict[str, int] = {}
    metadata: dict[str, Any] = {}
    for key in ("mc1", "mc2"):
        targets = row.get(f"{key}_targets")
        if not isinstance(targets, dict) or not all(isinstance(targets.get(k), list) for k in ("choices", "labels")):
            raise fail(f"`{key}_targets` has no `choices` and `labels`")
        texts, labels = targets["choices"], targets["labels"]
        if len(texts) != len(labels) or len(texts) < 2 or not all(isinstance(t, str) and t.strip() for t in texts):
            raise fail(f"`{key}_targets` has {len(texts)} choices and {len(labels)} labels")
        if any(label not in (0, 1) for label in labels) or 1 not in labels:
            raise fail(f"`{key}_targets` marks no choice as true")
        metadata[key] = [choices.setdefault(text, len(choices)) for text in texts]
        metadata[f"{key}_labels"] = [int(label) for label in labels]
    if metadata["mc1_labels"].count(1) != 1:
        raise fail("`mc1_targets` must mark exactly one choice as true")
    metadata["mc1_gold"] = metadata.pop("mc1_labels").index(1)
    return Sample(
        id=str(number),
        context=(Message("user", question),),
        choices=tuple(choices),
        gold=metadata["mc1"][metadata["mc1_gold"]],
        cluster=" ".join(question.split()),
        metadata=metadata,
    )
