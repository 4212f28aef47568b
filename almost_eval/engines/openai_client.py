"""One model behind an OpenAI-compatible endpoint: retries, threads, and failures as one line.

The base of the engines and of the reward model over HTTP. Addresses and keys are in `models.endpoints`.

Retries are the SDK's: with jitter, on 408, 409, 429, 5xx, timeouts and lost connections, after as long as the server's
Retry-After says (up to two minutes; beyond, the request fails).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, NoReturn, TypeVar

from almost_eval.errors import AlmostError, InputError, ModelError, RunError, did_you_mean
from almost_eval.models.checkpoint import Checkpoint, find_checkpoint
from almost_eval.models.endpoints import BASE_URL, KEYS, EndpointAddress, read_key, sdk_client, server_words
from almost_eval.nano import BUILT_IN
from almost_eval.types import JSONMapping, JSONObject

if TYPE_CHECKING:
    import openai

_Job = TypeVar("_Job")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class EndpointModel:
    """A model as an endpoint names it, in the place of a `Checkpoint`."""

    name: str
    """The name it is served under."""
    folder: Checkpoint | None
    """What the server says it has loaded, where that lies on this machine and the server runs on it; else None."""

    @property
    def architecture(self) -> str:
        """The class that its `config.json` names, or an empty string where the files are not at hand."""
        return self.folder.architecture if self.folder else ""

    def weight_digest(self) -> str | None:
        """sha256 over the weight files, or None: an endpoint does not tell what its weights are."""
        return self.folder.weight_digest() if self.folder else None

    def file_digests(self) -> dict[str, str] | None:
        """sha256 of each file beside the weights; None where they are not at hand."""
        return self.folder.file_digests() if self.folder else None


class OpenAIClient:
    """One model behind one endpoint.

    Args:
        model: the name it is served under, or None for whatever is served.
        base_url: the endpoint, up to and including `/v1`; None is `OPENAI_BASE_URL`.
        concurrency: requests on their way at a time.
        timeout: seconds that one answer may take.
        retries: of one request.

    Raises:
        InputError: no endpoint, or one that is no http(s) address; a broken key; a number out of range.
    """

    name = "openai"

    def __init__(
        self,
        model: str | None,
        *,
        base_url: str | None = None,
        concurrency: int = 32,
        timeout: float = 600.0,
        retries: int = 6,
    ) -> None:
        url = base_url or os.environ.get(BASE_URL)
        if not url:
            # Not the SDK's default: prompts go to a company only where somebody says so.
            raise InputError("the engine 'openai' needs an endpoint: give base_url, as in http://localhost:8000/v1")
        self.address = EndpointAddress.parse(url, "base_url")
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise InputError("concurrency must be 1 or more, timeout above 0 seconds, retries 0 or more")
        self.model: str = model or ""
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.card: JSONObject = {}
        """What `/v1/models` says of the model; known after `check`."""
        self._local = self.address.is_local
        self.endpoint: str = self.address.shown
        """`base_url` without a password that may be in it: for errors and specs."""
        self._key = read_key(self.address)
        self._checked = False

    def check(self) -> None:
        """Ask the endpoint for its models, once.

        Raises:
            InputError: it is down, refuses the key, or serves no such model (with those it does serve).
        """
        if self._checked:
            return
        served = self._served()
        if served and self.model not in served:
            raise InputError(
                f"the endpoint {self.endpoint} serves no model {self.model!r}; {did_you_mean(self.model, served)}"
            )
        self.card = served.get(self.model, {})
        self._checked = True

    def _served(self) -> dict[str, JSONObject]:
        """Served name -> what the endpoint says of it; empty where it lists nothing that the SDK can read."""
        import openai

        try:
            # Few retries: an endpoint that is down at the start is a mistake far more often than a hiccup.
            client = self.client.with_options(max_retries=1, timeout=min(self.timeout, 30.0))
            return {str(entry.id): entry.model_dump() for entry in client.models.list().data or []}
        except (openai.NotFoundError, AttributeError, TypeError, ValueError):
            return {}  # the first request will tell
        except openai.OpenAIError as error:
            if isinstance(error, openai.APIConnectionError | openai.InternalServerError):
                problem = "did not answer in time" if isinstance(error, openai.APITimeoutError) else "is not reachable"
                if isinstance(error, openai.InternalServerError):
                    problem = f"answers {error.status_code}"
                raise InputError(f"the endpoint {self.endpoint} {problem}; start it, or check base_url") from None
            self.fail(error)

    def served_names(self) -> list[str]:
        """The names of the models that the endpoint serves; raises as `check` does."""
        return list(self._served())

    @property
    def context_limit(self) -> int | None:
        """Tokens of prompt and answer that the server takes together, or None where it does not say."""
        limit = self.card.get("max_model_len")
        return limit if isinstance(limit, int) and limit > 0 else None

    @cached_property
    def server(self) -> JSONObject:
        """What decides the numbers and is told: the server's kind and version."""
        kind = self.card.get("owned_by")
        return {"kind": kind, "version": self._version() if kind == "vllm" else None}

    def _version(self) -> str | None:
        """The version of vLLM, whose server tells it beside `/v1`."""
        import openai

        try:
            return str(self.get_json(self.address.beside("/version"))["version"])
        except (openai.OpenAIError, LookupError, TypeError, ValueError):
            return None  # a gateway in between need not pass it on

    @property
    def root(self) -> str | None:
        """What the server says it has loaded, where that is a folder of this machine or a built-in name."""
        root = self.card.get("root")
        if not isinstance(root, str) or not root:
            return None
        try:
            return root if root in BUILT_IN or Path(root).is_dir() else None
        except (OSError, ValueError):
            return None

    def served_model(self, architectures: Collection[str]) -> EndpointModel:
        """The model's name, and its files where they are the server's own: it runs here and names a folder."""
        folder = None
        if self._local and (root := self.root):
            try:
                folder = find_checkpoint(root, architectures=architectures)
            except ModelError:
                folder = None
        return EndpointModel(self.model, folder)

    # --- requests ---

    def ask_all(self, jobs: Iterator[_Job], ask: Callable[[_Job], _Answer]) -> Iterator[tuple[_Job, _Answer]]:
        """Answers as they arrive; at most `concurrency` requests are on their way, and none is sent after an error.

        Daemon threads, not an executor's: the interpreter waits for those at its end, and an answer may take minutes.
        """
        answers: SimpleQueue[tuple[_Job, _Answer | BaseException]] = SimpleQueue()

        def put(job: _Job) -> None:
            try:
                answers.put((job, ask(job)))
            except BaseException as error:  # it is raised below, where somebody reads it
                answers.put((job, error))

        running = 0
        while True:
            for job in itertools.islice(jobs, self.concurrency - running):
                Thread(target=put, args=(job,), daemon=True).start()
                running += 1
            if not running:
                return
            job, answer = answers.get()
            running -= 1
            if isinstance(answer, BaseException):
                raise answer
            yield job, answer

    def post_json(self, path: str, body: JSONMapping) -> JSONObject:
        """The JSON of the answer to a POST, after retries; `path` follows the base address, or is a whole one.

        Raises:
            OpenAIError: of the SDK, for `fail`.
            ValueError: the answer is no JSON.
        """
        import httpx

        answer: JSONObject = self.client.post(path, cast_to=httpx.Response, body=body).json()
        return answer

    def get_json(self, path: str) -> JSONObject:
        """The JSON of the answer to a GET, tried once; raises as `post_json` does."""
        import httpx

        client = self.client.with_options(max_retries=0, timeout=min(self.timeout, 10.0))
        answer: JSONObject = client.get(path, cast_to=httpx.Response).json()
        return answer

    @cached_property
    def client(self) -> openai.OpenAI:
        """The SDK's client. Its key is the environment's."""
        return sdk_client(self.address, self._key, retries=self.retries, timeout=self.timeout)

    # --- failures ---

    def unreadable(self, what: str) -> RunError:
        """For an answer that came and is not what was requested."""
        return RunError(
            f"{self.endpoint} answered with something else than {what}; base_url must be an OpenAI-compatible "
            "endpoint, /v1 included"
        )

    def fail(self, error: openai.OpenAIError, path: str = "/completions") -> NoReturn:
        """One line for what the SDK raises. The server's own words are quoted where they cannot hold the key."""
        import openai

        at = f"the endpoint {self.endpoint}"
        kept = "what was done is kept: the same command goes on"
        failure: AlmostError
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            failure = InputError(f"{at} refuses the key ({error.status_code}); set {' or '.join(KEYS)} to a valid one")
        elif isinstance(error, openai.NotFoundError):
            failure = InputError(f"{at} has no model {self.model!r} at {path} (404); check model and base_url")
        elif isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
            failure = InputError(f"{at} refuses the request ({error.status_code}): {self.words(error)}")
        elif isinstance(error, openai.APITimeoutError):
            failure = RunError(f"{at} gave no answer within {self.timeout:g} s, {self.retries + 1} times; {kept}")
        elif isinstance(error, openai.APIConnectionError):
            failure = RunError(f"{at} is not reachable any more, after {self.retries + 1} tries; {kept}")
        elif isinstance(error, openai.APIStatusError):
            failure = RunError(
                f"{at} still answers {error.status_code} after {self.retries + 1} tries ({self.words(error)}); {kept}"
            )
        else:
            failure = RunError(f"{at} gave an answer that cannot be read ({type(error).__name__}); {kept}")
        raise failure from None

    def words(self, error: openai.APIStatusError) -> str:
        """What the server said of a failure, on one line and without the key."""
        body = error.body if isinstance(error.body, dict) else {}
        return server_words(str(body.get("message") or type(error).__name__), self._key)
