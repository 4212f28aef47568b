"""Every sample of a report, packed to travel in the page.

The index (ids, groups, scores) is read when the page opens; texts and outputs lie in chunks that are unpacked when they
are looked at or searched. Everything is JSON under gzip, which the browser's `DecompressionStream` unpacks. base64
keeps any text from ending its script element.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from almost_eval.files import read_rows
from almost_eval.judge.questions import LATER, OTHERS
from almost_eval.report.runs import Benchmark, LoadedRun, RunSet
from almost_eval.run.prompts import SamplePrompts
from almost_eval.tasks.registry import stated_by
from almost_eval.types import JSONObject, SampleRecord

CHUNK_CHARACTERS = 800_000
"""Of a chunk's texts: a browser unpacks and parses so much in a few hundredths of a second."""
CHUNK_SAMPLES = 4_000
DIGITS = 4
"""Decimals of a log-likelihood in the page; `samples.jsonl` has them all."""


@dataclass(slots=True)
class Payload:
    """What the page's script reads."""

    index: JSONObject = field(default_factory=dict)
    blobs: list[str] = field(default_factory=list)
    """base64 of gzip of JSON."""
    n_samples: int = 0
    """Distinct samples, however many runs answered them."""

    def add(self, value: object) -> int:
        """Pack a JSON value; its number."""
        packed = gzip.compress(to_json(value), compresslevel=9, mtime=0)  # no time: the same runs make the same page
        self.blobs.append(base64.b64encode(packed).decode("ascii"))
        return len(self.blobs) - 1


def to_json(value: object) -> bytes:
    """JSON as UTF-8, half a surrogate pair as its escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def pack(run_set: RunSet) -> Payload:
    """All samples of all benchmarks; the last blob is the index."""
    payload = Payload()
    payload.index = {"benchmarks": [_pack_benchmark(benchmark, payload) for benchmark in run_set.benchmarks]}
    payload.add(payload.index)
    return payload


def _pack_benchmark(benchmark: Benchmark, payload: Payload) -> JSONObject:
    runs = benchmark.runs
    lines = [{record.sample.id: record for record in run.records} for run in runs]
    ids = _ordered(runs, lines)
    payload.n_samples += len(ids)
    known = [next(of[id] for of in lines if id in of) for id in ids]
    sources = _sources(runs)
    texts = [_Texts(runs[source]) for source in dict.fromkeys(sources)]
    numbers = {source: number for number, source in enumerate(dict.fromkeys(sources))}
    groups, reasons, panels = _Numbered(), _Numbered([None]), _Numbered()
    index: JSONObject = {
        "title": benchmark.label,
        "runs": [{"label": run.label, "series": run.series} for run in runs],
        "source": [numbers[source] for source in sources],
        "ids": ids,
        "group": [groups.of(record.sample.group) for record in known],
        "panel": [panels.of(_panels(runs[0], record)) for record in known],
        "score": [[_number(of[id].score.value) if id in of else None for id in ids] for of in lines],
        "reason": [[reasons.of(of[id].score.reason if id in of else "missing") for id in ids] for of in lines],
        "cut": [[of[id].prompt_tokens_truncated if id in of else 0 for id in ids] for of in lines],
        "groups": groups.values,
        "reasons": reasons.values,
        "panels": panels.values,
        "has_prompts": any(run.prompts for run in runs),
        "judged": runs[0].judged,
        **({"graded": True} if runs[0].spec["settings"].get("judging") == "single" else {}),
    }
    index["chunks"] = []
    for start, end in _chunks(texts[0], known):
        mine = known[start:end]
        index["chunks"].append(
            {
                "end": end,
                "texts": [payload.add(of.chunk(mine)) for of in texts],
                "outputs": [
                    payload.add([_outputs(of[record.sample.id]) if record.sample.id in of else None for record in mine])
                    for of in lines
                ],
            }
        )
    return index


LETTERED = re.compile(r"\nA\. (.*?)\nB\. (.*?)\nC\. (.*?)\nD\. (.*?)\n[^\n]*\Z", re.DOTALL)
"""A prompt that ends in four lettered choices; the page's script has the same expression."""


def _choices(entry: SamplePrompts) -> list[str] | None:
    """The choices, or None where the first prompt says them in a form from which the page's script reads them."""
    own = entry.prompts[0].text[entry.prompts[0].shared :] if entry.prompts else ""
    # One line for each letter: the expression then has one way to match, and cannot take long.
    if not all(own.count(f"\n{letter}. ") == 1 for letter in "ABCD"):
        return list(entry.choices)
    lettered = LETTERED.search(own)
    return None if lettered and lettered.groups() == entry.choices else list(entry.choices)


class _Numbered:
    """Values, each with a number in the order of first use."""

    def __init__(self, values: Iterable[object] = ()) -> None:
        self.values = list(values)
        self._numbers = {to_json(value): number for number, value in enumerate(self.values)}

    def of(self, value: object) -> int:
        key = to_json(value)
        if key not in self._numbers:
            self._numbers[key] = len(self.values)
            self.values.append(value)
        return self._numbers[key]


def _ordered(runs: Sequence[LoadedRun], lines: Sequence[dict[str, SampleRecord]]) -> list[str]:
    """Sample ids in the order of the task, which the prompts have; a resumed run's lines have another."""
    every = {id: None for run in runs for id in run.prompts}
    here = {id for of in lines for id in of}
    ordered = [id for id in every if id in here]
    return ordered + sorted(here - set(ordered), key=_natural)


def _natural(id: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", id)]


def _sources(runs: Sequence[LoadedRun]) -> list[int]:
    """Place of the first run that read the same texts, for each run."""
    first: list[int] = []
    for place, run in enumerate(runs):
        same = (p for p in range(place) if not run.judged and runs[p].prompts == run.prompts)
        first.append(next(same, place))
    return first


class _Texts:
    """What a run's samples say, in the form the page reads."""

    def __init__(self, run: LoadedRun) -> None:
        self._run = run
        self._judged = _JudgedTexts(run.folder) if run.judged else None

    def of(self, record: SampleRecord, pieces: _Numbered, endings: _Numbered) -> list[object]:
        """[choices or None (see `_choices`), prompts, snippet or None, question and answers or None]."""
        entry = self._run.prompts.get(record.sample.id) or SamplePrompts(record.sample.id, (), ())
        prompts = [
            [pieces.of(p.text[: p.shared]) if p.shared else -1, p.text[p.shared :], endings.of(list(p.continuations))]
            for p in entry.prompts
        ]
        judged = self._judged.of(record) if self._judged else None
        # The cluster is the context, which may be in the part of a prompt that its neighbours share.
        snippet = record.sample.cluster if stated_by(self._run.task).context_is_text else None
        return [_choices(entry), prompts, snippet, judged]

    def chunk(self, records: Sequence[SampleRecord]) -> JSONObject:
        """A chunk of samples; what their prompts share is in it once."""
        pieces, endings = _Numbered(), _Numbered()
        samples = [self.of(record, pieces, endings) for record in records]
        return {"pieces": pieces.values, "endings": endings.values, "samples": samples}

    def size(self, record: SampleRecord) -> int:
        """Roughly its characters in a chunk."""
        entry = self._run.prompts.get(record.sample.id)
        own = sum(len(p.text) - p.shared for p in entry.prompts) + sum(map(len, entry.choices)) if entry else 0
        return own + 40 + (len(str(record.outputs.get("review") or "")) if record.outputs else 0)


class _JudgedTexts:
    """Questions and answers beside a judged run's lines."""

    def __init__(self, folder: Path) -> None:
        self._questions = {str(row["question_id"]): _turns_of(row) for row in _rows(folder / "questions.jsonl")}
        self._answers = {
            (str(row["model_id"]), str(row["question_id"])): _answered(row)
            for file in sorted((folder / "answers").glob("*.jsonl"))
            for row in _rows(file)
        }

    def of(self, record: SampleRecord) -> JSONObject:
        """The question up to the judged turn, and who answered what to it after which thought, by place."""
        stored, question = record.sample.metadata, record.sample.cluster
        turn, choice = int(stored.get("turn", 1)), int(stored.get("choice", 1))
        names = [str(stored[key]) for key in ("baseline", "model") if key in stored]
        if stored.get("order") == "reverse":
            names.reverse()
        answers = []
        for name in names:
            choices = self._answers.get((name, question))
            turns = choices[choice - 1 if len(choices) > 1 else 0] if choices else None
            answers.append([name, *(turns[turn - 1] if turns else (None, None))])
        asked = self._questions.get(question)
        return {"question": "\n\n".join(asked[:turn]) if asked else None, "answers": answers}


def _answered(row: JSONObject) -> list[list[tuple[str, str | None]]]:
    """(answer, thought that was stripped from it) of each turn, of each choice of an answer's line."""
    choices, about = row.get("choices") or [row], row.get("metadata") or {}
    stated = [about, *about.get(OTHERS, [])]
    return [_with_thoughts(_turns_of(one), stated[at] if at < len(stated) else {}) for at, one in enumerate(choices)]


def _with_thoughts(texts: list[str], about: JSONObject) -> list[tuple[str, str | None]]:
    thoughts = [about.get("reasoning"), *(later.get("reasoning") for later in about.get(LATER, []))]
    return list(zip(texts, [*thoughts, *[None] * len(texts)], strict=False))


def _turns_of(row: JSONObject) -> list[str]:
    """The turns of a question's line, or of a choice in an answer's."""
    return [str(turn) for turn in row["turns"]] if "turns" in row else [str(row["text"])]


def _rows(file: Path) -> list[JSONObject]:
    """Rows of a file, none where it is absent; a last line without its end is left out."""
    return read_rows(file, torn_end=True) if file.exists() else []


def _chunks(texts: _Texts, records: Sequence[SampleRecord]) -> Iterable[tuple[int, int]]:
    start = size = 0
    for at, record in enumerate(records):
        mine = texts.size(record)
        if at > start and (size + mine > CHUNK_CHARACTERS or at - start >= CHUNK_SAMPLES):
            yield start, at
            start, size = at, 0
        size += mine
    if start < len(records):
        yield start, len(records)


def _outputs(record: SampleRecord) -> JSONObject:
    """Outputs of the model, and the metrics where there are several."""
    outputs: JSONObject = {
        key: _rounded(value) for key, value in record.outputs.items() if key not in ("is_greedy", "logprobs")
    }
    if all(n == 1 for row in outputs.get("n_tokens", ()) for n in row):
        outputs.pop("n_tokens", None)
    if len(record.score.metrics) > 1:
        outputs["metrics"] = _rounded(dict(record.score.metrics))
    return outputs


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _number(value: float | None) -> float | int | None:
    """Rounded; a whole number as one, which is shorter."""
    if value is None:
        return None
    short = round(value, DIGITS)
    return int(short) if short == int(short) else short


def _panels(run: LoadedRun, record: SampleRecord) -> list[JSONObject]:
    panels = stated_by(run.task).number_panels(str(run.results["protocol"]), run.spec["settings"], record)
    return [{"title": panel.title, "unit": panel.unit, "rows": panel.rows} for panel in panels]
