"""One OpenAI-compatible endpoint: what it can do, an answer as a stream, rewards. Every failure is a plain sentence.

httpx and not OpenAI's SDK: the page must be there in seconds, the SDK alone takes one of them to import, and of the
protocol only a stream of chat chunks is needed. Leaving a stream closes the connection, which ends the work upstream.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from almost_eval.errors import InputError, RunError
from almost_eval.models.endpoints import KEYS, EndpointAddress, read_key, server_words
from almost_eval.types import JSONObject
from serving.chat.conversation import MAX_CHARACTERS, ChatCandidate, Settings
from serving.door.strict_json import NotJSON, read_json
from serving.gateway.events import EventReader, EventTooLong, TextJoiner, joined

if TYPE_CHECKING:
    import httpx

Kind = Literal["down", "key", "context_full", "loading", "busy", "reward", "refused", "broken"]

_CONTEXT = re.compile(r"context[ _](length|window|of|size)|maximum (context|model)|max_model_len|too long", re.I)
_EXAMPLE = "http://127.0.0.1:8000/v1"
_CONNECT_S = 5.0
_QUICK_S = 20.0
"""Seconds for a request that is no answer."""
_WHOLE_BYTES = 16 << 20
"""Of an answer that is no stream: a list of models, an OpenAPI document, rewards, an error."""
_MESSAGE = 4000
"""Characters of an error that are looked at: what finds keys in it takes the square of a word's length."""
_SILENCE_S = 120.0
"""Seconds without a byte after which the client gives up. Best-of-N is silent until the best is known."""


class EndpointError(RunError):
    """An endpoint failed; the message is a sentence for the page."""

    def __init__(self, kind: Kind, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Abilities:
    """What an endpoint serves."""

    models: tuple[str, ...] = ()
    rewards: bool = False
    """Whether it has `/v1/rewards`, as this toolkit's gateway does."""
    best_of: int = 1
    """The largest N of best-of-N; 1: it has none."""
    racing: bool = False
    """Whether best-of-N tells the best answer so far while it draws others."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Draft:
    """The best answer so far, whole, while others are drawn; what comes next takes its place."""

    text: str


@dataclass(frozen=True, slots=True)
class End:
    """The end of the answer."""

    ending: str
    tokens: int | None = None
    """Of all candidates; None where the endpoint does not say."""
    reward: float | None = None
    candidates: tuple[ChatCandidate, ...] = ()
    fallback: str | None = None
    """Why best-of-N was answered without rewards."""


@dataclass(frozen=True, slots=True)
class Address:
    """`[NAME=]URL[#MODEL]`, taken apart."""

    name: str
    url: str
    model: str | None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read a value of `--base-url`.

        Raises:
            InputError: no http(s) address, or one that holds a password.
        """
        head, equals, rest = text.partition("=")
        name, url = (head.strip(), rest) if equals and "://" not in head else ("", text)
        url, _, model = url.partition("#")
        address = EndpointAddress.parse(url, "--base-url", example=_EXAMPLE)
        if address.has_user:
            raise InputError(f"--base-url holds a user or a password; a key comes from the environment: {KEYS[0]}")
        if address.parts.query:
            raise InputError(f"--base-url is not an http(s) address; it must look like {_EXAMPLE}")
        return cls(name or (model or address.parts.netloc), url.rstrip("/").removesuffix("/v1") + "/v1", model or None)


@dataclass(slots=True)
class Endpoint:
    """One endpoint. Made anywhere, used in one event loop."""

    url: str
    """Up to and including `/v1`."""
    key: str | None = field(default=None, repr=False)
    local: bool = False
    """Whether this program started it: then the sentences do not speak of a server that somebody should start."""
    _client: httpx.AsyncClient | None = field(default=None, repr=False)

    @classmethod
    def with_key_of_environment(cls, url: str) -> Endpoint:
        """An endpoint that is sent the key of the environment, if there is one."""
        return cls(url, read_key(EndpointAddress(url)))

    async def abilities(self) -> Abilities:
        """Ask what it serves.

        Raises:
            EndpointError: it is down, refuses the key, or has no list of models.
        """
        listed = await self._json("GET", f"{self.url}/models")
        try:
            models = tuple(str(entry["id"]) for entry in listed["data"])
        except (LookupError, TypeError):
            raise self._broken() from None
        try:
            document = await self._json("GET", f"{self.url.removesuffix('/v1')}/openapi.json")
        except EndpointError:
            return Abilities(models)  # plain OpenAI-compatible endpoints publish none
        return _read_abilities(models, document)

    async def stream(
        self, model: str, messages: Sequence[Mapping[str, str]], settings: Settings, *, drafts: bool = False
    ) -> AsyncIterator[Draft | Delta | End]:
        """The answer to a conversation: `Draft`s where it is best-of-N and they are asked for, which only an endpoint
        with `racing` allows, `Delta`s, then one `End`.

        Raises:
            EndpointError: see `Kind`.
        """
        body: JSONObject = {
            "model": model,
            "messages": list(messages),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if settings.best_of > 1:
            body |= {"best_of": settings.best_of, "almost_candidates": True}
            body |= {"almost_stream": "racing"} if drafts else {}
        ending, tokens, almost, draft, length = "", None, None, "", 0
        joiner = TextJoiner()
        async for chunk in self._events(f"{self.url}/chat/completions", body):
            if chunk.get("error"):
                raise self._refusal(500, chunk)
            try:
                racing = (chunk.get("almost") or {}).get("racing")
                almost = almost if racing else chunk.get("almost") or almost
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
                choices = [
                    ((choice.get("delta") or {}).get("content"), choice.get("finish_reason"))
                    for choice in chunk["choices"]
                ]
            except (AttributeError, LookupError, TypeError):
                raise self._broken() from None
            if isinstance(racing, dict) and not racing.get("final"):
                draft = joined(str(racing.get("text") or draft + str(racing.get("delta") or "")))
                yield Draft(draft[:MAX_CHARACTERS])
            for text, reason in choices:
                if text and (whole := joiner.add(str(text))):
                    yield Delta(whole[: MAX_CHARACTERS - length])
                    length += len(whole)
                ending = str(reason) if reason else ending
            if max(length, len(draft)) > MAX_CHARACTERS:
                raise EndpointError(
                    "broken", f"The answer is longer than {MAX_CHARACTERS:,} characters, the most here."
                )
        if half := joiner.rest():
            yield Delta(half)
        if not ending:
            raise EndpointError("broken", "The answer broke off: the server closed the connection before its end.")
        try:
            end = _end(ending, tokens, almost)
        except (AttributeError, TypeError):
            raise self._broken() from None
        yield end

    async def rewards(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[float]:
        """Raw logits of conversations that end with an answer.

        Raises:
            EndpointError: see `Kind`.
        """
        body = {"conversations": [list(one) for one in conversations]}
        answer = await self._json("POST", f"{self.url}/rewards", body)
        try:
            rewards = [_figure(reward) for reward in answer["rewards"]]
        except (LookupError, TypeError):
            raise self._broken() from None
        known = [reward for reward in rewards if reward is not None]
        if not len(known) == len(rewards) == len(conversations):
            raise self._broken()
        return known

    # --- HTTP ---

    async def _json(self, method: str, url: str, body: JSONObject | None = None) -> JSONObject:
        import httpx

        try:
            async with (
                asyncio.timeout(_QUICK_S),
                self._open().stream(method, url, json=body, timeout=_QUICK_S) as response,
            ):
                content = _parsed(await self._whole(response))
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        except TimeoutError:
            raise self._unreachable(httpx.ReadTimeout("")) from None
        if response.status_code != 200:
            raise self._refusal(response.status_code, content)
        if content is None:
            raise self._broken()
        return content

    async def _events(self, url: str, body: JSONObject) -> AsyncIterator[JSONObject]:
        import httpx

        try:
            async with self._open().stream("POST", url, json=body) as response:
                if response.status_code != 200:
                    raise self._refusal(response.status_code, _parsed(await self._whole(response)))
                reader = EventReader()
                async for part in response.aiter_bytes():
                    for event in reader.feed(part):
                        if event.strip() == b"[DONE]":
                            return
                        yield self._chunk(event)
                for event in reader.finish():
                    if event.strip() != b"[DONE]":
                        yield self._chunk(event)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        except EventTooLong:
            raise self._broken() from None

    async def _whole(self, response: httpx.Response) -> bytes:
        """The body of an answer that is no stream."""
        body = bytearray()
        async for part in response.aiter_bytes():
            body += part
            if len(body) > _WHOLE_BYTES:
                raise self._broken()
        return bytes(body)

    def _chunk(self, event: bytes) -> JSONObject:
        chunk = _parsed(event)
        if chunk is None:
            raise self._broken()
        return chunk

    def _open(self) -> httpx.AsyncClient:
        import httpx

        if self._client is None:
            headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
            timeout = httpx.Timeout(_SILENCE_S, connect=_CONNECT_S)
            limits = httpx.Limits(max_connections=256, max_keepalive_connections=32)
            # trust_env: a proxy of the environment must not see what is said to a server of this machine.
            local = EndpointAddress(self.url).is_local
            self._client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits, trust_env=not local)
        return self._client

    # --- sentences ---

    def _where(self) -> str:
        return "The model" if self.local else f"The endpoint {self.url}"

    def _unreachable(self, error: Exception) -> EndpointError:
        import httpx

        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            hint = "start almost-chat again" if self.local else "start the server, or check the address"
            return EndpointError("down", f"{self._where()} is not reachable: {hint}, then press Retry.")
        if isinstance(error, httpx.TimeoutException):
            return EndpointError("down", f"{self._where()} was silent for too long, so the wait was given up.")
        return EndpointError("broken", "The answer broke off: the connection was lost before its end.")

    def _broken(self) -> EndpointError:
        return EndpointError("broken", f"{self._where()} answered with something that is no OpenAI-compatible reply.")

    def _refusal(self, status: int, body: JSONObject | None) -> EndpointError:
        details = body.get("error", body) if isinstance(body, dict) else {}
        details = details if isinstance(details, dict) else {"message": details}
        message = str(details.get("message") or "no reason given")[:_MESSAGE]
        words = server_words(message, self.key).rstrip(".")
        code = str(details.get("code") or "")
        if code == "context_length_exceeded" or (status in (400, 413, 422) and _CONTEXT.search(words)):
            sentence = "The context is full: the conversation and the answer do not fit the model."
            return EndpointError("context_full", sentence)
        if status in (401, 403):
            sentence = f"{self._where()} refuses the key: set {KEYS[0]} to a valid one and start almost-chat again."
            return EndpointError("key", sentence)
        if status == 404:
            return EndpointError("refused", f"{self._where()} has no such model: {words}.")
        if status == 429:
            return EndpointError("busy", f"{self._where()} is busy: {words}. Try again in a moment.")
        if code.startswith(("reward", "no_reward", "nothing_scored")):
            return EndpointError("reward", f"The reward model cannot be used now: {words}. Set best-of to 1 to go on.")
        if status == 503:
            return EndpointError(
                "loading", f"{self._where()} is not ready: the model is still loading. Try again soon."
            )
        if status in (502, 504) or code.startswith("policy"):
            return EndpointError("down", f"The model's server does not answer: {words}.")
        return EndpointError("refused", f"{self._where()} refuses the request ({status}): {words}.")


def _parsed(body: bytes) -> JSONObject | None:
    try:
        content = read_json(body)
    except NotJSON:
        return None
    return content if isinstance(content, dict) else None


def _read_abilities(models: tuple[str, ...], document: JSONObject) -> Abilities:
    """From the OpenAPI document, which names the routes a server has and the largest N it takes."""
    try:
        rewards = "/v1/rewards" in document["paths"]
        field_ = document["components"]["schemas"]["ChatRequest"]["properties"].get("best_of") or {}
        most = next((int(form["maximum"]) for form in field_.get("anyOf", [field_]) if "maximum" in form), 1)
        racing = "almost_stream" in document["components"]["schemas"]["ChatRequest"]["properties"]
    except (LookupError, TypeError, AttributeError, ValueError):
        return Abilities(models)
    return Abilities(models, rewards, most if rewards else 1, rewards and racing)


def _end(ending: str, tokens: object, almost: JSONObject | None) -> End:
    figure = _figure(tokens)
    count = None if figure is None else int(figure)
    if not isinstance(almost, dict):
        return End(ending, count)
    chosen = set(almost.get("chosen") or ())
    candidates = tuple(
        ChatCandidate(
            joined(str(one.get("text") or "")).strip(), _figure(one.get("reward")), one.get("index") in chosen
        )
        for one in almost.get("candidates") or ()
    )
    fallback = almost.get("fallback")
    return End(ending, count, _figure(almost.get("reward")), candidates, str(fallback) if fallback else None)


def _figure(value: object) -> float | None:
    """A number as a float; None for anything else, and for an integer that no float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None
