"""Lines of a batch's files: what is sent in one, and what comes back in two.

A line of the input file is a request with its `custom_id`; a line of the output file or of the error file holds the
same id, and an answer (`response`: its status and its body) or an `error` of the batch itself, such as `batch_expired`.
Lines come back in any order, and not each request has one.
Source: https://developers.openai.com/api/docs/guides/batch, read on 2026-11-29.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from almost_eval.judge.api.bodies import parsed
from almost_eval.judge.api.cost import Estimate, Price
from almost_eval.judge.api.endpoint import JudgeEndpoint, Trouble
from almost_eval.judge.records import JudgeRequest, Reply
from almost_eval.types import JSONMapping, JSONObject

URL = "/v1/chat/completions"
"""The endpoint that a batch names, wherever its provider's `/v1` lies."""

MAX_REQUESTS = 50_000
"""Requests of one file, as OpenAI allows them."""
MAX_BYTES = 100_000_000
"""Of one file: half of the 200 MB that OpenAI allows, for it is held in memory while it is sent."""
_BYTES_AROUND = 500
"""Of a line of the input file, besides its texts."""
_ESCAPED = 1.1
"""Bytes that JSON makes of one."""

EXPIRED = "batch_expired"
"""The code of a request that was not worked on in time: nothing is billed for it."""
_UNTOUCHED = (EXPIRED, "batch_cancelled")


@dataclass(frozen=True, slots=True)
class OutputLine:
    """One line of an output or an error file."""

    custom_id: str
    status: int | None
    """Of its answer; None where there is none."""
    body: object
    """Of its answer, as JSON."""
    code: str
    """Of the batch's error, where there is one."""
    message: str


def input_line(endpoint: JudgeEndpoint, digest: str, request: JudgeRequest, sent: JSONMapping) -> bytes:
    """A line of the input file, with its end."""
    body = endpoint.body_of(request, sent)
    line = {"custom_id": digest, "method": "POST", "url": URL, "body": body}
    return json.dumps(line).encode() + b"\n"  # ASCII: half a surrogate pair, which UTF-8 has not, is written too


def output_lines(chunks: Iterable[bytes]) -> Iterator[OutputLine | None]:
    """Each line of a file as it arrives; None for one that cannot be read. Blank lines are none."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (_output_line(line) for line in lines if line.strip())
    if rest.strip():
        yield _output_line(rest)


def _output_line(text: bytes) -> OutputLine | None:
    line = parsed(text)
    if not isinstance(line, dict) or not isinstance(line.get("custom_id"), str):
        return None
    response, error = line.get("response"), line.get("error")
    status = response.get("status_code") if isinstance(response, dict) else None
    body = response.get("body") if isinstance(response, dict) else None
    if isinstance(body, str):  # some hosts put the body in as text
        body = parsed(body.encode(errors="replace"))
    if not isinstance(status, int) or isinstance(status, bool) or not 100 <= status < 600:
        status = None
    if status is None and not isinstance(error, dict):
        return None
    stated: JSONObject = error if isinstance(error, dict) else {}
    return OutputLine(line["custom_id"], status, body, str(stated.get("code") or ""), str(stated.get("message") or ""))


def outcome_of(line: OutputLine, endpoint: JudgeEndpoint, request: JudgeRequest, sent: JSONMapping) -> Reply | Trouble:
    """What a line says of its request."""
    if line.status is not None and (line.body is not None or line.status >= 400):
        outcome = endpoint.outcome(line.status, line.body, request, sent)
        if isinstance(outcome, Trouble) and outcome.reason == "rate_limited":
            return replace(outcome, again=True, retry_after=None, fatal=None)  # a wait since then is over
        return outcome
    if line.status is not None:
        return Trouble("malformed", "the answer has no body", again=True, may_be_billed=True)
    words = endpoint.words(line.message or line.code or "no reason stated")
    return Trouble(
        endpoint.words(line.code) or "batch_error", words, again=True, may_be_billed=line.code not in _UNTOUCHED
    )


def batch_facts(needed: Estimate, price: Price | None, *, batch: bool) -> JSONObject:
    """What `--batch --dry-run` says of batches; none where nothing is sent in batches, and nothing was."""
    facts: JSONObject = {"requests_in_a_batch_already": needed.n_under_way} if needed.n_under_way else {}
    if not batch:
        return facts
    size = needed.bytes * _ESCAPED + needed.requests * _BYTES_AROUND
    facts["batches"] = max(-(-needed.requests // MAX_REQUESTS), -int(-size // MAX_BYTES))
    if price is not None:
        unknown = "unknown, so the whole price counts: --price-batch SHARE states it"
        known = f"{price.batch or 1:g} of the price ({price.batch_source})"
        facts["batch_price"] = unknown if price.batch is None else known
    return facts
