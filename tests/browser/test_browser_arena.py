"""Side by side, the blind arena and the reports, in chromium."""

import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from browser_fixtures import Server, Wire, leave

from almost_eval.arena.votes import VoteStore
from serving.chat.scripted import Script, ScriptedEndpoint

SYSTEMS = ("nano/almost", "nano/sft", "nano/vanilla-large")


BOTH_STREAM = """['left', 'right'].every((side) =>
    (document.querySelector(`#compare-${side}-answer .md`)?.innerText || '').includes('word3'))"""


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def test_two_answers_at_once_with_their_rewards(
    nano: Server, open_page: Callable[..., Any], shot: Callable[..., Path]
) -> None:
    page = open_page(nano.url)
    open_tab(page, "Side by side")
    page.fill("#compare-message textarea", "What does the hamster eat?")
    page.click("#compare-send")
    for side in ("left", "right"):
        page.wait_for_selector(f"#compare-{side}-answer .badge")
        assert page.inner_text(f"#compare-{side}-answer .md").strip()
    shot(page, "side-by-side")


def test_both_stream_at_once_and_stop_ends_both(chat_server: Callable[..., Any], open_page: Callable[..., Any]) -> None:
    script = Script([f"word{i} " for i in range(300)], delay_s=0.03)
    with ExitStack() as stack:
        one, two = (stack.enter_context(ScriptedEndpoint(script)) for _ in range(2))
        server = stack.enter_context(chat_server("--base-url", f"one={one.url}", "--base-url", f"two={two.url}"))
        page = open_page(server.url)
        open_tab(page, "Side by side")
        page.fill("#compare-message textarea", "Count")
        page.click("#compare-send")
        both = "['left', 'right'].every((s) => (document.querySelector(`#compare-${s}-answer .md`)?.innerText || '')"
        page.wait_for_function(both + ".includes('word3'))")
        page.click("#compare-stop")
        page.wait_for_selector("#compare-send", state="visible")
        page.wait_for_timeout(500)
        assert (one.unfinished, two.unfinished) == (1, 1)


def test_the_buttons_are_right_in_every_one_of_many_quick_rounds(
    chat_server: Callable[..., Any], open_page: Callable[..., Any]
) -> None:
    """Gradio's page may lose some of an update that another follows at once; a slow network brings several at once."""
    script = Script([f"word{i} " for i in range(600)], delay_s=0.03)
    shown = "(tab) => ['send', 'stop'].filter((n) => document.getElementById(`${tab}-${n}`)?.offsetParent).join(' ')"
    with ExitStack() as stack:
        one, two = (stack.enter_context(ScriptedEndpoint(script)) for _ in range(2))
        server = stack.enter_context(chat_server("--base-url", f"one={one.url}", "--base-url", f"two={two.url}"))
        wire = stack.enter_context(Wire(server.url))
        page = open_page(wire.url)
        page.wait_for_timeout(1000)
        wire.hold_s = 0.4
        for tab, name, panel in (("compare", "Side by side", "#compare-left-answer"), ("arena", "Arena", "#arena-a")):
            open_tab(page, name)
            seen = []
            for number in range(6):
                page.fill(f"#{tab}-message textarea", f"Question {number}?")
                page.press(f"#{tab}-message textarea", "Enter")
                page.wait_for_selector(f"{panel} .caret")
                while_answering = page.evaluate(shown, tab)
                page.keyboard.press("Escape")
                if "stop" not in while_answering:  # nothing can end it
                    pytest.fail(f"no Stop in round {number} of {tab}, but {while_answering!r}")
                page.wait_for_selector(f"{panel} .caret", state="detached")
                page.wait_for_timeout(1000)  # the last update has come
                seen.append((while_answering, page.evaluate(shown, tab)))
            assert seen == [("stop", "send")] * 6
        wire.hold_s = 0.0
        leave(page)


WHOLE = """([tab, sides, text]) => {
    const there = (id) => document.getElementById(`${tab}-${id}`)?.offsetParent;
    const whole = (side) => side.innerText.includes(text) && !side.querySelector('.caret, .pulse');
    return there('send') && !there('stop') && sides.every((one) => whole(document.querySelector(one)));
}"""
"""Both answers are there to their ends, and the tab can be asked again."""


def test_no_part_of_a_quick_answer_is_lost(chat_server: Callable[..., Any], open_page: Callable[..., Any]) -> None:
    """Answers that are whole at once: their updates follow each other as fast as they can."""
    from playwright.sync_api import TimeoutError

    def echo(body: dict[str, Any]) -> Script:
        return Script((f"You said {body['messages'][-1]['content']}",))

    with ExitStack() as stack:
        one, two = (stack.enter_context(ScriptedEndpoint(echo)) for _ in range(2))
        server = stack.enter_context(chat_server("--base-url", f"one={one.url}", "--base-url", f"two={two.url}"))
        page = open_page(server.url)
        lost = []
        for tab, name, panels in (("compare", "Side by side", "#compare-{}-answer"), ("arena", "Arena", "#arena-{}")):
            open_tab(page, name)
            sides = [panels.format(side) for side in (("left", "right") if tab == "compare" else "ab")]
            for number in range(10):
                page.fill(f"#{tab}-message textarea", f"number-{number}.")
                page.click(f"#{tab}-send")
                try:
                    page.wait_for_function(WHOLE, arg=[tab, sides, f"You said number-{number}."], timeout=8_000)
                except TimeoutError:
                    lost.append((tab, number, [page.inner_html(side) for side in sides]))
                if tab == "arena":
                    page.click("#vote-tie")
                    page.wait_for_selector("#arena-notice .good")
        assert lost == []
        leave(page)


def test_a_blind_round(nano: Server, open_page: Callable[..., Any], shot: Callable[..., Path]) -> None:
    with Wire(nano.url) as wire:
        page = open_page(wire.url)
        open_tab(page, "Arena")
        blind_round(page, nano, wire, shot)
        page.goto("about:blank")
        page.traffic.complaints.clear()


def blind_round(page: Any, nano: Server, wire: Wire, shot: Callable[..., Path]) -> None:
    page.wait_for_timeout(500)
    wire.heard.clear()
    page.click("#arena-draw")
    page.wait_for_function("document.querySelector('#arena-message textarea').value !== ''")
    question = page.input_value("#arena-message textarea")
    page.click("#arena-send")
    page.wait_for_selector("#vote-a:enabled")
    answers = [page.inner_text(f"#arena-{side} .md").strip() for side in "ab"]
    shot(page, "arena-blind")

    # Before the vote: no name anywhere, neither on the tab nor in what the server has told since the round began.
    panels = page.inner_text("#arena-a") + page.inner_text("#arena-b")
    assert not any(name in panels for name in SYSTEMS)
    told = b"".join(wire.heard).decode("utf-8", "replace")
    assert "process_completed" in told
    assert answers[0].split()[-1] in told  # it is the wire that was heard
    assert not any(name in told for name in SYSTEMS)
    assert "badge" not in told  # no reward either
    assert not nano.votes.exists() or question not in str(VoteStore(nano.votes).votes())

    page.click("#vote-a")
    page.wait_for_selector("#arena-a h3:has-text('nano/')")
    shot(page, "arena-revealed")
    vote = VoteStore(nano.votes).votes()[-1]
    headings = [page.inner_text(f"#arena-{side} h3") for side in "ab"]
    assert headings == [f"A: {vote.system_a}", f"B: {vote.system_b}"]
    assert (vote.vote, vote.prompt[-1]["content"]) == ("a", question)
    assert [vote.text_a.split(), vote.text_b.split()] == [text.split() for text in answers]
    assert vote.source.startswith("nano-")
    assert vote.reward_a is not None
    assert page.locator("#vote-a:enabled").count() == 0  # one vote a round

    assert any(name in b"".join(wire.heard).decode("utf-8", "replace") for name in SYSTEMS)


def test_a_browser_keeps_its_session_and_another_has_its_own(nano: Server, open_page: Callable[..., Any]) -> None:
    def vote(page: Any, question: str, button: str) -> None:
        page.fill("#arena-message textarea", question)
        page.click("#arena-send")
        page.wait_for_selector(f"{button}:enabled")
        page.click(button)
        page.wait_for_selector("#arena-notice .good")

    page, other = open_page(nano.url), open_page(nano.url)
    for one in (page, other):
        open_tab(one, "Arena")
    vote(page, "How big is the squid?", "#vote-tie")
    page.reload()
    page.wait_for_selector("#arena-message textarea")  # the address says which tab was open
    vote(page, "How big is the squid?", "#vote-b")
    vote(other, "How big is the donkey?", "#vote-both_bad")
    *_, first, second, third = VoteStore(nano.votes).votes()
    assert first.session == second.session != third.session
    assert [vote.vote for vote in (first, second, third)] == ["tie", "b", "both_bad"]
    assert third.source == "typed"


def test_a_killed_server_loses_no_vote(
    chat_server: Callable[..., Any], open_page: Callable[..., Any], tmp_path: Path
) -> None:
    votes = tmp_path / "votes.db"
    with ScriptedEndpoint(Script(("one",))) as one, ScriptedEndpoint(Script(("two",))) as two:
        endpoints = ("--base-url", f"one={one.url}", "--base-url", f"two={two.url}")
        with chat_server(*endpoints, votes=votes) as server:
            pages = [open_page(server.url) for _ in range(2)]
            for page in pages:
                open_tab(page, "Arena")
                page.fill("#arena-message textarea", "Which?")
                page.click("#arena-send")
            for page in pages:
                page.wait_for_selector("#vote-b:enabled")
            for page in pages:
                page.click("#vote-b")
            for page in pages:
                page.wait_for_selector("#arena-notice .good")
            for page in pages:
                page.goto("about:blank")  # a page whose server dies complains, and rightly
            server.process.send_signal(signal.SIGKILL)
            server.process.wait(10)
        stored = VoteStore(votes).votes()
        assert len(stored) == 2
        assert len({vote.session for vote in stored}) == 2
        with chat_server(*endpoints, votes=votes) as server:
            page = open_page(server.url)
            open_tab(page, "Arena")
            page.fill("#arena-message textarea", "And now?")
            page.click("#arena-send")
            page.wait_for_selector("#vote-a:enabled")
            page.click("#vote-a")
            page.wait_for_selector("#arena-notice .good")
            leave(page)
        assert len(VoteStore(votes).votes()) == 3


def test_a_report_is_shown_in_its_sandbox(nano: Server, open_page: Callable[..., Any]) -> None:
    page = open_page(nano.url)
    open_tab(page, "Report")
    page.wait_for_selector("#report .notice")
    assert "No run here has a report yet" in page.inner_text("#report")
    run = nano.reports / "hhh"
    run.mkdir()
    attack = "<h1>HHH</h1><p id=x>-</p><script>document.getElementById('x').textContent = 'drawn';"
    attack += "try { parent.document.title = 'owned' } catch (e) {}</script>"
    (run / "report.html").write_text(attack, encoding="utf-8")
    page.click("#report-look")
    page.wait_for_function("document.querySelector('#report').innerText.includes('Choose a run')")
    page.click("#report-run input")
    page.get_by_role("option", name="hhh").click()
    frame = page.frame_locator("iframe.report")
    frame.get_by_text("drawn").wait_for()
    assert page.title() == "ALMoST chat"
    page.traffic.complaints = [c for c in page.traffic.complaints if "sandbox" not in c.lower()]


def test_one_system_has_no_arena_and_says_how(chat_server: Callable[..., Any], open_page: Callable[..., Any]) -> None:
    with ScriptedEndpoint() as endpoint, chat_server("--base-url", endpoint.url) as server:
        page = open_page(server.url)
        for tab in ("Side by side", "Arena"):
            open_tab(page, tab)
            page.get_by_text("Two systems are needed here").filter(visible=True).wait_for()


def test_ready_within_ten_seconds(chat_server: Callable[..., Any]) -> None:
    import time

    began = time.perf_counter()
    with chat_server() as server:
        seconds = time.perf_counter() - began
        assert isinstance(server.process, subprocess.Popen)
    assert seconds <= 10
