"""What can be known before a weight is loaded: every prompt is rendered and encoded, and checked.

Over-long prompts lose whole few-shot examples first; what still does not fit is unscored. Nothing is cut mid-way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from almost_eval.engines.prefix import EncodedRequest, Ids, digest_ids
from almost_eval.errors import InputError, TemplateError
from almost_eval.tasks.base import Task
from almost_eval.types import LoglikelihoodRequest, Sample


@dataclass(slots=True)
class Prepared:
    """Every request of a run, encoded, and what was done to make it fit."""

    samples: list[Sample]
    requests: list[EncodedRequest] = field(default_factory=list)
    """All requests of all samples that fit, in order."""
    of_sample: list[range] = field(default_factory=list)
    """Sample index -> its requests; empty where the sample does not fit."""
    truncated: list[int] = field(default_factory=list)
    """Sample index -> tokens of dropped few-shot examples."""
    too_long: dict[int, int] = field(default_factory=dict)
    """Sample index -> tokens it would need, for those that do not fit even with no example."""

    @property
    def longest(self) -> int:
        """Tokens of the longest input."""
        return max((request.n_positions for request in self.requests), default=0)

    def digest(self) -> str:
        """sha256 over all prompt token ids."""
        return digest_ids(self.requests)


def prepare(task: Task, engine: Any, samples: Sequence[Sample]) -> Prepared:
    """Render and encode every request of a likelihood task.

    Raises:
        InputError: no sample fits the context, or a label is not one token of its own.
        TemplateError: the template cannot write a sample; or the BOS token is lost or doubled.
    """
    prepared = Prepared(list(samples))
    rendered = [_rendered(task, sample) for sample in samples]
    encoded = engine.encode([request for requests in rendered for request in requests])
    limit = engine.context_length
    at = 0
    for index, (sample, requests) in enumerate(zip(samples, rendered, strict=True)):
        mine = encoded[at : at + len(requests)]
        at += len(requests)
        needed = full = max(request.n_positions for request in mine)
        for shots in range(task.max_shots - 1, -1, -1):
            if limit is None or needed <= limit:
                break
            mine = engine.encode(task.requests(sample, shots))
            needed = max(request.n_positions for request in mine)
        if limit is not None and needed > limit:
            prepared.too_long[index] = needed
            mine, needed = [], full
        prepared.of_sample.append(range(len(prepared.requests), len(prepared.requests) + len(mine)))
        prepared.requests.extend(mine)
        prepared.truncated.append(full - needed)
    if not task.unfit_is_unscored and prepared.too_long and len(prepared.too_long) == len(samples):
        shortest = min(prepared.too_long.values())
        raise InputError(
            f"no sample fits: the shortest prompt has {shortest} tokens, the context {limit}; use a model with a "
            "longer context" + (", or raise --max-length" if limit and limit < shortest else "")
        )
    _check_labels(task, prepared, engine)
    _check_bos(prepared, engine)
    return prepared


def _rendered(task: Task, sample: Sample) -> list[LoglikelihoodRequest]:
    try:
        return task.requests(sample, task.max_shots)
    except TemplateError as error:
        raise error.about(f"sample {sample.id}") from None


def _check_labels(task: Task, prepared: Prepared, engine: Any) -> None:
    if not task.single_token_labels:
        return
    for request in prepared.requests:
        ids = [tuple(c.scored.tolist()) for c in request.continuations]
        if any(len(label) != 1 for label in ids) or len(set(ids)) < len(ids):
            labels = ", ".join(repr(c) for c in request.request.continuations)
            raise InputError(
                f"this tokenizer has no single token for each of the labels {labels} after the prompt (it gives "
                f"{', '.join(map(str, map(list, ids)))}); use --protocol likelihood"
            )


def _check_bos(prepared: Prepared, engine: Any) -> None:
    """BOS in front as often as the tokenizer itself would put it: doubled or lost, every number would be off."""
    tokenizer = getattr(engine, "tokenizer", None)
    opening = getattr(getattr(engine, "encoder", None), "opening", None)
    if tokenizer is None or opening is None:
        return
    # The config need not name what the tokenizer writes first.
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else next(iter(opening.ids), None)
    if bos is None:
        return
    own = list(opening.ids).count(bos)
    blank: dict[int, bool] = {}

    def in_front(ids: Ids) -> int:
        # Only those before the text: further on, BOS may be the end of a turn (GPT-NeoX has one token for both), the
        # beginning of each turn (Llama 2), or a word of the data.
        count = 0
        for token in ids.tolist():
            if token not in blank:
                blank[token] = token == bos or not tokenizer.decode([token]).strip()
            if not blank[token]:
                break
            count += token == bos
        return count

    for request in prepared.requests:
        context = request.request.context
        expected = max(own, int(opening.is_written(context)))
        if context and (count := in_front(request.continuations[0].prefix)) != expected:
            raise TemplateError(
                f"the prompt begins with {count} BOS tokens, the tokenizer's own encoding with {expected}: the "
                "template writes one too many, or one is lost; mend the template (--template FILE)"
            )


def describe(task: Task, prepared: Prepared, engine: Any) -> dict[str, Any]:
    """What `--dry-run` prints: one sample as the model will read it, and the lengths of all."""
    request = next((r for r in prepared.requests if r.continuations), prepared.requests[0])
    prefix = request.continuations[0].prefix if request.continuations else np.empty(0, np.int32)
    tokenizer = getattr(engine, "tokenizer", None)

    def show(ids: Ids) -> list[list[Any]]:
        return [[int(i), tokenizer.decode([int(i)]) if tokenizer is not None else ""] for i in ids]

    bos = getattr(tokenizer, "bos_token_id", None)
    return {
        "samples": len(prepared.samples),
        "requests": len(prepared.requests),
        "prompt": request.request.context,
        "continuations": list(request.request.continuations),
        "first_tokens": show(prefix[:4]),
        "last_tokens": show(prefix[-4:]),
        "labels": [show(c.scored) for c in request.continuations] if len(request.continuations) <= 8 else [],
        "bos": int((prefix == bos).sum()) if bos is not None else 0,
        "longest_prompt": prepared.longest,
        "context_length": engine.context_length,
        "shots_dropped_in": sum(tokens > 0 for tokens in prepared.truncated),
        "do_not_fit": len(prepared.too_long),
    }
