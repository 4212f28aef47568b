"""Any task of lm-eval on our engines: its prompts, its per-document results, its aggregation; our trie, records, gate.

What is lm-eval's stays lm-eval's: documents, few-shot sampling (its seed, 1234), contexts, requests, filters,
`process_results` and the aggregation functions are called on its own task objects. One rule is ours: a document
whose log-likelihoods are not finite, or all equal, is unscored, never right by the place of its answer.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from jinja2 import UndefinedError

from almost_eval.data.sources import DataSource, fingerprint
from almost_eval.errors import DataError, InputError, RunError, TemplateError, did_you_mean
from almost_eval.stats import mean_metric
from almost_eval.tasks.base import GenerationRequest, Prompting, ReasoningRule, Task
from almost_eval.tasks.facts import TaskSetting
from almost_eval.tasks.harness_answers import check_answer, has_no_right_choice
from almost_eval.tasks.harness_files import as_spec, digests, group_in_file, is_file_name
from almost_eval.tasks.harness_groups import LmEvalTasks, group_headline, group_metrics, task_key
from almost_eval.tasks.harness_prompts import DocumentChat, as_requests, lm_eval_instances
from almost_eval.tasks.harness_sampling import harness_sampling
from almost_eval.types import LoglikelihoodRequest, Metric, Outputs, Sample, SampleRecord, Score

FEWSHOT_SEED = 1234
"""lm-eval's default, kept so that the same examples are drawn."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets log and draw progress bars while they load; the run has its own."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("lm_eval")
    level, had_bars = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if had_bars:
            enable_progress_bars()


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """lm-eval's seeds, for tasks that shuffle as they load; the global generators are then put back as they were."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@cache
def _manager(folder: str | None) -> Any:
    """lm-eval's task manager over one folder of its tasks, or over all of them (some 14,000 files, seconds)."""
    import lm_eval.tasks

    with _quiet():
        if folder is None:
            return lm_eval.tasks.TaskManager()
        path = Path(lm_eval.tasks.__file__).parent / folder
        return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(path))


def _folder_of(names: Sequence[str]) -> str | None:
    """The folder of the tasks that our own benchmarks use, so that they need not index the rest."""
    if all(name.startswith("mmlu_") for name in names):
        of_words = all(name.endswith("_continuation") for name in names)
        return "mmlu/continuation" if of_words else "mmlu/default"
    return "truthfulqa" if all(name.startswith("truthfulqa_mc") for name in names) else None


def lm_eval_index() -> dict[str, Any]:
    """lm-eval's index of MMLU's tasks and groups: name -> entry."""
    index: dict[str, Any] = _manager("mmlu/default").task_index
    return index


def load_lm_eval_tasks(names: Sequence[str], data: DataSource) -> LmEvalTasks:
    """lm-eval's task objects by name, groups and tags expanded; data sets come from the data root first.

    Raises:
        InputError: an unknown name.
        DataError: a data set that is nowhere to be had.
    """
    folder = _folder_of(names)
    manager = _manager(folder)
    if folder is not None and any(name not in manager.task_index for name in names):
        manager = _manager(None)
    for name in names:
        if is_file_name(name):
            if not Path(name).is_file():
                raise InputError(f"there is no file {name}; give the YAML file of a task or group, or lm-eval's names")
        elif name not in manager.task_index:
            raise InputError(
                f"lm-eval has no task {name!r}; {did_you_mean(name, manager.all_tasks)}; one of your own is given by "
                "its YAML file"
            )
    with _quiet(), _seeded(), data.serving_lm_eval():
        try:
            loaded = manager.load([as_spec(name, manager) for name in names])
        except DataError:
            raise
        except Exception as error:  # a task's own code may raise anything
            own = any(map(is_file_name, names))
            lines = str(error).splitlines()
            problem = " ".join(" ".join(lines if own else lines[:1]).split())[:200] or type(error).__name__
            if isinstance(error, KeyError):  # of which the text is the key alone
                problem = f"it looks for {problem}, a split or a column that its data has not; add it"
            cure = ""
            if own:
                cure = "; mend the file"
            elif isinstance(error, ValueError | IndexError | TypeError | UndefinedError):  # it reads a row as it loads
                cure = f"; most likely the first row of its data is not as the task expects ({type(error).__name__})"
            if problem.startswith("Duplicate task"):
                cure = "; name it once, or its group alone"
            raise InputError(f"lm-eval cannot load {', '.join(names)}: {problem}{cure}") from None
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return LmEvalTasks(loaded["tasks"], loaded["groups"])


class Harness(Task):
    """Tasks of lm-eval, evaluated in one run.

    Args:
        names: lm-eval's names: tasks, groups or tags, or YAML files of them; all scored by likelihood or all by
            generated text.
        shots: examples before each document, or None for each task's own default.
        data: the data root that data sets are looked for in first.
        prompting: a template to apply; lm-eval's prompts are sent as they are without one.
        limit: documents of each task, or None for all.
        fewshot_as_multiturn: examples as turns of the template; None is as in lm-eval, where there is a template.
        system_instruction: before each prompt: a system message of the template, or text without one.
        reasoning: what becomes of thoughts, where the tasks generate.
    """

    name = "harness"
    title = "lm-eval"
    usage = """Any task of lm-eval on this engine: its prompts and metrics, our speed and records.

    \b
    Example:
      almost-eval harness --tasks arc_easy,hellaswag --model ./my-checkpoint
    """
    unit = "number"
    protocols = ("lm-eval's",)
    metric_names = ("lm-eval's",)
    task_settings = (
        TaskSetting(
            "tasks", "names", "lm-eval's names: tasks, groups or tags, or YAML files, by commas.", (), required=True
        ),
        TaskSetting("shots", "count", "Examples before a document.  [each task's own]", None, minimum=0),
        TaskSetting("fewshot_as_multiturn", "switch", "With a template: examples as turns.  [on, as in lm-eval]"),
        TaskSetting("system_instruction", "text", "System message before each prompt, as lm-eval writes it."),
        TaskSetting("reasoning", "text", "Thoughts in what a model writes: strip, keep or refuse.", "strip"),
    )

    def __init__(
        self,
        names: Sequence[str],
        data: DataSource,
        prompting: Prompting | None = None,
        *,
        shots: int | None = None,
        limit: int | None = None,
        fewshot_as_multiturn: bool | None = None,
        system_instruction: str | None = None,
        reasoning: str = "strip",
    ) -> None:
        if not names:
            raise InputError("no task named; give --tasks a,b,c (lm-eval's names)")
        if reasoning not in get_args(ReasoningRule):
            raise InputError(f"--reasoning {reasoning}: {did_you_mean(reasoning, get_args(ReasoningRule))}")
        self.reasoning = cast(ReasoningRule, reasoning)
        self.names = tuple(dict.fromkeys(names))
        self.shots = shots
        self.protocol = "+".join(self.names)
        self.data = data
        self.prompting = prompting or Prompting()
        self.limit = limit
        self.chat = DocumentChat(fewshot_as_multiturn, system_instruction or None)
        self._docs: dict[str, dict[str, Any]] = {}  # task -> sample id -> document
        self._rendered: dict[str, dict[str, list[tuple[Any, ...]]]] = {}  # task -> sample id -> arguments of requests

    @classmethod
    def build(
        cls, protocol: str, settings: Mapping[str, Any], data: DataSource, prompting: Prompting | None = None
    ) -> Harness:
        """See `Task.build`."""
        names = ("shots", "limit", "fewshot_as_multiturn", "system_instruction")
        chosen = {name: settings.get(name) for name in names} | {"reasoning": settings.get("reasoning") or "strip"}
        return cls(settings["tasks"], data, prompting, **chosen)

    @property
    def own_prompts(self) -> bool:
        """All prompts are lm-eval's documents."""
        return True

    def check_prompting(self) -> None:
        """See `Task.check_prompting`."""
        self.chat.check(self.prompting)

    @cached_property
    def tasks(self) -> dict[str, Any]:
        """lm-eval's task objects by name.

        Raises:
            InputError: tasks that this adapter cannot run, or not together.
        """
        tasks = load_lm_eval_tasks(self.names, self.data)
        kinds = {task.OUTPUT_TYPE for task in tasks.values()}
        if unknown := kinds - {"loglikelihood", "multiple_choice", "loglikelihood_rolling", "generate_until"}:
            raise InputError(f"tasks of kind {', '.join(sorted(map(str, unknown)))} are not scored by this adapter")
        for name, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False):
                raise InputError(f"{name} runs code that the model wrote, which this adapter never does; use lm-eval")
            if getattr(task, "MULTIMODAL", False):
                raise InputError(f"{name} shows images or sound, and this adapter sends text alone; use lm-eval")
        if "generate_until" in kinds:
            if len(kinds) > 1:
                raise InputError("tasks that generate and tasks that score choices need a run each")
            self.requires = "generation"
            for name, task in tasks.items():  # what it cannot do is refused before a model is looked for
                harness_sampling(name, task.config.generation_kwargs or {}, 1, self.prompting)
        elif self.reasoning != "strip":
            raise InputError(
                f"--reasoning {self.reasoning}: these tasks score choices, and write nothing; leave it out"
            )
        return tasks

    @property
    def groups(self) -> dict[str, Any]:
        """lm-eval's group objects by name: those that were named, and those inside them."""
        return dict(getattr(self.tasks, "groups", {}))

    @property
    def headline(self) -> str:  # type: ignore[override]
        """The first metric of what was named first: a group's own, as lm-eval aggregates it, or a task's."""
        first = group_in_file(self.names[0]) if is_file_name(self.names[0]) else self.names[0]
        own = group_headline(self.groups[first]) if first in self.groups else None
        name, task = next(iter(self.tasks.items()))
        return own or self._headline_of(name, task)

    def _headline_of(self, name: str, task: Any) -> str:
        return task_key(name, task, next(iter(task.aggregation())), task._filters[0].name)

    def samples(self) -> list[Sample]:
        """One sample a document; `group` is the lm-eval task."""
        samples = []
        self._docs, self._rendered = {}, {}
        with _quiet(), _seeded():
            for name, task in self.tasks.items():
                self.max_shots = max(self.max_shots, self._shots(task))
                docs = dict(zip(_numbered(name), islice(task.eval_docs, self.limit), strict=False))
                self._docs[name] = docs
                samples += [Sample(i, (), (), 0, cluster=fingerprint([doc]), group=name) for i, doc in docs.items()]
        by_name = sorted(self._docs.items())  # `--tasks b,a` asks the same as `--tasks a,b`
        self._fingerprint = fingerprint([doc for _, docs in by_name for doc in docs.values()])
        return samples

    def _doc(self, sample: Sample) -> Any:
        if not self._docs:
            self.samples()
        return self._docs[sample.group][sample.id]

    def _shots(self, task: Any) -> int:
        own = task.config.num_fewshot
        return int(own or 0) if self.shots is None or own == 0 else self.shots  # lm-eval too leaves a set 0 at 0

    def _arguments(self, sample: Sample, shots: int) -> list[tuple[Any, ...]]:
        """The arguments of lm-eval's requests of a document.

        lm-eval draws the examples of one document after another from one generator. So all documents of a task are
        rendered in their order, once: a resumed run, which asks for some of them, draws the same examples.
        """
        doc, task = self._doc(sample), self.tasks[sample.group]

        def written(id: str, doc: dict[str, Any], shots: int) -> list[tuple[Any, ...]]:
            try:
                check_answer(task, doc)
                instances = lm_eval_instances(task, doc, shots, self.prompting, self.chat)
            except TemplateError:
                raise
            except InputError as error:
                raise InputError(f"sample {id}: {error}") from None
            return [instance.args for instance in instances]

        if shots < self._shots(task):
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            return written(sample.id, doc, shots)
        if sample.group not in self._rendered:
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            docs = self._docs[sample.group].items()
            self._rendered[sample.group] = {id: written(id, d, self._shots(task)) for id, d in docs}
        return self._rendered[sample.group][sample.id]

    def requests(self, sample: Sample, shots: int) -> list[LoglikelihoodRequest]:
        """lm-eval's requests of the document."""
        return as_requests(self._arguments(sample, shots))

    def generation(self, sample: Sample, shots: int) -> GenerationRequest:
        """lm-eval's prompt of the document, with its own stop strings, length and number of tries."""
        ((prompt, arguments),) = self._arguments(sample, shots)
        repeats = int(self.tasks[sample.group].config.repeats or 1)
        return GenerationRequest(prompt, harness_sampling(sample.group, arguments, repeats, self.prompting))

    def score(self, sample: Sample, outputs: Outputs) -> Score:
        """lm-eval's `process_results`; metrics that are not one number are kept for the aggregation alone."""
        results = self._results(sample, outputs)
        if results is None:
            return Score(None, "non_finite")
        task = self.tasks[sample.group]
        numbers = {key: float(v) for key, v in results.items() if isinstance(v, int | float | np.number | np.bool_)}
        flat = [v for row in outputs.get("loglikelihoods", []) for v in row]
        if task.OUTPUT_TYPE == "multiple_choice" and len(flat) > 1 and len(set(flat)) == 1:
            return Score(None, "all_tied", dict.fromkeys(numbers))
        values = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        value = values.get(self._headline_of(sample.group, task), next(iter(values.values()), None))
        return Score(value, "non_finite" if None in values.values() else None, values)

    def _results(self, sample: Sample, outputs: Outputs) -> dict[str, Any] | None:
        """Metric -> what lm-eval's `process_results` says of it; None where a log-likelihood is not finite."""
        task, doc = self.tasks[sample.group], self._doc(sample)
        if "completions" in outputs:
            responses: list[list[Any]] = [outputs["completions"]]
        else:
            flat = [v for row in outputs["loglikelihoods"] for v in row]
            if any(v is None or not math.isfinite(v) for v in flat):
                return None
            greedy = [g for row in outputs["is_greedy"] for g in row]
            if task.OUTPUT_TYPE == "loglikelihood_rolling":
                responses = [[math.fsum(flat)]]  # one number a text: the sum over its windows
            else:
                responses = [[pair] for pair in zip(flat, greedy, strict=True)]
        from lm_eval.api.instance import Instance

        kind = "generate_until" if "completions" in outputs else "loglikelihood"
        instances = [
            Instance(kind, doc, (), i, (sample.group, 0, len(response)), resps=list(response))
            for i, response in enumerate(responses)
        ]
        results: dict[str, Any] = {}
        for pipeline in task._filters:
            try:
                pipeline.apply(instances)
                with np.errstate(all="ignore"), _quiet():
                    metrics = task.process_results(doc, [i.filtered_resps[pipeline.name] for i in instances])
            except Exception as error:  # a task's own code may raise anything
                raise RunError(
                    f"sample {sample.id}: the scoring of {sample.group} fails ({type(error).__name__}: "
                    f"{' '.join(str(error).split())[:160]}); mend the task or its row: what was answered is kept"
                ) from None
            results |= {task_key(sample.group, task, metric, pipeline.name): value for metric, value in metrics.items()}
        return results

    def metrics(self, records: Sequence[SampleRecord]) -> dict[str, Metric]:
        """`<task>/<metric>`: a mean with its interval, or lm-eval's own aggregation where that is not a mean.

        A task with several filters has `<task>/<metric>,<filter>` for each. Groups stand first.
        """
        metrics: dict[str, Metric] = {}
        for name, task in self.tasks.items():
            mine = [r for r in records if r.sample.group == name]
            clusters = [r.sample.cluster for r in mine]
            scored = [r for r in mine if r.outputs and r.score.reason is None]
            for pipeline in task._filters:
                for metric, aggregate in task.aggregation().items():
                    key = task_key(name, task, metric, pipeline.name)
                    if getattr(aggregate, "__name__", "") in {"mean", "nanmean"}:
                        values = [r.score.metrics.get(key) for r in mine]
                        mean = mean_metric(values, clusters)
                        # lm-eval's sum, in its order: a mean by numpy may differ in the last digit.
                        exact = float(aggregate([value for value in values if value is not None])) if mean.n else None
                        metrics[key] = replace(mean, value=exact)
                        continue
                    items = [self._results(r.sample, r.outputs) for r in scored]
                    results = [item[key] for item in items if item is not None and key in item]
                    value = float(aggregate(results)) if results else None
                    metrics[key] = Metric(value, None, None, len(results), len(mine) - len(results))
        return group_metrics(self.groups, self.tasks, metrics, records) | metrics

    def details(self, records: Sequence[SampleRecord]) -> dict[str, float | int]:
        """How many answers came after a thought; how many documents have no right choice."""
        thoughts = sum(thought is not None for r in records for thought in r.outputs.get("reasoning", ()))
        hopeless = sum(has_no_right_choice(self.tasks[r.sample.group], self._doc(r.sample)) for r in records)
        counts = {"answers_after_a_thought": thoughts, "documents_without_a_right_choice": hopeless}
        return {name: count for name, count in counts.items() if count}

    def data_fingerprint(self) -> str:
        """See `Task.data_fingerprint`."""
        return self._fingerprint

    def settings(self) -> dict[str, Any]:
        """See `Task.settings`."""
        return {
            "tasks": list(self.names),
            "shots": self.shots,
            "limit": self.limit,
            "versions": {name: str(task.VERSION) for name, task in self.tasks.items()}
            | {name: str(group.version) for name, group in self.groups.items()},
            **({"definitions": digests(self.tasks)} if any(map(is_file_name, self.names)) else {}),
            **({"reasoning": self.reasoning} if self.requires == "generation" else {}),
            **self.chat.settings(self.prompting, any(task.config.description for task in self.tasks.values())),
        }


def _numbered(name: str) -> Iterator[str]:
    return (f"{name}/{number}" for number in count())
