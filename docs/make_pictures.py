"""Makes the pictures of README.md and docs/ anew, of the built-in models: report, chat and arena in `docs/images`.

    python docs/make_pictures.py               all of them; some minutes
    python docs/make_pictures.py chat arena    some

Needs chromium and the package's `demo` and `dev` extras. Nothing in a picture is written by hand: the report is that
of three runs of `almost-eval all`, the chat and the arena are pages of `almost-chat` on the same models.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMAGES = Path(__file__).parent / "images"
CHROMIUM = "/usr/bin/chromium"
REPORTED = ("nano/almost", "nano/sft", "nano/vanilla-small")
QUESTION = "What does the hamster eat?"
PATIENCE_MS = 120_000


def report(browser: Any, folder: Path) -> None:
    """Three models on four benchmarks: the summary and the comparison."""
    runs = []
    for model in REPORTED:
        run = folder / model.replace("/", "-")
        # Vicuna compares with a vanilla model already, so one model is enough there.
        tasks = "hhh-likelihood,truthfulqa,mmlu" + (",vicuna" if model == REPORTED[0] else "")
        command("almost_eval.cli.main", "all", "--model", model, "--output", str(run), "--tasks", tasks)
        runs.append(str(run))
    page_file = folder / "report.html"
    command("almost_eval.cli.main", "report", *runs, "-o", str(page_file))
    page = browser.new_page(viewport={"width": 1240, "height": 900})
    page.goto(page_file.as_uri())
    page.wait_for_timeout(1000)  # plots
    # Down to where the list of single differences begins.
    end = page.get_by_role("heading", name="Differences from").bounding_box()["y"]
    clip = {"x": 0, "y": 0, "width": 1240, "height": end - 20}
    page.screenshot(path=str(IMAGES / "report.png"), animations="disabled", full_page=True, clip=clip)


def chat(browser: Any, folder: Path) -> None:
    """Best of six with its candidates open, beside another conversation that is kept."""
    with chat_page(browser, folder, 940) as page:
        page.get_by_role("tab", name="Chat", exact=True).click()
        page.wait_for_function("document.querySelector('.shelf ul[data-note]')")
        ask(page, "Where does the squid live?")
        page.get_by_role("button", name="New conversation").click()
        page.wait_for_selector(".welcome")
        for name, value in (("best-of", 6), ("temperature", 1.6)):
            box = page.locator(f"#{name} input[type=number]")
            box.fill(str(value))
            box.press("Tab")
        ask(page, QUESTION)
        page.locator("#past .candidates > summary").click()
        page.mouse.move(5, 5)
        page.wait_for_timeout(300)
        page.screenshot(path=str(IMAGES / "chat.png"), animations="disabled")


def arena(browser: Any, folder: Path) -> None:
    """A round after its vote."""
    with chat_page(browser, folder, 760) as page:
        page.get_by_role("tab", name="Arena", exact=True).click()
        page.click("#arena-draw")
        page.wait_for_function("document.querySelector('#arena-message textarea').value !== ''")
        page.click("#arena-send")
        page.wait_for_selector("#vote-a:enabled")
        page.click("#vote-a")
        page.wait_for_selector("#arena-a h3:has-text('nano/')")
        page.wait_for_timeout(500)
        page.screenshot(path=str(IMAGES / "arena.png"), animations="disabled")


PICTURES = {"report": report, "chat": chat, "arena": arena}


def ask(page: Any, text: str) -> None:
    """Ask on the Chat tab, and wait for the answer."""
    page.fill("#message textarea", text)
    page.press("#message textarea", "Enter")
    page.wait_for_selector("#past .turn.model .facts")


def command(module: str, *arguments: str) -> None:
    """Run a command line of this checkout; its own words say what is wrong where it fails."""
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment(), check=True)


def environment() -> dict[str, str]:
    """Of a process that imports this checkout, whatever is installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "ALMOST_CHAT_AUTH": ""}


@contextmanager
def chat_page(browser: Any, folder: Path, height: int) -> Iterator[Any]:
    """A page of a running `almost-chat`, ready to be used."""
    options = ["--port", "0", "--seed", "1", "--votes", str(folder / "votes.db"), "--reports", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.cli.chat", *options],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit("almost-chat did not start")
        page = browser.new_page(viewport={"width": 1280, "height": height}, color_scheme="light")
        page.set_default_timeout(PATIENCE_MS)
        page.goto(url)
        page.wait_for_selector("[role=tab]")
        yield page
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def main() -> None:
    """Make the pictures that are named, or all."""
    names = sys.argv[1:] or list(PICTURES)
    if unknown := [name for name in names if name not in PICTURES]:
        raise SystemExit(f"error: no picture {unknown[0]!r}; there are {', '.join(PICTURES)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for name in names:
            PICTURES[name](browser, Path(folder))
            print(IMAGES / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
