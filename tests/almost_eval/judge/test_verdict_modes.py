"""`--verdict json` and `--verdict logprobs`: what is requested, what is read, what it is worth, and what falls back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from replay_server import Call, Fault, ReplayServer

from almost_eval.errors import InputError
from almost_eval.judge.aggregate import aggregate
from almost_eval.judge.api.bodies import LAST_TOKENS, logprobs_of
from almost_eval.judge.api.parameters import Parameters, refused_parameter
from almost_eval.judge.calibration import brier, swap_calibration
from almost_eval.judge.modes import check_mode, fields_of
from almost_eval.judge.probabilities import parse_probabilities
from almost_eval.judge.prompts import parse_review
from almost_eval.judge.records import (
    Answer,
    JudgeRequest,
    Order,
    Pair,
    Question,
    Review,
    Side,
    TokenAlternatives,
    Unparsed,
    Verdict,
)
from almost_eval.judge.structured import parse_embedded, parse_object, response_format
from almost_eval.types import Message

Command = Callable[..., Any]
PAIR = Pair(Question("1", "Why?"), Answer("1", "Because.", "a"), Answer("1", "So.", "b"), "forward")
HELD = {"response_format": {"type": "json_schema"}}

# --- one JSON object


def test_the_reason_comes_before_the_verdict_in_the_schema() -> None:
    for form, fields in (("scores", ["reason", "score_1", "score_2"]), ("letters", ["reason", "verdict"])):
        stated = response_format(form)
        schema = stated["json_schema"]["schema"]
        assert (stated["type"], stated["json_schema"]["strict"]) == ("json_schema", True)
        assert list(schema["properties"]) == schema["required"] == fields
        assert schema["additionalProperties"] is False
        assert list(json.loads(json.dumps(schema))["properties"]) == fields


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"reason": "more depth", "score_1": 7, "score_2": 9.5}', Verdict("2", 7.0, 9.5)),
        (' {"score_2": 8, "score_1": 8, "reason": ""}\n', Verdict("tie", 8.0, 8.0)),
        ('{"reason": "x", "score_1": 0, "score_2": 9}', Unparsed("out_of_range")),
        ('{"reason": "x", "score_1": 11, "score_2": 9}', Unparsed("out_of_range")),
        ('{"reason": "x", "score_1": "8", "score_2": 9}', Unparsed("wrong_type")),
        ('{"reason": "x", "score_1": true, "score_2": 9}', Unparsed("wrong_type")),
        ('{"reason": null, "score_1": 8, "score_2": 9}', Unparsed("wrong_type")),
        ('{"reason": "x", "score_1": NaN, "score_2": 9}', Unparsed("not_json")),
        ('{"reason": "x", "score_1": 8}', Unparsed("missing_field")),
        ('{"reason": "x", "score_1": 8, "score_2": 9, "winner": 1}', Unparsed("unknown_field")),
        ('{"reason": "x", "score_1": 8, "score_2": 9, "score_2": 3}', Unparsed("duplicate_field")),
        ('Here it is: {"reason": "x", "score_1": 8, "score_2": 9}', Unparsed("not_json")),
        ('```json\n{"reason": "x", "score_1": 8, "score_2": 9}\n```', Unparsed("not_json")),
        ('[{"reason": "x", "score_1": 8, "score_2": 9}]', Unparsed("not_json")),
        ("8 9", Unparsed("not_json")),
    ],
)
def test_an_object_of_scores_is_read_strictly(text: str, verdict: Verdict | Unparsed) -> None:
    assert parse_object("scores", text) == verdict


def test_an_object_with_a_letter() -> None:
    assert parse_object("letters", '{"reason": "x", "verdict": "B"}') == Verdict("2")
    assert parse_object("letters", '{"reason": "x", "verdict": "C"}') == Verdict("tie")
    assert parse_object("letters", '{"reason": "x", "verdict": "b"}') == Unparsed("out_of_range")
    assert parse_object("letters", '{"reason": "x", "verdict": 2}') == Unparsed("wrong_type")


def test_the_text_of_an_endpoint_that_takes_no_schema() -> None:
    one, other = (json.dumps({"reason": "x", "score_1": 8, "score_2": n}) for n in (9, 3))
    assert parse_embedded("scores", f"Sure:\n```json\n{one}\n```") == Verdict("2", 8.0, 9.0)
    assert parse_embedded("scores", f"{one} or {other}") == Unparsed("ambiguous")
    assert parse_embedded("scores", f"The answer says {one}. {other}", f"Take {one}!") == Verdict("1", 8.0, 3.0)
    assert parse_embedded("scores", "8 9 {} {'a': 1}") is None


def test_json_in_a_review() -> None:
    text = '{"reason": "x", "score_1": 8, "score_2": 9}'
    fenced = f"```json\n{text}\n```"
    assert parse_review("scores", text, PAIR, "stop", "json", HELD) == Verdict("2", 8.0, 9.0)
    assert parse_review("scores", fenced, PAIR, "stop", "json", HELD) == Unparsed("not_json")
    assert parse_review("scores", fenced, PAIR, "stop", "json", {}) == Verdict("2", 8.0, 9.0)
    assert parse_review("scores", "8 9\nBetter.", PAIR, "stop", "json", {}) == Verdict("2", 8.0, 9.0)
    assert parse_review("scores", "8 9\nBetter.", PAIR, "stop", "json", HELD) == Unparsed("not_json")
    # Never from a thought, and a thought is no text around the object.
    assert parse_review("scores", f"<think>{text}", PAIR, "stop", "json", HELD) == Unparsed("thinking_cut")
    thought = '<think>{"reason": "x", "score_1": 1, "score_2": 1}</think>\n'
    assert parse_review("scores", thought + text, PAIR, "stop", "json", HELD) == Verdict("2", 8.0, 9.0)
    assert parse_review("scores", text[:30], PAIR, "length", "json", HELD) == Unparsed("cut")


REFUSED = [
    {"error": {"message": "This response_format type is unavailable now"}},
    {"error": {"message": "Invalid parameter: 'response_format' of type 'json_schema' is not supported", "param": "x"}},
    {"error": {"message": "This model does not support response format `json_schema`. See supported models."}},
    {"detail": [{"loc": ["body", "response_format", "type"], "msg": "Input should be 'text' or 'json_object'"}]},
    {"error": "'response_format.type' must be 'json_schema' or 'text'"},
]


@pytest.mark.parametrize("body", REFUSED)
def test_a_refused_schema_is_exchanged_step_by_step(body: object) -> None:
    fields = fields_of("json", "scores")
    request = JudgeRequest("j", (Message("user", "x"),), 0.2, 9, options=fields)
    parameters, changes = Parameters(), []
    for _ in range(2):
        sent = parameters.of(request)
        assert refused_parameter(sent, body) == "response_format"
        changes.append((sent["response_format"], parameters.change(sent, body)))
    assert changes == [
        (response_format("scores"), "response_format json_schema sent as json_object"),
        ({"type": "json_object"}, "response_format left out"),
    ]
    assert parameters.of(request) == {"temperature": 0.2, "max_tokens": 9}


# --- the probabilities of a letter


def token(text: str, **others: float) -> TokenAlternatives:
    """A token with the probabilities of what might have stood there; a space in a name is written as `_`."""
    return text, [(name.replace("_", " "), math.log(p)) for name, p in others.items()]


SURE = ("]]", [("]]", 0.0), ("y", -20.0)])


def test_a_verdict_is_the_probabilities_of_its_letter() -> None:
    # P(A), P(B), P(C) = 0.3, 0.5, 0.1: 0.9 in all, so 1/3, 5/9, 1/9.
    letters = token("B", A=0.3, B=0.5, C=0.1, D=0.05)
    forms: list[tuple[str, list[TokenAlternatives]]] = [
        ("[[B]]", [token("[[", x=0.9), letters, token("]]", x=1.0)]),
        ("B", [letters]),
        ("\n**B**.\n\nSince", [token("\n**", x=1.0), letters, token("**.\n\nSince", x=1.0)]),
        ("[[B]]", [("[[B", [("[[B", math.log(0.5)), ("[[A", math.log(0.3)), ("[[C]]", math.log(0.1))]), SURE]),
    ]
    for text, tokens in forms:
        verdict = parse_probabilities(text, tokens)
        assert isinstance(verdict, Verdict), text
        assert verdict.winner == "2"
        assert verdict.shares == pytest.approx((1 / 3, 5 / 9, 1 / 9))


def test_spellings_of_a_letter_are_added() -> None:
    tokens = [(" A", [(" A", math.log(0.2)), ("A", math.log(0.3)), ("[[A", math.log(0.1)), (" B", math.log(0.2))])]
    verdict = parse_probabilities("A", tokens)
    assert isinstance(verdict, Verdict)
    assert verdict.shares == pytest.approx((0.6 / 0.8, 0.2 / 0.8, 0))
    assert verdict.winner == "1"


@pytest.mark.parametrize(
    ("answer", "tokens", "reason"),
    [
        ("B", None, "no_logprobs"),
        ("B", [("B", [("B", 0.0)])], "no_logprobs"),  # the endpoint tells no alternatives
        ("B", [token("B", B=0.3, A=0.1, Both=0.5)], "low_mass"),
        ("Both", [token("Both", Both=0.6, B=0.4)], "no_verdict"),
        ("A is better", [token("A", A=0.9, B=0.1), token(" is better", x=1.0)], "no_verdict"),  # an article, perhaps
        ("[[A]] [[B]]", [token("[[A]] ", A=0.9, B=0.1), token("[[B]]", A=0.1, B=0.9)], "ambiguous"),
        ("B", [token("A", A=0.9, B=0.1)], "tokens_differ"),
    ],
)
def test_probabilities_that_are_no_verdict(
    answer: str, tokens: Sequence[TokenAlternatives] | None, reason: str
) -> None:
    assert parse_probabilities(answer, tokens) == Unparsed(reason)


def test_a_letter_of_a_thought_is_no_verdict() -> None:
    thought = [token("<think>", x=1.0), token("[[A]]", A=0.9, B=0.1), token("</think>\n", x=1.0)]
    said = token("[[B]]", A=0.25, B=0.75)
    text = "<think>[[A]]</think>\n[[B]]"
    for tokens in ([*thought, said], [said], [*thought, said, ("<|im_end|>", [("<|im_end|>", 0.0)])]):
        verdict = parse_review("letters", text, PAIR, "stop", "logprobs", None, tokens)
        assert isinstance(verdict, Verdict)
        assert verdict.shares == pytest.approx((0.25, 0.75, 0))
    assert parse_review("letters", "<think>[[A]]", PAIR, "stop", "logprobs", None, thought[:2]) == Unparsed(
        "thinking_cut"
    )


def test_log_probabilities_in_a_body() -> None:
    content = [{"token": "A", "logprob": -0.1, "top_logprobs": [{"token": "B", "logprob": -2.0}]}]
    assert logprobs_of({"logprobs": {"content": content}}) == [("A", [("A", -0.1), ("B", -2.0)])]
    older = {"tokens": ["A"], "token_logprobs": [-0.1], "top_logprobs": [{"A": -0.1, "B": -2.0}]}
    assert logprobs_of({"logprobs": older}) == [("A", [("A", -0.1), ("B", -2.0)])]
    assert len(logprobs_of({"logprobs": {"content": content * 100}}) or ()) == LAST_TOKENS
    for told in (None, {}, {"content": None}, {"content": [{"token": "A"}]}, {"content": [{"token": 1, "logprob": 0}]}):
        assert logprobs_of({"logprobs": told}) is None


def test_probabilities_need_letters() -> None:
    with pytest.raises(InputError, match="--prompt-family mt-bench"):
        check_mode("logprobs", "scores", {})
    with pytest.raises(InputError, match="sets response_format"):
        check_mode("json", "scores", {"response_format": {}})
    check_mode("logprobs", "letters", {"top_logprobs": 5})


# --- what they are worth


def review(question: str, order: Order, shares: tuple[float, float, float]) -> Review:
    winner: Side = "tie" if shares[0] == shares[1] else "1" if shares[0] > shares[1] else "2"
    return Review(question, "generic", order, "b", "m", 5, 5, Verdict(winner, shares=shares))


def test_a_win_rate_is_the_mean_of_probabilities() -> None:
    # The model is Assistant 2 forward, 1 in reverse: 0.7 + 0.2/2 = 0.8; 0.6; 0.3 + 0.2/2 = 0.4; 0.5.
    reviews = [
        review("1", "forward", (0.1, 0.7, 0.2)),
        review("1", "reverse", (0.6, 0.4, 0.0)),
        review("2", "forward", (0.5, 0.3, 0.2)),
        review("2", "reverse", (0.3, 0.3, 0.4)),
    ]
    results = aggregate(reviews)
    rate = results.metrics["win_rate"]
    assert rate.value == pytest.approx((0.8 + 0.6 + 0.4 + 0.5) / 4)
    # Residuals by question: (0.225 + 0.025), (-0.175 - 0.075): sqrt(2/1 * (0.0625 + 0.0625)) / 4.
    assert rate.stderr == pytest.approx(math.sqrt(2 * 0.125) / 4)
    counts = {name: results.metrics[name].value for name in ("wins", "ties", "losses", "unparsed")}
    assert counts == {"wins": 2.0, "ties": 1.0, "losses": 1.0, "unparsed": 0.0}
    # Without ties: 0.7/0.8, 0.6, 0.3/0.8, 0.5.
    assert aggregate(reviews, ties="drop").metrics["win_rate"].value == pytest.approx((0.875 + 0.6 + 0.375 + 0.5) / 4)


def test_calibration_against_the_swapped_order() -> None:
    # Question 1: the model wins with 0.9 and 0.7: both agree. Question 2: the baseline with 0.8, the model with 0.6:
    # neither agrees. Question 3: the model with 0.75, then a tie: one half, and a tie has no winner of its own.
    reviews = [
        review("1", "forward", (0.1, 0.9, 0.0)),
        review("1", "reverse", (0.7, 0.3, 0.0)),
        review("2", "forward", (0.8, 0.2, 0.0)),
        review("2", "reverse", (0.6, 0.4, 0.0)),
        review("3", "forward", (0.25, 0.75, 0.0)),
        review("3", "reverse", (0.5, 0.5, 0.0)),
        review("4", "forward", (0.1, 0.9, 0.0)),  # one order: nothing to compare with
    ]
    calibration = swap_calibration(reviews)
    assert calibration is not None
    assert calibration.confidence.value == pytest.approx((0.9 + 0.7 + 0.8 + 0.6 + 0.75) / 5)
    assert calibration.agreed.value == pytest.approx((1 + 1 + 0 + 0 + 0.5) / 5)
    assert calibration.overconfidence.value == pytest.approx(0.75 - 0.5)
    # Bins: 0.6 | 0.7, 0.75 | 0.8 | 0.9. Errors: 0.6; |0.725 - 0.75| twice; 0.8; 0.1.
    assert [(b.low, b.n) for b in calibration.bins] == [(0.6, 1), (0.7, 2), (0.8, 1), (0.9, 1)]
    assert calibration.error == pytest.approx((0.6 + 2 * 0.025 + 0.8 + 0.1) / 5)
    assert swap_calibration([Review("1", "g", "forward", "b", "m", 5, 5, Verdict("1"))]) is None


def test_briers_score() -> None:
    # P(Assistant 2) = 0.8, 0.5, 0.3 against 2 (1), a tie (0.5), 2 (1): 0.04, 0, 0.49.
    told: list[tuple[Verdict, Side, str]] = [
        (Verdict("2", shares=(0.1, 0.7, 0.2)), "2", "1"),
        (Verdict("tie", shares=(0.5, 0.5, 0.0)), "tie", "2"),
        (Verdict("1", shares=(0.7, 0.3, 0.0)), "2", "3"),
    ]
    score = brier(told)
    assert score is not None
    assert score.value == pytest.approx((0.04 + 0.0 + 0.49) / 3)
    assert brier([(Verdict("1"), "1", "1")]) is None


# --- whole runs


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ReplayServer]:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ALMOST_API_KEY", "ALMOST_DATA_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    rows = [{"question_id": i, "text": f"Question {i}?", "category": "generic"} for i in (1, 2, 3)]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in "ab":
        answers = [{"question_id": i, "text": f"{name} says {i}", "model_id": f"model-{name}"} for i in (1, 2, 3)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    served = ReplayServer([])
    yield served
    served.close()


def arguments(server: ReplayServer, mode: str, *more: str) -> list[str]:
    systems = ["--questions", "questions.jsonl", "--answers", "a.jsonl", "--baseline", "b.jsonl", "--data", "hub"]
    judge = ["--judge", "j", "--judge-base-url", server.url, "--prompt-set", "builtin", "--output", "run"]
    return ["vicuna", *systems, *judge, "--verdict", mode, *more]


def completion(text: str, logprobs: object = None) -> Fault:
    message = {"role": "assistant", "content": text}
    body = {
        "model": "j-1",
        "choices": [{"message": message, "finish_reason": "stop", "logprobs": logprobs}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18},
    }
    return Fault("body", body=json.dumps(body).encode())


def is_forward(call: Call) -> bool:
    prompt = call.body["messages"][-1]["content"]
    return prompt.index("b says") < prompt.index("a says")


def results_of(folder: str = "run") -> Any:
    return json.loads(Path(folder, "results.json").read_text())


def lines_of(folder: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def object_of(call: Call) -> str:
    """The model's answer has 9, the baseline's 4."""
    marks = (4, 9) if is_forward(call) else (9, 4)
    return json.dumps({"reason": "because", "score_1": marks[0], "score_2": marks[1]})


def test_a_run_by_a_schema(almost_eval: Command, server: ReplayServer) -> None:
    server.fault = lambda call: completion(object_of(call))
    code, out, err = almost_eval(*arguments(server, "json"))
    assert code == 0, err
    assert all(call.body["response_format"] == response_format("scores") for call in server.log)
    assert all('"score_1"' in call.body["messages"][-1]["content"] for call in server.log)
    results = results_of()
    assert results["metrics"]["win_rate"]["value"] == 1.0
    assert results["provenance"]["judge"]["verdict"] == "json"
    assert json.loads(Path("run/spec.json").read_text())["settings"]["judge"]["verdict"] == "json"
    assert almost_eval("verify", "run").code == 0
    assert almost_eval("judge", "report", "run").out == out
    refused = almost_eval("judge", "report", "run", "--prompt-family", "mt-bench")
    assert (refused.code, "--verdict json" in refused.err) == (2, True)


def test_an_endpoint_without_schemas_falls_back_once_and_says_so(almost_eval: Command, server: ReplayServer) -> None:
    refusal = "This response_format type is unavailable now"

    def answer(call: Call) -> Fault:
        if "response_format" in call.body:
            return Fault("status", 400, refusal)
        return completion(f"My verdict:\n```json\n{object_of(call)}\n```")

    server.fault = answer
    code, out, err = almost_eval(*arguments(server, "json"))
    assert code == 0, err
    kinds = [call.body.get("response_format", {}).get("type") for call in server.log]
    assert (kinds.count("json_schema"), kinds.count("json_object"), kinds.count(None)) == (1, 1, 6)
    assert "response_format json_schema sent as json_object" in err
    assert "response_format left out" in err
    assert "reviews with response_format left out: the endpoint refuses it 6" in " ".join(out.split())
    results = results_of()
    assert results["metrics"]["win_rate"]["value"] == 1.0
    assert [one["reviews"] for one in results["provenance"]["judge_parameters"]] == [6]
    assert almost_eval("verify", "run").code == 0


def test_an_endpoint_with_objects_but_no_schema(almost_eval: Command, server: ReplayServer) -> None:
    def answer(call: Call) -> Fault:
        if call.body.get("response_format", {}).get("type") == "json_schema":
            return Fault("status", 400, "json_schema is not supported")
        return completion(object_of(call) if call.number != 3 else f"Here: {object_of(call)}")

    server.fault = answer
    result = almost_eval(*arguments(server, "json"))
    assert result.code == 3  # one review has text around its object, and is unparsed
    assert "reviews with json_schema sent as json_object: the endpoint refuses it 6" in " ".join(result.out.split())
    assert sorted(str(line["outputs"].get("problem")) for line in lines_of()) == ["None"] * 5 + ["not_json"]


def logprobs_for(call: Call) -> dict[str, Any]:
    """[[B]] or [[A]] for the model's answer, with 0.6 against 0.2 and 0.1 for a tie."""
    mine, other = ("B", "A") if is_forward(call) else ("A", "B")
    likely = ((mine, 0.6), (other, 0.2), ("C", 0.1))
    top = [{"token": letter, "logprob": math.log(p)} for letter, p in likely]
    parts = [("[[", [{"token": "[[", "logprob": 0.0}]), (mine, top), ("]]", [{"token": "]]", "logprob": 0.0}])]
    return {"content": [{"token": t, "logprob": top[0]["logprob"], "top_logprobs": top} for t, top in parts]}


def test_a_run_by_probabilities(almost_eval: Command, server: ReplayServer) -> None:
    server.fault = lambda call: completion("[[B]]" if is_forward(call) else "[[A]]", logprobs_for(call))
    code, out, err = almost_eval(*arguments(server, "logprobs", "--prompt-family", "mt-bench"))
    assert code == 0, err
    body = server.log[0].body
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 16)
    results = results_of()
    # (0.6 + 0.1 / 2) / 0.9 in every review.
    assert results["metrics"]["win_rate"]["value"] == pytest.approx(0.65 / 0.9)
    assert results["metrics"]["wins"]["value"] == 6
    assert lines_of()[0]["score"] == pytest.approx(0.65 / 0.9)
    assert lines_of()[0]["outputs"]["logprobs"][1][0] == "B"
    calibration = results["judging"]["calibration"]
    assert calibration["confidence"]["value"] == pytest.approx(0.65 / 0.9)
    assert calibration["agreed"]["value"] == 1.0
    assert "calibration: its winners have a probability of 72.2%" in " ".join(out.split())
    assert almost_eval("verify", "run").code == 0
    dropped = json.loads(almost_eval("judge", "report", "run", "--ties", "drop", "--json").out)
    assert dropped["metrics"]["win_rate"]["value"] == pytest.approx(0.75)
    assert almost_eval("judge", "report", "run").out == out
    sent = server.count
    Path("run/samples.jsonl").unlink()  # the journal holds the probabilities too
    assert almost_eval(*arguments(server, "logprobs", "--prompt-family", "mt-bench")).code == 0
    assert server.count == sent
    assert results_of()["metrics"] == results["metrics"]


def test_an_endpoint_that_tells_no_probabilities_ends_it_after_one_reply(
    almost_eval: Command, server: ReplayServer
) -> None:
    server.fault = lambda call: completion("[[B]]")
    server.latency = 0.05
    for _ in range(2):
        code, _, err = almost_eval(*arguments(server, "logprobs", "--prompt-family", "mt-bench"))
        assert code == 2
        assert "tells no log-probabilities of j" in err
        assert len(err.strip().splitlines()) == 1
        assert server.count == 1


def test_an_endpoint_that_refuses_to_tell_them(almost_eval: Command, server: ReplayServer) -> None:
    server.fault = lambda call: Fault("status", 400, "'logprobs' is not supported with this model")
    code, _, err = almost_eval(*arguments(server, "logprobs", "--prompt-family", "mt-bench"))
    assert code == 2
    assert "'logprobs' is not supported with this model" in err
    assert server.count <= 3


def test_modes_that_cannot_be(almost_eval: Command, server: ReplayServer) -> None:
    refused = almost_eval(*arguments(server, "logprobs"))
    assert (refused.code, server.count) == (2, 0)
    assert "--verdict logprobs needs a prompt whose verdict is a letter" in refused.err
    refused = almost_eval("vicuna", "--verdict", "json", "--judge", "nano", "--limit", "1")
    assert (refused.code, "--verdict belongs to a judge behind an API" in refused.err) == (2, True)


def test_a_check_of_probabilities_has_briers_score(almost_eval: Command, server: ReplayServer) -> None:
    # The archive: Assistant 2 (b) wins questions 1 and 2, Assistant 1 (a) question 3. The judge gives the model's
    # answer, a, 0.65 / 0.9 in both places, so b 0.25 / 0.9: 0.65 / 0.9 wrong twice, 0.25 / 0.9 once.
    folder = Path("archive")
    for name in "ab":
        rows = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
        file = folder / "answer" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        named = [row | {"answer_id": f"{name}{row['question_id']}"} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in named))
    (folder / "review").mkdir()
    reviews = [
        {"question_id": i, "answer1_id": f"a{i}", "answer2_id": f"b{i}", "text": text}
        for i, text in ((1, "4 9"), (2, "5 8"), (3, "9 2"))
    ]
    (folder / "review" / "a_b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    server.fault = lambda call: completion("[[B]]" if is_forward(call) else "[[A]]", logprobs_for(call))
    code, out, err = almost_eval(
        *("judge", "check", "--archive", "archive", "--questions", "questions.jsonl", "--data", "hub", "--judge", "j"),
        *("--judge-base-url", server.url, "--prompt-set", "builtin", "--prompt-family", "mt-bench"),
        *("--verdict", "logprobs", "--output", "check"),
    )
    assert code == 0, err
    wrong, right = (0.65 / 0.9) ** 2, (0.25 / 0.9) ** 2
    assert results_of("check")["metrics"]["brier"]["value"] == pytest.approx((2 * wrong + right) / 3)
    assert "Brier score of its probabilities" in out
    assert almost_eval("report", "check").out == out
