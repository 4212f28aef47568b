"""What a run asks its model, sample by sample, and what the model answers: no folder, no spec, no results.

Everything that can be refused is refused when an `Interview` is made: data, prompts and lengths come before weights.

Thoughts are stored beside the answer, and never in its place. `Task.reasoning` says what becomes of a thought (see
`models.reasoning`): `strip` scores the answer alone, `keep` the text as it is, `refuse` nothing. A thought that has no
end has no answer after it: the sample is unscored, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

from almost_eval.engines.base import Described, SamplingParams
from almost_eval.engines.partition import Partition, partition_lengths, partition_prompts, partition_requests
from almost_eval.errors import InputError, TemplateError
from almost_eval.models.reasoning import Reasoning, opens_thought, split_reasoning
from almost_eval.run.prompts import Prepared, Prompt, SamplePrompts, describe, prepare
from almost_eval.run.shards import Shard
from almost_eval.tasks.base import GenerationRequest, ReasoningRule, Task, loglikelihood_outputs, reward_outputs
from almost_eval.types import (
    Completion,
    ContinuationScore,
    Conversation,
    JSONMapping,
    JSONObject,
    LoglikelihoodRequest,
    Outputs,
    Sample,
    Score,
)

CUT = "thought_cut"
"""Why a sample is unscored: its thought was cut before an answer."""
REFUSED = "thought"
"""Why a sample is unscored: it holds a thought, and `--reasoning refuse`."""


class Interview:
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
            InputError: see `Interview`.
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

    def _readable(self) -> tuple[list[tuple[int, int]], list[Conversation]]:
        """(sample, choice) of what a reward model can read whole, and the conversations."""
        fits = [index for index in range(len(self.samples)) if self._fits(index)]
        place = [(index, choice) for index in fits for choice in range(len(self._conversations[index]))]
        return place, [conversation for index in fits for conversation in self._conversations[index]]

    def _fits(self, index: int) -> bool:
        """Whether a reward model can read all conversations of a sample; where it does not tell, it is tried."""
        limit = self.model.context_length
        return limit is None or self._lengths[index] <= limit

    def partition(self, parts: int) -> Partition:
        """Which samples each of several processes is to compute, and what that costs; a function of the samples alone.

        Loads no weights.
        """
        if self.prepared is not None:
            places = [(index, at) for index, mine in enumerate(self.prepared.of_sample) for at in mine]
            requests = [self.prepared.requests[at] for _, at in places]
            if getattr(self.model, "share_prefixes", True):
                limits = self.model.pass_limits() if hasattr(self.model, "pass_limits") else {}
                owners = [index for index, _ in places]
                return partition_requests(requests, owners, parts, n_samples=len(self.samples), **limits)
            tokens = [0] * len(self.samples)
            for (index, _), request in zip(places, requests, strict=True):
                tokens[index] += sum(continuation.n_positions for continuation in request.continuations)
            return partition_lengths(tokens, parts)
        if self.task.requires == "reward":
            if self.model.context_length is None:  # a server need not tell how it counts
                texts = [[message.content for c in mine for message in c] for mine in self._conversations]
                return partition_lengths([sum(map(len, mine)) for mine in texts], parts)
            place, conversations = self._readable()
            return self.model.partition(conversations, [index for index, _ in place], len(self.samples), parts)
        return self._partition_prompts(parts)

    def _partition_prompts(self, parts: int) -> Partition:
        prompts, new_tokens = [], 0
        for index in range(len(self.samples)):
            request = self._fitting(index)
            prompts.append("" if request is None else request.prompt)
            if request is not None:
                new_tokens = max(new_tokens, request.params.n * request.params.max_new_tokens)
        encoded = self.model.encode([LoglikelihoodRequest(prompt, ("a",), token_ids=((0,),)) for prompt in prompts])
        return partition_prompts([e.continuations[0].prefix for e in encoded], parts, new_tokens=new_tokens)

    def describe_shard(self, shard: Shard) -> JSONObject:
        """What `--dry-run` adds for a shard: its samples, and how all are balanced."""
        partition = self.partition(shard.of)
        mine = shard.part(partition.parts)
        return {
            "shard": f"{shard}: {len(mine)} of {len(self.samples)} samples",
            "tokens_of_each_shard": ", ".join(f"{tokens:,}" for tokens in partition.tokens),
            "tokens_of_one_process": f"{partition.whole:,}",
            "computed_by_more_than_one_shard": f"{100 * partition.extra:.1f} % more tokens than one process computes",
        }

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
        place, conversations = self._readable()
        for index in sorted(to_score - {index for index, _ in place}):
            yield index, {}, Score(None, "context_too_long")
        wanted = {at for at, (index, _) in enumerate(place) if index in to_score}
        known: dict[int, dict[int, float]] = {}  # sample index -> choice -> reward
        for at, reward in self.model.stream(conversations, wanted, [index for index, _ in place]):
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


# --- what a model wrote ---


def text_outputs(task: Task, prompt: str, completions: Sequence[Completion]) -> Outputs:
    """Stored form of a sample's texts; `reasoning` and `thought_cut` are there where there is a thought."""
    parts = [split_completion(task.reasoning, prompt, completion) for completion in completions]
    outputs: Outputs = {
        "completions": [part.answer for part in parts],
        "finish_reasons": [completion.finish_reason for completion in completions],
    }
    if any(part.thought is not None for part in parts):
        outputs |= {"reasoning": [part.thought for part in parts], CUT: [part.is_cut for part in parts]}
    return outputs


def score_texts(task: Task, sample: Sample, outputs: Outputs) -> Score:
    """The task's score of stored outputs, of any kind; none where thoughts leave nothing to score."""
    thoughts = outputs.get("reasoning", ())
    if task.reasoning == "refuse" and any(thought is not None for thought in thoughts):
        return Score(None, REFUSED)
    if any(outputs.get(CUT, ())):
        return Score(None, CUT)
    return task.score(sample, outputs)


def unscored_reason(rule: ReasoningRule, part: Reasoning) -> str | None:
    """Why a text is not scored; None where it is."""
    if rule == "refuse" and part.thought is not None:
        return REFUSED
    return CUT if part.is_cut else None


def split_completion(rule: ReasoningRule, prompt: str, completion: Completion) -> Reasoning:
    """The parts of one text; an endpoint may have delivered the thought in a field of its own."""
    text, own = completion.text, completion.reasoning or None
    if rule == "keep":
        return Reasoning(text, own, False)
    if own is not None:
        part = split_reasoning(text)
        thought = own if part.thought is None else f"{own}\n\n{part.thought}"
        is_cut = part.is_cut or (not part.answer.strip() and completion.finish_reason == "length")
        return Reasoning(part.answer, thought, is_cut)
    return split_reasoning(text, opened=opens_thought(prompt))
