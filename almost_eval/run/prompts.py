"""The prompts of a run: rendered, encoded and checked before a weight is loaded; then kept as the model read them.

Over-long prompts lose whole few-shot examples first; what still does not fit is unscored. Nothing is cut mid-way.

`prompts.jsonl` of a run folder is what the model read, to the character. A report then needs neither data nor model.
Few-shot prompts repeat themselves. What neighbouring prompts begin with alike, up to a blank line, is a line of its own
(`{"piece": digest, "text": ...}`), written once and named by the prompts that begin with it. The file is written whole
or not at all before the first sample is scored: a run that goes on has the same prompts (its spec says so), and finds
it there. A run folder of an earlier version has none, and gets one when its command is repeated.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from almost_eval.engines.prefix import EncodedRequest, Ids, digest_ids
from almost_eval.errors import InputError, RunError, TemplateError
from almost_eval.files import placed_records, row_at, whole_file
from almost_eval.tasks.base import Task
from almost_eval.types import JSONObject, LoglikelihoodRequest, Sample

PROMPTS = "prompts.jsonl"
SHORTEST_PIECE = 200
"""Characters. A shorter common beginning stays with its prompt."""


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


# --- prompts.jsonl ---


@dataclass(frozen=True, slots=True)
class Prompt:
    """One text that the model read."""

    text: str
    continuations: tuple[str, ...] = ()
    """What was scored after it, if anything was."""
    shared: int = 0
    """Characters at the beginning that neighbouring prompts have too."""


@dataclass(frozen=True, slots=True)
class SamplePrompts:
    """What the model read of one sample."""

    id: str
    choices: tuple[str, ...]
    """The sample's own, as the data has them."""
    prompts: tuple[Prompt, ...]
    """Empty where the prompt did not fit the context, and the model read nothing."""


def write_prompts(folder: Path, samples: Iterable[SamplePrompts]) -> None:
    """Write `prompts.jsonl` unless it is there; raises RunError where the disk is full, or gone."""
    file = folder / PROMPTS
    if file.exists():
        return
    try:
        with whole_file(file) as stream:
            for line in _lines(list(samples)):
                # Half a surrogate pair has no UTF-8, but its escape is JSON.
                stream.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
    except OSError as error:
        raise RunError(f"cannot write to {folder} ({error.strerror}); the same command goes on") from None


class StoredPrompts(Mapping[str, SamplePrompts]):
    """Sample id -> what the model read, from the `prompts.jsonl` of a folder; empty where there is none.

    Every line is checked when it is opened, and read again when its sample is looked up: what is held in memory is
    where the lines begin, and what neighbouring prompts share.

    Raises:
        StoreError: a line that is no prompt.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / PROMPTS
        self._pieces: dict[str | None, str] = {None: ""}
        self._places: dict[str, int] = {}
        mend = "remove the file, and repeat the run's command to write it anew"
        for _, place, id in placed_records(self._file, self._id_of, "a prompt", mend=mend):
            if id is not None:
                self._places[id] = place

    def _id_of(self, row: JSONObject) -> str | None:
        """The sample of a line; of a piece, which is kept, None."""
        if "piece" in row:
            self._pieces[row["piece"]] = row["text"]
            return None
        return _of_row(row, self._pieces).id

    def __getitem__(self, id: str) -> SamplePrompts:
        place = self._places[id]
        with self._file.open("rb") as stream:
            return _of_row(row_at(stream, place), self._pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping) or len(self) != len(other):
            return False
        return all(id in other and self[id] == other[id] for id in self)  # a pair at a time

    __hash__ = None  # type: ignore[assignment]


def read_prompts(folder: Path) -> dict[str, SamplePrompts]:
    """`StoredPrompts`, all in memory."""
    return dict(StoredPrompts(folder))


def _of_row(row: JSONObject, pieces: dict[str | None, str]) -> SamplePrompts:
    prompts = [
        Prompt(pieces[p["piece"]] + p["text"], tuple(p["continuations"]), len(pieces[p["piece"]]))
        for p in row["prompts"]
    ]
    return SamplePrompts(row["id"], tuple(row["choices"]), tuple(prompts))


def _lines(samples: list[SamplePrompts]) -> Iterator[JSONObject]:
    """Each piece before the first sample that needs it."""
    shared = iter(_shared_lengths([prompt.text for one in samples for prompt in one.prompts]))
    written: set[str] = set()
    for one in samples:
        prompts = []
        for prompt in one.prompts:
            length = next(shared)
            piece = hashlib.sha256(prompt.text[:length].encode("utf-8", "surrogatepass")).hexdigest()[:16]
            if length and piece not in written:
                written.add(piece)
                yield {"piece": piece, "text": prompt.text[:length]}
            own = {"piece": piece if length else None, "text": prompt.text[length:]}
            prompts.append(own | {"continuations": list(prompt.continuations)})
        yield {"id": one.id, "choices": list(one.choices), "prompts": prompts}


def _shared_lengths(texts: list[str]) -> list[int]:
    """How much of each text begins its neighbour too, cut back to the last blank line; 0 where that is too little."""
    with_next = [_common(a, b) for a, b in itertools.pairwise(texts)]
    lengths = []
    for at, text in enumerate(texts):
        common = max(with_next[max(at - 1, 0) : at + 1], default=0)
        end = text.rfind("\n\n", 0, common)
        lengths.append(end + 2 if end + 2 >= SHORTEST_PIECE else 0)
    return lengths


def _common(a: str, b: str) -> int:
    """Length of the common beginning, by bisection: comparing slices is far faster than comparing characters."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
