"""What travels in the page: everything, once, and each number beside the choice it is of."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from report_fixtures import sample, write_run

from almost_eval.report.runs import load_runs
from almost_eval.report.samples import LETTERED, Payload, pack
from almost_eval.run.prompts import read_prompts
from almost_eval.types import SampleRecord, Score

pytest_plugins = ["report_fixtures"]


def unpacked(payload: Payload) -> list[Any]:
    return [json.loads(gzip.decompress(base64.b64decode(packed))) for packed in payload.blobs]


def samples_of(payload: Payload, benchmark: int) -> list[dict[str, Any]]:
    """As the page's script puts them together."""
    blobs, index = unpacked(payload), payload.index["benchmarks"][benchmark]
    found, start = [], 0
    for chunk in index["chunks"]:
        for at in range(start, chunk["end"]):
            texts = []
            for blob in chunk["texts"]:
                choices, packed, snippet, judged = blobs[blob]["samples"][at - start]
                pieces, endings = blobs[blob]["pieces"], blobs[blob]["endings"]
                prompts = [((pieces[p] if p >= 0 else "") + own, endings[e]) for p, own, e in packed]
                if choices is None:
                    lettered = LETTERED.search(packed[0][1])
                    assert lettered
                    choices = list(lettered.groups())
                texts.append({"choices": choices, "prompts": prompts, "snippet": snippet, "judged": judged})
            outputs = [blobs[blob][at - start] for blob in chunk["outputs"]]
            found.append({"id": index["ids"][at], "texts": texts, "outputs": outputs, "at": at})
        start = chunk["end"]
    return found


def flat(table: list[Any]) -> list[float]:
    return [value for row in table for value in (row if isinstance(row, list) else [row])]


@pytest.mark.parametrize("task", ["hhh", "truthfulqa", "mmlu", "hhh-reward"])
def test_nothing_is_lost(nano_runs: Path, task: str) -> None:
    folder = nano_runs / task
    payload = pack(load_runs([folder]))
    asked = read_prompts(folder)
    stored = {line["id"]: line for line in map(json.loads, (folder / "samples.jsonl").read_text().splitlines())}
    packed, index = samples_of(payload, 0), payload.index["benchmarks"][0]
    assert [one["id"] for one in packed] == list(asked)  # the order of the task
    assert payload.n_samples == len(stored)
    for one in packed:
        (text,), (outputs,), line = one["texts"], one["outputs"], stored[one["id"]]
        assert text["prompts"] == [(p.text, list(p.continuations)) for p in asked[one["id"]].prompts]
        assert text["choices"] == list(asked[one["id"]].choices)
        for key in ("loglikelihoods", "rewards"):
            flat = [
                value for row in line["outputs"].get(key, []) for value in (row if isinstance(row, list) else [row])
            ]
            mine = [value for row in outputs.get(key, []) for value in (row if isinstance(row, list) else [row])]
            assert mine == pytest.approx(flat, abs=5e-5)
        assert index["score"][0][one["at"]] == pytest.approx(line["score"], abs=5e-5)
        assert index["reasons"][index["reason"][0][one["at"]]] == line["reason"]


@pytest.mark.parametrize("task", ["hhh", "truthfulqa", "mmlu"])
def test_each_number_is_beside_its_choice(nano_runs: Path, task: str) -> None:
    """A right answer must be the one whose bar is marked gold and longest, by the task's own rule."""
    payload = pack(load_runs([nano_runs / task]))
    index = payload.index["benchmarks"][0]
    checked = 0
    for one in samples_of(payload, 0):
        (text,), (outputs,) = one["texts"], one["outputs"]
        panels = index["panels"][index["panel"][one["at"]]]
        assert panels
        for panel in panels:
            for request, column, choice, good in panel["rows"]:
                prompt, endings = text["prompts"][request]
                # What is scored is the choice itself, or a label that stands for it in the prompt.
                ending = endings[column]
                assert choice in range(len(text["choices"]))
                if task == "truthfulqa" and panel["title"] in ("mc1", "mc2"):
                    assert ending == f" {text['choices'][choice]}"
                elif task == "truthfulqa":
                    assert text["choices"][choice] in prompt
                elif task == "mmlu":
                    assert f"{ending.strip()}. {text['choices'][choice]}" in prompt
                else:
                    shown = prompt.index(text["choices"][choice].strip())
                    other = prompt.index(text["choices"][1 - choice].strip())
                    assert (shown < other) == (ending == " A")
                assert good in (0, 1)
        if task == "mmlu":
            (panel,) = panels
            values = {row[3]: outputs["loglikelihoods"][row[0]][row[1]] for row in panel["rows"] if row[3]}
            best = max(outputs["loglikelihoods"][0])
            assert (index["score"][0][one["at"]] == 1) == (values[1] == best)
            checked += 1
    assert checked or task != "mmlu"


def test_a_prompt_that_two_models_share_travels_once(nano_runs: Path) -> None:
    payload = pack(load_runs([nano_runs / "hhh", nano_runs / "hhh-small"]))
    index = payload.index["benchmarks"][0]
    same = read_prompts(nano_runs / "hhh") == read_prompts(nano_runs / "hhh-small")
    assert index["source"] == ([0, 0] if same else [0, 1])
    assert all(len(chunk["texts"]) == 2 - same for chunk in index["chunks"])
    assert [len(scores) for scores in index["score"]] == [len(index["ids"])] * 2


def test_a_sample_that_one_run_lacks_is_missing_not_wrong(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [SampleRecord(sample(f"{i}"), {}, Score(1.0)) for i in (1, 2, 10)], model="a")
    write_run(tmp_path / "b", [SampleRecord(sample(f"{i}"), {}, Score(0.0)) for i in (2, 3)], model="b")
    index = pack(load_runs([tmp_path / "a", tmp_path / "b"])).index["benchmarks"][0]
    assert index["ids"] == ["1", "2", "3", "10"]  # as people count
    assert index["score"] == [[1, 1, None, 1], [None, 0, 0, None]]
    reasons = [[index["reasons"][r] for r in of] for of in index["reason"]]
    assert reasons == [[None, None, "missing", None], ["missing", None, None, "missing"]]


def test_long_runs_are_cut_into_chunks(tmp_path: Path) -> None:
    records = [SampleRecord(sample(f"{i}"), {"review": "word " * 4_000}, Score(1.0)) for i in range(100)]
    payload = pack(load_runs([write_run(tmp_path / "run", records, protocol="reward")]))
    ends = [chunk["end"] for chunk in payload.index["benchmarks"][0]["chunks"]]
    assert len(ends) == 3
    assert ends[-1] == 100
    assert all(len(gzip.decompress(base64.b64decode(packed))) < 900_000 for packed in payload.blobs)
