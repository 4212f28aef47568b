"""Every sample of a report as data that travels in the page: small enough to mail, quick enough to open.

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
from typing import Any

from almost_eval.report.runs import Benchmark, LoadedRun, RunSet
from almost_eval.run.prompt_log import Asked
from almost_eval.types import SampleRecord

CHUNK_CHARACTERS = 800_000
"""Of a chunk's texts: a browser unpacks and parses so much in a few hundredths of a second."""
CHUNK_SAMPLES = 4_000
DIGITS = 4
"""Decimals of a log-likelihood in the page; `samples.jsonl` has them all."""


@dataclass(slots=True)
class Payload:
    """What the page's script reads."""

    index: dict[str, Any] = field(default_factory=dict)
    blobs: list[str] = field(default_factory=list)
    """base64 of gzip of JSON."""
    n_samples: int = 0
    """Distinct samples, however many runs answered them."""

    def add(self, value: Any) -> int:
        """Pack a JSON value; its number."""
        packed = gzip.compress(to_json(value), compresslevel=9, mtime=0)  # no time: the same runs make the same page
        self.blobs.append(base64.b64encode(packed).decode("ascii"))
        return len(self.blobs) - 1


def to_json(value: Any) -> bytes:
    """JSON as UTF-8, half a surrogate pair as its escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def pack(found: RunSet) -> Payload:
    """All samples of all benchmarks; the last blob is the index."""
    payload = Payload()
    payload.index = {"benchmarks": [_pack_benchmark(benchmark, payload) for benchmark in found.benchmarks]}
    payload.add(payload.index)
    return payload


def _pack_benchmark(benchmark: Benchmark, payload: Payload) -> dict[str, Any]:
    runs = benchmark.runs
    lines = [{record.sample.id: record for record in run.records} for run in runs]
    ids = _ordered(runs, lines)
    payload.n_samples += len(ids)
    known = [next(of[id] for of in lines if id in of) for id in ids]
    sources = _sources(runs)
    texts = [_Texts(runs[source]) for source in dict.fromkeys(sources)]
    numbers = {source: number for number, source in enumerate(dict.fromkeys(sources))}
    groups, reasons, panels = _Numbered(), _Numbered([None]), _Numbered()
    index: dict[str, Any] = {
        "title": benchmark.label,
        "runs": [{"label": run.label, "series": run.series} for run in runs],
        "source": [numbers[source] for source in sources],
        "ids": ids,
        "group": [groups.of(record.sample.group) for record in known],
        "panel": [panels.of(panels_of(runs[0], record)) for record in known],
        "score": [[_number(of[id].score.value) if id in of else None for id in ids] for of in lines],
        "reason": [[reasons.of(of[id].score.reason if id in of else "missing") for id in ids] for of in lines],
        "cut": [[of[id].prompt_tokens_truncated if id in of else 0 for id in ids] for of in lines],
        "groups": groups.values,
        "reasons": reasons.values,
        "panels": panels.values,
        "has_prompts": any(run.asked for run in runs),
        "judged": benchmark.task == "vicuna",
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


def _choices(asked: Asked) -> list[str] | None:
    """The choices, or None where the first prompt says them in a form from which the page's script reads them."""
    own = asked.prompts[0].text[asked.prompts[0].shared :] if asked.prompts else ""
    # One line for each letter: the expression then has one way to match, and cannot take long.
    if not all(own.count(f"\n{letter}. ") == 1 for letter in "ABCD"):
        return list(asked.choices)
    found = LETTERED.search(own)
    return None if found and found.groups() == asked.choices else list(asked.choices)


class _Numbered:
    """Values, each with a number in the order of first use."""

    def __init__(self, values: Iterable[Any] = ()) -> None:
        self.values = list(values)
        self._numbers = {to_json(value): number for number, value in enumerate(self.values)}

    def of(self, value: Any) -> int:
        key = to_json(value)
        if key not in self._numbers:
            self._numbers[key] = len(self.values)
            self.values.append(value)
        return self._numbers[key]


def _ordered(runs: Sequence[LoadedRun], lines: Sequence[dict[str, SampleRecord]]) -> list[str]:
    """Sample ids in the order of the task, which the prompts have; a resumed run's lines have another."""
    every = {id: None for run in runs for id in run.asked}
    here = {id for of in lines for id in of}
    ordered = [id for id in every if id in here]
    return ordered + sorted(here - set(ordered), key=_natural)


def _natural(id: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", id)]


def _sources(runs: Sequence[LoadedRun]) -> list[int]:
    """Place of the first run that read the same texts, for each run."""
    first: list[int] = []
    for place, run in enumerate(runs):
        judged = run.task == "vicuna"
        same = (p for p in range(place) if not judged and runs[p].asked == run.asked)
        first.append(next(same, place))
    return first


class _Texts:
    """What a run's samples say, in the form the page reads."""

    def __init__(self, run: LoadedRun) -> None:
        self._run = run
        self._judged = _JudgedTexts(run.folder) if run.task == "vicuna" else None

    def of(self, record: SampleRecord, pieces: _Numbered, endings: _Numbered) -> list[Any]:
        """[choices or None (see `_choices`), prompts, snippet or None, question and answers or None]."""
        asked = self._run.asked.get(record.sample.id) or Asked(record.sample.id, (), ())
        prompts = [
            [pieces.of(p.text[: p.shared]) if p.shared else -1, p.text[p.shared :], endings.of(list(p.continuations))]
            for p in asked.prompts
        ]
        judged = self._judged.of(record) if self._judged else None
        # The cluster is the context, which may be in the part of a prompt that its neighbours share.
        snippet = record.sample.cluster if self._run.task in ("hhh", "truthfulqa") else None
        return [_choices(asked), prompts, snippet, judged]

    def chunk(self, records: Sequence[SampleRecord]) -> dict[str, Any]:
        """A chunk of samples; what their prompts share is in it once."""
        pieces, endings = _Numbered(), _Numbered()
        samples = [self.of(record, pieces, endings) for record in records]
        return {"pieces": pieces.values, "endings": endings.values, "samples": samples}

    def size(self, record: SampleRecord) -> int:
        """Roughly its characters in a chunk."""
        asked = self._run.asked.get(record.sample.id)
        own = sum(len(p.text) - p.shared for p in asked.prompts) + sum(map(len, asked.choices)) if asked else 0
        return own + 40 + (len(str(record.outputs.get("review") or "")) if record.outputs else 0)


class _JudgedTexts:
    """Questions and answers beside a judged run's lines."""

    def __init__(self, folder: Path) -> None:
        self._questions = {str(row["question_id"]): str(row["text"]) for row in _rows(folder / "questions.jsonl")}
        self._answers = {
            (str(row["model_id"]), str(row["question_id"])): str(row["text"])
            for file in sorted((folder / "answers").glob("*.jsonl"))
            for row in _rows(file)
        }

    def of(self, record: SampleRecord) -> dict[str, Any]:
        """The question, and who answered what, by place in the prompt."""
        stored, question = record.sample.metadata, record.sample.cluster
        names = [str(stored.get("baseline", "")), str(stored.get("model", ""))]
        if stored.get("order") == "reverse":
            names.reverse()
        answers = [[name, self._answers.get((name, question))] for name in names]
        return {"question": self._questions.get(question), "answers": answers}


def _rows(file: Path) -> list[dict[str, Any]]:
    """JSON objects of a file, none where it is absent; a half-written last line is left out."""
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line.strip()]


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


def _outputs(record: SampleRecord) -> dict[str, Any]:
    """What the model gave, and the metrics where there are several."""
    outputs = {key: _rounded(value) for key, value in record.outputs.items() if key != "is_greedy"}
    if all(n == 1 for row in outputs.get("n_tokens", ()) for n in row):
        outputs.pop("n_tokens", None)
    if len(record.score.metrics) > 1:
        outputs["metrics"] = _rounded(dict(record.score.metrics))
    return outputs


def _rounded(value: Any) -> Any:
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


# --- which number belongs to which choice


def panels_of(run: LoadedRun, record: SampleRecord) -> list[dict[str, Any]]:
    """The groups of numbers of a sample that are to be compared with each other.

    A panel is `{"title", "unit", "rows": [[request, continuation, choice, good], ...]}`: where the number stands in the
    outputs, which choice it is of (-1: none, its continuation names it), and whether that one is right (1, 0; -1: not
    known).
    """
    if run.task == "hhh":
        return _hhh_panels(str(run.results["protocol"]), record)
    if run.task == "truthfulqa":
        return _truthfulqa_panels(run.spec["settings"]["metrics"], record)
    if run.task == "mmlu":
        gold = record.sample.gold
        rows = [[0, letter, letter, int(letter == gold)] for letter in range(4)]
        return [{"title": "next token", "unit": "nats", "rows": rows}]
    table = record.outputs.get("loglikelihoods") or []
    rows = [[r, c, -1, -1] for r, row in enumerate(table) for c in range(len(row))]
    return [{"title": "continuations", "unit": "nats", "rows": rows}] if rows else []


def _hhh_panels(protocol: str, record: SampleRecord) -> list[dict[str, Any]]:
    gold = record.sample.gold
    if protocol == "choice":
        # The second prompt shows the answers the other way round.
        return [
            {
                "title": f"answer {order} shown as A",
                "unit": "nats",
                "rows": [[request, letter, letter ^ request, int(letter ^ request == gold)] for letter in range(2)],
            }
            for request, order in enumerate((1, 2))
        ]
    unit = "reward" if protocol == "reward" else "nats"
    rows = [[0, choice, choice, int(choice == gold)] for choice in range(2)]
    return [{"title": "reward" if unit == "reward" else "log-likelihood", "unit": unit, "rows": rows}]


def _truthfulqa_panels(metrics: Sequence[str], record: SampleRecord) -> list[dict[str, Any]]:
    meta = record.sample.metadata
    by_answer = [metric for metric in ("mc1", "mc2") if metric in metrics]
    used = sorted({choice for metric in by_answer for choice in meta[metric]})
    panels = []
    for metric in by_answer:
        right = [int(choice == record.sample.gold) for choice in meta["mc1"]]
        good = meta["mc2_labels"] if metric == "mc2" else right
        rows = [[0, used.index(choice), choice, ok] for choice, ok in zip(meta[metric], good, strict=True)]
        panels.append({"title": metric, "unit": "nats", "rows": rows})
    if "mc1_true_prompt" in metrics:
        first = int(bool(by_answer))
        rows = [[first + at, 0, choice, int(choice == record.sample.gold)] for at, choice in enumerate(meta["mc1"])]
        panels.append({"title": "mc1, true-or-false prompt", "unit": "nats", "rows": rows})
    return panels
