"""The client of endpoints, against a scripted one over real HTTP; and the values that a conversation is."""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest
from fake_upstream import Served
from raw_upstream import STREAM, chunk, raw_upstream

from almost_eval.errors import InputError
from serving.chat.client import Abilities, Address, Delta, Draft, End, Endpoint, EndpointError
from serving.chat.conversation import ChatCandidate, ChatReply, Conversation, Settings
from serving.chat.scripted import Script, ScriptedEndpoint
from serving.chat.session import ChatSystem, RateLimit, Step, draw
from serving.chat.visitors import Visitors

ASK = [{"role": "user", "content": "hello"}]


def run(ask: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(ask())  # type: ignore[arg-type]


def answered(endpoint: Endpoint, settings: Settings = Settings()) -> tuple[str, End]:  # noqa: B008
    async def ask() -> list[Draft | Delta | End]:
        return [event async for event in endpoint.stream("scripted", ASK, settings)]

    *deltas, end = run(ask)
    assert isinstance(end, End)
    return "".join(delta.text for delta in deltas), end


def refused(script: Script, **more: Any) -> EndpointError:
    with ScriptedEndpoint(script, **more) as server, pytest.raises(EndpointError) as error:
        answered(Endpoint(server.url))
    return error.value


# --- addresses ---


@pytest.mark.parametrize(
    ("given", "name", "url", "model"),
    [
        ("http://127.0.0.1:8000/v1", "127.0.0.1:8000", "http://127.0.0.1:8000/v1", None),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", "http://127.0.0.1:8000/v1", None),
        ("ours=https://host/v1/#big/model", "ours", "https://host/v1", "big/model"),
        ("http://host/v1#m", "m", "http://host/v1", "m"),
    ],
)
def test_addresses(given: str, name: str, url: str, model: str | None) -> None:
    assert Address.parse(given) == Address(name, url, model)


@pytest.mark.parametrize("given", ["host:8000", "ftp://host/v1", "http://", "http://host:x/v1", "nonsense", "a=b"])
def test_malformed_addresses_are_refused(given: str) -> None:
    with pytest.raises(InputError, match="is not an http"):
        Address.parse(given)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(InputError) as error:
        Address.parse("http://me:hunter2@host/v1")
    assert "hunter2" not in str(error.value)


# --- what an endpoint can do ---


def test_a_plain_endpoint_has_no_rewards_and_a_gateway_has() -> None:
    with ScriptedEndpoint() as plain, ScriptedEndpoint(rewards=len) as gateway:
        assert run(Endpoint(plain.url).abilities) == Abilities(("scripted",), False, 1)
        assert run(Endpoint(gateway.url).abilities) == Abilities(("scripted",), True, 8)


def test_the_toolkits_own_gateway_is_recognised() -> None:
    from serving.chat.client import _read_abilities
    from serving.gateway.openapi import openapi
    from serving.gateway.settings import GatewaySettings

    settings = GatewaySettings(policy_url="http://h", reward_url="http://r", max_best_of=12, api_key=None)
    assert _read_abilities(("m",), openapi(settings)) == Abilities(("m",), True, 12, True)


# --- answers ---


def test_a_stream_is_told_piece_by_piece_with_what_was_asked() -> None:
    with ScriptedEndpoint(Script(("One", " two", " three."))) as server:
        text, end = answered(Endpoint(server.url), Settings(temperature=0.3, top_p=0.8, max_tokens=7))
    assert text == "One two three."
    assert (end.ending, end.tokens, end.candidates) == ("stop", 3, ())
    (sent,) = server.requests
    assert {name: sent[name] for name in ("messages", "temperature", "top_p", "max_tokens", "stream")} == {
        "messages": ASK,
        "temperature": 0.3,
        "top_p": 0.8,
        "max_tokens": 7,
        "stream": True,
    }
    assert "best_of" not in sent


def test_best_of_returns_every_candidate_with_its_reward() -> None:
    with ScriptedEndpoint(Script(("short", "the longest", "longer")), rewards=len) as server:
        text, end = answered(Endpoint(server.url), Settings(best_of=3))
    assert text == "the longest"
    assert end.reward == 11.0
    assert end.candidates == (
        ChatCandidate("short", 5, False),
        ChatCandidate("the longest", 11, True),
        ChatCandidate("longer", 6, False),
    )
    assert server.requests[0]["best_of"] == 3
    assert server.requests[0]["almost_candidates"] is True


def test_line_separators_in_an_answer_end_no_line() -> None:
    """U+2028, U+2029 and U+0085 as they are, not escaped: JSON may hold them so."""
    texts = ("before\u2028after. ", "nel\u0085next. ", "para\u2029graph.\x1e")
    events = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    garbage = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
    with ScriptedEndpoint(Script((), garbage=garbage.replace("\\u001e", "\\u001e"))) as server:
        assert answered(Endpoint(server.url))[0] == "".join(texts)


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
def test_halves_of_a_character_and_every_kind_of_line_end(end: str) -> None:
    events = [
        json.dumps({"choices": [{"index": 0, "delta": {"content": half}}]}) for half in ("a\ud83d", "\ude00b\ud800")
    ]
    garbage = "".join(f"data:{event}{end}{end}" for event in events)
    with ScriptedEndpoint(Script((), garbage=garbage)) as server:
        assert answered(Endpoint(server.url))[0] == "a😀b\ufffd"


def test_an_event_without_an_end_is_given_up() -> None:
    garbage = "data: " + "a" * (5 << 20)
    with ScriptedEndpoint(Script((), garbage=garbage)) as server, pytest.raises(EndpointError, match="no OpenAI"):
        answered(Endpoint(server.url))


def test_a_list_of_models_without_an_end_is_given_up() -> None:
    async def endless(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(300):
            await send({"type": "http.response.body", "body": b" " * (1 << 20), "more_body": True})

    with Served.of(endless) as served, pytest.raises(EndpointError, match="no OpenAI"):
        run(Endpoint(f"{served.url}/v1").abilities)


def test_the_best_so_far_is_shown_before_the_best() -> None:
    """Of the toolkit's own gateway: candidate 0 grows, 1 is scored first, 0 is the best in the end."""

    def parts(fields: dict[str, Any]) -> Iterator[bytes]:
        yield STREAM + chunk(0, {"content": " Slow"})
        time.sleep(0.3)
        yield chunk(1, {"content": "one"}, "stop")
        time.sleep(0.3)
        yield chunk(0, {"content": " and long"}, "stop") + b"data: [DONE]\n\n"

    async def ask(url: str) -> list[Step]:
        system = ChatSystem("s", Endpoint(f"{url}/v1"), "m")
        return [step async for step in draw(system, ASK, Settings(best_of=2), asyncio.Event())]

    from serving.gateway.app import GatewaySettings, create_app

    with raw_upstream(parts) as url:
        settings = GatewaySettings(policy_url=url, reward_url=url, api_key=None)
        with Served.of(create_app(settings)) as served:
            steps = asyncio.run(ask(served.url))
    texts = list(dict.fromkeys(step.reply.text for step in steps))
    assert texts[:2] == ["Slow", "one"]
    assert texts[-1] == "Slow and long"
    last = steps[-1]
    assert (last.done, last.error, last.reply.reward) == (True, None, 13.0)
    assert [(one.text, one.chosen) for one in last.reply.candidates] == [("Slow and long", True), ("one", False)]


def test_leaving_a_stream_ends_it_upstream() -> None:
    with ScriptedEndpoint(Script(["word "] * 200, delay_s=0.02)) as server:

        async def ask() -> None:
            stop, system = asyncio.Event(), ChatSystem("s", Endpoint(server.url))
            async for step in draw(system, ASK, Settings(), stop):
                if step.reply.text.count("word") > 3:
                    stop.set()
                last = step
            assert last.done
            assert last.reply.ending == "stopped"
            assert 3 < last.reply.text.count("word") < 100
            for _ in range(100):
                if server.unfinished:
                    return
                await asyncio.sleep(0.02)

        run(ask)
        assert server.unfinished == 1


def test_an_answer_grows_before_its_end_and_has_a_reward_at_it() -> None:
    with ScriptedEndpoint(Script(("a ", "b ", "c"), delay_s=0.12), rewards=lambda text: -len(text)) as server:

        async def ask() -> list[Step]:
            system = ChatSystem("s", Endpoint(server.url))
            return [step async for step in draw(system, ASK, Settings(), asyncio.Event())]

        *growing, last = run(ask)
    assert [step.reply.text for step in growing] == ["a ", "a b ", "a b c"][: len(growing)]
    assert len(growing) >= 2
    assert last.done
    assert (last.reply.text, last.reply.reward, last.reply.tokens) == ("a b c", -5.0, 3)
    assert last.reply.seconds is not None
    assert last.reply.seconds >= 0.36


# --- failures are sentences ---


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        (Script(status=400, error={"message": "full", "code": "context_length_exceeded"}), "context_full", "full"),
        (
            Script(status=400, error={"message": "This model's maximum context length is 2048 tokens."}),
            "context_full",
            "do not fit",
        ),
        (Script(status=404, error={"message": "no model x"}), "refused", "no such model"),
        (Script(status=429, error={"message": "slow down"}), "busy", "busy"),
        (Script(status=503, error={"message": "loading", "code": "x"}), "loading", "still loading"),
        (Script(status=503, error={"message": "it is down", "code": "reward_unavailable"}), "reward", "reward model"),
        (Script(status=502, error={"message": "policy down", "code": "policy_failed"}), "down", "does not answer"),
        (Script(status=500, error={}), "refused", "(500)"),
        (Script(cut=True), "broken", "broke off"),
        (Script(garbage='data: {"choices": [7]}\n\n'), "broken", "no OpenAI-compatible reply"),
        (Script(garbage="data: not JSON\n\n"), "broken", "no OpenAI-compatible reply"),
        (Script(garbage='data: {"error": {"message": "out of memory"}}\n\n'), "refused", "out of memory"),
    ],
)
def test_every_failure_is_a_sentence(script: Script, kind: str, words: str) -> None:
    error = refused(script)
    assert error.kind == kind
    assert words in str(error)
    assert str(error).endswith(".")
    assert "\n" not in str(error)


def test_an_endpoint_that_is_down_is_a_sentence_within_seconds() -> None:
    with ScriptedEndpoint() as server:
        url = server.url
    began = time.perf_counter()
    with pytest.raises(EndpointError) as error:
        answered(Endpoint(url))
    assert error.value.kind == "down"
    assert time.perf_counter() - began < 6


def test_a_wrong_key_is_a_sentence_without_the_key() -> None:
    with ScriptedEndpoint(key="right") as server:
        with pytest.raises(EndpointError) as error:
            answered(Endpoint(server.url, "wrong-key-1"))
        assert answered(Endpoint(server.url, "right"))[0] == "All is well."
    assert error.value.kind == "key"
    assert "wrong-key-1" not in str(error.value)
    assert "wrong-key-1" not in repr(Endpoint(server.url, "wrong-key-1"))


def test_a_key_that_the_server_repeats_is_struck_out() -> None:
    script = Script(status=400, error={"message": "I got k3y"})
    with ScriptedEndpoint(script) as server, pytest.raises(EndpointError) as error:
        answered(Endpoint(server.url, "k3y"))
    assert "k3y" not in str(error.value)


def test_a_broken_stream_keeps_what_had_come() -> None:
    with ScriptedEndpoint(Script(("Half an", " answer"), cut=True)) as server:

        async def ask() -> list[Step]:
            system = ChatSystem("s", Endpoint(server.url))
            return [step async for step in draw(system, ASK, Settings(), asyncio.Event())]

        last = run(ask)[-1]
    assert last.error is not None
    assert (last.reply.text, last.reply.ending) == ("Half an answer", "broken")


# --- conversations ---


def talk(*pairs: tuple[str, str]) -> Conversation:
    conversation = Conversation()
    for question, answer in pairs:
        conversation = conversation.ask(question).answer(ChatReply(answer))
    return conversation


def test_retry_edit_undo() -> None:
    both = talk(("q1", "a1"), ("q2", "a2"))
    assert both.reopen(1).messages("") == [*talk(("q1", "a1")).messages(""), {"role": "user", "content": "q2"}]
    assert both.reopen(0, "other").messages("") == [{"role": "user", "content": "other"}]
    assert both.undo() == (talk(("q1", "a1")), "q2")
    assert Conversation().undo() == (Conversation(), "")


def test_dropping_the_oldest_keeps_them_on_the_page_and_the_last_question_in_sight() -> None:
    open_ = talk(("q1", "a1"), ("q2", "a2")).ask("q3")
    shorter = open_.drop_oldest(5)
    assert shorter.messages("s") == [{"role": "system", "content": "s"}, {"role": "user", "content": "q3"}]
    assert len(shorter.turns) == 3


def test_the_download_is_a_line_of_sft_data() -> None:
    from datasets import Dataset

    line = talk(("q1", "a1"), ("q2", 'with "quotes"\nand a line')).ask("open").jsonl("Be kind.")
    (row,) = Dataset.from_list([json.loads(line)])
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert line.count("\n") == 1
    assert Conversation().ask("open").jsonl("") == ""


def test_a_conversation_survives_the_browser() -> None:
    whole = (
        talk(("q", "a"))
        .ask("q2")
        .answer(ChatReply("x", "m", 1.5, (ChatCandidate("x", 1.5, True), ChatCandidate("y", None)), 12, 0.5, "length"))
    )
    assert Conversation.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        {},
        {"turns": "x"},
        {"turns": [{"user": 1}]},
        {"turns": [{"user": "q"}, {"user": "q"}]},
        {"turns": [{"user": "q", "reply": {"text": "a"}}]},
    ],
)
def test_nonsense_from_the_browser_is_an_empty_conversation(value: object) -> None:
    assert Conversation.from_dict(value) == Conversation()


def test_settings_from_the_browser_stay_in_range() -> None:
    assert Settings.checked("s", 9, -1, "x", float("nan"), most=4) == Settings("s", 2.0, 0.01, 256, 1)
    assert Settings.checked(None, 0.5, 1, 10, 99, most=4) == Settings("", 0.5, 1.0, 10, 4)


def test_the_rate_limit_is_each_visitors_own() -> None:
    limit = RateLimit(2)
    asked: Sequence[bool] = [limit.admits("a", "1.1.1.1", now) for now in (0.0, 1.0, 2.0, 59.0, 60.5)]
    assert list(asked) == [True, True, False, False, True]
    assert limit.admits("b", "2.2.2.2", 2.0)


def test_a_new_visitor_of_the_same_address_is_no_new_allowance() -> None:
    limit = RateLimit(2)
    assert [limit.admits(visitor, "1.1.1.1", 0.0) for visitor in "abc"] == [True, True, False]
    shared = RateLimit(2, 3)  # a school, behind one address
    assert [shared.admits(visitor, "1.1.1.1", 0.0) for visitor in "aaabb"] == [True, True, False, True, False]


def test_a_visitor_is_who_has_the_cookie_and_of_the_others_an_address() -> None:
    visitors = Visitors(7860)
    cookie = visitors.cookie().partition(";")[0]
    own = visitors.asker("page", cookie, "1.1.1.1")
    assert own == visitors.asker("page", f"a=b; {cookie}", "1.1.1.1")
    assert re.fullmatch("[0-9a-f]{32}", own.visitor)
    name, _, value = cookie.partition("=")
    assert name == "almost_visitor_7860"
    forged = [
        f"{name}={'f' * 32}.{value.partition('.')[2]}",
        f"{name}={'f' * 32}",
        f"{name}=",
        "a\x00=;;=",
        Visitors(7860).cookie(),
    ]
    nobody = {visitors.asker(page, sent, "1.1.1.1").visitor for page in "ab" for sent in forged}
    assert len(nobody) == 1
    assert nobody.isdisjoint({own.visitor, visitors.asker("a", "", "2.2.2.2").visitor})
    assert visitors.asker("a", "", "2001:db8:1:2::3").address == visitors.asker("a", "", "2001:db8:1:2:9::").address
    assert visitors.asker("a", "", "::ffff:1.1.1.1").address == own.address
