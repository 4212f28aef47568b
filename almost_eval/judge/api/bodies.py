"""What the bodies and headers of a provider's answers say: text and thoughts, tokens, errors, how long to wait.

Providers that call themselves compatible differ in all of these. What is known here was read in their answers.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from almost_eval.judge.records import TokenAlternatives, Usage
from almost_eval.types import JSONObject

_THOUGHTS = ("thinking", "reasoning", "thought", "reasoning_content", "redacted_thinking")
"""Types of a part of the content that is no answer, and names of the field that holds its text."""
_AGAIN_IN = re.compile(
    r"(?:try again|retry|retryDelay|available again|resets?)\W{1,4}(?:in|after)?\W{0,3}"
    r"(?P<span>(?:\d+(?:\.\d+)? ?(?:milliseconds?|ms|days?|hours?|minutes?|min|seconds?|sec|[dhms])[ ,]*)+)",
    re.I,
)
_SPAN = re.compile(r"(\d+(?:\.\d+)?) ?(ms|milli|d|h|m|s)", re.I)
_UNITS = {"ms": 0.001, "milli": 0.001, "d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


def parsed(content: bytes) -> Any:
    """A body as JSON, whatever it may be; None where it is none."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return body


def completion_in(content: bytes) -> Any:
    """The body of a completion as JSON: also of one that came as a stream of events, though none was requested.

    Of an endpoint that always streams each reply is paid for; it would be sent, and paid for, again and again.
    """
    if not content.lstrip().startswith((b"data:", b"event:", b":")):
        return parsed(content)
    lines = content.decode(errors="replace").split("\n")
    events = [
        event for line in lines if line.startswith("data:") and isinstance(event := parsed(line[5:].encode()), dict)
    ]
    if (error := next((event for event in events if event.get("error")), None)) is not None:
        return error
    pieces = [piece for event in events for piece in event.get("choices") or [] if not piece.get("index")]
    deltas = [piece.get("delta") or {} for piece in pieces]
    message = {
        name: "".join(text for delta in deltas if isinstance(text := delta.get(name), str))
        for name in ("content", "refusal", "reasoning_content", "reasoning")
    }
    finish = next((piece["finish_reason"] for piece in reversed(pieces) if piece.get("finish_reason")), "no end")
    told = {
        name: value for event in events for name in ("model", "usage") if (value := event.get(name))
    }  # the last ones
    return {**told, "choices": [{"message": message, "finish_reason": finish}]} if events else None


CUT_OFF = "cut off"
"""The finish of an answer that its provider broke off: what there is of it may lack its end."""
_FINISHES = {
    **dict.fromkeys(("model_length", "max_tokens", "max_output_tokens"), "length"),
    **dict.fromkeys(("safety", "sensitive", "recitation", "blocklist", "prohibited_content", "spii"), "content_filter"),
    **dict.fromkeys(
        ("error", "abort", "aborted", "cancelled", "insufficient_system_resource", "network_error", "no end"), CUT_OFF
    ),
}
"""What hosts call it besides OpenAI: Mistral, Gemini, Zhipu, DeepSeek, OpenRouter, vLLM."""


def finish_of(choice: JSONObject) -> str:
    """Why an answer ended: `stop`, `length`, `content_filter`, `CUT_OFF`, or as it stands; `unknown` where it does not.

    Raises:
        TypeError: it is no text.
    """
    finish = choice.get("finish_reason") or "unknown"
    if not isinstance(finish, str):
        raise TypeError
    return _FINISHES.get(finish.lower(), finish)


def refusal_of(message: JSONObject) -> str:
    """The words of a judge that refuses, in a field or a part of their own; empty where it does not."""
    content = message.get("content")
    parts = [part.get("refusal") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    return " ".join(str(words) for words in (message.get("refusal"), *parts) if words)


def content_of(message: JSONObject) -> tuple[str, str]:
    """The text of a message, and its thoughts where they came in a field or a part of their own.

    Raises:
        TypeError: its content is neither text nor a list of parts.
    """
    content = message.get("content")
    thoughts = [message.get(name) for name in ("reasoning_content", "reasoning", "thinking")]
    texts: list[str] = []
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(part, str):
                texts.append(part)
            elif kind in _THOUGHTS:
                thoughts.append(_text(next((part[name] for name in _THOUGHTS if name in part), part.get("text"))))
            elif isinstance(part, dict):
                texts.append(_text(part.get("text")))
            else:
                raise TypeError
    elif isinstance(content, str | None):
        texts.append(content or "")
    else:
        raise TypeError
    # Some servers repeat one thought under two names.
    spoken = dict.fromkeys(thought for thought in thoughts if isinstance(thought, str) and thought)
    return "".join(texts), "\n\n".join(spoken)


def _text(value: object) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(value, list):
        return "".join(_text(part.get("text") if isinstance(part, dict) else part) for part in value)
    return value if isinstance(value, str) else ""


LAST_TOKENS = 64
"""Of a reply whose log-probabilities are kept: a verdict is a few tokens at its end, and thinking before it is long."""


def logprobs_of(choice: JSONObject) -> list[TokenAlternatives] | None:
    """The last tokens of a reply, each with what else might have stood there; None where nothing sane is told.

    OpenAI's shape is a list `content` of objects; some servers send the older lists `tokens` and `top_logprobs`.
    """
    told = choice.get("logprobs")
    if not isinstance(told, dict):
        return None
    try:
        if isinstance(told.get("content"), list):
            last = told["content"][-LAST_TOKENS:]
            return [
                _alternatives(
                    one["token"], one["logprob"], [(o["token"], o["logprob"]) for o in one.get("top_logprobs") or ()]
                )
                for one in last
            ]
        rows = list(zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True))[-LAST_TOKENS:]
        return [_alternatives(token, logprob, (others or {}).items()) for token, logprob, others in rows]
    except (AttributeError, LookupError, TypeError, ValueError):
        return None


def _alternatives(token: object, logprob: object, others: Iterable[tuple[object, object]]) -> TokenAlternatives:
    """One token; ValueError where a value is not what it should be."""
    rows = [(other, value) for other, value in others]
    if token not in [other for other, _ in rows]:
        rows.insert(0, (token, logprob))
    # A token that is out of the question is told as -inf, or as a very small number.
    checked = [(o, float(v)) for o, v in rows if isinstance(o, str) and isinstance(v, int | float) and v <= 0.001]
    if not isinstance(token, str) or len(checked) < len(rows):
        raise ValueError
    return token, [(other, value) for other, value in checked if math.isfinite(value)]


def usage_of(body: object) -> Usage | None:
    """Tokens that a body says are billed; None where it says nothing, or nonsense."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt = _count(usage, "prompt_tokens", "input_tokens")
    completion = _count(usage, "completion_tokens", "output_tokens")
    if prompt is None or completion is None:
        return None
    prompt_parts = (usage.get("prompt_tokens_details"), usage.get("input_tokens_details"), usage)
    if "prompt_tokens" not in usage:  # Anthropic's input_tokens are those that no cache has to do with
        prompt += _first((usage,), "cache_read_input_tokens") + _first((usage,), "cache_creation_input_tokens")
    completion_parts = (usage.get("completion_tokens_details"), usage.get("output_tokens_details"), usage)
    cached = _first(prompt_parts, "cached_tokens", "prompt_cache_hit_tokens", "cache_read_input_tokens")
    written = _first(prompt_parts, "cache_write_tokens", "cache_creation_input_tokens")
    thought = _first(completion_parts, "reasoning_tokens")
    # Some count thoughts beside the completion, and in the total alone; they are billed like the rest.
    beside = (_count(usage, "total_tokens") or 0) - prompt - completion
    if beside > 0:
        completion, thought = completion + beside, max(thought, beside)
    if not prompt + completion:
        return None
    cached = min(cached, prompt)
    return Usage(prompt, completion, cached, min(thought, completion), min(written, prompt - cached))


def cost_of(body: object) -> float | None:
    """USD that a body says are billed; None where it says nothing, or nonsense.

    OpenRouter states them in each answer: `cost` is charged to the account; with a provider's key of one's own,
    `cost_details.upstream_inference_cost` is what that provider bills beside it
    (https://openrouter.ai/docs/use-cases/usage-accounting).
    """
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict) or (cost := _dollars(usage.get("cost"))) is None:
        return None
    details = usage.get("cost_details")
    if usage.get("is_byok") is True and isinstance(details, dict):
        cost += _dollars(details.get("upstream_inference_cost")) or 0.0
    return cost


def _dollars(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


def _first(parts: Iterable[object], *names: str) -> int:
    """The first count above 0 that one of the parts states; 0 where there is none."""
    return next((n for part in parts if isinstance(part, dict) and (n := _count(part, *names))), 0)


_MOST_TOKENS = 10**12
"""A count above it is nonsense, and no database holds the sum."""


def _count(usage: JSONObject, *names: str) -> int | None:
    for name in names:
        value = usage.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS:
            return value
    return None


def error_words(body: object) -> tuple[str, str]:
    """Code and message of an error, whatever envelope it came in; empty where there is none."""
    if isinstance(body, list) and body:  # Gemini's endpoint puts its error into a list
        body = body[0]
    if not isinstance(body, dict):
        return "", ""
    error = body.get("error", body)
    if isinstance(error, str):
        return str(body.get("code") or ""), error
    if not isinstance(error, dict):
        return "", ""
    message = error.get("message") or error.get("detail") or error.get("msg") or body.get("detail") or ""
    text = message if isinstance(message, str) else json.dumps(message)
    metadata = error.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("raw"), str):  # OpenRouter: what its provider said
        text = f"{text}: {metadata['raw']}"
    inner = error.get("innererror")
    code = error.get("code") or error.get("type") or (inner.get("code") if isinstance(inner, dict) else "")
    if isinstance(inner, dict) and inner.get("code") == "ResponsibleAIPolicyViolation":
        code = "content_filter"
    delay = re.search(r'"retryDelay": ?"([^"]+)"', json.dumps(error))
    return str(code or ""), f"{text} retry in {delay[1]}" if delay else text


_STATUSES = {
    "insufficient_quota": 429,
    "rate_limit_exceeded": 429,
    "invalid_api_key": 401,
    "authentication_error": 401,
    "model_not_found": 404,
    "invalid_request_error": 400,
}
"""Codes of errors that some hosts send under status 200 -> the status that OpenAI sends them under."""


def error_status(body: object) -> int:
    """The status that an error inside an answer of status 2xx would have by itself; 500 where it says none."""
    code, _ = error_words(body)
    status = int(code) if code.isdecimal() and len(code) == 3 else _STATUSES.get(code, 500)
    return status if 400 <= status < 600 else 500


def retry_after(headers: Mapping[str, str], now: float | None = None, words: str = "") -> float | None:
    """Seconds that an endpoint asks to wait; None where it says nothing sane.

    Args:
        headers: of its answer: `retry-after-ms` or `Retry-After` (seconds or a date) is taken.
        now: the time, for a date without the server's own.
        words: its message, which may say it where no header does ("Please try again in 7m12s").
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    stated = headers.get("retry-after")
    seconds = _number(stated)
    if seconds is not None:
        return seconds
    if not stated:
        return _spoken(words)
    try:
        until = parsedate_to_datetime(stated).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
    try:  # the server's clock against itself, where it shows its time
        now = parsedate_to_datetime(headers["date"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        now = time.time() if now is None else now
    return until - now if until > now else None


def _spoken(words: str) -> float | None:
    """Seconds of "try again in 7m12s", "in 20 seconds", "in 6 hours"."""
    match = _AGAIN_IN.search(words)
    if match is None:
        return None
    seconds = sum(float(number) * _UNITS[unit.lower()] for number, unit in _SPAN.findall(match["span"]))
    return seconds or None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
