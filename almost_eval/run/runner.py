"""The one loop: spec -> samples -> requests -> scores -> records -> results.

Each step is refused as early as it can be: data, prompts and lengths are checked before a weight is loaded, and a
sample's line is on disk before the next batch starts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from almost_eval.engines.base import Described, SamplingParams
from almost_eval.errors import InputError, RunError, TemplateError
from almost_eval.files import read_json
from almost_eval.progress import Progress
from almost_eval.run import provenance
from almost_eval.run.preflight import Prepared, describe, prepare
from almost_eval.run.prompt_log import Prompt, SamplePrompts, write_prompts
from almost_eval.run.store import RunStore, default_folder, origin
from almost_eval.run.texts import score_texts, text_outputs
from almost_eval.run.validity import ALLOWED, Validity, check
from almost_eval.tasks.base import GenerationRequest, Task, loglikelihood_outputs, reward_outputs
from almost_eval.tasks.facts import PROMPT_SETTINGS
from almost_eval.types import (
    ContinuationScore,
    Conversation,
    JSONMapping,
    JSONObject,
    LoglikelihoodRequest,
    Outputs,
    SampleRecord,
    Score,
)


class Run:
    """A task and the model it is put to, checked and ready.

    Args:
        task: the benchmark.
        model: an engine (HFEngine, ...) or a reward model (HFRewardModel, ...), whichever the task requires.
        seed: recorded, and of every text that is drawn.
        allowed: shares for the validity gate, or None for the defaults.

    Raises:
        InputError: no samples, or none that fits this model; see `prepare`.
    """

    def __init__(
        self, task: Task, model: Described, *, seed: int = 0, allowed: Mapping[str, float] | None = None
    ) -> None:
        self.task = task
        self.model = cast(Any, model)  # which protocol it must meet is known only by `task.requires`
        self.seed = seed
        self.allowed = allowed
        self.samples = self.task.samples()
        if not self.samples:
            raise InputError(f"{self.task.name} has no samples with these settings")
        duplicates = len(self.samples) - len({sample.id for sample in self.samples})
        if duplicates:
            raise InputError(f"{self.task.name} has {duplicates} samples with an id that is not unique")
        self.prepared: Prepared | None = None
        self.truncated: dict[int, int] = {}
        """Sample index -> tokens of dropped few-shot examples."""
        self._fitted: dict[int, GenerationRequest | None] = {}
        if self.task.requires == "loglikelihood":
            if hasattr(self.model, "check_scores"):  # an endpoint: not each can
                self.model.check_scores()
            self._prepare()
        elif not self.task.unfit_is_unscored:
            self._refuse_unfit()

    def _refuse_unfit(self) -> None:
        places = range(len(self.samples))
        if self.task.requires == "reward" and not any(self._fits(i) for i in places):
            raise InputError(
                f"no sample fits: the shortest conversation has {min(self._lengths)} tokens, the context "
                f"{self.model.context_length}; use a model with a longer context, or raise --max-length"
            )
        if self.task.requires == "generation" and not any(self._fitting(i) for i in places):
            new = self.task.generation(self.samples[0], 0).params.max_new_tokens
            raise InputError(
                f"no prompt leaves room for {new} new tokens in the context of {self.model.context_length} of "
                f"{self.model.checkpoint.name}; use a model with a longer context, or lower max_new_tokens"
            )

    def _prepare(self) -> None:
        self.prepared = prepare(self.task, self.model, self.samples)
        self.truncated = dict(enumerate(self.prepared.truncated))

    def adopt_date(self, spec: JSONMapping) -> None:
        """Let the template write the time that it wrote when the run of `spec` began.

        Raises:
            InputError: see `Run`.
        """
        is_reward = self.task.requires == "reward"
        template = self.model.template if is_reward else self.task.prompting.template
        now = (spec.get("template") or {}).get("now")
        if template is None or now is None or template.now in (None, now):
            return
        dated = replace(template, now=now)
        if is_reward:
            (getattr(self.model, "reader", None) or self.model).template = dated
            self.__dict__.pop("_lengths", None)
            return
        self.task.prompting = replace(self.task.prompting, template=dated)
        self._fitted.clear()
        if self.prepared is not None:
            self._prepare()

    @cached_property
    def _conversations(self) -> list[list[Conversation]]:
        """Sample index -> what a reward model reads."""
        return [self.task.conversations(sample) for sample in self.samples]

    @cached_property
    def _lengths(self) -> list[int]:
        """Sample index -> tokens of its longest conversation."""
        try:
            lengths = iter(self.model.lengths([c for mine in self._conversations for c in mine]))
        except TemplateError as error:
            raise self._of_sample(error) from None
        return [max(next(lengths) for _ in mine) for mine in self._conversations]

    def _of_sample(self, error: TemplateError) -> TemplateError:
        """The error of a template with the first sample that it cannot write, and what to do."""
        for sample, mine in zip(self.samples, self._conversations, strict=True):
            try:
                for conversation in mine:
                    self.model.render(conversation)
            except TemplateError:
                roles = ", ".join(message.role for message in conversation)
                return error.about(f"sample {sample.id} ({roles})")
        return error

    def _fits(self, index: int) -> bool:
        """Whether a reward model can read all conversations of a sample; where it does not tell, it is tried."""
        limit = self.model.context_length
        return limit is None or self._lengths[index] <= limit

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
        """The checkpoint must still be what the spec says, or nobody knows which model gave which line.

        Raises:
            RunError: a file of it is another one than when this process began.
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

    def describe(self) -> JSONObject:
        """What `--dry-run` prints."""
        if self.prepared is not None:
            return describe(self.task, self.prepared, self.model)
        if self.task.requires == "reward":
            limit = self.model.context_length
            return {
                "samples": len(self.samples),
                "prompt": self.model.render(self._conversations[0][0]),
                "longest_prompt": None if limit is None else max(self._lengths),
                "context_length": limit,
                "do_not_fit": sum(not self._fits(i) for i in range(len(self.samples))),
            }
        request = self.task.generation(self.samples[0], self.task.max_shots)
        return {"samples": len(self.samples), "prompt": request.prompt}

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
        if (folder / "spec.json").is_file():
            self.adopt_date(read_json(folder / "spec.json"))
        spec = self.spec()
        with RunStore(folder, spec) as store:
            write_prompts(folder, self.prompts())
            missing = [i for i, sample in enumerate(self.samples) if sample.id not in store.done]
            earlier = store.results("engine", "timing")
            if not missing and earlier is not None:
                engine, timing = earlier["engine"], earlier["timing"]
            else:
                known = len(self.samples) - len(missing)
                if known:
                    progress.note(f"going on in {folder}: {known} of {len(self.samples)} samples are there")
                first: float | None = None
                with progress.track(f"{self.task.name} {self.task.protocol}", len(self.samples), known) as advance:
                    for index, outputs, score in self.answers(missing):
                        first = first or time.perf_counter() - started
                        store.append(SampleRecord(self.samples[index], outputs, score, self.truncated.get(index, 0)))
                        advance(1)
                self._refuse_changed(folder)
                engine = self._engine_report()
                texts = [r for r in store.done.values() if r.outputs.get("finish_reasons")]
                if cut := sum("length" in r.outputs["finish_reasons"] for r in texts):
                    engine["warnings"].append(f"{cut} of {len(texts)} answers were cut at the limit of new tokens")
                if spec["commit"] != store.spec["commit"]:
                    engine["warnings"].append(f"begun on commit {store.spec['commit']}, ended on {spec['commit']}")
                timing = {
                    "seconds": round(time.perf_counter() - started, 3),
                    "seconds_to_first_sample": round(first, 3) if first else None,
                    "samples_computed_now": len(missing),
                }
                if (pool := getattr(self.model, "pool", None)) is not None:
                    timing["workers"] = pool.describe()
            records = [store.done[sample.id] for sample in self.samples if sample.id in store.done]
            validity = check(records, len(self.samples), self.allowed or ALLOWED)
            results = summarise(self.task, records, validity, store.spec, engine) | {"timing": timing}
            store.finish(results)
        return results, validity

    def prompts(self) -> Iterator[SamplePrompts]:
        """What the model reads of each sample, as text: the content of `prompts.jsonl`."""
        for index, sample in enumerate(self.samples):
            yield SamplePrompts(sample.id, sample.choices, tuple(self._prompts(index)))

    def _prompts(self, index: int) -> Iterator[Prompt]:
        if self.prepared is not None:
            for at in self.prepared.of_sample[index]:
                request = self.prepared.requests[at].request
                yield Prompt(request.context, request.continuations)
        elif self.task.requires == "reward":
            for conversation in self._conversations[index]:
                yield Prompt(self.model.render(conversation))
        elif (generation := self._fitting(index)) is not None:
            yield Prompt(generation.prompt)

    def _engine_report(self) -> JSONObject:
        if self.prepared is None:
            return {"path": self.task.requires, "warnings": list(getattr(self.model, "warnings", ()))}
        report: JSONObject = self.model.report.to_dict()
        merges = getattr(getattr(self.model, "encoder", None), "boundary_merges", 0)
        if merges:
            report["warnings"].append(f"the tokenizer merges across the boundary of {merges} continuations")
        return report

    def answers(self, missing: Sequence[int]) -> Iterator[tuple[int, Outputs, Score]]:
        """(sample index, outputs, score) of each missing sample, as they become known."""
        if self.task.requires == "reward":
            yield from self._rewards(missing)
        elif self.task.requires == "generation":
            yield from self._texts(missing)
        else:
            yield from self._loglikelihoods(missing)

    def _loglikelihoods(self, missing: Sequence[int]) -> Iterator[tuple[int, Outputs, Score]]:
        prepared = self.prepared
        assert prepared is not None
        for index in missing:
            if index in prepared.too_long:
                yield index, {}, Score(None, "context_too_long")
        owner = {r: index for index in missing for r in prepared.of_sample[index]}
        known: dict[int, list[ContinuationScore]] = {}  # request -> its scores, until its sample is whole
        # Streamed even where nothing is missing: the report of the whole run's plan belongs in the results.
        for request, scores in self.model.stream(prepared.requests, owner.keys()):
            known[request] = scores
            mine = prepared.of_sample[owner[request]]
            if all(r in known for r in mine):
                index = owner[request]
                outputs = loglikelihood_outputs([known.pop(r) for r in mine])
                yield index, outputs, self.task.score(self.samples[index], outputs)

    def _rewards(self, missing: Sequence[int]) -> Iterator[tuple[int, Outputs, Score]]:
        to_score = frozenset(missing)
        conversations, place = [], []  # what fits, and the (sample, choice) it belongs to
        for index, mine in enumerate(self._conversations):
            if self._fits(index):
                place += [(index, choice) for choice in range(len(mine))]
                conversations += mine
            elif index in to_score:
                yield index, {}, Score(None, "context_too_long")
        wanted = {at for at, (index, _) in enumerate(place) if index in to_score}
        known: dict[int, dict[int, float]] = {}  # sample index -> choice -> reward
        for at, reward in self.model.stream(conversations, wanted):
            index, choice = place[at]
            by_choice = known.setdefault(index, {})
            by_choice[choice] = reward
            if len(by_choice) == len(self.samples[index].choices):
                outputs = reward_outputs([by_choice[c] for c in sorted(known.pop(index))])
                yield index, outputs, self.task.score(self.samples[index], outputs)

    def _texts(self, missing: Sequence[int]) -> Iterator[tuple[int, Outputs, Score]]:
        groups: dict[SamplingParams, list[tuple[int, str]]] = {}  # what may be generated together
        for index in missing:
            request = self._fitting(index)
            if request is None:
                yield index, {}, Score(None, "context_too_long")
                continue
            groups.setdefault(replace(request.params, seed=self.seed), []).append((index, request.prompt))
        for params, prompts in groups.items():
            for at, completions in self.model.stream_completions([prompt for _, prompt in prompts], params):
                index = prompts[at][0]
                outputs = text_outputs(self.task, prompts[at][1], completions)
                if self.task.keeps_tokens:
                    outputs["token_ids"] = [list(c.token_ids) for c in completions]
                yield index, outputs, score_texts(self.task, self.samples[index], outputs)

    def _fitting(self, index: int) -> GenerationRequest | None:
        """What to have the model write, with as many examples as leave room for the answer; None where none do."""
        if index not in self._fitted:
            self._fitted[index] = self._fit(index)
        return self._fitted[index]

    def _fit(self, index: int) -> GenerationRequest | None:
        full = 0
        for shots in range(self.task.max_shots, -1, -1):
            try:
                request = self.task.generation(self.samples[index], shots)
            except TemplateError as error:
                raise error.about(f"sample {self.samples[index].id}") from None
            # With ids for a continuation, the prefix is the prompt as the engine reads it to continue it.
            (encoded,) = self.model.encode([LoglikelihoodRequest(request.prompt, ("a",), token_ids=((0,),))])
            needed = len(encoded.continuations[0].prefix)
            full = full or needed
            limit = self.model.context_length
            if limit is None or needed + request.params.max_new_tokens <= limit:
                self.truncated[index] = full - needed
                return request
        return None


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
