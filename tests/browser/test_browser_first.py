"""The first tab in chromium: what a visitor sees in the first minute, without a click and after one."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from browser_fixtures import PHONE, Server, leave
from test_browser_accessible import violations

from almost_eval.arena.votes import VoteStore
from serving.chat.options import AFTER, BEFORE
from serving.chat.scripted import Script, ScriptedEndpoint
from serving.chat.small_model import INSTALL, packaged_file
from serving.chat.tab_first import CANDIDATES
from serving.chat.toyworld import KNOWN, PREPARED

WIDEST = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
LIT = ".race.done .lane.winner"
BOTH_STREAM = """() => {
  const text = (id) => (document.querySelector(`#first-${id} .md.live`)?.innerText || '').trim();
  window.both ||= Boolean(text('before') && text('after'));
  window.racing = Math.max(window.racing || 0, document.querySelectorAll('.lane .md.live').length);
}"""


def ask(page: Any, text: str) -> None:
    page.fill("#first-message textarea", text)
    page.press("#first-message textarea", "Enter")


def wait_for_both(page: Any) -> None:
    page.wait_for_selector(".race.done")
    page.wait_for_selector("#first-send", state="visible")


def test_before_and_after_without_a_click(
    nano: Server, open_page: Callable[..., Any], shot: Callable[..., Path]
) -> None:
    page = open_page(nano.url, tab=None)
    assert KNOWN in page.inner_text(".opening")
    wait_for_both(page)
    assert page.input_value("#first-message textarea") == PREPARED[0].question
    for side, name in (("before", BEFORE), ("after", AFTER)):
        panel = page.inner_text(f"#first-{side}")
        assert name in panel
        assert re.search(r"reward\s*[+\u2212]\d+\.\d\d", panel)
        assert "percentile" in panel
    # The aligned model refuses, and its badge is green: it reads as known good answers do.
    assert page.locator("#first-after .badge.good").count() == 1
    lanes = page.locator(".lane")
    assert lanes.count() == CANDIDATES
    assert len(set(page.locator(".lane .md").all_inner_texts())) >= 3
    assert page.locator(LIT).count() == 1
    assert "Picked by the reward model" in page.inner_text(LIT)
    raised = page.evaluate("(s) => getComputedStyle(document.querySelector(s)).transform", LIT)
    assert raised not in ("", "none")
    page.wait_for_timeout(600)
    shot(page, "start")


def test_both_sides_and_the_candidates_stream_at_once(nano: Server, open_page: Callable[..., Any]) -> None:
    page = open_page(nano.url, tab=None)
    wait_for_both(page)
    page.evaluate(f"window.watch = setInterval({BOTH_STREAM}, 10)")
    page.locator(".chip", has_text="zorbit").click()
    page.wait_for_function("document.querySelector('#first-message textarea').value.includes('zorbit')")
    page.wait_for_selector(".race.running")
    wait_for_both(page)
    assert page.evaluate("window.both") is True
    assert page.evaluate("window.racing") >= 2


def test_a_question_from_elsewhere_gets_a_hint_and_no_green(
    nano: Server, open_page: Callable[..., Any], shot: Callable[..., Path]
) -> None:
    page = open_page(nano.url, tab=None)
    wait_for_both(page)
    ask(page, "What is the capital of France?")
    page.wait_for_selector("#first-notice .notice")
    wait_for_both(page)
    assert "This is a toy world" in page.inner_text("#first-notice")
    assert page.locator("#first-before .badge, #first-after .badge").count() == 2
    assert page.locator(".badge.good, .lane.winner").filter(visible=True).count() == 0
    page.wait_for_timeout(400)
    shot(page, "start-outside")
    # In the Chat tab too.
    page.get_by_role("tab", name="Chat").click()
    page.fill("#message textarea", "What is the capital of France?")
    page.press("#message textarea", "Enter")
    page.wait_for_selector("#past .turn.model .badge")
    assert "This is a toy world" in page.inner_text("#notice")
    assert page.locator("#past .badge.good").count() == 0


def test_stop_ends_all_of_them_and_asking_again_works(nano: Server, open_page: Callable[..., Any]) -> None:
    page = open_page(nano.url, tab=None)
    wait_for_both(page)
    page.click("#first-send")
    page.wait_for_selector("#first-stop", state="visible")
    page.keyboard.press("Escape")
    page.wait_for_selector("#first-send", state="visible")
    ask(page, PREPARED[3].question)
    page.wait_for_selector(".race.running")
    wait_for_both(page)
    assert "kite" in page.inner_text("#first-after .md")


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_and_in_the_dark(
    nano: Server, open_page: Callable[..., Any], shot: Callable[..., Path], dark: bool
) -> None:
    page = open_page(nano.url, PHONE, dark=dark, tab=None)
    wait_for_both(page)
    assert page.inner_text("#theme") == ("Light" if dark else "Dark")
    assert page.evaluate(WIDEST) <= PHONE["width"]
    box = page.locator("#first-before").bounding_box()
    assert box["y"] + box["height"] <= PHONE["height"]  # the first answer without scrolling
    assert page.get_by_role("tab").all_inner_texts() == ["Start", "Chat", "Side by side", "Arena", "Report"]
    page.wait_for_timeout(600)
    assert violations(page) == []
    shot(page, f"start-phone{'-dark' if dark else ''}")
    if dark:
        wide = open_page(nano.url, dark=True, tab=None)
        wait_for_both(wide)
        wide.wait_for_timeout(600)
        assert violations(wide) == []
        shot(wide, "start-dark")


def test_the_open_tab_is_in_the_address_and_survives_a_reload(nano: Server, open_page: Callable[..., Any]) -> None:
    page = open_page(nano.url, tab=None)
    wait_for_both(page)
    page.get_by_role("tab", name="Arena").click()
    page.wait_for_selector("#arena-send")
    assert page.url.endswith("#arena")
    page.reload()
    page.wait_for_selector("#arena-send")
    assert not page.locator("#first-send").is_visible()


def test_the_real_model_is_one_click_away_or_says_what_to_do(
    nano: Server, open_page: Callable[..., Any], shot: Callable[..., Path]
) -> None:
    page = open_page(nano.url, tab=None)
    assert "Apache-2.0" in page.inner_text(".real")
    wait_for_both(page)
    page.click("#first-load")
    if packaged_file() is None:
        page.wait_for_selector("#first-loading .notice.error")
        assert INSTALL in page.inner_text("#first-loading")
        assert page.locator("#first-load").is_enabled()
        return
    page.wait_for_selector("#message textarea", timeout=180_000)
    page.fill("#message textarea", "What is the capital of France?")
    page.press("#message textarea", "Enter")
    page.wait_for_selector("#past .turn.model .md", timeout=60_000)
    assert "SmolLM2" in page.inner_text("#past .turn.model h3")
    page.wait_for_timeout(300)
    shot(page, "chat-smollm2")
    # And for those who open the page after that.
    other = open_page(nano.url)
    other.click("#system input")
    other.get_by_role("option", name="SmolLM2").wait_for()


# --- the arena ---


def votes(page: Any) -> int:
    text = page.inner_text("#arena-board")
    found = re.search(r"(\d+) votes? by", text)
    return int(found[1]) if found else 0


def test_rounds_by_keys_alone_and_a_board_that_grows(
    chat_server: Callable[..., Any], open_page: Callable[..., Any], shot: Callable[..., Path], tmp_path: Path
) -> None:
    with chat_server("--seed", "3", votes=tmp_path / "votes.db") as server:
        page, watching = (open_page(server.url, tab="arena") for _ in range(2))
        page.wait_for_selector("#arena-board .board")
        assert votes(page) == 0
        page.locator("#arena-next").focus()
        for number, key in enumerate("abtx", 1):
            page.keyboard.press("n" if number % 2 else "Enter")  # the button has the focus after a vote
            page.wait_for_selector("#vote-a:enabled")
            page.keyboard.press(key)
            page.wait_for_function(f"document.querySelector('#arena-board').innerText.includes('{number} vote')")
            page.wait_for_function("document.activeElement.id === 'arena-next'")
        assert [vote.vote for vote in VoteStore(tmp_path / "votes.db").votes()] == ["a", "b", "tie", "both_bad"]
        assert re.search(r"\d+ %\s+\[\d+, \d+\]", page.inner_text("#arena-board"))
        assert violations(page) == []
        # Another page sees them without doing anything.
        watching.wait_for_function("document.querySelector('#arena-board').innerText.includes('4 votes')")

        # Several turns, then the vote.
        page.keyboard.press("n")
        page.wait_for_selector("#vote-a:enabled")
        page.fill("#arena-message textarea", "How can I clean the kite?")
        page.press("#arena-message textarea", "Enter")
        page.wait_for_function("document.querySelectorAll('#arena-a .question').length === 2")
        page.wait_for_selector("#vote-a:enabled")
        assert "nano/" not in page.inner_text("#arena-a") + page.inner_text("#arena-b")
        page.keyboard.press("b")  # typed into the box, which has the focus: no vote
        assert len(VoteStore(tmp_path / "votes.db").votes()) == 4
        page.click("#vote-b")
        page.wait_for_selector("#arena-a h3:has-text('nano/')")
        page.wait_for_timeout(500)
        shot(page, "arena-turns")
        last = VoteStore(tmp_path / "votes.db").votes()[-1]
        assert [len(last.answers(side)) for side in "ab"] == [2, 2]
        assert len(last.prompt) == 2
        leave(page, watching)


def test_stop_and_a_system_that_names_itself(chat_server: Callable[..., Any], open_page: Callable[..., Any]) -> None:
    def script(body: dict[str, Any]) -> Script:
        if body["messages"][-1]["content"] == "slow":
            return Script([f"word{i} " for i in range(300)], delay_s=0.03)
        return Script(("I am ChatGPT.",))

    with ExitStack() as stack:
        one, two = (stack.enter_context(ScriptedEndpoint(script)) for _ in range(2))
        server = stack.enter_context(chat_server("--base-url", f"one={one.url}", "--base-url", f"two={two.url}"))
        page = open_page(server.url, tab="arena")
        page.fill("#arena-message textarea", "slow")
        page.press("#arena-message textarea", "Enter")
        page.wait_for_function("document.querySelector('#arena-a').innerText.includes('word3')")
        page.click("#arena-stop")
        page.wait_for_selector("#arena-send", state="visible")
        assert "this round does not count" in page.inner_text("#arena-notice")
        assert page.locator("#vote-a:enabled").count() == 0
        page.wait_for_timeout(500)
        assert (one.unfinished, two.unfinished) == (1, 1)
        page.fill("#arena-message textarea", "Who are you?")
        page.press("#arena-message textarea", "Enter")
        page.wait_for_selector("#vote-a:enabled")
        assert "not blind" in page.inner_text("#arena-notice")
        page.click("#vote-a")
        page.wait_for_selector("#arena-notice .good")
        assert VoteStore(server.votes).votes()[-1].settings["named"] == "ab"
        assert "not counted" in page.inner_text("#arena-board")
        leave(page)
