"""The page without a browser: who is let in, what is served, what an answer can do as HTML, what is refused."""

import base64
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from machine_time import seconds_taken

from almost_eval.arena.votes import VoteStore
from almost_eval.errors import InputError
from serving.chat.arena import Arena, void_sentence
from serving.chat.client import Endpoint, EndpointError
from serving.chat.conversation import ChatCandidate, ChatReply, Conversation, Settings
from serving.chat.questions import EXAMPLES, arena_questions
from serving.chat.render import candidates_html, markdown, past_html
from serving.chat.session import ChatSystem
from serving.chat.tab_report import report_html, runs_with_report
from serving.cli.chat import main

ATTACKS = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "[click](javascript:document.title='owned')",
    "[click](JaVaScRiPt:alert(1))",
    "[click](data:text/html,<script>alert(1)</script>)",
    "![x](https://elsewhere.example/track.png)",
    "<iframe src='https://elsewhere.example'></iframe>",
    "<svg/onload=alert(1)>",
    "`<script>`\n\n```html\n<script>alert(1)</script>\n```",
    '<a href="javascript:alert(1)">x</a>',
    '[x](https://host/"onmouseover="alert(1))',
    "<style>*{display:none}</style>",
    "{{value}} ${alert(1)} `${alert(1)}`",
]
SAFE_TAGS = set("p strong em code pre ul ol li h1 h2 h3 h4 h5 h6 blockquote hr br a table thead tbody tr th td".split())
OWN_TAGS = SAFE_TAGS | set("article header div span details summary b i button".split())


class Tags(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_answer_is_harmless_html(attack: str) -> None:
    for tag, attributes in Tags(markdown(attack)).found:
        assert tag in SAFE_TAGS
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "https:").startswith(("https:", "http:", "mailto:"))


@pytest.mark.parametrize("attack", ATTACKS)
def test_so_is_everything_around_it(attack: str) -> None:
    """Questions, model names and candidates are data as well."""
    reply = ChatReply(attack, attack, 1.0, (ChatCandidate(attack, None), ChatCandidate(attack, 2.0, True)), 3, 1.0)
    page = past_html(Conversation().ask(attack).answer(reply)) + candidates_html(reply.candidates)
    for tag, attributes in Tags(page).found:
        assert tag in OWN_TAGS
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "https:").startswith(("https:", "http:", "mailto:"))


def test_markdown_that_is_meant_is_shown() -> None:
    html = markdown("**bold**, `code`\n\n- one\n- two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n[link](https://host/)")
    assert {"strong", "code", "ul", "li", "table", "a"} <= {tag for tag, _ in Tags(html).found}
    assert 'rel="noopener noreferrer nofollow"' in html


# --- reports ---


def test_only_reports_below_the_root_are_shown(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    (root / "mine").mkdir(parents=True)
    (root / "mine" / "report.html").write_text("<h1>mine</h1><script>1</script>", encoding="utf-8")
    (root / "empty").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "report.html").write_text("secret", encoding="utf-8")
    (root / "link").mkdir()
    (root / "link" / "report.html").symlink_to(tmp_path / "secret" / "report.html")
    assert "mine" in runs_with_report(root)
    shown = report_html(root, "mine")
    assert 'sandbox="allow-scripts"' in shown
    assert "<script" not in shown  # it is in an attribute, escaped
    for run in ("../secret", "link", "empty", str(tmp_path / "secret"), "mine/../../secret", "\0", "x" * 5000):
        refused = report_html(root, run)
        assert "iframe" not in refused
        assert "no such report" in refused


# --- the arena's questions ---


def test_questions_of_every_known_shape(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    first, second = '{"question_id": 81, "turns": ["Why?", "And then?"]}', '{"id": "x", "prompt": "How?"}'
    file.write_text(f'{first}\n\n{second}\n{{"text": "Who\\u2028?"}}\n', encoding="utf-8")
    assert arena_questions(file, []) == [("81", "Why?"), ("x", "How?"), ("4", "Who\u2028?")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no questions"),
        (b'{"text": "a"}\n{"no": 1}\n', "line 2 is no question"),
        (b'{"text": "a"}\n[1]\n', "line 2 is no question"),
        (b'{"text": "a"}\n{"text"\n', "row 2: not JSON"),
        (b'{"text": "\xff"}\n', "cannot be read"),
    ],
)
def test_a_file_without_questions_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError, match=words):
        arena_questions(file, [])


def test_questions_where_there_is_no_file() -> None:
    assert arena_questions(None, ["nano/almost", "/some/model"])[0] == ("example-0", EXAMPLES[0])
    built_in = arena_questions(None, ["nano/almost"])
    assert len(built_in) > 50
    assert built_in[0][0] == "nano-0"


# --- a blind round ---


def systems() -> list[ChatSystem]:
    return [ChatSystem(name, Endpoint(f"http://127.0.0.1:1/{name}")) for name in ("red", "green", "blue")]


def test_sides_are_shuffled_by_the_seed_and_evenly(tmp_path: Path) -> None:
    def orders(seed: int) -> list[tuple[str, str]]:
        arena = Arena(systems(), VoteStore(tmp_path / "v.db"), Settings(), seed)
        return [arena.begin("q", "typed").systems for _ in range(600)]

    assert orders(1) == orders(1)
    assert orders(1) != orders(2)
    counts = [sum(order[0] == name for order in orders(1)) for name in ("red", "green", "blue")]
    assert all(150 < count < 250 for count in counts)
    assert all(a != b for a, b in orders(1))


def test_a_vote_is_stored_whole(tmp_path: Path) -> None:
    store = VoteStore(tmp_path / "v.db")
    arena = Arena(systems(), store, Settings(max_tokens=99), 4)
    round_ = arena.begin("Why?", "q7")
    assert not round_.votable
    round_ = round_.answer((ChatReply("one", reward=1.0), ChatReply("two", reward=2.0)), arena.names)
    voted = arena.vote(round_, "f" * 32, "b")
    assert not voted.votable
    with pytest.raises(InputError):
        arena.vote(round_, "f" * 32, "a")  # by another page, which knows of no vote
    (vote,) = store.votes()
    assert (vote.system_a, vote.system_b) == round_.systems
    assert (vote.text_a, vote.text_b, vote.vote, vote.source) == ("one", "two", "b", "q7")
    assert vote.settings["max_tokens"] == 99
    assert vote.settings["seed"] == 4
    assert vote.prompt == ({"role": "user", "content": "Why?"},)


def test_a_failure_in_the_arena_names_nobody() -> None:
    told = void_sentence(EndpointError("down", "The endpoint http://red:8000/v1 is not reachable."))
    assert told == "One of the two systems did not answer"


# --- the command ---


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serving.cli.chat", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base-url", "nonsense"], "must look like http://127.0.0.1:8000/v1"),
        (["--base-url", "http://u:pass@h/v1"], "holds a user or a password"),
        (["--model", "nano/almots"], "did you mean 'nano/almost'?"),
        (["--model", "/nowhere"], "no model at '/nowhere'"),
        (["--model", "nano/reward"], "this needs a"),
        (["--reward", "nano/sft"], "this needs a *SequenceClassification*"),
        (["--base-url", "http://h/v1", "--reward", "nano/reward"], "--reward scores the answers of --model"),
        (["--base-url", "http://h/v1", "--base-url", "http://h/v1"], "give one a name"),
        (["--questions", "/nowhere.jsonl"], "cannot be read"),
        (["--auth"], "user:password"),
        (["--port", "99999"], "99999"),
        (["--base-url", "http://h/v1", "--allowed-host", "http://a.b"], "without scheme, port and path"),
        (["--engine", "tgi"], "tgi"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALMOST_CHAT_AUTH", "")
    monkeypatch.setattr("sys.argv", ["almost-chat", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capfd.readouterr().err
    assert ended.value.code == 2, err
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert words in err
    assert "pass@" not in err


def test_a_port_in_use_and_a_wrong_votes_file_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "votes.db").write_text("no database at all, but a text of some length" * 30, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = command("--base-url", "http://h/v1", "--port", port, "--votes", str(tmp_path / "v.db"))
        assert done.returncode == 2
        assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr
    done = command("--base-url", "http://h/v1", "--port", "0", "--votes", str(tmp_path / "votes.db"))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "votes" in done.stderr


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    from almost_eval.nano import shipped

    ignored = shutil.ignore_patterns("tokenizer*")
    shutil.copytree(shipped("nano/almost"), tmp_path / "broken", ignore=ignored)
    done = command("--model", str(tmp_path / "broken"), "--port", "0", "--votes", str(tmp_path / "v.db"))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "has no tokenizer" in done.stderr


def test_a_password_that_is_none_is_refused() -> None:
    done = command("--base-url", "http://h/v1", ALMOST_CHAT_AUTH="nobody")
    assert done.returncode == 2
    assert "user:password" in done.stderr
    assert "nobody" not in done.stderr


def test_help_is_instant() -> None:
    program = [sys.executable, "-m", "serving.cli.chat", "--help"]
    assert min(seconds_taken(program, holds="Usage: ") for _ in range(3)) <= 0.5


# --- over HTTP ---


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page with a login before an endpoint that is down."""
    folder = tmp_path_factory.mktemp("chat")
    endpoint = f"http://127.0.0.1:{random.randrange(1, 9)}/v1"
    arguments = ["--base-url", f"a={endpoint}", "--base-url", f"b={endpoint}", "--port", "0"]
    arguments += ["--votes", str(folder / "votes.db"), "--reports", str(folder)]
    running = subprocess.Popen(
        [sys.executable, "-m", "serving.cli.chat", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "ALMOST_CHAT_AUTH": "me:pässword"},
    )
    assert running.stdout is not None
    address = running.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    yield address
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 0


LOGIN = {"Authorization": "Basic " + base64.b64encode("me:pässword".encode()).decode()}


def test_nothing_without_the_login(page: str) -> None:
    wrong = {"Authorization": "Basic " + base64.b64encode(b"me:other").decode()}
    for path in ("/", "/config", "/gradio_api/queue/data", "/assets/x.js", "/static/img/logo.svg"):
        for headers in ({}, wrong, {"Authorization": "Bearer x"}):
            answer = httpx.get(page + path, headers=headers, trust_env=False)
            assert answer.status_code == 401
            assert "WWW-Authenticate" in answer.headers
    assert httpx.get(page, headers=LOGIN, trust_env=False).status_code == 200


def test_the_page_answers_to_its_own_names_and_pages(page: str) -> None:
    for headers, expected in (
        ({"Host": "evil.lan"}, 403),
        ({"Host": page.removeprefix("http://"), "Origin": "http://evil.lan:8500"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": page}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
    ):
        for path in ("/", "/config"):
            answer = httpx.get(page + path, headers={**LOGIN, **headers}, trust_env=False)
            assert (headers, answer.status_code) == (headers, expected)
    assert httpx.get(page, headers={"Host": "evil.lan"}, trust_env=False).status_code == 403  # before the login


def test_a_header_without_an_end_is_refused(page: str) -> None:
    host, port = page.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 70_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 431 ")


def test_a_browser_gets_one_cookie_that_no_script_reads(page: str) -> None:
    with httpx.Client(base_url=page, headers=LOGIN, trust_env=False) as client:
        cookie = client.get("/").headers["set-cookie"]
        assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= {part.strip() for part in cookie.split(";")}
        assert "set-cookie" not in client.get("/").headers
        client.cookies.clear()
        name, _, value = cookie.partition(";")[0].partition("=")
        forged = client.get("/", headers={"Cookie": f"{name}={'0' * 32}.{value.partition('.')[2]}"})
        assert "set-cookie" in forged.headers


def ask_in_the_arena(client: httpx.Client, config: dict[str, Any]) -> str:
    """One question by a new page, and everything that the page is told."""
    ids = {component["id"]: component["props"].get("elem_id") for component in config["components"]}
    number = next(
        event["id"]
        for event in config["dependencies"]
        if any(ids.get(target[0]) == "arena-send" and target[1] == "click" for target in event["targets"])
    )
    session = uuid.uuid4().hex
    body = {"data": ["hi", None, None], "fn_index": number, "session_hash": session, "event_data": None}
    client.post("/gradio_api/queue/join", json=body).raise_for_status()
    told = ""
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as answer:
        for line in answer.iter_lines():
            told += line
            if '"process_completed"' in line:
                return told
    return told


def test_new_pages_and_new_cookies_are_no_new_allowance(page: str) -> None:
    """45 of 45 questions of one address were let in, each with a session number of its own."""
    config = httpx.get(page + "/config", headers=LOGIN, trust_env=False).json()

    def ask(first: int) -> int:
        """Whether each of nine questions was let in, counted; others ask at the same time."""
        admitted = 0
        with httpx.Client(base_url=page, headers=LOGIN, trust_env=False, timeout=30) as client:
            for number in range(first, first + 9):
                client.cookies.clear()
                client.headers["X-Forwarded-For"] = f"10.0.0.{number}"
                admitted += "questions a minute" not in ask_in_the_arena(client, config)
        return admitted

    with ThreadPoolExecutor(5) as pool:
        assert sum(pool.map(ask, range(0, 45, 9))) == 30


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("POST", "/upload"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=https://elsewhere.example/"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/vibe-code"),
        ("POST", "/gradio_api/call/answer"),
        ("GET", "/openapi.json"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/assets/..%2f..%2f..%2fetc/passwd"),
    ],
)
def test_routes_that_the_page_does_not_need_are_closed(page: str, method: str, path: str) -> None:
    assert httpx.request(method, page + path, headers=LOGIN, trust_env=False).status_code in (403, 404)


def test_the_page_loads_nothing_from_elsewhere_and_says_so(page: str) -> None:
    answer = httpx.get(page, headers=LOGIN, trust_env=False)
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    config = httpx.get(page + "/config", headers=LOGIN, trust_env=False).json()
    assert config["analytics_enabled"] is False
    assert not config.get("stylesheets")
    assert config["enable_queue"] is True
