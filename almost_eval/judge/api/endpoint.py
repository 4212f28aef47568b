"""One request to a judge over HTTP, and what came of it: a reply, or what went wrong and whether to try again.

OpenAI's own endpoint is sent `max_completion_tokens`, which all of its chat models take; its newer ones refuse
`max_tokens`. Every other endpoint is sent `max_tokens`, which all of them take.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from almost_eval.errors import AlmostError, InputError, RunError
from almost_eval.judge.records import JudgeRequest, Reply
from almost_eval.models.endpoints import (
    BASE_URL,
    KEYS,
    OPENAI,
    EndpointAddress,
    async_sdk_client,
    hide_key,
    read_key,
    server_words,
)

if TYPE_CHECKING:
    import httpx
    import openai

Tokens = tuple[int, int]  # (prompt, completion) as billed

_TRY_AGAIN = (408, 409)  # and 429, 5xx
_TOO_LONG = ("context_length_exceeded", "string_above_max_length")


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why one sending gave no reply."""

    reason: str
    """As in `Failure.reason`."""
    message: str
    again: bool = False
    """It may pass if it is sent again."""
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


class JudgeEndpoint:
    """Where a judge is reached.

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
        address = EndpointAddress.parse(
            (base_url or os.environ.get(BASE_URL) or OPENAI).rstrip("/"), "--judge-base-url"
        )
        self.address = address
        self.base_url = address.url
        self.is_openai = address.is_openai
        self._key = read_key(address)
        parts = address.parts
        if address.has_user or parts.query or parts.fragment or (self._key and self._key in self.base_url):
            raise InputError(
                "--judge-base-url holds a user, a password, a query or the key; give the bare address, the key in "
                f"{' or '.join(KEYS)}"
            )
        if self.is_openai and not self._key:
            raise InputError(
                f"no key for {self.base_url}: set {KEYS[1]} or {KEYS[0]}, or give --judge-base-url for a server of "
                "your own"
            )

    def connect(self) -> openai.AsyncOpenAI:
        """The SDK's client, for the loop that sends. Use as a context manager."""
        return async_sdk_client(self.address, self._key, timeout=self.timeout)

    async def send(self, connection: openai.AsyncOpenAI, request: JudgeRequest) -> Reply | Trouble:
        """Send once."""
        import httpx
        import openai

        body = {
            "model": request.judge,
            "messages": [message.to_dict() for message in request.messages],
            "temperature": request.temperature,
            "max_completion_tokens" if self.is_openai else "max_tokens": request.max_tokens,
        }
        try:
            async with asyncio.timeout(self.timeout):  # the SDK's own is for each read: a server that drips passes it
                response = await connection.post("/chat/completions", cast_to=httpx.Response, body=body)
        except (TimeoutError, openai.APITimeoutError):
            return Trouble("timeout", f"no answer within {self.timeout:g} s", again=True, may_be_billed=True)
        except openai.APIStatusError as error:
            return self._refusal(error)
        except openai.APIConnectionError as error:
            return self._lost(error)
        return self._read(response)

    def _read(self, response: httpx.Response) -> Reply | Trouble:
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
            return Trouble("refusal", server_words(str(refusal), self._key), tokens=tokens)
        if not text or not text.strip():
            why = ": its tokens were used up before it wrote anything" if finish == "length" else ""
            return Trouble("empty", f"the answer is empty (finish_reason {finish}){why}", tokens=tokens)
        model = body.get("model")
        return Reply(hide_key(text, self._key), finish, model if isinstance(model, str) else "", *(tokens or (0, 0)))

    def _refusal(self, error: openai.APIStatusError) -> Trouble:
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
            return replace(
                trouble, fatal=InputError(f"{at} refuses the key ({status}): {words}; check {KEYS[0]} or {KEYS[1]}")
            )
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

    def _lost(self, error: openai.APIConnectionError) -> Trouble:
        cause = error.__cause__
        if "complete message body" in str(cause) or "incomplete chunked read" in str(cause):
            return Trouble("cut", "the answer was cut off", again=True, may_be_billed=True)
        name = type(cause or error).__name__
        # Where no connection was made, nothing was billed.
        return Trouble(
            "connection", f"the connection failed ({name})", again=True, may_be_billed=name != "ConnectError"
        )

    def _words(self, error: openai.APIStatusError) -> str:
        """The provider's own message, in one line and without the key."""
        body = error.body if isinstance(error.body, dict) else {}
        text = body.get("message") or body.get("detail") or error.response.reason_phrase or "no reason given"
        return server_words(str(text), self._key)


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that `retry-after-ms` or `Retry-After` (seconds or a date) asks for; None where it says nothing sane."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    stated = headers.get("retry-after")
    seconds = _number(stated)
    if seconds is not None or not stated:
        return seconds
    try:
        until = parsedate_to_datetime(stated).timestamp()
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


def _usage(body: object) -> Tokens | None:
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int) or min(prompt, completion) < 0:
        return None
    return (prompt, completion) if prompt + completion else None
