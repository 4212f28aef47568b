"""`--max-tokens` raised in a folder: what was cut is requested again, and nothing else; the spec says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from replay_server import Call, Fault, ReplayServer

Command = Callable[..., Any]
N = 6


@pytest.fixture
def server() -> Iterator[ReplayServer]:
    """Reviews of a thinking judge: question 1 needs 300 tokens, question 2 is all thought below 500."""
    served = ReplayServer([])
    served.review = lambda prompt: "8 6\nThe first is better."  # type: ignore[method-assign]

    def fault(call: Call) -> Fault | None:
        prompt, bound = call.body["messages"][-1]["content"], call.body["max_tokens"]
        usage = {"prompt_tokens": 100, "completion_tokens": bound}
        if "question one" in prompt and bound < 300:
            choice = {"message": {"content": "Let me weigh both answers, the first"}, "finish_reason": "length"}
        elif "question two" in prompt and bound < 500:
            choice = {"message": {"content": "", "reasoning": "hm"}, "finish_reason": "length"}
        elif "question three" in prompt and bound < 300:  # cut behind its verdict: it stays
            choice = {"message": {"content": "9 3\nThe first is much"}, "finish_reason": "length"}
        else:
            return None
        return Fault("body", body=json.dumps({"choices": [choice], "usage": usage, "model": "m"}).encode())

    served.fault = fault
    yield served
    served.close()


@pytest.fixture
def run(
    almost_eval: Command, server: ReplayServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALMOST_API_KEY", "sk-test")
    texts = ("question one", "question two", "question three")
    files: dict[str, list[dict[str, object]]] = {"q": [{"question_id": i, "text": t} for i, t in enumerate(texts)]}
    files |= {m: [{"question_id": i, "text": f"{m} {i}", "model_id": m} for i in range(3)] for m in ("a", "b")}
    for name, rows in files.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--questions", "q.jsonl", "--answers", "a.jsonl", "--baseline", "b.jsonl", "--data", "hub"]
    flags += ["--judge", "j", "--judge-base-url", server.url, "--prompt-set", "builtin", "--output", "run"]
    flags += ["--price-in", "1", "--price-out", "5", "--allow", "unparsed=1", "--allow", "missing=1"]
    return lambda max_tokens, *more: almost_eval("vicuna", *flags, "--max-tokens", max_tokens, *more)


def lines() -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in map(json.loads, Path("run/samples.jsonl").read_text().splitlines())}


def test_what_was_cut_is_requested_again_and_nothing_else(
    run: Callable[..., Any], server: ReplayServer, almost_eval: Command
) -> None:
    run(100)
    assert server.count == N
    first = lines()
    assert [first[f"{q}/forward"]["reason"] for q in range(3)] == ["unparsed", "thought_only", None]
    plan = json.loads(run(400, "--dry-run", "--json").out)
    assert (plan["requests"], plan["reviews_that_stay"]) == (4, 2)
    assert run(400).code == 0
    assert server.count == N + 4
    second = lines()
    assert [second[f"{q}/forward"]["reason"] for q in range(3)] == [None, "thought_only", None]
    assert second["2/forward"] == first["2/forward"]  # its verdict was read, though it was cut
    assert second["0/forward"]["outputs"]["parameters"]["max_tokens"] == 400
    run(600)
    assert server.count == N + 4 + 2
    assert {line["reason"] for line in lines().values()} == {None}
    spec = json.loads(Path("run/spec.json").read_text())
    judge = spec["settings"]["judge"]
    assert (judge["max_tokens"], judge["max_tokens_before"]) == (600, [100, 400])
    assert spec["prompt_set"] == judge["prompt_set"]
    results = json.loads(Path("run/results.json").read_text())
    sent = {row["sent"]["max_tokens"]: row["reviews"] for row in results["provenance"]["judge_parameters"]}
    assert sent == {100: 2, 400: 2, 600: 2}
    assert results["provenance"]["judge"]["max_tokens_before"] == [100, 400]
    verified = almost_eval("verify", "run")
    assert verified.code == 0, verified.out
    before = server.count
    again = run(600)
    assert (again.code, server.count) == (0, before)
    plan = json.loads(run(600, "--dry-run", "--json").out)
    assert (plan["requests"], plan["price_usd_at_most"]) == (0, 0.0)


def test_a_kill_between_the_spec_and_the_lines_loses_nothing(run: Callable[..., Any], server: ReplayServer) -> None:
    run(100)
    samples = Path("run/samples.jsonl")
    kept = samples.read_text()
    run(600)
    samples.write_text(kept)  # as if the process had ended when it had written the spec
    before = server.count
    assert run(600).code == 0
    assert server.count == before  # the replies are in the journal
    assert {line["reason"] for line in lines().values()} == {None}


def test_a_lower_bound_or_other_words_are_another_run(run: Callable[..., Any]) -> None:
    run(100)
    code, _, err = run(50)
    assert code == 2
    assert "run holds another run: settings.judge.max_tokens was 100, is 50" in err
    code, _, err = run(600, "--judge-temperature", "0.9")
    assert code == 2
    assert "temperature was" in err
    assert json.loads(Path("run/spec.json").read_text())["settings"]["judge"]["max_tokens"] == 100
