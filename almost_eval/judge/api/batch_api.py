"""The provider's batch API over HTTP: files and `/batches`, as OpenAI defines them and others copy them.

Reading and uploading may be repeated at will, and are, after whatever may pass. The order to work on a file costs
money, so it is sent once: where no clear answer comes back, the batch is looked for in the list (`find`) before
another order leaves.
Source: https://developers.openai.com/api/docs/guides/batch and the reference of `/v1/batches`, read on 2026-11-29.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from almost_eval.errors import InputError, RunError
from almost_eval.judge.api.adaptive import MAX_PAUSE, backoff
from almost_eval.judge.api.batch_files import URL
from almost_eval.judge.api.bodies import error_words, parsed, retry_after
from almost_eval.judge.api.endpoint import KEPT, JudgeEndpoint, duration
from almost_eval.types import JSONObject

if TYPE_CHECKING:
    import openai

KEY = "almost_eval_batch"
"""The name in a batch's metadata under which its key stands."""
WINDOW = "24h"
"""The only completion window there is."""

MAX_TRIES = 6
"""Sendings of one call that costs nothing, the first included."""
PATIENCE = 600.0
"""Seconds that a file may take; other calls have those of a review."""
LOOKS = (0.0, 2.0, 5.0, 15.0)
"""Seconds before each look for a batch of which it is unknown whether it was created: a list may lag behind."""
SLACK = 86400.0
"""Seconds by which the provider's clock may go behind ours."""
_PAGE = 100

_PASSING = (408, 409, 425, 429)  # and 5xx
_NO_SUCH_PATH = (404, 405, 501)


class MaybeCreated(Exception):
    """No clear answer came to the order: the batch may exist."""


class NotThere(Exception):
    """The provider has no such batch or file (any more)."""


class BatchAPI:
    """Files and batches of one endpoint. Use as a context manager."""

    def __init__(self, endpoint: JudgeEndpoint, notice: Callable[[str], None], random_: random.Random) -> None:
        self._endpoint = endpoint
        self._notice = notice
        self._random = random_
        self._client: openai.OpenAI | None = None

    def __enter__(self) -> Self:
        self._client = self._endpoint.connect_blocking(self._endpoint.timeout)
        return self

    def __exit__(self, *_: object) -> None:
        self._sdk.close()

    def check(self) -> None:
        """Refuse an endpoint without a batch API, or with one whose batches cannot be listed.

        Raises:
            InputError: see above, or the key is refused.
            RunError: no answer.
        """
        try:
            body = self._call(lambda: self._sdk.batches.with_raw_response.list(limit=1))
        except NotThere as error:
            raise InputError(
                f"the endpoint {self._endpoint.base_url} has no batch API ({error}); leave out --batch"
            ) from None
        if not isinstance(body.get("data"), list):
            raise InputError(
                f"the endpoint {self._endpoint.base_url} has no batch API (its /batches is no list); leave out --batch"
            )

    def upload(self, name: str, content: bytes) -> str:
        """Put an input file there; its id. Costs nothing, and the provider removes it in time."""
        file = (name, content, "application/jsonl")
        files = self._sdk.files.with_raw_response
        body = self._call(lambda: files.create(file=file, purpose="batch", timeout=PATIENCE))
        if not isinstance(id := body.get("id"), str) or not id:
            raise RunError(f"the endpoint {self._endpoint.base_url} gave an uploaded file no id; {KEPT}")
        return id

    def create(self, file: str, key: str) -> JSONObject:
        """Order that a file be worked on, once: this costs money.

        Raises:
            MaybeCreated: it is unknown whether the order was taken.
            NotThere: the file is not there, or not yet.
            InputError: the order is refused.
            RunError: no credit, or asked to wait for long.
        """
        body = self._call(
            lambda: self._sdk.batches.with_raw_response.create(
                input_file_id=file, endpoint=URL, completion_window=WINDOW, metadata={KEY: key}
            ),
            once=True,
        )
        if not isinstance(body.get("id"), str) or not body["id"]:
            raise MaybeCreated("the answer names no batch")
        return body

    def find(self, key: str, since: float) -> JSONObject | None:
        """The batch of this key, looked for several times; None where it was not created. The list is not read further
        back than `since`, when it was planned (s since 1970).
        """
        for pause in LOOKS:
            time.sleep(pause)
            for batch in self._listed(since):
                metadata = batch.get("metadata")
                if isinstance(metadata, dict) and metadata.get(KEY) == key:
                    return batch
        return None

    def retrieve(self, name: str) -> JSONObject:
        """A batch as it stands.

        Raises:
            NotThere: there is none.
            RunError: no answer.
        """
        return self._call(lambda: self._sdk.batches.with_raw_response.retrieve(name))

    def content(self, file: str) -> Iterator[bytes]:
        """The bytes of a file as they arrive. What breaks off midway is the caller's to begin anew.

        Raises:
            NotThere: it is gone.
            ConnectionError: it broke off.
        """
        import httpx
        import openai

        try:
            with self._sdk.files.with_streaming_response.content(file, timeout=PATIENCE) as response:
                yield from response.iter_bytes()
        except openai.APIStatusError as error:
            if error.status_code in (404, 410):
                raise NotThere(f"{error.status_code}") from None
            raise ConnectionError(f"{error.status_code}") from None
        except (openai.APIConnectionError, httpx.HTTPError) as error:
            raise ConnectionError(type(error.__cause__ or error).__name__) from None
        except Exception as error:  # the SDK's own copy of httpx has classes of its own
            if "httpx" in type(error).__module__ or "httpcore" in type(error).__module__:
                raise ConnectionError(type(error).__name__) from None
            raise

    def pause(self, tries: int, why: str, wait: float | None = None) -> None:
        """Wait before a call is made again, the `tries`-th time."""
        seconds = max(backoff(tries, self._random), min(wait or 0.0, MAX_PAUSE))
        if seconds >= 20.0:
            self._notice(f"waiting {duration(seconds)}, as the endpoint asks to ({why})")
        time.sleep(seconds)

    def _listed(self, since: float) -> Iterator[JSONObject]:
        """Batches, the newest first, as far back as `since`."""
        after: str | None = None
        while True:
            place = {"after": after} if after else {}
            page = self._call(partial(self._sdk.batches.with_raw_response.list, limit=_PAGE, **place))
            rows = [row for row in page.get("data") or [] if isinstance(row, dict)]
            yield from rows
            times = [row.get("created_at") for row in rows]
            after = str(rows[-1].get("id") or "") if rows else ""
            are_old = all(isinstance(at, int | float) and at < since - SLACK for at in times)
            if not page.get("has_more") or not after or are_old:
                return

    def _call(self, send: Callable[[], Any], *, once: bool = False) -> JSONObject:
        """The JSON object of an answer of status 2xx; sent again after what may pass, unless `once`."""
        import openai

        tries = 0
        while True:
            tries += 1
            wait: float | None = None
            try:
                response = send().http_response
                body = parsed(response.content)
                if isinstance(body, dict):
                    return body
                if once:
                    raise MaybeCreated("the answer is not JSON")
                return {}  # a web page, or what else has that address
            except openai.APIStatusError as error:
                why, wait = self._refused(error, once=once)
            except openai.APIConnectionError as error:
                why = type(error.__cause__ or error).__name__
                if once and why != "ConnectError":
                    raise MaybeCreated(why) from None
            if tries >= MAX_TRIES:
                where = self._endpoint.base_url
                raise RunError(f"the endpoint {where} does not answer about its batches ({why}); {KEPT}") from None
            self.pause(tries, why, wait)

    def _refused(self, error: openai.APIStatusError, *, once: bool) -> tuple[str, float | None]:
        """Why a call is sent again, and the seconds that the endpoint asks to wait; whatever else it was is raised."""
        status, response = error.status_code, error.response
        body = parsed(response.content)
        code, text = error_words(body)
        words = self._endpoint.words(text or response.reason_phrase or "no reason stated")
        why, at = f"{status}: {words}", f"the endpoint {self._endpoint.base_url}"
        if self._endpoint.has_no_credit(status, code, text):
            raise RunError(f"{at} has no credit left ({why}); {KEPT}") from None
        if status in _PASSING or (status >= 500 and status not in _NO_SUCH_PATH):
            if once and status != 429:
                raise MaybeCreated(why) from None
            wait = retry_after(response.headers, words=text)
            if wait is not None and wait > MAX_PAUSE:
                raise RunError(f"{at} asks to wait {duration(wait)} ({why}); {KEPT} when that time is over") from None
            return why, wait
        if status in _NO_SUCH_PATH or (once and "file" in text.lower() and "find" in text.lower()):
            raise NotThere(why) from None
        if status in (401, 403):
            raise InputError(f"{at} refuses the key for batches ({why}); check the key and what it may do") from None
        raise InputError(f"{at} refuses the batch ({why}); leave out --batch") from None

    @property
    def _sdk(self) -> Any:  # its types want literals
        assert self._client is not None  # inside the context
        return self._client
