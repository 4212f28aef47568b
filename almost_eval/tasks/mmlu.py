"""MMLU: 57 subjects, 14,042 four-way questions (Hendrycks et al., arXiv 2009.03300).

With lm-eval's prompts (the default on real data) each subject is lm-eval's own `mmlu_<subject>` task. The built-in
prompt set has our own wording of the same protocol and takes any subject that the data holds.

With `words` the choices' own words are scored, and not their letters: lm-eval's `mmlu_<subject>_continuation`. Small
models do not bind letters to choices and stay at chance with them, whatever they know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from almost_eval.data.sources import DataSource, fingerprint, malformed
from almost_eval.errors import DataError, InputError, did_you_mean
from almost_eval.models.chat import fill
from almost_eval.stats import mean_metric, mean_of_means
from almost_eval.tasks.base import Prompting, Task, accuracy, choice_score
from almost_eval.tasks.facts import HubDataset, MetricGroup, NumberPanel, Preset, TaskSetting
from almost_eval.tasks.harness_prompts import DocumentChat
from almost_eval.types import LoglikelihoodRequest, Message, Metric, Outputs, Sample, SampleRecord, Score

DATASET = "cais/mmlu"
CATEGORIES = ("stem", "humanities", "social_sciences", "other")
LETTERS = ("A", "B", "C", "D")
SHOTS = 5
"""Examples that each subject has."""


class MMLU(Task):
    """MMLU on chosen subjects.

    Args:
        subjects: names of subjects or categories; empty for all.
        shots: examples before each question, 0 to 5, the first of the subject's `dev` split.
        data: where the data set comes from.
        prompting: prompt set and template.
        limit: questions of each subject, or None for all.
        fewshot_as_multiturn: examples as turns of the template; else all are in the question's turn.
        words: score the words of the choices; else their letters.

    Raises:
        InputError: an unknown subject, or a number of shots that the data does not have.
    """

    name = "mmlu"
    title = "MMLU"
    usage = """MMLU: 57 subjects of four-way questions, with lm-eval's own task definitions.

    \b
    Example:
      almost-eval mmlu --model ./my-checkpoint --subjects stem,anatomy --shots 5
    """
    dataset = HubDataset(DATASET, "MMLU", "test")
    protocols = ("letters or words, 0 to 5 examples",)
    metric_names = ("accuracy", "accuracy_macro", *(f"accuracy/{name}" for name in (*CATEGORIES, "SUBJECT")))
    metric_titles: ClassVar[Mapping[str, str]] = {"accuracy_macro": "mean of subjects"}
    task_settings = (
        TaskSetting("shots", "count", "Examples before a question.", SHOTS, minimum=0, maximum=SHOTS),
        TaskSetting(
            "fewshot_as_multiturn", "flag", "With a template: examples as turns, not in the user's one.", False
        ),
        TaskSetting(
            "words",
            "flag",
            "Score the words of the choices in place of their letters (lm-eval's mmlu_continuation).",
            False,
            changes_metric=True,
        ),
        TaskSetting("subjects", "names", "Subjects, or stem, humanities, social_sciences, other.  [all]", ()),
    )
    presets = (Preset("mmlu", settings={"subjects": (), "shots": SHOTS}),)
    comparison = Preset("mmlu", "choice", {"subjects": (), "shots": SHOTS, "words": False})

    def __init__(
        self,
        subjects: Sequence[str],
        shots: int,
        data: DataSource,
        prompting: Prompting | None = None,
        *,
        limit: int | None = None,
        fewshot_as_multiturn: bool = False,
        words: bool = False,
    ) -> None:
        if not 0 <= shots <= SHOTS:
            raise InputError(f"{shots} shots: each subject has {SHOTS} examples, so 0 to {SHOTS}")
        self.shots = self.max_shots = shots
        self.words = words
        self.protocol = f"{shots}-shot, words" if words else f"{shots}-shot"
        self.data = data
        self.prompting = prompting or Prompting()
        self.limit = limit
        self.chat = DocumentChat(fewshot_as_multiturn)
        self.chosen = list(subjects)
        self._shots_of: dict[str, list[dict[str, Any]]] = {}

    @classmethod
    def build(
        cls, protocol: str, settings: Mapping[str, Any], data: DataSource, prompting: Prompting | None = None
    ) -> MMLU:
        """See `Task.build`."""
        return cls(
            settings["subjects"],
            settings["shots"],
            data,
            prompting,
            limit=settings.get("limit"),
            fewshot_as_multiturn=bool(settings.get("fewshot_as_multiturn")),
            words=bool(settings.get("words")),
        )

    @property
    def own_prompts(self) -> bool:
        """All prompts are lm-eval's documents."""
        return True

    def check_prompting(self) -> None:
        """See `Task.check_prompting`."""
        if self._builtin and self.chat.fewshot_as_multiturn:
            raise InputError("--fewshot-as-multiturn: the built-in prompt is one turn; add --prompt-set official")
        self.chat.check(self.prompting)

    @classmethod
    def main_metrics(cls, names: Sequence[str]) -> list[str]:
        """All but those of single subjects."""
        return [name for name in names if "/" not in name or name.split("/")[-1] in CATEGORIES]

    @classmethod
    def metric_groups(
        cls, names: Sequence[str], means: Mapping[str, float], records: Sequence[SampleRecord]
    ) -> list[MetricGroup]:
        """Overall and by category; then the subjects of each category, best first."""
        category_of = {r.sample.group: str(r.sample.metadata["category"]) for r in records}
        categories = list(dict.fromkeys(category_of.values()))
        overall = ("accuracy", "accuracy_macro", *(f"accuracy/{category}" for category in categories))
        groups = [MetricGroup("Accuracy", overall, 2)]
        for category in categories:
            subjects = [f"accuracy/{subject}" for subject, of in category_of.items() if of == category]
            subjects.sort(key=lambda name: -means.get(name, -1.0))
            groups.append(MetricGroup(f"Subjects: {category.replace('_', ' ')}", tuple(subjects), compact=True))
        return groups

    @classmethod
    def number_panels(cls, protocol: str, settings: Mapping[str, Any], record: SampleRecord) -> list[NumberPanel]:
        """The four letters, or the four choices."""
        gold = record.sample.gold
        title = "continuation" if settings.get("words") else "next token"
        return [NumberPanel(title, "nats", tuple((0, k, k, int(k == gold)) for k in range(len(LETTERS))))]

    @property
    def _builtin(self) -> bool:
        return self.prompting.prompt_set is not None and self.prompting.prompt_set.name == "builtin"

    @cached_property
    def categories(self) -> dict[str, str]:
        """Subject -> category, of the chosen subjects, sorted by category as lm-eval groups them."""
        known = _lm_eval_subjects()
        if self._builtin and self.data.name == "nano":
            known = dict.fromkeys(self.data.configs(DATASET), "other")
        if not self.chosen:
            return known
        wanted: dict[str, str] = {}
        for name in self.chosen:
            members = {s: c for s, c in known.items() if name in (s, c)}
            if not members:
                raise InputError(
                    f"unknown subject {name!r}; {did_you_mean(name, [*dict.fromkeys(known.values()), *known], limit=8)}"
                )
            wanted |= members
        return {subject: category for subject, category in known.items() if subject in wanted}

    def samples(self) -> list[Sample]:
        """One sample a question, subject by subject; `group` is the subject."""
        samples, used = [], []
        for subject in self.categories:
            rows = self.data.read(DATASET, subject, "test")[: self.limit]
            dev = self._dev(subject)
            if len(dev) < self.shots:
                raise DataError(f"{DATASET}, {subject}: {len(dev)} rows in dev, {self.shots} shots need as many")
            used += [*dev, *rows]
            for number, row in enumerate(rows):
                samples.append(_sample(subject, self.categories[subject], number, row))
        self._fingerprint = fingerprint(used)
        return samples

    def _dev(self, subject: str) -> list[dict[str, Any]]:
        if subject not in self._shots_of:
            rows = self.data.read(DATASET, subject, "dev") if self.shots else []
            for number, row in enumerate(rows):
                _sample(subject, "", number, row, "dev")  # a malformed example is as bad as a malformed question
            self._shots_of[subject] = rows[: self.shots]
        return self._shots_of[subject]

    def requests(self, sample: Sample, shots: int) -> list[LoglikelihoodRequest]:
        """One request: the shots and the question, with the four letters or the four choices."""
        row = {"question": sample.context[0].content, "choices": list(sample.choices), "answer": sample.gold}
        subject = sample.group
        if self._builtin:
            header = fill(self.prompting.prompt("mmlu_header"), {"subject": subject.replace("_", " ")})
            examples = [
                f"{self._block(r)}{self._continuations(r)[r['answer']]}\n\n" for r in self._dev(subject)[:shots]
            ]
            text = header + "".join(examples) + self._block(row)
            if self.prompting.document_template is not None:
                text = self.prompting.document_template.render(
                    (Message("user", text.removesuffix("\nAnswer:")),),
                    response_prefix="Answer:",
                    special_tokens=self.prompting.special_tokens,
                )
            return [LoglikelihoodRequest(text, self._continuations(row))]
        from almost_eval.tasks.harness_prompts import as_requests, lm_eval_instances

        task = self._lm_eval_tasks[self._lm_eval_name(subject)]
        return as_requests([i.args for i in lm_eval_instances(task, row, shots, self.prompting, self.chat)])

    def _continuations(self, row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(f" {answer}" for answer in (row["choices"] if self.words else LETTERS))

    def _lm_eval_name(self, subject: str) -> str:
        return f"mmlu_{subject}_continuation" if self.words else f"mmlu_{subject}"

    def _block(self, row: dict[str, Any]) -> str:
        values = dict(zip("abcd", row["choices"], strict=True)) | {"question": row["question"].strip()}
        return fill(self.prompting.prompt("mmlu_question"), values)

    @cached_property
    def _lm_eval_tasks(self) -> dict[str, Any]:
        from almost_eval.tasks.harness import load_lm_eval_tasks

        return load_lm_eval_tasks([self._lm_eval_name(subject) for subject in self.categories], self.data)

    def score(self, sample: Sample, outputs: Outputs) -> Score:
        """1 where the right letter, or the right choice, is the likeliest: the sum over its tokens."""
        score = choice_score(outputs["loglikelihoods"][0], sample.gold)
        return Score(score.value, score.reason, {"accuracy": score.value})

    def metrics(self, records: Sequence[SampleRecord]) -> dict[str, Metric]:
        """`accuracy` per question, `accuracy_macro` per subject, and `accuracy/<category>`, `accuracy/<subject>`."""
        by_subject: dict[str, list[SampleRecord]] = {}
        by_category: dict[str, list[SampleRecord]] = {}
        for record in records:
            by_subject.setdefault(record.sample.group, []).append(record)
            by_category.setdefault(record.sample.metadata["category"], []).append(record)
        metrics = {
            "accuracy": accuracy(records),
            "accuracy_macro": mean_of_means({s: [r.score.value for r in rs] for s, rs in by_subject.items()}),
        }
        for name, members in [*by_category.items(), *by_subject.items()]:
            metrics[f"accuracy/{name}"] = accuracy(members)
        return metrics

    def baselines(self, records: Sequence[SampleRecord]) -> dict[str, Metric]:
        """`always <letter>` for the letter that is right most often."""
        best = max(range(4), key=lambda letter: sum(r.sample.gold == letter for r in records))
        return {f"always {LETTERS[best]}": mean_metric([float(r.sample.gold == best) for r in records])}

    def details(self, records: Sequence[SampleRecord]) -> dict[str, float | int]:
        """Ties for the best letter, which share the credit."""
        return {"tied": sum(r.score.reason == "tied" for r in records)}

    def data_fingerprint(self) -> str:
        """See `Task.data_fingerprint`."""
        return self._fingerprint

    def settings(self) -> dict[str, Any]:
        """See `Task.settings`."""
        chosen = {"subjects": list(self.categories), "shots": self.shots, "limit": self.limit}
        chosen |= {"words": True} if self.words else {}
        return chosen if self._builtin else {**chosen, **self.chat.settings(self.prompting, has_description=True)}


def _lm_eval_subjects() -> dict[str, str]:
    """Subject -> category for the 57 subjects, as lm-eval groups them; read from its task index, not by heart."""
    from almost_eval.tasks.harness import lm_eval_index

    index = lm_eval_index()
    subjects = {}
    for category in CATEGORIES:
        for task in sorted(index[f"mmlu_{category}_tasks"].tags):
            subjects[task.removeprefix("mmlu_")] = category
    return subjects


def _sample(subject: str, category: str, number: int, row: dict[str, Any], split: str = "test") -> Sample:
    def fail(problem: str) -> InputError:
        return malformed(DATASET, f"{subject} ({split})", number + 1, problem)

    question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise fail("`question` is not a text")
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(c, str) for c in choices):
        raise fail("`choices` are not four texts")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < 4:
        raise fail(f"`answer` is {answer!r}, not 0 to 3")
    return Sample(
        id=f"{subject}/{number}",
        context=(Message("user", question),),
        choices=tuple(choices),
        gold=answer,
        cluster=f"{subject}: {' '.join(question.split())} {choices}",
        group=subject,
        metadata={"category": category},
    )
