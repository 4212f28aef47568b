"""One request to a judge over HTTP, and what came of it: a reply, or what went wrong and whether to ask again.

OpenAI's own endpoint is sent `max_completion_tokens`, which all of its chat models take; its newer ones refuse
`max_tokens`. Every other endpoint is sent `max_tokens`, which all of them take.

The key is read from `OPENAI_API_KEY`; it is in no setting, log, reply or error.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from almost_eval.errors import AlmostError, InputError, RunError
from almost_eval.judge.records import JudgeRequest, Reply

OPENAI = "https://api.openai.com/v1"
KEY = "OPENAI_API_KEY"
NO_KEY = "none"
"""The SDK does not start without a key; a server that wants none ignores this one."""

Tokens = tuple[int, int]  # (prompt, completion) as billed

_TRY_AGAIN = (408, 409)  # and 429, 5xx
_TOO_LONG = ("context_length_exceeded", "string_above_max_length")
_KEY_LIKE = re.compile(r"\bsk-[\w*.-]+|\S*\*{3,}\S*")


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why one sending gave no reply."""

    reason: str
    """As in `Failure.reason`."""
    message: str
    again: bool = False
    """It may pass if it is asked again."""
    retry_after: float | None = None
    """Seconds that the endpoint asks to wait."""
    tokens: Tokens | None = None
    """What was billed all the same, where it is known."""
    may_be_billed: bool = False
    """The endpoint may have worked on it, and nobody says for how many tokens."""
    fatal: AlmostError | None = None
    """No other request will pass either: the error to end with."""
    refused: AlmostError | None = None
    """The same, but only if no other request passes: a 400 may be this request's own fault."""


class Endpoint:
    """Where a judge is asked.

    Args:
        judge: the model's name there.
        base_url: up to and including `/v1`; None is `OPENAI_BASE_URL`, else OpenAI's.
        timeout: seconds that one answer may take, from the first byte sent to the last received.

    Raises:
        InputError: no address, an address with anything secret in it, no key for OpenAI's endpoint, or a broken key.
    """

    def __init__(self, judge: str, base_url: str | None, timeout: float) -> None:
        self.judge = judge
        self.timeout = timeout
        self._key = os.environ.get(KEY, "").strip()
        if not re.fullmatch(r"[!-~]*", self._key):
            raise InputError(f"{KEY} holds spaces or characters that no key has; set it again")
        self.base_url = _checked(base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI, self._key)
        host = urlsplit(self.base_url).hostname or ""
        self.is_openai = host == "openai.com" or host.endswith(".openai.com")
        if self.is_openai and not self._key:
            raise InputError(
                f"no key for {self.base_url}: set {KEY}, or give --judge-base-url for a server of your own"
            )

    def connect(self) -> Any:
        """An `openai.AsyncOpenAI` without retries of its own; use as a context manager in the loop that asks."""
        import openai

        return openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self._key or NO_KEY, max_retries=0, timeout=self.timeout
        )

    async def ask(self, connection: Any, request: JudgeRequest) -> Reply | Trouble:
        """Send once."""
        import openai

        limit = "max_completion_tokens" if self.is_openai else "max_tokens"
        try:
            async with asyncio.timeout(self.timeout):  # the SDK's own is for each read: a server that drips passes it
                raw = await connection.chat.completions.with_raw_response.create(
                    model=request.judge,
                    messages=[message.to_dict() for message in request.messages],
                    temperature=request.temperature,
                    **{limit: request.max_tokens},
                )
        except (TimeoutError, openai.APITimeoutError):
            return Trouble("timeout", f"no answer within {self.timeout:g} s", again=True, may_be_billed=True)
        except openai.APIStatusError as error:
            return self._refusal(error)
        except openai.APIConnectionError as error:
            return self._lost(error)
        return self._read(raw.http_response)

    def _read(self, response: Any) -> Reply | Trouble:
        """A response of status 2xx."""
        try:
            body = json.loads(response.content)
        except ValueError:
            start = response.content[:200].lstrip().lower()
            if "html" in response.headers.get("content-type", "") or start.startswith((b"<!doctype", b"<html")):
                return Trouble("html", f"{self.base_url} sent a web page instead of JSON", again=True)
            return Trouble("malformed", "the answer is not JSON", again=True, may_be_billed=True)
        tokens = _usage(body)
        try:
            choices = body["choices"]
            if isinstance(choices, list) and not choices:
                return Trouble("empty_choices", "the answer holds no choice", tokens=tokens)
            message, finish = choices[0]["message"], choices[0].get("finish_reason") or "unknown"
            text, refusal = message.get("content"), message.get("refusal")
            if not isinstance(text, str | None) or not isinstance(finish, str):
                raise TypeError
        except (AttributeError, LookupError, TypeError):
            return Trouble(
                "malformed", "the answer is JSON, but no chat completion", again=True, tokens=tokens, may_be_billed=True
            )
        if finish == "content_filter":
            return Trouble("content_filter", "the provider's content filter withheld the answer", tokens=tokens)
        if not text and refusal:
            return Trouble("refusal", self._scrub(str(refusal)), tokens=tokens)
        if not text or not text.strip():
            why = ": its tokens were used up before it wrote anything" if finish == "length" else ""
            return Trouble("empty", f"the answer is empty (finish_reason {finish}){why}", tokens=tokens)
        model = body.get("model")
        if self._key:
            text = text.replace(self._key, "***")
        return Reply(text, finish, model if isinstance(model, str) else "", *(tokens or (0, 0)))

    def _refusal(self, error: Any) -> Trouble:
        """A response of any other status."""
        status, words = error.status_code, self._words(error)
        code = error.body.get("code") if isinstance(error.body, dict) else None
        at = f"the endpoint {self.base_url}"
        trouble = Trouble(f"http_{status}", f"{status}: {words}")
        if status == 429 and code == "insufficient_quota":
            return replace(trouble, fatal=RunError(f"{at} has no credit left (429): {words}"))
        if status == 429 or status in _TRY_AGAIN or status >= 500:
            reason = "rate_limited" if status == 429 else trouble.reason
            return replace(trouble, reason=reason, again=True, retry_after=retry_after(error.response.headers))
        if code == "content_filter":
            return replace(trouble, reason="content_filter")
        if status == 413 or code in _TOO_LONG or "maximum context length" in words:
            return replace(trouble, reason="too_long")
        if status in (401, 403):
            return replace(trouble, fatal=InputError(f"{at} refuses the key ({status}): {words}; check {KEY}"))
        if status == 404:
            return replace(
                trouble,
                fatal=InputError(
                    f"{at} has no judge {self.judge!r} (404): {words}; check --judge and --judge-base-url"
                ),
            )
        if status in (400, 422):
            hint = "; such a judge takes no temperature but 1" if "temperature" in words else ""
            return replace(
                trouble,
                refused=InputError(f"{at} refuses what is sent to the judge {self.judge!r} ({status}): {words}{hint}"),
            )
        return replace(trouble, fatal=RunError(f"{at} answers {status}: {words}"))

    def _lost(self, error: Any) -> Trouble:
        cause = error.__cause__
        if "complete message body" in str(cause) or "incomplete chunked read" in str(cause):
            return Trouble("cut", "the answer was cut off", again=True, may_be_billed=True)
        name = type(cause or error).__name__
        # Where no connection was made, nothing was billed.
        return Trouble(
            "connection", f"the connection failed ({name})", again=True, may_be_billed=name != "ConnectError"
        )

    def _words(self, error: Any) -> str:
        """The provider's own message, in one line and without the key."""
        body = error.body if isinstance(error.body, dict) else {}
        text = body.get("message") or body.get("detail") or error.response.reason_phrase or "no reason given"
        return self._scrub(str(text))

    def _scrub(self, text: str) -> str:
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(_KEY_LIKE.sub("***", text).split())[:300]


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that `retry-after-ms` or `Retry-After` (seconds or a date) asks for; None where it says nothing sane."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    given = headers.get("retry-after")
    seconds = _number(given)
    if seconds is not None or not given:
        return seconds
    try:
        until = parsedate_to_datetime(given).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
    try:  # the server's clock against itself, where it shows its time
        now = parsedate_to_datetime(headers["date"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        now = time.time() if now is None else now
    return until - now if until > now else None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _usage(body: Any) -> Tokens | None:
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int) or min(prompt, completion) < 0:
        return None
    return (prompt, completion) if prompt + completion else None


def _checked(base_url: str, key: str) -> str:
    """The address, if it is one and holds nothing that may not be shown."""
    try:
        address = urlsplit(base_url)
        host, _ = address.hostname, address.port
    except ValueError:
        address, host = urlsplit(""), None
    if address.scheme not in ("http", "https") or not host:
        raise InputError(
            "--judge-base-url is not an http(s) address; it must look like http://localhost:8000/v1"
        )  # not repeated: it may be a key in the wrong place
    if "@" in address.netloc or address.query or address.fragment or (key and key in base_url):
        raise InputError(
            f"--judge-base-url holds a user, a password, a query or the key; give the bare address, the key in {KEY}"
        )
    return base_url.rstrip("/")
