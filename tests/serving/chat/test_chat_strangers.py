"""What strangers send to the page, and endpoints of strangers: bounded, told in a sentence, never a crash."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from raw_upstream import STREAM, chunk, raw_upstream, whole

from serving.chat.app import create_app
from serving.chat.client import Delta, Endpoint, EndpointError
from serving.chat.conversation import MAX_CHARACTERS, ChatReply, Conversation, Settings
from serving.chat.kept import record_of
from serving.chat.session import ChatSystem, Desk, Draw, Step, draw, draw_together
from serving.chat.visitors import Visitors

ID = "0123456789abcdef"
DONE = b"data: [DONE]\n\n"
HALF = "a\ud83d"
"""Half of a character, as JSON can hold it and no file and no answer can."""


# --- endpoints ---


def event(text: str) -> bytes:
    """A chunk that ends the answer "x", with more fields."""
    return f'data: {{"choices": [{{"delta": {{"content": "x"}}, "finish_reason": "stop"}}], {text}}}\n\n'.encode()


async def steps_of(url: str) -> list[Step]:
    system = ChatSystem("one", Endpoint(f"{url}/v1"), "m")
    messages = [{"role": "user", "content": "q"}]
    return [step async for step in draw(system, messages, Settings(), asyncio.Event())]


@pytest.mark.parametrize(
    "said",
    [
        event('"almost": {"chosen": [[1]], "candidates": [{"text": "a"}]}'),
        event('"almost": {"chosen": 5}'),
        event('"almost": {"candidates": [3]}'),
        event('"almost": [1]'),
        event('"usage": {"completion_tokens": NaN}'),
        event('"usage": {"completion_tokens": 1e999}'),
        event(f'"deep": {"[" * 100_000}{"]" * 100_000}'),
        event('"x": 1').replace(b'{"content": "x"}', b'["x"]'),
    ],
    ids=lambda said: said.decode()[70:120],
)
def test_what_no_endpoint_says_is_a_sentence(said: bytes) -> None:
    with raw_upstream(lambda _: iter((STREAM, said, DONE))) as url:
        *_, last = asyncio.run(steps_of(url))
    assert last.error is not None
    assert "no OpenAI-compatible reply" in str(last.error)


@pytest.mark.parametrize("field", ['"usage": {"completion_tokens": N}', '"almost": {"reward": N, "chosen": []}'])
def test_a_figure_that_no_float_holds_is_none(field: str) -> None:
    said = event(field.replace("N", "1" + "0" * 400))
    with raw_upstream(lambda _: iter((STREAM, said, DONE))) as url:
        *_, last = asyncio.run(steps_of(url))
    assert (last.error, last.reply.text, last.reply.tokens, last.reply.reward) == (None, "x", None, None)


def test_an_error_of_one_long_word_holds_nobody_up() -> None:
    """A pattern that looks for keys took the square of its length, in the one thread that all pages have."""
    began = time.monotonic()
    with raw_upstream(lambda _: iter((whole({"error": {"message": "x" * 400_000}}, "400 Bad"),))) as url:
        *_, last = asyncio.run(steps_of(url))
    assert "refuses the request (400): xxx" in str(last.error)
    assert len(str(last.error)) < 500
    assert time.monotonic() - began < 10


def test_the_first_event_is_read_after_a_byte_order_mark() -> None:
    said = b"\xef\xbb\xbf" + chunk(0, {"content": "All "})
    with raw_upstream(lambda _: iter((STREAM, said, chunk(0, {"content": "of it"}, "stop"), DONE))) as url:
        *_, last = asyncio.run(steps_of(url))
    assert last.reply.text == "All of it"


def test_an_answer_without_an_end_is_ended() -> None:
    def endless(_: Any) -> Iterator[bytes]:
        yield STREAM
        while True:
            yield chunk(0, {"content": "word " * 200})

    with raw_upstream(endless) as url:
        *_, last = asyncio.run(steps_of(url))
    assert last.error is not None
    assert "longer than 200,000 characters" in str(last.error)
    assert MAX_CHARACTERS - 10 <= len(last.reply.text) <= MAX_CHARACTERS


@pytest.mark.parametrize("together", [False, True])
def test_a_page_that_takes_long_to_show_is_told_less_often(together: bool) -> None:
    """A long answer takes long to set as HTML, in the one thread that all pages have."""

    class Quick(Endpoint):
        async def stream(self, *_: Any, **__: Any) -> Any:
            while True:
                await asyncio.sleep(0.01)
                yield Delta("x")

    async def shown() -> int:
        count, one = 0, Draw(ChatSystem("one", Quick("http://h/v1"), "m"), [], Settings())
        stop = asyncio.Event()
        steps = draw_together([one], stop) if together else draw(one.system, one.messages, one.settings, stop)
        async for _ in steps:
            count += 1
            time.sleep(0.1)  # what markdown takes
            if count == 3:
                break
        return count

    began = time.monotonic()
    assert asyncio.run(shown()) == 3
    assert time.monotonic() - began > 3 * 0.1 + 2 * 0.35  # at 0.05 s between two it would be 0.4 s


def test_rewards_are_numbers() -> None:
    async def rewards(url: str) -> list[float]:
        return await Endpoint(f"{url}/v1").rewards([[{"role": "user", "content": "q"}]])

    for value in ('"1.0"', "true", "NaN", "1" + "0" * 400, "null"):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            body = f'{{"rewards": [{value}]}}'.encode()
            head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()

            def serve(listening: socket.socket = listening, reply: bytes = head + body) -> None:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(reply)

            threading.Thread(target=serve, daemon=True).start()
            with pytest.raises(EndpointError, match="no OpenAI-compatible reply"):
                asyncio.run(rewards(f"http://127.0.0.1:{listening.getsockname()[1]}"))


# --- records ---


def talk(**reply: Any) -> dict[str, Any]:
    whole = Conversation().ask("q").answer(ChatReply("a")).to_dict() | {"id": ID}
    whole["turns"][0]["reply"] |= reply
    return whole


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"conversation": talk(tokens=10**400)}),
        json.dumps({"conversation": talk(reward=float("inf"))}),
        json.dumps({"conversation": talk() | {"dropped": 10**400}}),
        json.dumps({"conversation": talk()}).replace('"dropped": 0', '"dropped": 1e999'),
        "[" * 100_000,
    ],
    ids=lambda text: text[-40:],
)
def test_a_record_with_impossible_figures_is_new(text: str) -> None:
    assert record_of(text, Settings())[0].turns == ()


def test_settings_beyond_all_numbers_are_the_defaults() -> None:
    record = {"conversation": talk(), "settings": {"temperature": 10**400, "system": HALF}}
    conversation, settings = record_of(record, Settings(temperature=0.3))
    assert conversation.turns
    assert (settings.temperature, settings.system) == (Settings().temperature, "a\ufffd")


def test_half_a_character_is_kept_as_one_that_can_be_shown() -> None:
    conversation = Conversation().ask(HALF).reopen(0, HALF)
    assert conversation.turns[0].user == "a\ufffd"
    assert record_of({"conversation": talk(text=HALF)}, Settings())[0].turns[0].reply == ChatReply("a\ufffd")


# --- the page ---


@contextmanager
def page(folder: Path, login: str | None = None) -> Iterator[httpx.Client]:
    """A client of a page before two endpoints that are down."""
    desk = Desk([ChatSystem(name, Endpoint("http://127.0.0.1:9/v1"), "m") for name in ("one", "two")], folder, folder)
    desk.votes = folder / "votes.db"
    desk.conversations = folder / "kept.db" if login else None
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(create_app(desk, login), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        user = tuple(login.split(":")) if login else None
        with httpx.Client(base_url=address, auth=user, trust_env=False, timeout=30) as client:  # type: ignore[arg-type]
            yield client
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with page(tmp_path_factory.mktemp("page")) as client:
        yield client


@pytest.fixture
def log(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """What the server has written to its log since the test began."""
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(caplog.handler)
    yield lambda: capfd.readouterr().err + caplog.text
    logger.removeHandler(caplog.handler)


def number_of(config: dict[str, Any], elem_id: str, event_name: str = "click") -> int:
    """Of the event of a component."""
    ids = {component["id"]: component["props"].get("elem_id") for component in config["components"]}
    return next(
        int(event["id"])
        for event in config["dependencies"]
        if any((ids.get(target[0]), target[1]) == (elem_id, event_name) for target in event["targets"])
    )


@pytest.mark.parametrize("elem_id", ["send", "arena-send", "compare-send"])
def test_half_a_character_is_a_question_like_any_other(visitor: httpx.Client, elem_id: str) -> None:
    """It ended the stream of the page's events, and the tab waited for its answer for ever."""
    config = visitor.get("/config").json()
    number, session = number_of(config, elem_id), uuid.uuid4().hex
    values = {component["id"]: component["props"].get("value") for component in config["components"]}
    inputs = next(event["inputs"] for event in config["dependencies"] if event["id"] == number)
    body = {"data": [HALF, *(values[i] for i in inputs[1:])], "fn_index": number, "session_hash": session}
    headers = {"Content-Type": "application/json"}
    visitor.post("/gradio_api/queue/join", content=json.dumps(body), headers=headers).raise_for_status()
    told = ""
    with visitor.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as answer:
        for line in answer.iter_lines():
            told += line
            if '"process_completed"' in line or "unexpected_error" in line:
                break
    assert '"process_completed"' in told
    assert "unexpected_error" not in told
    assert "is not reachable" in told or "did not answer" in told


def test_a_body_has_an_end(visitor: httpx.Client) -> None:
    """Gradio reads all of a body into memory: 150 MB were taken, and more would have been."""
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        yield b'{"data": ["'
        for _ in range(64):
            sent += 1
            yield b"x" * (1 << 20)
        yield b'"], "fn_index": 0, "session_hash": "s"}'

    headers = {"Content-Type": "application/json"}
    for path in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
        assert visitor.post(path, content=pieces(), headers=headers).status_code == 413


def test_a_cookie_costs_no_time(visitor: httpx.Client) -> None:
    """Python's reader of cookies took 4 to 7 seconds for each of these, and nobody else was answered meanwhile."""
    for hostile in ('a="' + "\\1" * 30_000 + '"', 'a="' + '\\"' * 30_000 + '"'):
        began = time.monotonic()
        assert visitor.get("/", headers={"Cookie": hostile}).status_code == 200
        assert time.monotonic() - began < 2


def test_a_cookie_among_others_is_read() -> None:
    visitors = Visitors(7)
    pair = visitors.cookie().partition(";")[0]
    number = pair.partition("=")[2].partition(".")[0]
    for cookies in (pair, f"a=b; {pair}", f"{pair}; a=b", f'x="{pair}"; {pair}'):
        assert visitors.number_in(cookies) == number
    for cookies in (f"x{pair}", f"{pair}0", pair[:-1] + "é", pair.replace("_7=", "_8="), "", ";" * 60_000):
        assert visitors.number_in(cookies) is None


@pytest.mark.parametrize("name", ["a" * 300, ""])
def test_a_name_that_no_file_has_is_not_looked_for(visitor: httpx.Client, name: str) -> None:
    assert visitor.get(f"/assets/{name}").status_code == 404


EVENTS = ("/gradio_api/queue/join", "/gradio_api/run/predict")


@pytest.mark.parametrize(
    "change",
    [
        {"fn_index": 9999},
        {"fn_index": -1},
        {"fn_index": 10**30},
        {"fn_index": True},
        {"fn_index": "0"},
        {"fn_index": None},
        {"data": []},
        {"data": None},
        {"data": [5]},
        {"data": [["a"]]},
        {"session_hash": ""},
        {"session_hash": None},
        {"session_hash": HALF},
        {"session_hash": "a/b"},
        {"session_hash": "s" * 65},
        {"trigger_id": HALF},
        {"trigger_id": [float("nan")]},
    ],
    ids=lambda change: str(change)[:30],
)
@pytest.mark.parametrize("path", EVENTS)
def test_an_event_that_is_none_is_refused_in_one_line(
    visitor: httpx.Client, path: str, change: dict[str, Any], log: Callable[[], str]
) -> None:
    """Each was a 500, or a traceback in the log of a server that had nothing wrong with it."""
    number = number_of(visitor.get("/config").json(), "report-run", "input")
    body = json.dumps({"data": ["x"], "fn_index": number, "session_hash": "s", **change})
    refused = visitor.post(path, content=body, headers={"Content-Type": "application/json"})
    assert refused.status_code in (400, 422)
    assert refused.headers["content-type"].startswith("text/plain")
    assert len(refused.text.splitlines()) == 1
    assert log() == ""


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"data": NaN}', b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("path", [*EVENTS, "/gradio_api/cancel", "/gradio_api/reset"])
def test_a_body_that_is_no_event_is_refused_in_one_line(
    visitor: httpx.Client, path: str, body: bytes, log: Callable[[], str]
) -> None:
    refused = visitor.post(path, content=body, headers={"Content-Type": "application/json"})
    assert refused.status_code in (400, 422)
    assert len(refused.text.splitlines()) == 1
    assert log() == ""


def test_a_session_that_is_none_is_no_crash(visitor: httpx.Client, log: Callable[[], str]) -> None:
    """A page that is open when the server starts again asks so, and each left a traceback."""
    told = visitor.get("/gradio_api/queue/data", params={"session_hash": "nope"}).text
    assert json.loads(told.removeprefix("data: "))["session_not_found"] is True
    assert "Traceback" not in log()


@pytest.mark.parametrize(("elem_id", "event_name"), [("report-run", "input"), ("send", "click")])
def test_a_value_that_the_page_does_not_offer_leaves_no_traceback(
    visitor: httpx.Client, elem_id: str, event_name: str, log: Callable[[], str]
) -> None:
    """Of a list, and of a slider beyond its end: Gradio refused it, and wrote a traceback each time."""
    config = visitor.get("/config").json()
    number, session = number_of(config, elem_id, event_name), uuid.uuid4().hex
    components = {component["id"]: component for component in config["components"]}
    inputs = next(event["inputs"] for event in config["dependencies"] if event["id"] == number)
    outside: dict[str, Any] = {"dropdown": "../../etc/passwd", "slider": 10**9}
    data = [outside.get(components[i]["type"], components[i]["props"].get("value")) for i in inputs]
    assert set(data) & set(outside.values())
    body = {"data": data, "fn_index": number, "session_hash": session}
    visitor.post("/gradio_api/queue/join", json=body).raise_for_status()
    with visitor.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as answer:
        ended = next(line for line in answer.iter_lines() if '"process_completed"' in line)
    assert json.loads(ended.removeprefix("data: "))["success"] is False
    assert log() == ""


def test_several_who_listen_to_one_page_and_leave_are_no_crash(visitor: httpx.Client, log: Callable[[], str]) -> None:
    """From the second on, who left was a KeyError of Gradio's."""
    session = uuid.uuid4().hex
    body = {"data": [None], "fn_index": number_of(visitor.get("/config").json(), "report-run", "input")}
    visitor.post("/gradio_api/queue/join", json={**body, "session_hash": session}).raise_for_status()
    news = f"/gradio_api/queue/data?session_hash={session}"
    with ExitStack() as listeners:
        for _ in range(4):  # of whom one hears the event, and the others wait
            listeners.enter_context(visitor.stream("GET", news))
        time.sleep(0.5)
    time.sleep(0.5)  # they have left
    assert "Traceback" not in log()


# --- kept conversations ---


def test_what_is_put_can_be_had_again_or_is_refused(tmp_path: Path) -> None:
    """What was kept and could not be written as an answer made the conversation, and a search for it, a 500."""
    record = json.dumps({"name": "n", "version": 0, "conversation": talk(), "settings": {"best_of": 1}})
    with page(tmp_path, "ann:one") as ann:
        path = f"/conversations/{ID}"
        for old, new, status in (
            ('"best_of": 1', '"best_of": NaN', 400),
            ('"best_of": 1', '"best_of": 1e999', 400),
            ('"best_of": 1', '"best_of": 1' + "0" * 400, 200),
            ('"settings": {"best_of": 1}', '"settings": "\\ud83d"', 200),
            ('"settings": {"best_of": 1}', '"settings": {"other": "\\ud83d"}', 200),
            ('"name": "n"', '"name": "\\ud83d"', 200),
            ('"text": "a"', '"text": "\\ud83d"', 200),
            ('"user": "q"', '"user": "\\ud83d"', 200),
            ('"tokens": null', '"tokens": 1' + "0" * 400, 400),
            ('"dropped": 0', '"dropped": 1e999', 400),
            ('"dropped": 0', '"dropped": 1' + "0" * 400, 400),
            ('"name": "n"', '"name": ' + "[" * 100_000, 400),
        ):
            assert old in record
            body = record.replace(old, new)
            put = ann.put(path, content=body, headers={"Content-Type": "application/json"})
            assert (new[:40], put.status_code) == (new[:40], status)
            assert ann.get(path).status_code == (200 if status == 200 else 404)
            assert ann.get("/conversations").status_code == 200
            ann.delete(path)
