"""The certificate: what is the same, what is found where it is not, and vLLM against transformers for real."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from almost_eval.compare.parity import ParityPlan, ParityRow, compare, plan
from almost_eval.errors import InputError
from almost_eval.run.runner import RunRequest
from almost_eval.types import Outputs, Sample, SampleRecord, Score

Command = Callable[..., Any]
BINARY = Path(sys.executable).with_name("almost-eval")


def record(id: str, values: list[float | None], score: float | None = 1.0, tokens: int = 2) -> SampleRecord:
    sample = Sample(id, (), ("a", "b"), 0, id)
    outputs: Outputs = {
        "loglikelihoods": [values],
        "is_greedy": [[False] * len(values)],
        "n_tokens": [[tokens] * len(values)],
    }
    reason = "non_finite" if score is None else None
    return SampleRecord(sample, outputs, Score(score, reason, {"accuracy": score}))


def compared(mine: list[SampleRecord], theirs: list[SampleRecord]) -> ParityRow:
    was, now = ({one.sample.id: one for one in records} for records in (theirs, mine))
    return compare(was, now, ParityRow("hhh", "vllm", "hf", 0))


REFERENCE = [record("a", [-1.0, -2.0]), record("b", [-3.0, -1.0], 0.0)]


def test_small_differences_hold() -> None:
    row = compared([record("a", [-1.0004, -2.0]), record("b", [-3.0, -1.0002], 0.0)], REFERENCE)
    assert row.holds
    assert (row.samples, row.continuations, row.flips, row.problems) == (2, 4, [], [])
    assert row.largest_nats == pytest.approx(4e-4)
    assert row.largest_per_token == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("changed", "flips", "problem"),
    [
        (record("a", [-1.002, -2.0]), [], None),  # beyond the tolerance, though the prediction stands
        (record("a", [-2.0, -1.9], 0.0), ["a"], None),
        (record("a", [-1.0, -2.0], 0.0), ["a"], None),  # the score alone
        (record("a", [-1.0, None], None), [], "sample a: scored against non_finite"),
        (
            record("a", [-1.0, -2.0], tokens=3),
            [],
            "log-likelihoods that do not pair: other lengths, or finite in one run alone",
        ),
        (record("c", [-1.0, -2.0]), [], "2 samples are in one run alone, first a"),
    ],
)
def test_what_differs_is_found(changed: SampleRecord, flips: list[str], problem: str | None) -> None:
    row = compared([changed, REFERENCE[1]], REFERENCE)
    assert not row.holds
    assert row.flips == flips
    assert row.problems == ([problem] if problem else [])


def test_nothing_is_no_proof() -> None:
    lost = [replace(one, score=Score(None, "all_tied")) for one in REFERENCE]
    row = compared(lost, lost)
    assert not row.holds
    assert row.problems == ["nothing to compare: 2 samples without a score"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"engines": ["hf", "openai"]},
            "needs a served model; start one with: almost-serve policy --model nano/almost",
        ),
        ({"engines": ["hf"]}, "parity is between engines: give two or more of hf, vllm, openai"),
        ({"engines": ["hf", "hf"]}, "parity is between engines"),
        ({"engines": ["hf", "vlm"]}, "unknown engine 'vlm'; did you mean 'vllm'"),
        ({"tasks": ["hh"]}, "unknown task 'hh'; did you mean 'hhh'"),
        ({"engines": ["hf", "vllm"], "base_url": "http://x/v1"}, "--base-url belongs to the engine openai"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(**given)


def planned(**named: Any) -> ParityPlan:
    return plan(RunRequest(task="", model="nano/almost"), **named)


def test_the_default_engines_include_a_served_model() -> None:
    assert planned().engines == ["hf", "vllm"]
    assert planned(base_url="http://x/v1").engines == ["hf", "vllm", "openai"]
    assert planned().tasks == ["hhh", "truthfulqa", "mmlu"]


def test_no_server_is_one_line(almost_eval: Command) -> None:
    code, out, err = almost_eval("parity", "--engines", "hf,openai")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "almost-serve policy --model nano/almost, and give --base-url" in err


def test_an_endpoint_that_is_down_is_refused_before_anything_runs(almost_eval: Command, tmp_path: Path) -> None:
    given = ["--engines", "hf,openai", "--base-url", "http://127.0.0.1:9/v1", "--output", tmp_path / "parity"]
    code, out, err = almost_eval("parity", *given)
    assert (code, out) == (2, "")
    assert "is not reachable; start it" in err
    assert not (tmp_path / "parity").exists()


@pytest.mark.slow
def test_vllm_gives_the_numbers_of_transformers(almost_eval: Command, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="needs vLLM: pip install 'almost-toolkit[vllm]'")
    given = ["parity", "--model", "nano/almost", "--limit", "4", "--output", str(tmp_path / "parity")]
    done = subprocess.run([BINARY, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert done.stdout.count("the same") == 3
    certificate = json.loads((tmp_path / "parity/certificate.json").read_text())
    assert certificate["holds"]
    for row in certificate["rows"]:
        assert (row["flips"], row["problems"]) == ([], [])
        assert 0 < row["largest_nats"] <= 1e-3
        assert row["continuations"] > row["samples"] > 0
    engines = certificate["engines"]
    assert engines["vllm"]["version"].startswith("0.")
    assert engines["vllm"]["dtype"] == engines["hf"]["dtype"] == "float32"
    assert {engine["weight_digest"] for engine in engines.values()} == {certificate["weight_digest"]}
    # Another certificate finds the runs, and loads nothing; one changed number, and it does not hold.
    file = tmp_path / "parity/mmlu-vllm/samples.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["outputs"]["loglikelihoods"][0][0] -= 0.01
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = almost_eval(*given, "--json")
    assert code == 1
    assert [row["holds"] for row in json.loads(out)["rows"]] == [True, True, False]
