"""The page with its tabs, and middleware around it: the login, the routes that the page needs, safe headers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from gradio.blocks import Block
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from almost_eval.arena.votes import VoteStore
from serving.chat.arena import Arena
from serving.chat.event_guard import EventGuard, unreadable
from serving.chat.kept import ConversationStore, add_routes, keeper_script
from serving.chat.options import lines_of
from serving.chat.session import Desk
from serving.chat.tab_arena import ArenaTab
from serving.chat.tab_chat import ChatTab
from serving.chat.tab_compare import CompareTab
from serving.chat.tab_first import FirstTab
from serving.chat.tab_report import ReportTab
from serving.chat.visitors import Visitors
from serving.door.hosts import HostGuard

_ASSETS = Path(__file__).with_name("assets")
_PART = re.compile(r"(katex|prism|prism-[a-z-]+)-[\w-]{8}\.(js|css)")
_PARTS = Path("templates", "frontend", "assets")
"""What gradio's own page brings for its Markdown, which ours uses too: KaTeX for maths, Prism for code. No network.

gradio gives these files no stable names, so they are looked for. Where one is missing, after an update of gradio, a
formula is shown as its source and code without colours.
"""

_ROUTES = re.compile(
    r"/(?:|config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|(?:assets|static)/.{1,200}|"
    r"conversations(?:/[0-9a-f]{16})?|gradio_api/(?:queue/join|queue/data|heartbeat/[\w-]+|cancel|reset|startup-events|run/predict|info))/?"
)
"""What the page asks for; `conversations` answers only where there is a login.

gradio serves more (uploads, files, proxies, monitoring, code editing): none of it here.
"""

_MAX_BODY_BYTES = 16 << 20
"""Of a request: a kept conversation (4 MiB) with all of it escaped is less. gradio reads whatever comes into memory."""

_EVENTS = 4096
"""Events that gradio works on at a time; the desk takes far fewer questions and refuses the others at once."""

_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # gradio's page is an inline script; gr.HTML compiles
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "frame-src 'self'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Guard:
    """ASGI middleware: the login, the routes of the page and no others, and headers that forbid other hosts.

    Args:
        app: the page.
        login: `user:password`, several of them on a line each, or None to let everybody in.
        visitors: whoever opens the page without their cookie gets one.
    """

    def __init__(self, app: ASGIApp, login: str | None, visitors: Visitors) -> None:
        self._app = app
        self._visitors = visitors
        self._users = {_digest(base64.b64encode(one.encode())): one.partition(":")[0] for one in lines_of(login)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        user = self._user(scope)
        if user is None:
            ask = {"WWW-Authenticate": 'Basic realm="almost-chat", charset="UTF-8"'}
            await PlainTextResponse("This page needs a login.", 401, ask)(scope, receive, send)
            return
        if not _ROUTES.fullmatch(scope["path"]):
            await PlainTextResponse("There is nothing here.", 404)(scope, receive, send)
            return
        cookies = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"cookie"), "")
        number = self._visitors.number_in(cookies)
        is_new = scope["path"] == "/" and number is None
        # No other cookie goes further: gradio reads them all, by a reader that takes seconds for a hostile one.
        headers = [item for item in scope["headers"] if item[0] != b"cookie"]
        if number is not None:
            headers.append((b"cookie", self._visitors.pair(number).encode()))
        scope = {**scope, "headers": headers, "user": user}  # whose conversations `kept` serves

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if is_new:
                    headers.append("set-cookie", self._visitors.cookie())
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        length = 0

        async def receive_bounded() -> Message:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > _MAX_BODY_BYTES:
                raise HTTPException(413, "That is more than this page takes at once.")
            return message

        await self._app(scope, receive_bounded, send_with_headers)

    def _user(self, scope: Scope) -> str | None:
        """Whose login was sent: "" where none is needed, None where it is not right."""
        if not self._users:
            return ""
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = sent.partition(b" ")
        digest = _digest(token.strip())  # of one length, whatever is sent
        matches = [user for right, user in self._users.items() if hmac.compare_digest(digest, right)]
        return matches[0] if matches and scheme.lower() == b"basic" else None


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


class _Page(gr.Blocks):
    """Puts no traceback into the log for a value that a page may not send: of no list, beyond a slider's end."""

    async def preprocess_data(self, *arguments: Any, **options: Any) -> Any:
        try:
            return await super().preprocess_data(*arguments, **options)
        except gr.Error as error:
            error.print_exception = False
            raise


def build_page(desk: Desk) -> gr.Blocks:
    """The tabs, connected."""
    arena = None
    if len(desk.systems) > 1:
        # Its own list: a model that is loaded later does not join the rounds of those before.
        arena = Arena(tuple(desk.systems), VoteStore(desk.votes), desk.defaults, desk.seed)
    with _Page(title="ALMoST chat", analytics_enabled=False, fill_width=True, delete_cache=None) as page:
        gr.HTML(
            '<header class="top"><h1>ALMoST <span>chat</span></h1>'
            '<button type="button" id="theme" aria-label="Switch between dark and light">Dark</button></header>',
            apply_default_css=False,
            padding=False,
        )
        first = None
        with gr.Tabs(elem_id="tabs") as tabs:
            if pair := desk.before_and_after():
                with gr.Tab("Start", id="start", elem_id="tab-start") as start_tab:
                    first = FirstTab(desk, *pair)
            with gr.Tab("Chat", id="chat", elem_id="tab-chat") as chat_tab:
                chat = ChatTab(desk)
            with gr.Tab("Side by side", id="compare", elem_id="tab-compare") as compare_tab:
                compare = CompareTab(desk)
            with gr.Tab("Arena", id="arena", elem_id="tab-arena") as arena_tab:
                blind = ArenaTab(desk, arena)
            with gr.Tab("Report", id="report", elem_id="tab-report") as report_tab:
                report = ReportTab(desk.reports)
        others = [chat_tab, compare_tab, report_tab]
        if first is not None:
            others.append(start_tab)
            first.connect(page, tabs, chat.system, compare.pickers)
        chat.connect(page)
        compare.connect(chat.settings)
        blind.connect(page, arena_tab, others)
        report.connect(page)

        def leave(request: gr.Request) -> None:
            desk.leave(request.session_hash)

        page.unload(leave)
    page.queue(max_size=None, default_concurrency_limit=None, api_open=False)  # the desk says who waits
    page._queue.max_thread_count = _EVENTS  # else 40: number 41 would wait without a word and without its question
    return page


def create_app(
    desk: Desk, login: str | None = None, host: str = "127.0.0.1", allowed_hosts: Sequence[str] = ()
) -> ASGIApp:
    """The whole application. `login` is as in `Guard`; `allowed_hosts`, in the form of `checked_hosts`, are names
    besides `host`, which is listened on.

    Raises:
        StoreError: the file of votes is something else.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if desk.conversations is not None:
        add_routes(app, ConversationStore(desk.conversations))
    page = build_page(desk)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        app_kwargs={"exception_handlers": {RequestValidationError: unreadable}},
        theme=_theme(),
        css=_asset("chat.css") + _asset("first.css"),
        head=_scripts(keeper_script(on_server=desk.conversations is not None)),
        footer_links=[],
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=1,
        run_history=False,
    )
    events = EventGuard(app, {number: [_type_of(one) for one in event.inputs] for number, event in page.fns.items()})
    return HostGuard(Guard(events, login, desk.visitors), host, allowed_hosts)


def _type_of(component: Block) -> type | UnionType:
    """Of the values that a page sends for a component; what they mean is for the event to check."""
    if isinstance(component, gr.Slider):
        return int | float
    return str | None if isinstance(component, gr.Textbox | gr.Dropdown) else object  # a state's value stays here


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _scripts(keeper: str) -> str:
    files = [_asset(name) for name in ("chat.js", "rich.js", "shelf.js", "connection.js", "first.js")]
    return "".join(f"<script>{script}</script>" for script in (parts_script(), keeper, *files))


def _theme() -> gr.themes.Base:
    # Fonts of the visitor's own system: gradio's defaults come from another host, or are files more to load.
    sans = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    return gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=[gr.themes.Font(name) for name in sans],
        font_mono=[gr.themes.Font(name) for name in mono],
        radius_size="lg",
    )


def parts_of(folder: Path) -> dict[str, str]:
    """Files for code and maths: `katex.js`, `katex.css`, `prism.js`, `prism-python.js`, ... -> the name in `folder`."""
    names = sorted(file.name for file in folder.glob("*")) if folder.is_dir() else []
    matches = ((name, _PART.fullmatch(name)) for name in names)
    return {f"{match[1]}.{match[2]}": name for name, match in matches if match}


def parts_script() -> str:
    """JavaScript that tells `assets/rich.js` where they are."""
    spec = find_spec("gradio")
    assert spec is not None
    assert spec.origin is not None  # a regular package: it is installed, as `almost-chat` has checked
    return f"window.almostParts = {json.dumps(parts_of(Path(spec.origin).parent / _PARTS))};"
