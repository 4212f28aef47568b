"""Judges of today: they think before they answer, refuse parameters, and bill for all of it."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from replay_server import Archived, Call, Fault, ReplayServer, requests_for

from almost_eval.errors import AlmostError, InputError, RunError
from almost_eval.judge.answers import ArchivedSystem, less_thoughts
from almost_eval.judge.api.bodies import content_of, cost_of, error_words, retry_after, usage_of
from almost_eval.judge.api.client import JudgeClient
from almost_eval.judge.api.cost import Budget, Price, price_of, retirement_of
from almost_eval.judge.api.endpoint import JudgeEndpoint, duration
from almost_eval.judge.api.journal import Journal
from almost_eval.judge.api.parameters import refused_parameter
from almost_eval.judge.build import request_options
from almost_eval.judge.prompts import parse_review
from almost_eval.judge.questions import read_answers
from almost_eval.judge.records import Answer, Failure, Pair, Question, Reply, Unparsed, Usage, Verdict

pytest_plugins = ["judge_fixtures"]

PAIR = Pair(Question("1", "Why?"), Answer("1", "Because.", "a"), Answer("1", "So.", "b"), "forward")


# --- thinking is never a verdict ---

NEUTRAL = "Let me compare both answers. They differ in depth."
TENTATIVE = "Assistant 1: 2\nAssistant 2: 9. The final scores would be 2 and 9. [[B]] Hmm, but no.\n2 9"


def pair_of(one: Archived) -> Pair:
    return Pair(Question("1", one.question), Answer("1", one.answer_1, "a"), Answer("1", one.answer_2, "b"), "forward")


@pytest.fixture(scope="module")
def verdicts(archive: list[Archived]) -> list[Verdict | Unparsed]:
    """Of every archived review, as it stands."""
    return [parse_review("scores", one.review, pair_of(one)) for one in archive]


@pytest.mark.parametrize("thought", [NEUTRAL, TENTATIVE], ids=["neutral", "tentative"])
@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>\n", "\n</think>\n\n"),
        ("", "\n</think>\n\n"),
        ("[THINK]", "[/THINK]"),
        ("<thinking>", "</thinking>\n"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ],
)
def test_every_archived_review_is_read_as_before_behind_a_thought(
    archive: list[Archived], verdicts: list[Verdict | Unparsed], thought: str, opening: str, closing: str
) -> None:
    """A thought that holds no score is the easier case: every eighth review."""
    assert len(archive) == 400
    for one, bare in list(zip(archive, verdicts, strict=True))[:: 8 if thought is NEUTRAL else 1]:
        assert isinstance(bare, Verdict)
        assert parse_review("scores", opening + thought + closing + one.review, pair_of(one)) == bare


@pytest.mark.parametrize("opening", ["<think>\n", "[THINK]", "<reasoning>\n", "<|channel|>analysis<|message|>"])
@pytest.mark.parametrize("form", ["scores", "letters"])
def test_a_thought_that_was_cut_says_nothing(form: str, opening: str) -> None:
    assert parse_review(form, opening + TENTATIVE, PAIR, "length") == Unparsed("thinking_cut")
    assert parse_review(form, opening + TENTATIVE, PAIR) == Unparsed("thinking_cut")


@pytest.mark.parametrize(
    ("form", "text", "verdict"),
    [
        ("scores", "First I see scores of 5 and 8. Let me reread", Unparsed("cut")),  # the template opened the thought
        ("letters", "A is fluent, so [[A]]. Let me check", Unparsed("cut")),
        ("scores", "9 4\n\nAssistant 1 is", Verdict("1", 9, 4)),
        ("scores", "<think>7 8?</think>\n9 4\n\nAssistant 1 is", Verdict("1", 9, 4)),
        ("letters", "<think>[[B]]?</think>\nA is better: [[A]], as its", Verdict("1")),
        ("scores", "<think>7 8?</think>\nBoth are", Unparsed("cut")),
    ],
)
def test_a_review_that_was_cut(form: str, text: str, verdict: Verdict | Unparsed) -> None:
    assert parse_review(form, text, PAIR, "length") == verdict


def test_content_in_parts_and_thoughts_in_a_field() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "8 7"}]
    assert content_of({"content": parts}) == ("8 7", "hm")
    assert content_of({"content": "8 7", "reasoning_content": "hm", "reasoning": "hm"}) == ("8 7", "hm")
    assert content_of({"content": None}) == ("", "")
    with pytest.raises(TypeError):
        content_of({"content": 3})


# --- parameters ---

SENT = {"temperature": 0.2, "max_tokens": 9, "seed": 1, "top_p": 0.9, "response_format": {}, "reasoning_effort": "low"}
TOKENS = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
HEAT = "Unsupported value: 'temperature' does not support 0.2 with this model. Only the default (1) value is supported."


def openai_error(message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


RAW = json.dumps(
    openai_error("Unsupported parameter: 'temperature' is not supported with this model.", None, "temperature")
)
FORBIDDEN = {"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "input": 3}
REFUSALS: list[tuple[str | None, object]] = [
    ("max_tokens", openai_error(TOKENS, "unsupported_parameter", "max_tokens")),
    ("temperature", openai_error(HEAT, "unsupported_value", "temperature")),
    ("temperature", openai_error(HEAT)),
    ("temperature", {"error": {"message": "Provider returned error", "code": 400, "metadata": {"raw": RAW}}}),
    ("top_p", openai_error("`temperature` and `top_p` cannot both be specified for this model. Please use only one.")),
    ("temperature", openai_error("`temperature` is deprecated for this model.")),
    ("seed", {"object": "error", "message": {"detail": [FORBIDDEN]}, "type": "invalid_request_error", "param": None}),
    ("seed", {"detail": [FORBIDDEN]}),
    ("max_tokens", {"message": "[{'type': 'extra_forbidden', 'loc': ('body', 'max_tokens'), 'input': 8192}]"}),
    ("reasoning_effort", {"code": "x", "error": "Model grok-4-latest does not support parameter reasoningEffort."}),
    ("reasoning_effort", openai_error("Unrecognized request argument supplied: reasoning_effort")),
    ("response_format", openai_error("This response_format type is unavailable now")),
    ("temperature", {"detail": "Unsupported parameter: temperature"}),
    ("temperature", "invalid temperature: only 1 is allowed for this model"),
    (None, openai_error("max_tokens is too large: 50000. At most 16384 are possible", "invalid_value", "max_tokens")),
    (None, openai_error("Invalid prompt: your prompt was flagged as potentially violating our usage policy.")),
]


@pytest.mark.parametrize(("name", "body"), REFUSALS)
def test_what_a_refusal_names(name: str | None, body: object) -> None:
    assert refused_parameter(SENT, body) == name


def reasoning_judge(call: Call) -> Fault | None:
    if "max_tokens" in call.body:
        return Fault("status", 400, TOKENS, "unsupported_parameter")
    if call.body.get("temperature", 1) != 1:
        return Fault("status", 400, HEAT, "unsupported_value")
    return None


def test_each_parameter_is_refused_once_and_never_again(
    server: ReplayServer, journal: Journal, archive: list[Archived]
) -> None:
    notices: list[str] = []
    server.fault, server.latency = reasoning_judge, 0.02
    client = JudgeClient("o", journal, base_url=server.url, notice=notices.append)
    outcomes = dict(client.stream(requests_for(archive[:40], "o")))
    assert [o.text for _, o in sorted(outcomes.items()) if isinstance(o, Reply)] == [a.review for a in archive[:40]]
    assert server.count == 42  # two refusals, whatever the concurrency
    assert client.stats.retried == {"exchanged": 2}
    assert {json.dumps(o.parameters) for o in outcomes.values() if isinstance(o, Reply)} == {
        '{"max_completion_tokens": 1024}'
    }
    assert len(notices) == 2
    again = JudgeClient("o", journal, base_url=server.url)  # a later process
    dict(again.stream(requests_for(archive[40:45], "o")))
    assert (server.count, again.stats.retried) == (47, {})


def test_no_bound_on_tokens_and_a_bound_on_money(
    server: ReplayServer, journal: Journal, archive: list[Archived]
) -> None:
    def fault(call: Call) -> Fault | None:
        name = next((n for n in ("max_tokens", "max_completion_tokens") if n in call.body), None)
        return Fault("status", 400, f"Unrecognized request argument supplied: {name}") if name else None

    server.fault = fault
    client = JudgeClient("o", journal, base_url=server.url, budget=Budget(1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="no bound on the tokens of a reply, so that --max-cost cannot be kept"):
        dict(client.stream(requests_for(archive[:5], "o")))


def test_options_of_the_request() -> None:
    assert request_options('{"top_p": 0.9}', "low") == {"top_p": 0.9, "reasoning_effort": "low"}
    for text in ("{", "[1]", '{"model": "x"}', '{"max_tokens": 3}'):
        with pytest.raises(InputError, match="--judge-options"):
            request_options(text, None)


def test_azures_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALMOST_API_KEY", "secret")
    endpoint = JudgeEndpoint("j", "https://x.openai.azure.com/openai/deployments/x?api-version=2024-10-21", 1.0)
    client = endpoint.connect()
    assert dict(client.default_query) == {"api-version": "2024-10-21"}
    assert client.default_headers["api-key"] == "secret"
    with pytest.raises(InputError, match="a query"):
        JudgeEndpoint("j", "https://host/v1?api_key=x", 1.0)


# --- waits ---


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("Limit 200, Used 200. Please try again in 7m12s.", 432.0),
        ("Please try again in 20s.", 20.0),
        ("Please retry after 6 hours.", 21600.0),
        ("Please try again in 1h2m3s", 3723.0),
        ("try again in 250ms", 0.25),
        ("Limit: 3 / min.", None),
        ("try again later", None),
    ],
)
def test_a_wait_in_words(words: str, seconds: float | None) -> None:
    assert retry_after({}, words=words) == seconds
    assert retry_after({"retry-after": "2"}, words=words) == 2.0


def test_durations() -> None:
    assert [duration(s) for s in (0, 45, 432, 21600, 90000)] == ["0 s", "45 s", "7 min 12 s", "6 h", "1 d 1 h"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            Fault("status", 429, "quota", "insufficient_quota"),
            r"has no credit left \(429\): quota; what was done is kept",
        ),
        (Fault("status", 402, "Insufficient Balance"), r"has no credit left \(402\)"),
        (
            Fault("status", 429, "per day", headers={"Retry-After": "21600"}),
            r"asks to wait 6 h \(429\): per day; what was",
        ),
    ],
)
def test_a_quota_of_a_day_ends_the_run_and_it_goes_on(
    server: ReplayServer, journal: Journal, archive: list[Archived], fault: Fault, message: str
) -> None:
    server.fault = lambda call: fault if call.number > 5 else None
    client = JudgeClient("gpt-4", journal, base_url=server.url, concurrency=1)
    with pytest.raises(RunError, match=message):
        dict(client.stream(requests_for(archive[:10])))
    assert len(journal) == 5
    server.fault = lambda call: None
    again = JudgeClient("gpt-4", journal, base_url=server.url)
    assert len(dict(again.stream(requests_for(archive[:10])))) == 10
    assert (again.stats.sent, again.stats.cached) == (5, 5)


def test_a_wait_is_told(server: ReplayServer, journal: Journal, archive: list[Archived], monkeypatch: Any) -> None:
    monkeypatch.setattr("almost_eval.judge.api.session.TOLD", 0.1)
    server.fault = lambda call: Fault("status", 429, "slow", headers={"Retry-After": "1"}) if call.number == 1 else None
    notices: list[str] = []
    dict(JudgeClient("gpt-4", journal, base_url=server.url, notice=notices.append).stream(requests_for(archive[:4])))
    assert len(notices) == 1
    assert notices[0].startswith("waiting 1 s, until ")
    assert "429: slow" in notices[0]


# --- money ---


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 5}, Usage(9, 5)),
        ({"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}, Usage(9, 5, 4)),
        ({"prompt_tokens": 9, "completion_tokens": 5, "prompt_cache_hit_tokens": 8}, Usage(9, 5, 8)),
        (
            {"prompt_tokens": 9, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 3}},
            Usage(9, 5, 0, 3),
        ),
        (
            {"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cache_write_tokens": 6}},
            Usage(9, 5, 0, 0, 6),
        ),
        ({"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 34}, Usage(9, 25, 0, 20)),  # thoughts beside
        ({"input_tokens": 9, "output_tokens": 5}, Usage(9, 5)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, None),
        ({"prompt_tokens": "9"}, None),
        (None, None),
    ],
)
def test_what_is_billed(usage: object, tokens: Usage | None) -> None:
    assert usage_of({"usage": usage}) == tokens


def test_cached_and_reasoning_tokens_have_their_price() -> None:
    price = Price(2.0, 10.0, "", "", 0.5, 20.0)
    # 600 fresh at 2, 400 cached at 0.5, 70 written at 10, 30 thought at 20: 1200 + 200 + 700 + 600 per million
    assert price.of(1000, 100, 400, 30) == pytest.approx(2700e-6)
    assert price.at_most(1000, 100) == pytest.approx(4000e-6)


def test_what_is_written_to_a_cache_costs_more_and_the_worst_case_holds_it() -> None:
    price = price_of("gpt-6.1-terra")
    assert price is not None
    # 500 at 1, 1500 written at 1.25, 100 out at 5: 500 + 1875 + 500 per million
    assert price.of(2000, 100, 0, 0, 1500) == pytest.approx(2875e-6)
    assert price.at_most(2000, 100) == pytest.approx(3000e-6)  # all of it may be written
    stated = price_of("gpt-6.1-terra", 2.0, 10.0)  # the factor is the model's
    assert stated is not None
    assert stated.written == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("usage", "dollars"),
    [
        ({"cost": 0.00125}, 0.00125),
        ({"cost": 0}, 0.0),
        ({"cost": 0.001, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.02}}, 0.021),
        ({"cost": 0.95, "is_byok": False, "cost_details": {"upstream_inference_cost": 19}}, 0.95),
        ({"cost": "0.1"}, None),
        ({"cost": -1}, None),
        ({"cost": {"total_cost": 0.1}}, None),
        ({}, None),
    ],
)
def test_a_bill_that_the_host_states(usage: dict[str, Any], dollars: float | None) -> None:
    assert cost_of({"usage": usage}) == dollars


def test_a_bill_that_the_host_states_is_taken_before_a_price(
    server: ReplayServer, journal: Journal, archive: list[Archived]
) -> None:
    def stated(call: Call) -> Fault:
        usage = {"prompt_tokens": 100, "completion_tokens": 50, "cost": 0.002}
        choice = {"message": {"content": "" if call.number == 3 else "9 8"}, "finish_reason": "stop"}
        return Fault("body", body=json.dumps({"choices": [choice], "usage": usage}).encode())

    server.fault = stated
    budget = Budget(1.0, 30.0, 60.0)
    client = JudgeClient("j", journal, base_url=server.url, budget=budget)
    outcomes = dict(client.stream(requests_for(archive[:5], "j")))
    assert sum(isinstance(outcome, Failure) for outcome in outcomes.values()) == 1  # it is billed too
    assert client.stats.cost == pytest.approx(0.01)
    assert budget.spent == pytest.approx(0.01)
    assert budget.of_ledger(journal.ledger()) == (pytest.approx(0.01), 0.0)
    unknown = Budget(judge="a judge that is in no table")
    assert unknown.of_ledger(journal.ledger())[0] == pytest.approx(0.01)
    assert unknown.is_known(journal.ledger())
    stored = journal.get(requests_for(archive[:1], "j")[0].digest)
    assert stored is not None
    assert stored.cost == 0.002


BILLED_EMPTY = {"prompt_tokens": 100, "completion_tokens": 50, "completion_tokens_details": {"reasoning_tokens": 50}}
THOUGHT_ONLY = {"choices": [{"message": {"content": "", "reasoning": "hm"}, "finish_reason": "length"}]}
FAULTS = {
    "thought only": Fault("body", body=json.dumps(THOUGHT_ONLY | {"usage": BILLED_EMPTY}).encode()),
    "no choice": Fault("body", body=json.dumps({"choices": [], "usage": BILLED_EMPTY}).encode()),
    "filtered": Fault("content_filter"),
    "cut at its limit": Fault("length"),
    "500 after work": Fault("status", 500),
    "hangs": Fault("hang"),
    "cut": Fault("cut"),
    "reset": Fault("reset"),
    "429": Fault("status", 429),
}
UNSAID = ("500 after work", "hangs", "cut", "reset")
"""Billed, perhaps, and nobody says for how much."""


@pytest.mark.parametrize("name", FAULTS)
def test_the_ledger_is_the_invoice(server: ReplayServer, journal: Journal, archive: list[Archived], name: str) -> None:
    fault = FAULTS[name]
    server.fault = lambda call: fault if call.number % 3 == 0 else None
    budget = Budget(None, 30.0, 60.0)
    client = JudgeClient("j", journal, base_url=server.url, timeout=0.7, max_attempts=2, budget=budget, concurrency=2)
    outcomes = dict(client.stream(requests_for(archive[:12], "j")))
    struck = sum(call.number % 3 == 0 for call in server.log)
    ledger = journal.ledger()
    known = [o.usage for o in outcomes.values() if isinstance(o, Reply)]
    prompts = {c.number: len("\n".join(m["content"] for m in c.body["messages"])) // 4 for c in server.log}
    if name in ("thought only", "no choice"):
        known += [Usage(100, 50, 0, 50)] * struck
    elif name == "filtered":
        texts = {c.number: server.review("\n".join(m["content"] for m in c.body["messages"])) for c in server.log}
        known += [Usage(prompts[n], len(text) // 4) for n, text in texts.items() if n % 3 == 0]
    assert ledger.billed == Usage(*(sum(column) for column in zip(*known, strict=True)))
    assert ledger.n_unsure == client.stats.unmetered == (struck if name in UNSAID else 0)
    assert sum(budget.of_ledger(ledger)) == pytest.approx(budget.spent) == pytest.approx(client.stats.cost)
    if name == "thought only":
        failures = [o for o in outcomes.values() if isinstance(o, Failure)]
        assert failures[0].message == "the judge spent its 1,024 tokens thinking; raise --max-tokens"


def test_what_empty_replies_took_bounds_all_later_runs(
    server: ReplayServer, journal: Journal, archive: list[Archived]
) -> None:
    server.fault = lambda call: FAULTS["no choice"]
    for _ in range(4):  # 50 completion tokens are 0.05 USD; a request may take 1.024
        budget = Budget(1.5, 0.0, 1000.0)
        budget.spent = sum(budget.of_ledger(journal.ledger()))
        dict(JudgeClient("o", journal, base_url=server.url, budget=budget).stream(requests_for(archive[:20], "o")))
    assert server.count * 0.05 <= 1.5
    assert server.count == 10  # 0.5 USD: no other could be sent


def test_a_sending_that_was_killed_counts_at_its_most(tmp_path: Path, archive: list[Archived]) -> None:
    [request] = requests_for(archive[:1])
    with Journal(tmp_path / "j") as journal:
        journal.begin(request, Usage(700, 1024))
    with Journal(tmp_path / "j") as journal:
        ledger = journal.ledger()
        assert (ledger.billed, ledger.unsure, ledger.n_unsure) == (Usage(0, 0), Usage(700, 1024), 1)


def test_a_retired_judge_is_named_with_its_successor() -> None:
    for judge in ("gpt-4", "gpt-4-0613", "gpt-3.5-turbo"):
        retired = retirement_of(judge)
        assert retired is not None
        assert retired.date == "2026-10-23"
        assert "was shut down on 2026-10-23; its maker names gpt-5.6" in retired.words(
            judge, date(2026, 11, 29).isoformat()
        )
    assert retirement_of("my-judge") is None


# --- answers ---


def test_thinking_in_an_answer() -> None:
    answer = Answer("1", "<think>\nhm\n</think>\n\nYes.", "m")
    stripped = less_thoughts(answer, "strip")
    assert (stripped.text, stripped.metadata["reasoning"]) == ("Yes.", "hm")
    assert stripped.metadata["reasoning_characters"] == len(answer.text) - 4
    assert less_thoughts(answer, "keep") == answer
    with pytest.raises(InputError, match="question 1: the answer holds thinking"):
        less_thoughts(answer, "refuse")


def test_several_choices_are_said(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    choices = [{"index": i, "turns": [text]} for i, text in enumerate(["", "second", "third"])]
    file.write_text(json.dumps({"question_id": 1.0, "model_id": "m", "choices": choices}))
    questions = [Question("1", "Why?")]
    system = ArchivedSystem(file, questions, choice=2)
    assert system.known()["1"].text == "second"
    assert system.notes == ["m: the file holds up to 3 answers to a question; number 2 is judged (--choice)"]
    with pytest.raises(AlmostError, match="it has 3 answers, and no number 4"):
        ArchivedSystem(file, questions, choice=4)


def test_an_instruction_that_stands_twice_or_with_a_blank(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    rows = [
        {"instruction": text, "output": out, "generator": "g"} for text, out in (("A\n", "1"), ("B", "2"), ("A", "3"))
    ]
    file.write_text(json.dumps(rows))
    _, answers = read_answers(file, [Question("1", "A"), Question("2", "B"), Question("3", "A")])
    assert {id: answer.text for id, answer in answers.items()} == {"1": "1", "2": "2", "3": "3"}


def test_error_envelopes() -> None:
    assert error_words({"error": {"message": "m", "code": "c"}}) == ("c", "m")
    assert error_words([{"error": {"message": "m", "code": 429}}]) == ("429", "m")
    assert error_words({"detail": "d"}) == ("", "d")
    assert error_words("text") == ("", "")
