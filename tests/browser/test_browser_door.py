"""What a page of another site can do to ours, in a real chromium: nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from browser_fixtures import Server

from almost_eval.arena.votes import VoteStore

ATTEMPTS = """async (base) => {
  const told = {};
  const attempt = async (name, action) => {
    try {
      const answer = await action();
      told[name] = answer.type + ' ' + answer.status;
    } catch (error) { told[name] = 'refused'; }
  };
  const body = JSON.stringify({data: ['planted', null], fn_index: 0, session_hash: 'evil', event_data: null});
  await attempt('read', () => fetch(base + '/config'));
  await attempt('read with cookies', () => fetch(base + '/config', {credentials: 'include'}));
  await attempt('ask', () => fetch(base + '/gradio_api/queue/join',
    {method: 'POST', body, headers: {'Content-Type': 'application/json'}}));
  await attempt('ask blindly', () => fetch(base + '/gradio_api/queue/join', {method: 'POST', body, mode: 'no-cors'}));
  return told;
}"""


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """Another site."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<h1>elsewhere</h1>")

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_a_page_of_another_site_reads_nothing_and_asks_nothing(nano: Server, browser: Any, elsewhere: str) -> None:
    context = browser.new_context()
    own = context.new_page()
    own.goto(nano.url)  # the visitor has our page open, with its cookie
    page = context.new_page()
    page.goto(elsewhere)
    statuses: list[int] = []
    page.on("response", lambda answer: statuses.append(answer.status) if answer.url.startswith(nano.url) else None)
    told = page.evaluate(ATTEMPTS, nano.url)
    assert told == {"read": "refused", "read with cookies": "refused", "ask": "refused", "ask blindly": "opaque 0"}
    assert statuses
    assert set(statuses) <= {403}
    context.close()


def test_a_name_that_was_made_to_point_here_is_not_answered(browser: Any, nano: Server) -> None:
    """DNS rebinding: the browser asks our server, by the attacker's name."""
    context = browser.new_context()
    page = context.new_page()
    port = nano.url.rpartition(":")[2]
    # Every name below localhost points here in chromium, without a name server.
    answer = page.goto(f"http://evil.localhost:{port}/config")
    assert answer.status == 403
    assert "does not answer to the host" in answer.text()
    assert page.goto(f"http://localhost:{port}/config").status == 200
    votes = VoteStore(nano.votes).votes() if nano.votes.exists() else []
    assert all(vote.prompt[0]["content"] != "planted" for vote in votes)
    context.close()
