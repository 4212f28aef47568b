"""How long a visitor of `almost-chat` waits, in a real chromium: until the page can be used, and for the first words.

    python benchmarks/chat_page.py                     # the built-in models, and SmolLM2 if runs/models holds it
    python benchmarks/chat_page.py --models nano --starts 5 --questions 20

*Ready* is from the start of the command to a page whose message box takes text and whose kept conversations are read,
the browser being up already. *First token* is from the Enter key to the first text of the answer on the screen. Both
are read on this program's clock around a browser that polls in every frame. Each limit that is missed is named, and
the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
SMOLLM2 = ROOT / "runs" / "models" / "smollm2-135m-instruct"
QUESTION = "What does the hamster eat?"
CHROMIUM = "/usr/bin/chromium"
_LOADED = "window.almostShelf && document.querySelector('.shelf ul[data-note]') && document.querySelector('.welcome')"
_FIRST = "(document.querySelector('#live .md, #past .turn.model:nth-of-type(2) .md') || {}).innerText"
_RESTED = "document.querySelector('#send') && !document.querySelector('#live .live')"


@dataclass(frozen=True)
class Case:
    """One model, and what is promised of it."""

    name: str
    options: tuple[str, ...]
    ready_limit_s: float
    token_limit_s: float | None
    """None: reported, not promised."""


CASES = (
    Case("nano", (), 10.0, 0.5),
    Case("smollm2", ("--model", str(SMOLLM2)), 25.0, None),
)


@dataclass(frozen=True)
class Times:
    """What was measured for one case; seconds."""

    case: str
    ready_s: list[float]
    """Of each start."""
    said_ready_s: list[float]
    """What the command itself says of the same starts, without the browser."""
    first_token_s: list[float]
    """Of each question, on one server, each in a new conversation."""


@contextmanager
def server(options: tuple[str, ...], folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A running `almost-chat` and its address."""
    command = [sys.executable, "-m", "serving.cli.chat", "--port", "0", "--rate", "1000", *options]
    command += ["--votes", str(folder / "votes.db"), "--reports", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ALMOST_CHAT_AUTH": ""}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            assert process.stderr is not None
            raise SystemExit(process.stderr.read().strip() or "almost-chat did not start")
        yield url, process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def measure(case: Case, browser: Any, starts: int, questions: int) -> Times:
    """Start the command `starts` times, and on the last start ask `questions` times."""
    times = Times(case.name, [], [], [])
    with tempfile.TemporaryDirectory() as folder:
        for number in range(starts):
            context = browser.new_context(viewport={"width": 1280, "height": 800})
            began = time.perf_counter()
            with server(case.options, Path(folder)) as (url, process):
                page = context.new_page()
                page.set_default_timeout(120_000)
                page.goto(url)
                page.get_by_role("tab", name="Chat", exact=True).click()
                page.wait_for_selector("#message textarea:enabled")
                page.wait_for_function(_LOADED)
                times.ready_s.append(time.perf_counter() - began)
                assert process.stderr is not None
                times.said_ready_s.append(float(process.stderr.readline().split()[2]))
                for _ in range(questions if number == starts - 1 else 0):
                    times.first_token_s.append(first_token(page))
            context.close()
    return times


def first_token(page: Any) -> float:
    """Seconds from Enter to the first words, in a new conversation."""
    page.fill("#message textarea", QUESTION)
    began = time.perf_counter()
    page.press("#message textarea", "Enter")
    page.wait_for_function(_FIRST)
    seconds = time.perf_counter() - began
    page.wait_for_function(_RESTED)
    page.get_by_role("button", name="New conversation").click()
    page.wait_for_selector(".welcome")
    page.wait_for_timeout(200)
    return seconds


def missed(case: Case, times: Times) -> list[str]:
    """The limits that the medians miss."""
    lines = []
    if median(times.ready_s) > case.ready_limit_s:
        lines.append(f"{case.name}: ready in {median(times.ready_s):.2f} s, promised {case.ready_limit_s:g} s")
    if case.token_limit_s is not None and median(times.first_token_s) > case.token_limit_s:
        told = f"first token after {median(times.first_token_s):.2f} s"
        lines.append(f"{case.name}: {told}, promised {case.token_limit_s:g} s")
    return lines


def main() -> int:
    """Measure, print a line a figure, and say what is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="nano,smollm2", help="which, separated by commas [default: %(default)s]")
    parser.add_argument("--starts", type=int, default=3, help="of the command, for each model [default: %(default)s]")
    parser.add_argument("--questions", type=int, default=10, help="for each model [default: %(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there")
    arguments = parser.parse_args()
    names = arguments.models.split(",")
    if unknown := set(names) - {case.name for case in CASES}:
        parser.error(f"unknown model {sorted(unknown)[0]!r}; known: {', '.join(case.name for case in CASES)}")
    if min(arguments.starts, arguments.questions) < 1:
        parser.error("--starts and --questions must be at least 1")

    from playwright.sync_api import sync_playwright

    all_times, lines = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for case in CASES:
            if case.name not in names:
                continue
            if case.name == "smollm2" and not SMOLLM2.is_dir():
                print(f"{case.name}: not measured, {SMOLLM2.relative_to(ROOT)} is missing (make test-real makes it)")
                continue
            times = measure(case, browser, arguments.starts, arguments.questions)
            all_times.append(times)
            for what, values in (("ready", times.ready_s), ("first token", times.first_token_s)):
                spread = f"{min(values):.2f} to {max(values):.2f}, n = {len(values)}"
                print(f"{case.name:8} {what:12} median {median(values):6.2f} s ({spread})", flush=True)
            lines += missed(case, times)
        browser.close()
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(times) for times in all_times], indent=2) + "\n", encoding="utf-8")
    print("\n".join(lines) or "every limit is kept")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
