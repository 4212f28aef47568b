"""Talking to the built-in model in chromium, end to end."""

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from browser_fixtures import DESKTOP, PHONE, Server

from serving.chat.scripted import Script, ScriptedEndpoint

QUESTION = "What does the hamster eat?"


WIDEST = "Math.max(...[...document.querySelectorAll('button, textarea')].map((e) => e.getBoundingClientRect().right))"
"""The right edge of whatever can be pressed or typed into, in pixels: the page itself hides what runs over."""


def ask(page: Any, text: str) -> None:
    page.fill("#message textarea", text)
    page.press("#message textarea", "Enter")


def answer(page: Any, number: int = 0) -> Any:
    """The finished answer of a turn."""
    found = page.locator("#past .turn.model").nth(number)
    found.wait_for()
    return found


def slide(page: Any, id: str, value: float) -> None:
    box = page.locator(f"#{id} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def test_a_conversation_end_to_end(nano: Server, open_page: Callable[..., Any], shot: Callable[..., Path]) -> None:
    page = open_page(nano.url)
    page.wait_for_selector(".example")
    shot(page, "chat-empty")
    examples = page.locator(".example")
    assert examples.count() == 4
    examples.first.click()
    first = answer(page)
    assert first.locator(".md").inner_text().strip()
    assert re.search(r"reward\s*[+\u2212]\d", first.locator(".badge").inner_text())
    assert "tokens/s" in first.locator(".facts").inner_text()
    ask(page, QUESTION)
    answer(page, 1)
    shot(page, "chat")

    # Retry draws another answer to the last question, and keeps what is above.
    kept = first.locator(".md").inner_text()
    page.locator("#past .turn.model").nth(1).get_by_role("button", name="Retry").click()
    page.wait_for_selector("#live .live", state="attached")
    page.wait_for_selector("#send", state="visible")
    assert page.locator("#past .turn.model").count() == 2
    assert answer(page).locator(".md").inner_text() == kept

    # Edit the first question: what followed is gone.
    page.locator("#past .turn.user").first.get_by_role("button", name="Edit").click()
    page.wait_for_function("document.querySelector('#message textarea').value !== ''")
    ask(page, "How big is the donkey?")
    page.wait_for_function("document.querySelectorAll('#past .turn.user').length === 1")
    answer(page)
    assert page.locator("#past .turn.user .text").inner_text() == "How big is the donkey?"

    # Undo gives the question back; clear leaves nothing.
    page.click("#undo")
    page.wait_for_selector(".welcome")
    assert page.input_value("#message textarea") == "How big is the donkey?"
    page.press("#message textarea", "Enter")
    answer(page)
    page.click("#clear")
    page.wait_for_selector(".welcome")


def test_best_of_opens_its_candidates(nano: Server, open_page: Callable[..., Any], shot: Callable[..., Path]) -> None:
    page = open_page(nano.url)
    page.wait_for_selector("#best-of")
    slide(page, "best-of", 6)
    slide(page, "temperature", 1.6)
    ask(page, QUESTION)
    reply = answer(page)
    assert "best of 6" in reply.locator(".facts").inner_text()
    # Opened with the keyboard alone.
    reply.locator(".candidates > summary").focus()
    page.keyboard.press("Enter")
    rows = reply.locator(".candidate")
    assert rows.count() == 6
    scores = [float(text.replace("\u2212", "-")) for text in rows.locator(".score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    assert rows.first.get_attribute("class") == "candidate chosen"
    rows.nth(1).locator("summary").click()
    assert rows.nth(1).locator(".md").is_visible()
    assert rows.first.locator(".md").inner_text(timeout=1000) is not None
    shot(page, "chat-best-of-n")


def test_streaming_is_seen_before_the_end_and_stop_ends_it(
    chat_server: Callable[..., Any], open_page: Callable[..., Any]
) -> None:
    with ExitStack() as stack:
        endpoint = stack.enter_context(ScriptedEndpoint(Script([f"word{i} " for i in range(300)], delay_s=0.03)))  # 9 s
        server = stack.enter_context(chat_server("--base-url", f"slow={endpoint.url}"))
        page = open_page(server.url)
        ask(page, "Count")
        page.wait_for_function("(document.querySelector('#live .md')?.innerText || '').includes('word3')")
        seen = page.locator("#live .md").inner_text()
        assert "word299" not in seen
        page.wait_for_function(
            "(seen) => (document.querySelector('#live .md')?.innerText || '').length > seen", arg=len(seen)
        )
        page.press("#message textarea", "Escape")
        reply = answer(page)
        assert "stopped" in reply.locator(".facts").inner_text()
        text = reply.locator(".md").inner_text()
        assert "word3" in text
        assert "word299" not in text
        page.wait_for_timeout(500)
        assert endpoint.unfinished == 1  # upstream has stopped too
        page.wait_for_selector("#send", state="visible")
        assert not page.locator("#best-of").is_visible()  # a plain endpoint has none
        assert page.locator("#past .badge").count() == 0

        # Closing the page ends the work upstream as well.
        ask(page, "Again")
        page.wait_for_selector("#live .md")
        assert page.traffic.complaints == []
        page.goto("about:blank")
        page.traffic.complaints.clear()  # of the requests that leaving broke off
        for _ in range(100):
            if endpoint.unfinished == 2:
                break
            page.wait_for_timeout(100)
        assert endpoint.unfinished == 2


def test_reload_keeps_the_conversation_and_the_settings(nano: Server, open_page: Callable[..., Any]) -> None:
    page = open_page(nano.url)
    page.wait_for_selector("#best-of")
    slide(page, "temperature", 0)
    page.fill("#instruction textarea", "Be brief.")
    ask(page, QUESTION)
    text = answer(page).locator(".md").inner_text()
    page.wait_for_timeout(300)
    page.reload()
    assert answer(page).locator(".md").inner_text() == text
    assert page.input_value("#instruction textarea") == "Be brief."
    assert page.input_value("#temperature input[type=number]") == "0"
    # The conversation goes on from there.
    ask(page, "How big is the donkey?")
    answer(page, 1)


def test_two_visitors_share_nothing(nano: Server, open_page: Callable[..., Any]) -> None:
    one, two = open_page(nano.url), open_page(nano.url)
    slide(one, "temperature", 2)
    ask(one, "Where does the squid live?")
    ask(two, QUESTION)
    answer(one)
    answer(two)
    assert one.locator("#past .turn.user .text").all_inner_texts() == ["Where does the squid live?"]
    assert two.locator("#past .turn.user .text").all_inner_texts() == [QUESTION]
    two.reload()
    answer(two)
    assert two.input_value("#temperature input[type=number]") == "0.7"


def test_download_and_copy(nano: Server, open_page: Callable[..., Any], tmp_path: Path) -> None:
    page = open_page(nano.url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, QUESTION)
    text = answer(page).locator(".md").inner_text().strip()
    with page.expect_download() as waiting:
        page.click("#download")
    waiting.value.save_as(tmp_path / "c.jsonl")
    (line,) = (tmp_path / "c.jsonl").read_text(encoding="utf-8").splitlines()
    messages = json.loads(line)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"] == QUESTION
    answer(page).get_by_role("button", name="Copy this answer").click()
    assert page.evaluate("navigator.clipboard.readText()").split() == text.split()
    page.click("#copy-all")
    page.wait_for_function("navigator.clipboard.readText().then((t) => t.startsWith('Human: '))")


def test_dark_and_light(nano: Server, open_page: Callable[..., Any], shot: Callable[..., Path]) -> None:
    page = open_page(nano.url, dark=True)
    page.wait_for_selector(".example")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(18, 21, 28)"
    ask(page, QUESTION)
    answer(page)
    shot(page, "chat-dark")
    page.click("#theme")
    assert page.evaluate(background) == "rgb(247, 248, 250)"
    page.reload()
    answer(page)
    assert page.evaluate(background) == "rgb(247, 248, 250)"


def test_readable_on_a_phone(nano: Server, open_page: Callable[..., Any], shot: Callable[..., Path]) -> None:
    page = open_page(nano.url, PHONE)
    page.wait_for_selector(".example")
    ask(page, QUESTION)
    answer(page)
    shot(page, "chat-phone")
    assert page.evaluate(WIDEST) <= PHONE["width"]
    box = page.locator("#message textarea").bounding_box()
    assert box["y"] + box["height"] <= PHONE["height"]  # no scrolling before one can type
    assert box["width"] >= 200
    size = page.evaluate("parseFloat(getComputedStyle(document.querySelector('#past .md')).fontSize)")
    assert size >= 15
    for tab in ("Side by side", "Arena", "Report"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(200)
        shot(page, f"{tab.lower().replace(' ', '-')}-phone")
        assert page.evaluate(WIDEST) <= PHONE["width"]


def test_keyboard_alone(nano: Server, open_page: Callable[..., Any]) -> None:
    page = open_page(nano.url, DESKTOP)
    page.wait_for_selector(".example")
    page.locator(".example").first.focus()
    page.keyboard.press("Enter")
    answer(page)
    seen = set()
    page.locator("#theme").focus()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.closest('[id]')?.id"))
        seen.add(page.evaluate("document.activeElement.innerText"))
    assert {"transcript", "undo", "clear", "copy-all", "download", "send", "Retry", "Copy", "Edit"} <= seen


# --- errors ---


def test_a_failing_endpoint_is_a_sentence_and_the_conversation_stays(
    chat_server: Callable[..., Any], open_page: Callable[..., Any]
) -> None:
    full = Script(status=400, error={"message": "the context is full", "code": "context_length_exceeded"})
    asked: list[int] = []

    def script(body: dict[str, Any]) -> Script:
        asked.append(len(body["messages"]))
        text = body["messages"][-1]["content"]
        if text == "loading":
            return Script(status=503, error={"message": "starting"})
        return full if len(body["messages"]) > 3 else Script((f"You said {text}",))

    with ScriptedEndpoint(script) as endpoint, chat_server("--base-url", endpoint.url) as server:
        page = open_page(server.url)
        for number, text in enumerate(("one", "two")):
            ask(page, text)
            answer(page, number)
        # Full: the offer is to drop the oldest turns, and it works.
        ask(page, "three")
        page.wait_for_selector("#drop")
        assert "The context is full" in page.inner_text("#notice")
        assert page.locator("#past .turn.user").count() == 3
        page.click("#drop")
        answer(page, 2)
        assert asked[-1] == 3
        assert page.locator("#past .turn.user").count() == 3
        assert page.inner_text("#past .aside") == "Not shown to the model any more"

        page.click("#clear")
        page.wait_for_selector(".welcome")
        ask(page, "loading")
        page.wait_for_selector("#notice .notice")
        assert "still loading" in page.inner_text("#notice")
        assert page.locator("#past .turn.user .text").inner_text() == "loading"
        assert page.get_by_role("button", name="Retry").is_visible()

        endpoint.__exit__()
        ask(page, "and now")
        page.wait_for_function("document.querySelector('#notice').innerText.includes('not reachable')")
        assert page.locator("#past .turn.user .text").last.inner_text() == "and now"


# --- what an answer can do ---

ATTACK = "\n\n".join(
    (
        "<script>document.title='owned'</script>",
        "<img src=x onerror=\"document.title='owned'\">",
        "<svg onload=\"document.title='owned'\"></svg>",
        "[click me](javascript:document.title='owned')",
        "![picture](https://elsewhere.example/track.png)",
        "<a href=\"javascript:document.title='owned'\">click me too</a>",
        "<iframe src='https://elsewhere.example/'></iframe>",
        "**but Markdown works**",
        "${document.title='owned'} {{constructor.constructor('document.title=1')()}}",
    )
)


def test_an_answer_can_do_nothing(
    chat_server: Callable[..., Any], open_page: Callable[..., Any], shot: Callable[..., Path]
) -> None:
    with ExitStack() as stack:
        endpoint = stack.enter_context(ScriptedEndpoint(Script((ATTACK, " end")), rewards=len))
        server = stack.enter_context(chat_server("--base-url", f"<b>x</b>={endpoint.url}"))
        page = open_page(server.url)
        title = page.title()
        ask(page, ATTACK)  # and neither can a question
        reply = answer(page)
        assert reply.locator("strong").inner_text() == "but Markdown works"
        for link in reply.locator("a").all():
            link.click()
        page.get_by_text("click me").first.click()
        slide(page, "best-of", 2)
        ask(page, "again")
        answer(page, 1).locator(".candidates > summary").click()
        page.locator(".candidate summary").first.click()
        page.wait_for_timeout(500)
        page.reload()
        answer(page, 1)
        assert page.title() == title
        for tag in ("script", "img", "svg", "iframe", "a[href^=javascript]"):
            assert page.locator(f"#past {tag}").count() == 0
        shot(page, "chat-attack")
