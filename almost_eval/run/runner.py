"""A run from its request to its results: `RunRequest` is the one record that the command line, Python, `all`, `tax`,
`parity` and `verify` all build, `open_run` makes a run of it, and `Run` is the loop.

Each step is refused as early as it can be: data, task, model (without weights) and prompts are opened in that order,
before a weight is loaded. The loop: spec -> samples -> requests -> scores -> records -> results; a sample's line is on
disk before the next batch starts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from almost_eval.data.sources import DataSource, find_data
from almost_eval.engines.build import EngineOptions, loglikelihood_engine
from almost_eval.errors import InputError, RunError, StoreError, did_you_mean
from almost_eval.models.chat import ChatTemplate, load_template
from almost_eval.nano import BUILT_IN, DEFAULT_MODEL, DEFAULT_REWARD_MODEL
from almost_eval.progress import Progress
from almost_eval.rewards.build import reward_model
from almost_eval.run import provenance
from almost_eval.run.interview import Interview
from almost_eval.run.prompts import write_prompts
from almost_eval.run.shards import MARK, Mark, Shard, begin_shard, beginning, without_shard
from almost_eval.run.store import RunStore, default_folder, origin, read_spec
from almost_eval.run.validity import ALLOWED, Validity, check
from almost_eval.tasks.base import Task, resolve_prompting
from almost_eval.tasks.facts import PROMPT_SETTINGS, SettingValue
from almost_eval.tasks.registry import build_task, task_class
from almost_eval.types import JSONMapping, JSONObject, SampleRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """A task, the model it is put to, and how."""

    task: str
    """A name of `tasks.registry.TASKS`."""
    protocol: str = ""
    """Empty is the task's default."""
    settings: Mapping[str, SettingValue] = field(default_factory=dict)
    """The task's own (`Task.task_settings`); what is left out has its default."""
    model: str | None = None
    """Checkpoint directory, hub id, built-in or served name; None is the built-in model for the task."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    data: str | None = None
    """`hub` or `nano`; None is nano for built-in models and the hub for others."""
    data_root: str | None = None
    """A folder laid out like the hub, looked in first."""
    prompt_set: str | None = None
    """`official` or `builtin`; None is by the data."""
    template: str = "auto"
    """See `load_template`; `none` sends prompts as they are."""
    limit: int | None = None
    """Samples of each category, subject or task."""
    seed: int = 0
    """Recorded, and of whatever is drawn."""
    allowed: Mapping[str, float] | None = None
    """Shares of samples for the validity gate; None is the defaults."""
    output: Path | None = None
    """The run folder; None is named by the run, under `runs`."""

    @property
    def built_in(self) -> bool:
        """Whether the model is a built-in one. What an endpoint serves is one only where it is named."""
        return (self.model or DEFAULT_MODEL) in BUILT_IN and (self.engine.engine != "openai" or self.model is not None)

    def source(self) -> DataSource:
        """Where the data comes from.

        Raises:
            InputError: an unknown name, or a root that is not there.
        """
        return find_data(self.data, self.data_root, built_in_model=self.built_in)


def complete_settings(request: RunRequest) -> dict[str, Any]:
    """The task's settings with defaults where the request has none.

    Raises:
        InputError: an unknown task, or a setting it does not have.
    """
    stated = {setting.name: setting for setting in task_class(request.task).task_settings}
    if unknown := next((name for name in request.settings if name not in stated), None):
        raise InputError(f"{request.task} has no setting {unknown!r}; {did_you_mean(unknown, stated)}")
    defaults = {name: setting.default for name, setting in stated.items() if name != "protocol"}
    return {**defaults, **request.settings}


def open_run(request: RunRequest, model: Any = None) -> Run:
    """The run that a request describes, checked and ready; no weight is loaded.

    Args:
        request: what is to be done.
        model: an engine or reward model that is open already, instead of the one that the request names.

    Raises:
        InputError: whatever data, task, model or prompts refuse.
    """
    settings = complete_settings(request)
    task = build_task(request.task, request.protocol, {**settings, "limit": request.limit}, request.source())
    return open_task(task, request, model)


def open_task(task: Task, request: RunRequest, model: Any = None) -> Run:
    """The same for a task that is built already; the request's task, settings and data are not read.

    Raises:
        InputError: whatever model or prompts refuse.
    """
    if task.requires == "reward":
        return Run(task, _scorer(request, model), seed=request.seed, allowed=request.allowed)
    if model is None and task.requires == "loglikelihood" and request.engine.speculative_config:
        raise InputError(
            f"{request.task} scores given texts, so there is no token to guess: leave out --speculative-config"
        )
    engine: Any = model or loglikelihood_engine(request.model or DEFAULT_MODEL, request.engine)
    task.prompting = resolve_prompting(
        task.data, request.prompt_set, request.template, engine.tokenizer, own_prompts=task.own_prompts
    )
    task.check_prompting()
    return Run(task, engine, seed=request.seed, allowed=request.allowed)


def _scorer(request: RunRequest, model: Any) -> Any:
    if request.prompt_set:
        raise InputError("--prompt-set: a reward model reads the dialogue itself, so it takes no prompts")
    choice = request.template
    if choice == "none":
        raise InputError("--template none: a reward model reads a conversation, so it needs a template; use auto")
    if choice == "tokenizer":
        raise InputError("--template tokenizer: auto is the tokenizer's own for a reward model; leave it out")
    template: ChatTemplate | str | None = None
    if choice.startswith("tokenizer:"):
        template = choice  # one of several: known where the tokenizer is
    elif choice != "auto":
        template = load_template(choice, None)
    if model is not None:
        return model
    served = request.engine.engine == "openai"  # a server has one, whatever its name
    return reward_model(request.model if served else request.model or DEFAULT_REWARD_MODEL, request.engine, template)


# --- the loop ---


class Run(Interview):
    """A task and the model it is put to, checked and ready, and the folder that it fills; made as an `Interview` is."""

    def spec(self) -> JSONObject:
        """Everything that decides the numbers, and the command that requested them."""
        task, model = self.task, self.model
        if task.requires == "reward":
            template, prompts = model.template, None  # no template: the server writes the conversations
            is_chosen = template is not None and template.name != "tokenizer"
        else:
            template, prompts = task.prompting.template, task.prompting.prompt_set
            is_chosen = task.prompting.is_chosen
        return {
            "schema": 1,
            "task": task.name,
            "task_version": task.version,
            "protocol": task.protocol,
            "settings": task.settings(),
            "requires": task.requires,
            "model_name": model.checkpoint.name,
            "architecture": model.checkpoint.architecture,
            "weight_digest": self._weight_digest,
            "model_files": self._model_files,
            "engine": model.settings(),
            "template": template.to_dict() if template else None,
            "template_asked": is_chosen,
            "prompt_set": {"name": prompts.name, "digest": prompts.digest} if prompts else None,
            "prompt_ids_digest": self.prepared.digest() if self.prepared else None,
            "data": {"source": task.data.name, "fingerprint": task.data_fingerprint()},
            "n_samples": len(self.samples),
            "seed": self.seed,
            "versions": provenance.versions(),
            "command": provenance.command(),
            "commit": provenance.commit(),
        }

    @cached_property
    def _weight_digest(self) -> str | None:
        digest: str | None = self.model.checkpoint.weight_digest()
        return digest

    @cached_property
    def _model_files(self) -> dict[str, str] | None:
        return self._read_files()

    def _read_files(self) -> dict[str, str] | None:
        read = getattr(self.model.checkpoint, "file_digests", None)  # an engine of one's own may have no files
        files: dict[str, str] | None = read() if read else None
        return files

    def _refuse_changed(self, folder: Path) -> None:
        """Raise RunError where a file of the checkpoint is another one than when this process began.

        Else nobody would know which model gave which line.
        """
        checkpoint = self.model.checkpoint
        was, now = self._model_files or {}, self._read_files() or {}
        changed = [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
        changed += ["the weights"] if checkpoint.weight_digest() != self._weight_digest else []
        if changed:
            raise RunError(
                f"{checkpoint.name} was changed while it ran ({', '.join(changed[:3])}), so these numbers belong to "
                f"no one checkpoint: remove {folder} and run the command again"
            )

    def default_folder(self) -> Path:
        """`runs/<task>-<protocol>-<model>-<digest of the spec>`: the same command goes on where it stopped."""
        return default_folder(self.spec(), self.task.name, self.task.protocol, Path(self.model.checkpoint.name).name)

    def execute(
        self, folder: Path, progress: Progress | None = None, *, started: float | None = None
    ) -> tuple[JSONObject, Validity]:
        """Run what is missing, then write and return `results.json`'s content and the gate's verdict.

        Args:
            folder: the run folder.
            progress: where to report to; nowhere by default.
            started: `time.perf_counter()` when the program started, from which times count; now by default.

        Raises:
            StoreError: see `RunStore`.
            RunError: out of memory or disk.
        """
        progress = progress or Progress()
        started = time.perf_counter() if started is None else started
        if (folder / MARK).is_file():
            raise StoreError(f"{folder} is a shard's; give its --shard, or choose another --output")
        with RunStore(folder, self._spec_in(folder)) as store:
            write_prompts(folder, self.prompts())
            earlier = store.results("engine", "timing")
            whole = range(len(self.samples))
            if earlier is not None and all(sample.id in store.done for sample in self.samples):
                engine, timing = earlier["engine"], earlier["timing"]
            else:
                report, timing = self._compute(store, whole, progress, started)
                engine = whole_report(report, list(store.done.values()), store.spec, provenance.commit())
            results, validity = finish(store, self.task, [s.id for s in self.samples], engine, timing, self.allowed)
        return results, validity

    def execute_shard(
        self, whole: Path, shard: Shard, progress: Progress | None = None, *, started: float | None = None
    ) -> Mark:
        """Run what is missing of one shard, in its folder inside `whole`; `run.merge` makes the results of all.

        The batches are those of the whole run, less those that hold nothing of this shard: in float32 on transformers
        its lines are those of an unsharded run, to the byte.

        Raises:
            InputError: the shard would have no sample.
            StoreError: see `RunStore`.
            RunError: out of memory or disk.
        """
        progress = progress or Progress()
        started = time.perf_counter() if started is None else started
        folder = shard.folder(whole)
        mine = shard.part(self.partition(shard.of).parts)
        own = self.spec()  # digests the weights, which may take minutes: not while other shards wait
        with ExitStack() as stack:
            with beginning(whole, shard) as begun:
                spec = self._spec_in(begun or folder)  # a date that a template writes is that of all shards
                store = stack.enter_context(RunStore(folder, spec | {"command": without_shard(spec["command"])}))
            if spec != own:  # another date may have more tokens
                mine = shard.part(self.partition(shard.of).parts)
            ids = [sample.id for sample in self.samples]
            mark = begin_shard(folder, shard, mine, ids, {"allowed": dict(self.allowed or ALLOWED)})
            if mark.finished is not None:
                return mark
            write_prompts(folder, self.prompts())
            report, timing = self._compute(store, mine, progress, started)
            store.in_order(mark.ids)
            return mark.write({"engine": report, "timing": timing, "commit": provenance.commit()})

    def _spec_in(self, folder: Path) -> JSONObject:
        """The spec, dated as the run in `folder` began, if one did."""
        if (folder / "spec.json").is_file():
            self.adopt_date(read_spec(folder))
        return self.spec()

    def _compute(
        self, store: RunStore, mine: Sequence[int], progress: Progress, started: float
    ) -> tuple[JSONObject, JSONObject]:
        """Append what is missing of the samples `mine`: the engine's report, and the times."""
        missing = [i for i in mine if self.samples[i].id not in store.done]
        known = len(mine) - len(missing)
        if known:
            progress.note(f"going on in {store.folder}: {known} of {len(mine)} samples are there")
        first: float | None = None
        with progress.track(f"{self.task.name} {self.task.protocol}", len(mine), known) as advance:
            for index, outputs, score in self.answers(missing):
                first = first or time.perf_counter() - started
                store.append(SampleRecord(self.samples[index], outputs, score, self.truncated.get(index, 0)))
                advance(1)
        self._refuse_changed(store.folder)
        timing = {
            "seconds": round(time.perf_counter() - started, 3),
            "seconds_to_first_sample": round(first, 3) if first else None,
            "samples_computed_now": len(missing),
        }
        if (pool := getattr(self.model, "pool", None)) is not None:
            timing["workers"] = pool.describe()
        return self._engine_report(), timing


def whole_report(
    engine: JSONMapping, records: Sequence[SampleRecord], spec: JSONMapping, commit: str | None
) -> JSONObject:
    """What the engine reported, with what the records of the whole run, and the `commit` that ended it, add."""
    warnings = list(engine["warnings"])
    texts = [record for record in records if record.outputs.get("finish_reasons")]
    if cut := sum("length" in record.outputs["finish_reasons"] for record in texts):
        warnings.append(f"{cut} of {len(texts)} answers were cut at the limit of new tokens")
    if commit != spec["commit"]:
        warnings.append(f"begun on commit {spec['commit']}, ended on {commit}")
    return {**engine, "warnings": warnings}


def finish(
    store: RunStore,
    task: Task,
    ids: Sequence[str],
    engine: JSONMapping,
    timing: JSONMapping,
    allowed: Mapping[str, float] | None,
) -> tuple[JSONObject, Validity]:
    """Put the lines in the order of `ids`, all samples of the run, and write `results.json`.

    Returns:
        Its content, and the gate's verdict.

    Raises:
        RunError: the disk is full, or gone.
    """
    records = store.in_order(ids)
    validity = check(records, len(ids), allowed or ALLOWED)
    results = summarise(task, records, validity, store.spec, engine) | {"timing": dict(timing)}
    store.finish(results)
    return results, validity


def summarise(
    task: Task,
    records: Sequence[SampleRecord],
    validity: Validity,
    spec: JSONMapping,
    engine: JSONMapping,
) -> JSONObject:
    """`results.json` without its times: a pure function of the records and the spec."""
    metrics = {name: metric.to_dict() for name, metric in task.metrics(records).items()}
    if not validity.passed:
        metrics[task.headline] |= {"value": None, "stderr": None, "ci95": None, "withheld": validity.reason}
    template = spec["template"] or {}
    chosen = {name: spec["settings"][name] for name in PROMPT_SETTINGS if name in spec["settings"]}
    return {
        "task": spec["task"],
        "protocol": spec["protocol"],
        "model": spec["model_name"],
        "headline": task.headline,
        "metrics": metrics,
        "baselines": {name: metric.to_dict() for name, metric in task.baselines(records).items()},
        "details": task.details(records),
        "validity": validity.to_dict(),
        "engine": engine,
        "provenance": {
            "weight_digest": spec["weight_digest"],
            "data_source": spec["data"]["source"],
            "data_fingerprint": spec["data"]["fingerprint"],
            "template": template.get("name"),
            "template_digest": template.get("digest"),
            "template_text": template.get("text"),
            "prompt_set": spec["prompt_set"],
            **({"prompt_settings": chosen} if chosen else {}),
            "prompt_ids_digest": spec["prompt_ids_digest"],
            **origin(spec, records),
        },
    }
