"""Conversations that are kept, in a browser or by the server; edits, clearing, waiting, losing the server."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser_fixtures import Server

from serving.chat.scripted import Script, ScriptedEndpoint

SHORT = {"width": 1280, "height": 800}


def reply(body: dict[str, Any]) -> Script:
    text = body["messages"][-1]["content"]
    if text.startswith("slow"):
        return Script([f"word{i} " for i in range(400)], delay_s=0.1)
    return Script((f"You said {text}",))


@pytest.fixture(scope="module")
def scripted(chat_server: Callable[..., Any]) -> Any:
    """A page that writes two answers at a time, before an endpoint that says a question again."""
    with ExitStack() as stack:
        endpoint = stack.enter_context(ScriptedEndpoint(reply))
        yield stack.enter_context(chat_server("--base-url", f"echo={endpoint.url}", "--concurrency", "2"))


def ask(page: Any, text: str, number: int = 0) -> None:
    """Ask, and wait for the answer."""
    page.fill("#message textarea", text)
    page.press("#message textarea", "Enter")
    page.locator("#past .turn.model").nth(number).wait_for()


def names(page: Any) -> list[str]:
    return list(page.locator(".shelf li .name").all_inner_texts())


def wait_for_names(page: Any, expected: list[str]) -> None:
    script = "(n) => JSON.stringify([...document.querySelectorAll('.shelf li .name')].map((e) => e.innerText)) === n"
    page.wait_for_function(script, arg=str(expected).replace("'", '"').replace('", "', '","'))


def questions(page: Any) -> list[str]:
    return list(page.locator("#past .turn.user .text").all_inner_texts())


def drive(page: Any) -> None:
    """Keep, name, search, open, delete and bring back."""
    ask(page, "What is a teapot?")
    ask(page, "And a kettle?", 1)
    page.get_by_role("button", name="New conversation").click()
    page.wait_for_selector(".welcome")
    ask(page, "Where do owls sleep?")
    wait_for_names(page, ["Where do owls sleep?", "What is a teapot?"])
    page.reload()
    page.locator("#past .turn.model").wait_for()
    assert questions(page) == ["Where do owls sleep?"]  # the tab has the conversation that it had

    page.get_by_label("Rename Where do owls sleep?").click()
    page.get_by_label("Name of the conversation").fill("Birds <b>at night</b>")
    page.keyboard.press("Enter")
    wait_for_names(page, ["Birds <b>at night</b>", "What is a teapot?"])
    page.fill(".shelf input[type=search]", "KETTLE")  # in what was said, not in the name
    wait_for_names(page, ["What is a teapot?"])
    page.locator(".shelf li .name").click()
    page.wait_for_function("document.querySelectorAll('#past .turn.user').length === 2")
    page.fill(".shelf input[type=search]", "")
    ask(page, "Thanks", 2)  # it goes on under its own name
    wait_for_names(page, ["What is a teapot?", "Birds <b>at night</b>"])

    page.locator(".shelf li").first.hover()
    page.get_by_label("Delete What is a teapot?").click()
    page.wait_for_selector(".welcome")
    wait_for_names(page, ["Birds <b>at night</b>"])
    page.locator(".shelf [role=status] button").click()
    page.wait_for_function("document.querySelectorAll('#past .turn.user').length === 3")
    assert sorted(names(page)) == ["Birds <b>at night</b>", "What is a teapot?"]


def test_conversations_are_kept_in_the_browser(
    scripted: Server, open_page: Callable[..., Any], shot: Callable[..., Path]
) -> None:
    page = open_page(scripted.url)
    drive(page)
    shot(page, "chat-kept")
    assert "in this browser" in page.inner_text("#whereabouts")
    assert "127.0.0.1" in page.inner_text("#whereabouts")  # where the endpoint is
    # A second tab has them too, and one of its own; nobody else has.
    second = open_page(scripted.url, context=page.context)
    second.wait_for_selector(".welcome")
    assert len(names(second)) == 2
    stranger = open_page(scripted.url)
    stranger.wait_for_selector(".welcome")
    assert names(stranger) == []


def test_two_tabs_do_not_overwrite_each_other(scripted: Server, open_page: Callable[..., Any]) -> None:
    one = open_page(scripted.url)
    ask(one, "shared beginning")
    two = open_page(scripted.url, context=one.context)
    two.locator(".shelf li .name").click()
    two.locator("#past .turn.model").wait_for()
    ask(one, "said in tab one", 1)
    ask(two, "said in tab two", 1)
    two.wait_for_function("document.querySelectorAll('.shelf li').length === 2")
    assert "Another tab has changed" in two.inner_text(".shelf [role=status]")
    for page, said in ((one, "said in tab one"), (two, "said in tab two")):
        page.reload()
        page.locator("#past .turn.model").nth(1).wait_for()
        assert questions(page) == ["shared beginning", said]


def test_with_a_login_the_server_keeps_them_for_each_user(
    chat_server: Callable[..., Any], open_page: Callable[..., Any], browser: Any, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        endpoint = stack.enter_context(ScriptedEndpoint(reply))
        login = "ann:one\nbob:two"
        options = ["--auth", "--base-url", endpoint.url, "--conversations", str(tmp_path / "kept.db")]
        server = stack.enter_context(chat_server(*options, ALMOST_CHAT_AUTH=login))

        def visitor(user: str, password: str) -> Any:
            credentials = {"username": user, "password": password}
            return open_page(server.url, context=browser.new_context(viewport=SHORT, http_credentials=credentials))

        ann = visitor("ann", "one")
        drive(ann)
        assert "server" in ann.inner_text("#whereabouts")
        assert ann.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('almost-chat/'))") == []
        elsewhere = visitor("ann", "one")  # another browser of hers
        wait_for_names(elsewhere, names(ann))
        bob = visitor("bob", "two")
        bob.wait_for_selector(".welcome")
        assert names(bob) == []
        (tmp_path / "kept.db").stat()


def test_an_edit_can_be_cancelled_and_clearing_undone(
    scripted: Server, open_page: Callable[..., Any], shot: Callable[..., Path]
) -> None:
    page = open_page(scripted.url, SHORT)
    for number, text in enumerate(("first", "second", "third")):
        ask(page, text, number)
    for cancel in (lambda: page.click("#cancel-edit"), lambda: page.keyboard.press("Escape")):
        page.fill("#message textarea", "half a thought")
        page.locator("#past .turn.user").first.get_by_role("button", name="Edit").click()
        page.wait_for_selector("#cancel-edit")
        assert page.input_value("#message textarea") == "first"
        assert "the 2 after it will be replaced" in page.inner_text("#notice")
        shot(page, "chat-editing")
        cancel()
        page.wait_for_selector("#cancel-edit", state="detached")
        assert page.input_value("#message textarea") == "half a thought"
        assert questions(page) == ["first", "second", "third"]
    # An edit that is sent can be taken back, too.
    page.locator("#past .turn.user").nth(1).get_by_role("button", name="Edit").click()
    page.wait_for_selector("#cancel-edit")
    page.fill("#message textarea", "another second")
    page.press("#message textarea", "Enter")
    page.wait_for_selector("#restore")
    assert questions(page) == ["first", "another second"]
    page.click("#restore")
    page.wait_for_function("document.querySelectorAll('#past .turn.user').length === 3")
    page.click("#clear")
    page.wait_for_selector(".welcome")
    assert names(page) == []
    page.click("#restore")
    page.wait_for_function("document.querySelectorAll('#past .turn.user').length === 3")
    wait_for_names(page, ["first"])
    page.reload()
    page.locator("#past .turn.model").nth(2).wait_for()


# --- waiting ---


def crowd(server: Server, count: int) -> list[threading.Thread]:
    """So many visitors whose questions take long; they leave with their threads."""
    config = httpx.get(f"{server.url}/config", trust_env=False).json()
    ids = {component["id"]: component["props"].get("elem_id") for component in config["components"]}
    number = next(
        event["id"]
        for event in config["dependencies"]
        if any(ids.get(target[0]) == "send" and target[1] == "click" for target in event["targets"])
    )
    names = [ids.get(one) for one in next(e for e in config["dependencies"] if e["id"] == number)["inputs"]]
    data = {"message": "slow please", "system": "echo", "temperature": 0.7, "top-p": 0.9, "max-tokens": 64}
    inputs = [data.get(name or "", 1 if name == "best-of" else None) for name in names]

    def visit() -> None:
        session = uuid.uuid4().hex
        with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:
            join = {"data": inputs, "fn_index": number, "session_hash": session}
            client.post("/gradio_api/queue/join", json=join).raise_for_status()
            with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as told:
                until = time.monotonic() + 40
                for _ in told.iter_lines():
                    if time.monotonic() > until or done.is_set():
                        return

    done.clear()
    threads = [threading.Thread(target=visit, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


done = threading.Event()


def test_who_waits_sees_the_question_the_place_and_the_time(
    scripted: Server, open_page: Callable[..., Any], shot: Callable[..., Path]
) -> None:
    page = open_page(scripted.url, SHORT)
    threads = crowd(scripted, 45)  # more than the 40 events that gradio works on unless it is told otherwise
    try:
        page.wait_for_timeout(3000)
        page.fill("#message textarea", "Is anybody there?")
        page.press("#message textarea", "Enter")
        page.wait_for_function(
            "/Number \\d+ in the queue, \\d+ s so far/.test(document.querySelector('#live').innerText)"
        )
        assert questions(page) == ["Is anybody there?"]
        assert page.input_value("#message textarea") == ""
        shot(page, "chat-waiting")
        page.click("#stop")  # nobody has to wait
        page.wait_for_selector("#send")
        assert "stopped" in page.inner_text("#past")
        # As many wait as may: the next is told so in a sentence, and the question stays.
        more = crowd(scripted, 40)
        threads += more
        page.wait_for_timeout(4000)
        page.fill("#message textarea", "And now?")
        page.press("#message textarea", "Enter")
        page.wait_for_function("document.querySelector('#notice').innerText.includes('as many as this server keeps')")
        assert questions(page)[-1] == "And now?"
        assert page.locator("#send").is_visible()
        box = page.locator("#message textarea").bounding_box()
        assert box["y"] + box["height"] <= SHORT["height"]  # the notice takes its room from the transcript
        shot(page, "chat-full")
    finally:
        done.set()
        for thread in threads:
            thread.join(20)


def test_a_page_that_lost_its_server_can_be_used_again(
    chat_server: Callable[..., Any], open_page: Callable[..., Any]
) -> None:
    with ScriptedEndpoint(reply) as endpoint:
        with chat_server("--base-url", endpoint.url) as server:
            page = open_page(server.url)
            page.fill("#message textarea", "slow please")
            page.press("#message textarea", "Enter")
            page.wait_for_selector("#live .md")
            server.process.kill()
            server.process.wait()
            page.wait_for_selector(".lost")
            port = server.url.rpartition(":")[2]
        page.set_default_timeout(60_000)
        with chat_server("--base-url", endpoint.url, "--port", port):
            page.wait_for_selector("#past .turn.open")
            assert questions(page) == ["slow please"]
            page.wait_for_selector("#send", state="visible")
            ask(page, "quick please")
            page.traffic.complaints.clear()  # of the connection that broke
