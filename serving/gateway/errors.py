"""Errors in OpenAI's form, with a status that its SDKs know."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from almost_eval.models.endpoints import hide_key, server_words
from almost_eval.types import JSONObject
from serving.door.refusals import error_text
from serving.door.strict_json import NotJSON, read_json

_FOLDERS = re.compile(r"\bfile:/+(?:[^\s/]+/)*|(?<![\w:/.])(?!/v1/)/(?:[\w.@+~-]+/)+")
"""Of a file of that server's machine; of no URL, and of no path of OpenAI's API."""
_KEYS = re.compile(r"\bsk-[\w*.-]+|\bhf_\w{20,}|(?i:\bbearer\s+)[\w.~+/=-]{16,}")
_MESSAGE = 2000
"""Characters of an upstream's message; vLLM's own are up to some 500."""
_WORD = 100
"""Characters of its type, its code and the name of a field."""
_NO_REASON = "it does not say why"


def refusal(
    status: int, message: str, code: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
) -> HTTPException:
    """An exception that becomes an answer in OpenAI's error form.

    Args:
        status: HTTP status; 502 and up is an upstream's fault, 500 ours.
        message: one line: what is wrong, what to do.
        code: a word for programs, as `reward_unavailable`.
        param: the field of the request that is at fault.
        headers: more headers of the answer.
    """
    return HTTPException(status, error_text(status, message, code, param), dict(headers or {}))


def message_of(error: HTTPException) -> str:
    """The message of a `refusal`."""
    return str(json.loads(error.detail)["error"]["message"])


async def on_refusal(request: Request, error: Exception) -> Response:
    """Starlette's handler of HTTPException: our own refusals, and its 404 and 405."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    detail = error.detail
    if error.status_code == 404 and not detail.startswith("{"):
        detail = error_text(404, "no such path; GET /openapi.json lists those that there are", "not_found")
    elif error.status_code == 405 and not detail.startswith("{"):
        detail = error_text(405, f"this path does not take {request.method[:16]}", "method_not_allowed")
    return Response(detail, error.status_code, headers, "application/json")


def crashed() -> HTTPException:
    """For a bug of our own, told without a word of the request in it."""
    return refusal(500, "the gateway failed; its log says how", "internal_error")


async def on_crash(request: Request, error: Exception) -> Response:
    """Starlette's handler of everything else."""
    return await on_refusal(request, crashed())


def upstream_refusal(server: str, status: int, body: bytes, key: str | None) -> HTTPException:
    """What the client gets where an upstream refuses its request: the error in that server's own words, written anew.

    Its bytes may be anything, a proxy's page or a traceback. Of an error in OpenAI's form message, type, param and code
    are kept, as far as they can be shown; of anything else its words, if it has some.
    """
    error = shaped_error(body, key)
    if error is None:
        words = upstream_words(body, key)
        return refusal(status, f"the {server} server refuses the request ({status}): {words}", f"{server}_refused")
    return HTTPException(status, json.dumps({"error": error | {"type": error["type"] or "invalid_request_error"}}))


def shaped_error(body: bytes, key: str | None) -> JSONObject | None:
    """Message, type, param and code of an error in OpenAI's form, as far as they can be shown; None of anything else.
    `key` is what the gateway sends to that server.
    """
    content = _content_of(body)
    error = content.get("error", content) if isinstance(content, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return None
    details: JSONObject = {"message": _shown(error["message"], key, _MESSAGE) or _NO_REASON}
    details |= {name: _shown(error.get(name), key, _WORD) for name in ("type", "param", "code")}
    if type(error.get("code")) is int and 0 <= error["code"] < 1000:  # vLLM writes the status there
        details["code"] = error["code"]
    return details


def upstream_words(body: bytes, key: str | None) -> str:
    """The message in an upstream's error, in any of the forms that vLLM writes it: one line, no key and nothing that
    looks like one, of a file's path its last part alone, 300 characters at most.
    """
    content = _content_of(body)
    for name in ("error", "message", "detail"):
        if isinstance(content, dict) and name in content:
            content = content[name]
    if isinstance(content, dict):  # whatever it is, it is no message
        return _NO_REASON
    return server_words(_shown(str(content), key, _MESSAGE) or "", key) or _NO_REASON


def _content_of(body: bytes) -> object:
    """What an error holds: of JSON its content, else its text. A page, a stream, JSON that breaks off hold nothing."""
    try:
        return read_json(body)
    except NotJSON:
        text = body.decode("utf-8", "replace")
        return "" if text.lstrip("\ufeff \t\r\n").startswith(("<", "{", "[", "data:")) else text


def _shown(value: object, key: str | None, most: int) -> str | None:
    """A text fit to be shown, at most so many characters; None for what is no text."""
    if not isinstance(value, str):
        return None
    text = hide_key(value, key)[: 4 * most]  # before the patterns: a message may be as long as the body
    text = "".join(one if one == "\n" or one.isprintable() else " " for one in text)  # vLLM's may have several lines
    return _FOLDERS.sub(".../", _KEYS.sub("***", text)).strip()[:most]
