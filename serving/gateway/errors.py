"""Errors in OpenAI's form, with a status that its SDKs know."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from almost_eval.models.endpoints import server_words
from serving.door.refusals import error_text

_FOLDERS = re.compile(r"(?<![\w:/.])(?!/v1/)/(?:[\w.@+~-]+/)+")
"""Of a file of that server's machine; of no URL, and of no path of OpenAI's API."""


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


def upstream_words(body: bytes, key: str | None) -> str:
    """The message in an upstream's error, in any of the forms that vLLM writes it: one line, no key and nothing that
    looks like one, of a file's path its last part alone, 300 characters at most.

    Args:
        body: the error.
        key: what the gateway sends to that server.
    """
    try:
        content: object = json.loads(body)
    except (ValueError, RecursionError):
        content = body.decode("utf-8", "replace")
    for name in ("error", "message"):
        if isinstance(content, dict) and name in content:
            content = content[name]
    return server_words(_FOLDERS.sub(".../", str(content)), key)
