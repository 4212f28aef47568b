"""One request to a judge over HTTP, and what came of it: a reply, or what went wrong and whether to try again.

OpenAI's own endpoint is sent `max_completion_tokens`, which all of its chat models take; its newer ones refuse
`max_tokens`. Every other endpoint is sent `max_tokens` at first. A parameter that is refused is exchanged or left out
from then on (see `parameters`). What a body says is read in `bodies`.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import urlunsplit

from almost_eval.errors import AlmostError, InputError, RunError
from almost_eval.judge.api.adaptive import MAX_PAUSE
from almost_eval.judge.api.bodies import (
    CUT_OFF,
    completion_in,
    content_of,
    cost_of,
    error_status,
    error_words,
    finish_of,
    logprobs_of,
    parsed,
    refusal_of,
    retry_after,
    usage_of,
)
from almost_eval.judge.api.parameters import LOGPROBS, MAX_COMPLETION_TOKENS, MAX_TOKENS, Parameters
from almost_eval.judge.records import JudgeRequest, Reply, Usage
from almost_eval.models.endpoints import (
    KEYS,
    EndpointAddress,
    async_sdk_client,
    hide_key,
    read_key,
    sdk_client,
    server_words,
)
from almost_eval.types import JSONObject

if TYPE_CHECKING:
    import httpx
    import openai

EXCHANGED = "exchanged"
"""The reason of a sending that was refused for a parameter which the next one sends otherwise."""
THOUGHT_ONLY = "thought_only"
"""The reason where a judge spent all of its tokens on thinking."""
KEPT = "what was done is kept: the same command goes on"

_TRY_AGAIN = (408, 409)  # and 429, 5xx
_OVERLOADED = (503, 529)
"""Refused for load, as a 429 is: nothing was worked on."""
_FILTERED = ("content_filter", "content_policy_violation")
_TOO_LONG = ("context_length_exceeded", "string_above_max_length")
_NO_CREDIT = re.compile(
    r"insufficient[_ ](?:quota|balance|credits?|funds)|billing[_ ]hard[_ ]limit|billing_not_active"
    r"|credit balance is too low|exceeded your current quota|requires more credits|out of credits",
    re.I,
)
_API_VERSION = re.compile(r"api-version=[\w.-]+")
"""The only query of an address that is no secret: Azure's."""


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
    tokens: Usage | None = None
    """What was billed all the same, where it is known."""
    cost: float | None = None
    """The same in USD, where the host states them."""
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
        base_url: up to and including `/v1`.
        timeout: seconds that one answer may take, from the first byte sent to the last received.

    Raises:
        InputError: no address, an address with anything secret in it, no key for OpenAI's endpoint, or a broken key.
    """

    def __init__(self, judge: str, base_url: str, timeout: float) -> None:
        self.judge = judge
        self.timeout = timeout
        address = EndpointAddress.parse(base_url.rstrip("/"), "--judge-base-url")
        self.address = address
        self.base_url = address.url
        self.is_openai = address.is_openai
        self._key = read_key(address)
        parts = address.parts
        self._query: dict[str, str] = {}
        if _API_VERSION.fullmatch(parts.query):
            self._query = dict([parts.query.split("=", 1)])
            address = EndpointAddress(urlunsplit(parts._replace(query="")))
            self.address, self.base_url, parts = address, address.url, address.parts
        self.parameters = Parameters(MAX_COMPLETION_TOKENS if self.is_openai else MAX_TOKENS)
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

    @property
    def name(self) -> str:
        """Of what is learnt about it, in a journal."""
        return f"parameters of {self.judge} at {self.base_url}"

    def connect(self) -> openai.AsyncOpenAI:
        """The SDK's client, for the loop that sends. Use as a context manager."""
        return async_sdk_client(
            self.address, self._key, timeout=self.timeout, query=self._query, headers=self._own_headers
        )

    def connect_blocking(self, timeout: float) -> openai.OpenAI:
        """The SDK's client for whole files, without a loop. Use as a context manager."""
        return sdk_client(
            self.address, self._key, retries=0, timeout=timeout, query=self._query, headers=self._own_headers
        )

    @property
    def _own_headers(self) -> dict[str, str]:
        host = self.address.parts.hostname or ""
        is_azure = bool(self._query) or host.endswith((".azure.com", ".azure-api.net"))
        return {"api-key": self._key} if is_azure and self._key else {}  # beside the bearer that the SDK sends

    def body_of(self, request: JudgeRequest, sent: Mapping[str, object]) -> JSONObject:
        """What is sent for a request with these parameters."""
        return {"model": request.judge, "messages": [message.to_dict() for message in request.messages], **sent}

    @property
    def account(self) -> str:
        """Tells one key from another without holding any of it: what is ordered with one is not seen with another."""
        return hashlib.sha256(f"almost-eval {self._key}".encode()).hexdigest()[:8]

    @staticmethod
    def has_no_credit(status: int, code: str, text: str) -> bool:
        """Whether a refusal says that there is no money left."""
        return status in (402, 429, 403, 400) and (status == 402 or bool(_NO_CREDIT.search(f"{code} {text}")))

    def words(self, text: str) -> str:
        """What the endpoint said, fit to be shown."""
        return server_words(text, self._key)

    async def send(self, connection: openai.AsyncOpenAI, request: JudgeRequest) -> Reply | Trouble:
        """Send once."""
        import httpx
        import openai

        sent = self.parameters.of(request)
        body = self.body_of(request, sent)
        try:
            async with asyncio.timeout(self.timeout):  # the SDK's own is for each read: a server that drips passes it
                response = await connection.post("/chat/completions", cast_to=httpx.Response, body=body)
        except (TimeoutError, openai.APITimeoutError):
            return Trouble("timeout", f"no answer within {self.timeout:g} s", again=True, may_be_billed=True)
        except openai.APIStatusError as error:
            refusal: httpx.Response = error.response  # type: ignore[assignment]  # httpx2
            body = parsed(refusal.content)
            return self._redirected(refusal) or self._refusal(error.status_code, body, refusal, request, sent)
        except openai.APIConnectionError as error:
            return self._lost(error)
        return self._redirected(response) or self._read(response, request, sent)

    def outcome(self, status: int, body: object, request: JudgeRequest, sent: Mapping[str, object]) -> Reply | Trouble:
        """What an answer is that came in a file: its status, its body, and what it is the answer to."""
        import httpx

        response = httpx.Response(status, json=body)
        if 200 <= status < 300:
            return self._read(response, request, sent)
        return self._refusal(status, body, response, request, sent)

    def _read(self, response: httpx.Response, request: JudgeRequest, sent: Mapping[str, object]) -> Reply | Trouble:
        """A response of status 2xx."""
        body = completion_in(response.content)
        if body is None:
            start = response.content[:200].lstrip().lower()
            if "html" in response.headers.get("content-type", "") or start.startswith((b"<!doctype", b"<html")):
                return Trouble("html", f"{self.base_url} sent a web page instead of JSON", again=True)
            return Trouble("malformed", "the answer is not JSON", again=True, may_be_billed=True)
        tokens, cost = usage_of(body), cost_of(body)
        if not (isinstance(body, dict) and body.get("choices")) and any(error_words(body)):
            # A router hands on what its provider said, under a status of its own.
            return self._refusal(error_status(body), body, response, request, sent)
        try:
            choices = body["choices"]
            if isinstance(choices, list) and not choices:
                return Trouble("empty_choices", "the answer holds no choice", False, None, tokens, cost, True)
            message, finish = choices[0]["message"], finish_of(choices[0])
            text, thinking = content_of(message)
            refusal = refusal_of(message)
        except (AttributeError, LookupError, TypeError):
            is_paid = tokens is not None or cost is not None  # the next one would be paid for as well
            why = "the answer is JSON, but no chat completion"
            return Trouble("malformed", why, not is_paid, None, tokens, cost, True)
        if finish == CUT_OFF:
            why = f"the provider broke the answer off (finish_reason {choices[0].get('finish_reason')})"
            return Trouble("cut", why, True, None, tokens, cost, True)
        missing = self._missing(text, thinking, finish, refusal, tokens, request)
        if missing is not None:
            return replace(missing, cost=cost)
        model = body.get("model")
        usage = tokens or Usage(0, 0)
        return Reply(
            hide_key(text, self._key),
            finish,
            model if isinstance(model, str) else "",
            usage.prompt,
            usage.completion,
            usage.cached,
            usage.reasoning,
            hide_key(thinking, self._key),
            dict(sent),
            usage.written,
            cost,
            logprobs=logprobs_of(choices[0]) if LOGPROBS in sent else None,
        )

    def _missing(
        self, text: str, thinking: str, finish: str, refusal: str, tokens: Usage | None, request: JudgeRequest
    ) -> Trouble | None:
        """Why an answer is no reply, though it came whole. It is billed like any other."""
        billed = Trouble("empty", "", tokens=tokens, may_be_billed=True)
        if finish == "content_filter":
            return replace(billed, reason="content_filter", message="the provider's content filter withheld the answer")
        if not text.strip() and refusal:
            return replace(billed, reason="refusal", message=server_words(refusal, self._key))
        if text.strip():
            return None
        if finish == "length" and (thinking.strip() or (tokens and tokens.reasoning)):
            return replace(
                billed,
                reason=THOUGHT_ONLY,
                message=f"the judge spent its {request.max_tokens:,} tokens thinking; raise --max-tokens",
            )
        why = ": its tokens were used up before it wrote anything; raise --max-tokens" if finish == "length" else ""
        return replace(billed, message=f"the answer is empty (finish_reason {finish}){why}")

    def _refusal(
        self, status: int, body: object, response: httpx.Response, request: JudgeRequest, sent: Mapping[str, object]
    ) -> Trouble:
        """A response of any other status, or an error inside one of status 2xx."""
        headers = response.headers
        code, text = error_words(body)
        words = server_words(text or (response.reason_phrase if status >= 400 else "") or "no reason given", self._key)
        at = f"the endpoint {self.base_url}"
        tokens = usage_of(body)
        trouble = Trouble(
            f"http_{status}",
            f"{status}: {words}",
            tokens=tokens,
            cost=cost_of(body),
            may_be_billed=status >= 500 and status not in _OVERLOADED,
        )
        if self.has_no_credit(status, code, text):
            return replace(trouble, fatal=RunError(f"{at} has no credit left ({status}): {words}; {KEPT}"))
        if status == 429 or status in _TRY_AGAIN or status >= 500:
            reason = "rate_limited" if status == 429 else trouble.reason
            pause = retry_after(headers, words=text)
            if pause is not None and pause > MAX_PAUSE:
                wait = f"asks to wait {duration(pause)} ({status}): {words}"
                return replace(trouble, reason=reason, fatal=RunError(f"{at} {wait}; {KEPT} when that time is over"))
            return replace(trouble, reason=reason, again=True, retry_after=pause)
        if status in (400, 404, 415, 422):
            if sent != self.parameters.of(request):
                return replace(
                    trouble, reason=EXCHANGED, message="", again=True
                )  # another request has learnt it meanwhile
            change = self.parameters.change(sent, body if body is not None else response.text)
            if change is not None:
                return replace(trouble, reason=EXCHANGED, message=change, again=True)
        if code in _FILTERED:
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
            return replace(
                trouble,
                refused=InputError(f"{at} refuses what is sent to the judge {self.judge!r} ({status}): {words}"),
            )
        return replace(trouble, fatal=RunError(f"{at} answers {status}: {words}"))

    def _redirected(self, response: httpx.Response) -> Trouble | None:
        """The end of a run whose requests are sent on, and arrive without their content: as GET."""
        if not response.history or response.request.method == "POST":
            return None
        to = self.words(response.history[-1].headers.get("location", "")) or "nowhere"
        why = f"sends on to {to} in a way that loses what is sent ({response.history[0].status_code})"
        fatal = InputError(f"the endpoint {self.base_url} {why}; give the address that it means as --judge-base-url")
        return Trouble("redirected", why, fatal=fatal)

    def _lost(self, error: openai.APIConnectionError) -> Trouble:
        cause = error.__cause__
        if "complete message body" in str(cause) or "incomplete chunked read" in str(cause):
            return Trouble("cut", "the answer was cut off", again=True, may_be_billed=True)
        name = type(cause or error).__name__
        if name == "TooManyRedirects":
            fatal = InputError(f"the endpoint {self.base_url} sends on without end; check --judge-base-url")
            return Trouble("redirected", name, fatal=fatal)
        if name == "DecodingError":
            return Trouble("malformed", "the answer is not compressed as it says", again=True, may_be_billed=True)
        # Where no connection was made, nothing was billed.
        return Trouble(
            "connection", f"the connection failed ({name})", again=True, may_be_billed=name != "ConnectError"
        )


def duration(seconds: float) -> str:
    """Seconds for a reader: `45 s`, `7 min 12 s`, `6 h`."""
    total = round(seconds)
    days, hours, minutes, rest = total // 86400, total // 3600 % 24, total // 60 % 60, total % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    shown = [f"{number} {unit}" for number, unit in parts if number]
    return " ".join(shown[:2]) or "0 s"
