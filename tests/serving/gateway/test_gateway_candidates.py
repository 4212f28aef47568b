"""What is drawn, what of a candidate is scored, and early answers: on servers that say what a test tells them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from fake_upstream import Served
from openai import OpenAI
from raw_upstream import STREAM, chunk, completion, raw_upstream, whole

from serving.gateway.app import GatewaySettings, create_app
from serving.gateway.candidates import CALLS_NOTE, GREEDY_NOTE, drawing_of, independent_seed, scored_text
from serving.gateway.racing import GrowingChoice

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
Parts = Callable[[dict[str, Any]], Iterator[bytes]]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
WRITTEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture
def gateway() -> Iterator[Callable[..., httpx.Client]]:
    """`gateway(parts)`: a client of a gateway before a server that answers so; rewards are lengths of texts."""
    with ExitStack() as stack:

        def make(parts: Parts, **settings: Any) -> httpx.Client:
            url = stack.enter_context(raw_upstream(parts))
            settings = {"policy_url": url, "reward_url": url, "api_key": None, **settings}
            served = stack.enter_context(Served.of(create_app(GatewaySettings(**settings))))
            return stack.enter_context(httpx.Client(base_url=served.url, timeout=20))

        yield make


class Says:
    """Candidates with these texts, in one answer; keeps what it was asked."""

    def __init__(self, *messages: dict[str, Any] | str) -> None:
        self.messages = [one if isinstance(one, dict) else {"role": "assistant", "content": one} for one in messages]
        self.asked: list[dict[str, Any]] = []

    def __call__(self, fields: dict[str, Any]) -> Iterator[bytes]:
        self.asked.append(fields)
        yield whole(completion(self.messages[: fields["n"]]))


# --- what is drawn ---


@pytest.mark.parametrize("more", [{"temperature": 0}, {"temperature": 0.0}, {"temperature": 1e-6}, {"top_k": 1}])
@pytest.mark.parametrize("n", [1, 3])
def test_where_nothing_is_sampled_one_is_drawn(
    gateway: Callable[..., httpx.Client], more: dict[str, Any], n: int
) -> None:
    policy = Says("the one", "never")
    answer = gateway(policy).post(CHAT, json={"messages": HELLO, "best_of": 4, "n": n, **more}).json()
    assert policy.asked[0]["n"] == 1
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["the one"] * n
    assert [choice["index"] for choice in answer["choices"]] == list(range(n))
    almost = answer["almost"]
    assert (almost["best_of"], almost["rewards"], almost["chosen"]) == (1, [7.0], [0] * n)
    assert almost["note"] == GREEDY_NOTE


@pytest.mark.parametrize("more", [{}, {"temperature": 0.1}, {"temperature": 0, "use_beam_search": True}])
def test_else_all_are_drawn(gateway: Callable[..., httpx.Client], more: dict[str, Any]) -> None:
    policy = Says("a", "bb")
    answer = gateway(policy).post(CHAT, json={"messages": HELLO, "best_of": 2, **more}).json()
    assert (policy.asked[0]["n"], answer["almost"]["rewards"], answer["almost"]["note"]) == (2, [1.0, 2.0], None)


def test_neighbouring_seeds_share_no_candidate() -> None:
    """VLLM draws candidate i with seed + i: of seeds 0 to 999 and 16 candidates, no two are the same."""
    used = [independent_seed(seed) + i for seed in range(1000) for i in range(16)]
    assert len(set(used)) == len(used)
    assert all(0 <= seed < 2**63 for seed in used)
    assert drawing_of({"seed": 5}, 2).fields["seed"] == independent_seed(5) == independent_seed(5)
    assert "seed" not in drawing_of({"messages": []}, 2).fields
    assert drawing_of({"seed": None}, 2).fields["seed"] is None


@pytest.mark.parametrize("seed", ["5", 1.5, True, [1]])
def test_a_seed_is_a_whole_number(gateway: Callable[..., httpx.Client], seed: Any) -> None:
    answer = gateway(Says("a")).post(CHAT, json={"messages": HELLO, "best_of": 1, "seed": seed})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "seed")


# --- tools ---


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": " hi "}, "hi"),
        ({"content": None, "tool_calls": [CALL]}, WRITTEN),
        ({"content": "", "tool_calls": [CALL]}, WRITTEN),
        ({"content": " Let me see. ", "tool_calls": [CALL, CALL]}, f"Let me see.\n{WRITTEN}\n{WRITTEN}"),
        (
            {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}]},
            '<tool_call>\n{"name": "f", "arguments": "{oops"}\n</tool_call>',
        ),
        ({"content": None}, None),
        ({"content": None, "tool_calls": []}, None),
        ({"content": [{"type": "text"}]}, None),
        ({"content": None, "tool_calls": [{"type": "function"}]}, None),
        ({"content": None, "tool_calls": "x"}, None),
        ({"content": "x", "function_call": {"name": "f"}}, None),
        ({"content": "a\ud83d\ude00"}, "a😀"),
    ],
)
def test_what_of_an_answer_is_scored(message: dict[str, Any], text: str | None) -> None:
    scored, reason = scored_text(message)
    assert scored == text
    assert bool(reason) == (text is None)


@pytest.mark.parametrize("best_of", [1, 2])
@pytest.mark.parametrize("content", [None, "", "calling"])
@pytest.mark.parametrize("racing", [False, True])
def test_tool_calls_stream_with_their_index(
    gateway: Callable[..., httpx.Client], content: str | None, best_of: int, racing: bool
) -> None:
    """OpenAI's own stream helper puts the calls together, which it does by their index."""
    message = {"role": "assistant", "content": content, "tool_calls": [CALL, {**CALL, "id": "call_2"}]}

    def parts(fields: dict[str, Any]) -> Iterator[bytes]:
        if not fields.get("stream"):
            yield whole(completion([message] * fields["n"], "tool_calls"))
            return
        yield STREAM
        for i in range(fields["n"]):
            yield chunk(i, {"role": "assistant", "content": content})
            for place, identity in enumerate(("call_1", "call_2")):
                head = {"index": place, "id": identity, "type": "function"}
                yield chunk(i, {"tool_calls": [{**head, "function": {"name": "weather", "arguments": '{"city": '}}]})
                yield chunk(i, {"tool_calls": [{"index": place, "function": {"arguments": '"Paris"}'}}]})
            yield chunk(i, {}, "tool_calls")
        yield b"data: [DONE]\n\n"

    url = str(gateway(parts).base_url)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    extra = {"best_of": best_of, **({"almost_stream": "racing"} if racing else {})}
    with OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        asked: Any = {"model": "m", "messages": HELLO, "tools": tools, "extra_body": extra}
        with client.chat.completions.stream(**asked) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion()
        calls = final.choices[0].message.tool_calls or []
        assert [(call.id, call.function.name, call.function.arguments) for call in calls] == [
            ("call_1", "weather", '{"city": "Paris"}'),
            ("call_2", "weather", '{"city": "Paris"}'),
        ]
        deltas = [
            call.index
            for part in client.chat.completions.create(**asked, stream=True)
            for choice in part.choices
            for call in choice.delta.tool_calls or []
        ]
        assert deltas == [0, 1]
        if not racing:
            almost = client.chat.completions.create(**asked).model_extra["almost"]
            expected = len("\n".join([*filter(None, [content]), WRITTEN, WRITTEN]))
            assert (almost["rewards"], almost["note"]) == ([expected] * best_of, CALLS_NOTE)


# --- a grammar that cannot be compiled ---


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"structured_outputs": {"grammar": "root ::= ((("}}, 400),
        ({"response_format": {"type": "json_schema"}, "best_of": 2}, 400),
        ({"guided_regex": "(((", "stream": True}, 400),
        ({}, 502),  # the client sent none
    ],
)
def test_a_clients_bad_grammar_is_its_own_fault(
    gateway: Callable[..., httpx.Client], fields: dict[str, Any], status: int
) -> None:
    def parts(_: dict[str, Any]) -> Iterator[bytes]:
        yield whole(
            {"error": {"message": "Failed to compile the grammar: unexpected ((("}}, "500 Internal Server Error"
        )

    answer = gateway(parts).post(CHAT, json={"messages": HELLO, **fields})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == ("invalid_grammar" if status == 400 else "policy_failed")


def test_another_failure_is_none_of_the_grammar(gateway: Callable[..., httpx.Client]) -> None:
    def parts(_: dict[str, Any]) -> Iterator[bytes]:
        yield whole({"error": {"message": "CUDA out of memory"}}, "500 Internal Server Error")

    body = {"messages": HELLO, "response_format": {"type": "json_object"}}
    assert gateway(parts).post(CHAT, json=body).status_code == 502


# --- early answers ---


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


RACING = {"messages": HELLO, "stream": True, "almost_stream": "racing"}


def growing(fields: dict[str, Any]) -> Iterator[bytes]:
    """Candidate 0 is the slowest and middling, 1 ends first and is short, 2 ends second and is the best."""
    assert fields["stream"] is True
    assert fields["stream_options"] == {"include_usage": True}
    yield STREAM
    for i in range(fields["n"]):
        yield chunk(i, {"role": "assistant", "content": ""})
    yield chunk(0, {"content": "slow"})
    yield chunk(1, {"content": "x"}) + chunk(1, {}, "stop")
    time.sleep(0.3)
    yield chunk(2, {"content": "the longest"}) + chunk(2, {"content": " of all"}, "stop")
    time.sleep(0.3)
    yield chunk(0, {"content": " and late"}, "length")
    usage = {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10}
    yield b'data: {"id": "c", "choices": [], "usage": ' + json.dumps(usage).encode() + b"}\n\ndata: [DONE]\n\n"


def test_the_best_so_far_is_told_while_others_are_drawn(gateway: Callable[..., httpx.Client]) -> None:
    client = gateway(growing)
    body = {**RACING, "best_of": 3, "almost_candidates": True, "stream_options": {"include_usage": True}}
    events = events_of(client.post(CHAT, json=body))
    racing = [event["almost"]["racing"] for event in events if "racing" in event.get("almost", {})]
    assert racing == [
        {"candidate": 0, "reward": None, "delta": "slow", "final": False},
        {"candidate": 1, "reward": 1.0, "text": "x", "final": False},
        {"candidate": 2, "reward": 18.0, "text": "the longest of all", "final": False},
        {"candidate": 2, "reward": 18.0, "final": True},
    ]
    # Who adds up the text has the final answer and nothing else.
    assert all(event["choices"][0]["delta"] == {} for event in events if "racing" in event.get("almost", {}))
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "the longest of all"
    *_, last, usage = events
    assert last["almost"] == {
        "best_of": 3,
        "reward": 18.0,
        "rewards": [13.0, 1.0, 18.0],
        "chosen": [2],
        "unscored": [],
        "fallback": None,
        "note": None,
        "candidates": [
            {"index": 0, "text": "slow and late", "reward": 13.0, "finish_reason": "length"},
            {"index": 1, "text": "x", "reward": 1.0, "finish_reason": "stop"},
            {"index": 2, "text": "the longest of all", "reward": 18.0, "finish_reason": "stop"},
        ],
    }
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] == 9


def test_it_is_told_early(gateway: Callable[..., httpx.Client]) -> None:
    told, in_time = threading.Event(), []

    def parts(fields: dict[str, Any]) -> Iterator[bytes]:
        yield STREAM + chunk(1, {"content": "x"}) + chunk(1, {}, "stop")
        in_time.append(told.wait(20))  # before anything else is drawn
        yield chunk(0, {"content": "later"}, "stop") + b"data: [DONE]\n\n"

    with gateway(parts).stream("POST", CHAT, json={**RACING, "best_of": 2}) as answer:
        for line in answer.iter_lines():
            if '"candidate": 1' in line:
                told.set()
    assert in_time == [True]


def test_a_candidate_cut_off_is_a_failure(gateway: Callable[..., httpx.Client]) -> None:
    def parts(fields: dict[str, Any]) -> Iterator[bytes]:
        yield STREAM + chunk(0, {"content": "half"}) + chunk(1, {"content": "whole"}, "stop") + b"data: [DONE]\n\n"

    *_, last = events_of(gateway(parts).post(CHAT, json={**RACING, "best_of": 2}))
    assert last["error"]["code"] == "policy_failed"
    assert "end of each candidate" in last["error"]["message"]


BROKEN = (
    b'data: {"error": {"message": "engine died"}}\n\n',
    b"data: {nonsense\n\n",
    b"data: 3\n\n",
    b'data: {"choices": [3]}\n\n',
    chunk(7, {"content": "no such candidate"}),
)


@pytest.mark.parametrize("said", BROKEN)
def test_a_broken_stream_is_a_failure(gateway: Callable[..., httpx.Client], said: bytes) -> None:
    def parts(fields: dict[str, Any]) -> Iterator[bytes]:
        yield STREAM + chunk(0, {"content": "begun"}) + said

    *_, last = events_of(gateway(parts).post(CHAT, json={**RACING, "best_of": 2}))
    assert last["error"]["code"] == "policy_failed"


def test_a_refusal_of_the_policy_is_passed_on(gateway: Callable[..., httpx.Client]) -> None:
    def parts(fields: dict[str, Any]) -> Iterator[bytes]:
        yield whole({"error": {"message": "too long"}}, "400 Bad Request")

    answer = gateway(parts).post(CHAT, json={**RACING, "best_of": 2})
    error = {"message": "too long", "type": "invalid_request_error", "param": None, "code": None}
    assert (answer.status_code, answer.json()) == (400, {"error": error})


def test_without_rewards_a_race_falls_back_or_fails(gateway: Callable[..., httpx.Client]) -> None:
    down = "http://127.0.0.1:9"
    *_, last = events_of(gateway(growing, reward_url=down).post(CHAT, json={**RACING, "best_of": 3}))
    assert last["error"]["code"] == "reward_unavailable"
    body = {**RACING, "best_of": 3, "best_of_fallback": True}
    events = events_of(gateway(growing, reward_url=down).post(CHAT, json=body))
    almost = events[-1]["almost"]
    assert (almost["chosen"], almost["rewards"]) == ([0], [None] * 3)
    assert "not reachable" in almost["fallback"]
    assert "".join(choice["delta"].get("content") or "" for e in events for choice in e["choices"]) == "slow and late"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"almost_stream": "racing"}, "almost_stream"),
        ({"almost_stream": "racing", "best_of": 2}, "almost_stream"),
        ({"almost_stream": "racing", "best_of": 2, "stream": True, "n": 2}, "n"),
        ({"almost_stream": "walking", "best_of": 2, "stream": True}, "almost_stream"),
    ],
)
def test_what_does_not_go_with_a_race(gateway: Callable[..., httpx.Client], more: dict[str, Any], param: str) -> None:
    answer = gateway(growing).post(CHAT, json={"messages": HELLO, **more})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_choice_is_put_together_from_its_chunks() -> None:
    growing_ = GrowingChoice()
    told = [
        growing_.add(choice)
        for choice in (
            {"delta": {"role": "assistant", "content": ""}, "finish_reason": None},
            {"delta": {"content": "a\ud83d"}, "logprobs": {"content": [{"token": "a"}]}},
            {
                "delta": {"content": "\ude00", "reasoning": "so"},
                "logprobs": {"content": [{"token": "b"}]},
                "token_ids": [1],
            },
            {"delta": {"reasoning": " it is"}, "token_ids": [2], "finish_reason": "stop", "stop_reason": 7},
        )
    ]
    assert told == ["", "a", "😀", ""]
    assert growing_.ended
    assert growing_.choice(3) == {
        "index": 3,
        "message": {"role": "assistant", "content": "a😀", "reasoning": "so it is"},
        "logprobs": {"content": [{"token": "a"}, {"token": "b"}]},
        "finish_reason": "stop",
        "stop_reason": 7,
        "token_ids": [1, 2],
    }
