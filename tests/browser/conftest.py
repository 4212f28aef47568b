"""A real chromium before a real `almost-chat`. Skipped where there is no chromium; `make test-browser` installs one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser_fixtures import DESKTOP, ROOT, Server, Traffic


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder need the browser."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chat_server(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What starts the command on a free port, as a context manager that takes its options."""

    @contextmanager
    def start(*arguments: str, votes: Path | None = None, **environment: str) -> Iterator[Server]:
        folder = tmp_path_factory.mktemp("chat")
        votes = votes or folder / "votes.db"
        reports = folder / "runs"
        reports.mkdir()
        command = [sys.executable, "-m", "serving.cli.chat", "--port", "0", "--rate", "1000"]
        command += ["--votes", str(votes), "--reports", str(reports), *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **environment}
        )
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), "almost-chat did not start"
        try:
            yield Server(url, votes, reports, process)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(20)

    return start


@pytest.fixture(scope="session")
def nano(chat_server: Callable[..., Any]) -> Iterator[Server]:
    """`almost-chat` with nothing: the built-in models."""
    with chat_server("--seed", "1") as server:
        yield server


def listen(traffic: Traffic, kind: str, message: str) -> None:
    if kind in ("error", "warning"):
        traffic.complaints.append(message)


def refuse(traffic: Traffic, dialog: Any) -> None:
    traffic.complaints.append(f"dialog: {dialog.message}")
    dialog.dismiss()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """`open_page(url, viewport=..., dark=..., tab=...)`: a page of a new visitor, with `page.traffic`.

    At the end of the test every page must have asked no other host for anything and have no error in its console.
    """
    opened: list[Any] = []

    def open_(
        url: str,
        viewport: dict[str, int] | None = None,
        *,
        dark: bool = False,
        context: Any = None,
        tab: str | None = "chat",
    ) -> Any:
        scheme = "dark" if dark else "light"
        context = context or browser.new_context(viewport=viewport or DESKTOP, color_scheme=scheme)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.traffic = traffic = Traffic()
        page.on("request", lambda request: traffic.requests.append(request.url))
        page.on("websocket", lambda socket: traffic.sockets.append(socket.url))
        page.on("pageerror", lambda error: traffic.complaints.append(str(error)))
        page.on("console", lambda message: listen(traffic, message.type, message.text))
        page.on("dialog", lambda dialog: refuse(traffic, dialog))
        page.origin = url
        page.goto(f"{url}/#{tab}" if tab else url)
        page.wait_for_selector(
            {None: "#first-send, #first-stop", "arena": "#arena-message"}.get(tab, "#message textarea")
        )
        opened.append(page)
        return page

    yield open_
    for page in opened:
        elsewhere = [
            url for url in page.traffic.requests if not url.startswith((page.origin, "data:", "blob:", "about:"))
        ]
        assert elsewhere == []
        assert page.traffic.sockets == []
        assert page.traffic.complaints == []
        page.context.close()


@pytest.fixture(scope="session")
def shot() -> Callable[..., Path]:
    """`shot(page, name)`: a screenshot in ALMOST_SCREENSHOTS, or in runs/screenshots."""
    folder = Path(os.environ.get("ALMOST_SCREENSHOTS") or ROOT / "runs" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)

    def take(page: Any, name: str) -> Path:
        file = folder / f"{name}.png"
        page.screenshot(path=str(file), animations="disabled")
        return file

    return take
