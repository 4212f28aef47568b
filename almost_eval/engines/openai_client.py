"""One model behind one OpenAI-compatible endpoint or several: retries, threads, and failures as one line.

The base of the engines and of the reward model over HTTP. Addresses and keys are in `models.endpoints`; how requests
are spread over several endpoints is in `models.endpoint_pool`. Several must give the same log-probabilities for a short
text, or whose numbers these are would depend on who answered first.

Retries are the SDK's: with jitter, on 408, 409, 429, 5xx, timeouts and lost connections, after as long as the server's
Retry-After says (up to two minutes; beyond, the request fails).
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, NoReturn, TypedDict, TypeVar

from almost_eval.engines.openai_parity import compare_endpoints
from almost_eval.errors import AlmostError, InputError, ModelError, RunError, did_you_mean
from almost_eval.models.checkpoint import Checkpoint, find_checkpoint
from almost_eval.models.endpoints import BASE_URL, KEYS, EndpointAddress, read_key, sdk_client, server_words
from almost_eval.nano import BUILT_IN
from almost_eval.types import JSONMapping, JSONObject

if TYPE_CHECKING:
    import openai

    from almost_eval.models.endpoint_pool import EndpointPool

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


class ClientOptions(TypedDict, total=False):
    """What every engine and reward model over HTTP takes, and hands on to `OpenAIClient`."""

    base_url: str | None
    """The endpoint, up to and including `/v1`, several by commas; None is `OPENAI_BASE_URL`."""
    concurrency: int
    """Requests on their way at a time, to all endpoints together."""
    timeout: float
    """Seconds that one answer may take."""
    retries: int
    """Of one request."""


class OpenAIClient:
    """One model behind one endpoint, or behind several that serve the same.

    Args:
        model: the name it is served under, or None for whatever is served.

    All others: see `ClientOptions`.

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
        self.addresses = EndpointAddress.parse_all(url, "base_url")
        self.address = self.addresses[0]
        if len(self.addresses) > 1 and any(address.has_user for address in self.addresses):
            raise InputError(
                "base_url: of several endpoints none may hold a user or a password; put the key in the "
                f"environment ({KEYS[0]})"
            )
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise InputError("concurrency must be 1 or more, timeout above 0 seconds, retries 0 or more")
        self.model: str = model or ""
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.card: JSONObject = {}
        """What `/v1/models` says of the model; known after `check`."""
        self._local = all(address.is_local for address in self.addresses)
        self.endpoint: str = ",".join(address.shown for address in self.addresses)
        """`base_url` without a password that may be in it: for errors and specs."""
        self._reachable = self.addresses
        """Where requests go; of several endpoints, those that answered `check`."""
        self._pool: EndpointPool | None = None
        self._key = read_key(self.address)
        self._checked = False

    def check(self) -> None:
        """Ask the endpoint for its models, once.

        Raises:
            InputError: it is down, refuses the key, or serves no such model (with those it does serve).
        """
        if self._checked:
            return
        cards = []
        for address, served in self._served():
            if served and self.model not in served:
                raise InputError(
                    f"the endpoint {address.shown} serves no model {self.model!r}; {did_you_mean(self.model, served)}"
                )
            cards.append(served.get(self.model, {}))
        self._adopt(cards)
        if len(self._reachable) > 1:
            compare_endpoints(self.model, [(address.shown, self._client(address)) for address in self._reachable])
        self._checked = True

    def _adopt(self, cards: Sequence[JSONObject]) -> None:
        """Take what the first endpoint says of the model; of the context, the shortest that any states."""
        limits = [card["max_model_len"] for card in cards if isinstance(card.get("max_model_len"), int)]
        self.card = cards[0] | ({"max_model_len": min(limits)} if limits else {})

    def _served(self) -> list[tuple[EndpointAddress, dict[str, JSONObject]]]:
        """Each endpoint that answers -> served name -> what it says of it; empty where it lists nothing readable.

        Raises:
            InputError: none answers, or one refuses the key. Of several, one that does not answer is left out.
        """
        import openai

        answers: list[tuple[EndpointAddress, dict[str, JSONObject]]] = []
        problems: list[tuple[EndpointAddress, str]] = []
        for address in self.addresses:
            try:
                entries = self._client(address).models.list().data or []
                answers.append((address, {str(entry.id): entry.model_dump() for entry in entries}))
            except (openai.NotFoundError, AttributeError, TypeError, ValueError):
                answers.append((address, {}))  # the first request will tell
            except openai.InternalServerError as error:
                problems.append((address, f"answers {error.status_code}"))
            except openai.APITimeoutError:
                problems.append((address, "did not answer in time"))
            except openai.APIConnectionError:
                problems.append((address, "is not reachable"))
            except openai.OpenAIError as error:
                self.fail(error, at=address.shown)
        if not answers:
            address, problem = problems[0]
            raise InputError(f"the endpoint {address.shown} {problem}; start it, or check base_url")
        self._reachable = tuple(address for address, _ in answers)
        self.address = self._reachable[0]
        for address, problem in problems:
            _notice(f"the endpoint {address.shown} {problem}; the run goes on with the other {len(answers)}")
        return answers

    def _client(self, address: EndpointAddress) -> openai.OpenAI:
        """The SDK's client of one endpoint, for questions before the start.

        Few retries: an endpoint that is down then is a mistake far more often than a hiccup.
        """
        return sdk_client(address, read_key(address), retries=1, timeout=min(self.timeout, 30.0))

    def served_names(self) -> list[str]:
        """The names of the models that all endpoints serve; raises as `check` does."""
        first, *others = (served for _, served in self._served())
        return [name for name in first if all(name in served for served in others)]

    @property
    def context_limit(self) -> int | None:
        """Tokens of prompt and answer that the server takes together, or None where it does not say."""
        limit = self.card.get("max_model_len")
        return limit if isinstance(limit, int) and limit > 0 else None

    @cached_property
    def server(self) -> JSONObject:
        """What decides the numbers and is told: the server's kind and version."""
        kind = self.card.get("owned_by")
        return {"kind": kind, "version": vllm_version(self.client, self.address, self.card)}

    @property
    def root(self) -> str | None:
        """What the server says it has loaded, where that is a folder of this machine or a built-in name."""
        root = self.card.get("root")
        if not isinstance(root, str) or not root:
            return None
        return root if is_here(root) else None

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

    @cached_property
    def client(self) -> openai.OpenAI:
        """The SDK's client. Its key is the environment's."""
        if len(self._reachable) > 1:
            from almost_eval.models.endpoint_pool import EndpointPool

            self._pool = EndpointPool(self._reachable, _notice)
        return sdk_client(
            self._reachable[0], self._key, retries=self.retries, timeout=self.timeout, transport=self._pool
        )

    @property
    def lost(self) -> list[str]:
        """What a reader of the results must know of the endpoints."""
        lost = [address.shown for address in self.addresses if address not in self._reachable]
        lost += self._pool.lost if self._pool else []
        return [f"lost on the way: {shown}" for shown in lost]

    # --- failures ---

    def unreadable(self, what: str) -> RunError:
        """For an answer that came and is not what was requested."""
        return RunError(
            f"{self.endpoint} answered with something else than {what}; base_url must be an OpenAI-compatible "
            "endpoint, /v1 included"
        )

    def fail(self, error: openai.OpenAIError, path: str = "/completions", at: str | None = None) -> NoReturn:
        """One line for what the SDK raises. The server's own words are quoted where they cannot hold the key.

        `at` is the endpoint, where it is known which of several it was; that of an answer is.
        """
        import openai

        if isinstance(error, openai.APIStatusError):
            at = at or error.response.extensions.get("endpoint")
        at = f"the endpoint {at or self.endpoint}"
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


def post_json(client: openai.OpenAI, path: str, body: JSONMapping) -> JSONObject:
    """The JSON of the answer to a POST, after retries; `path` follows the base address, or is a whole one.

    Raises:
        OpenAIError: of the SDK, for `OpenAIClient.fail`.
        ValueError: the answer is no JSON.
    """
    import httpx

    answer: JSONObject = client.post(path, cast_to=httpx.Response, body=body).json()
    return answer


def vllm_version(client: openai.OpenAI, address: EndpointAddress, card: JSONMapping) -> str | None:
    """The version of vLLM, whose server tells it beside `/v1`; None where, by the model's card, another one serves."""
    import httpx
    import openai

    if card.get("owned_by") != "vllm":
        return None
    once = client.with_options(max_retries=0, timeout=10.0)
    try:
        return str(once.get(address.beside("/version"), cast_to=httpx.Response).json()["version"])
    except (openai.OpenAIError, LookupError, TypeError, ValueError):
        return None  # a gateway in between need not pass it on


def is_here(name: str) -> bool:
    """Whether a name is a folder of this machine or a built-in one."""
    try:
        return name in BUILT_IN or Path(name).is_dir()
    except (OSError, ValueError):
        return False


def _notice(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
