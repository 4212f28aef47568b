"""Generation by any OpenAI-compatible endpoint: a server of vLLM, of another toolkit, or of a company.

`/v1/completions` with rendered prompts, one request for each completion with a seed of its own: servers disagree on
what `n` does with a seed, and some ignore it. Retries are the SDK's: with jitter, on 408, 409, 429, 5xx, timeouts and
lost connections, after as long as the server's Retry-After says (up to two minutes; beyond, the request fails).

The key is read from `ALMOST_API_KEY`, else `OPENAI_API_KEY`; it is in no setting, log or error.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from queue import SimpleQueue
from threading import Thread
from typing import Any, NoReturn
from urllib.parse import urlsplit, urlunsplit

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.seeding import request_seed
from almost_eval.errors import AlmostError, InputError, RunError, did_you_mean
from almost_eval.types import Completion

KEYS = ("ALMOST_API_KEY", "OPENAI_API_KEY")
"""Environment variables a key is read from, the first that is set."""

MAX_STOPS = 4
"""Stop strings that OpenAI's protocol takes; any more are looked for here."""

_Job = tuple[int, int]  # (prompt, number of the completion)


class OpenAIEngine:
    """A model behind an OpenAI-compatible endpoint.

    `Completion.token_ids` is empty: the protocol does not tell. A completion is as reproducible as the server's seeds.

    Args:
        model: the name it is served under.
        base_url: the endpoint, up to and including `/v1`; None is `OPENAI_BASE_URL`.
        concurrency: requests on their way at a time.
        timeout: seconds that one answer may take.
        retries: of one request.

    Raises:
        InputError: no endpoint, or one that is no http(s) address; a number out of range.
    """

    name = "openai"

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        concurrency: int = 32,
        timeout: float = 600.0,
        retries: int = 6,
    ) -> None:
        given = base_url or os.environ.get("OPENAI_BASE_URL")
        if not given:
            # Not the SDK's default: prompts go to a company only where somebody says so.
            raise InputError("the engine 'openai' needs an endpoint: give base_url, as in http://localhost:8000/v1")
        try:
            address = urlsplit(given)
            host = address.hostname
        except ValueError:
            address, host = urlsplit(""), None
        if address.scheme not in ("http", "https") or not host:
            raise InputError("base_url is not an http(s) address; it must look like http://localhost:8000/v1")
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise InputError("concurrency must be 1 or more, timeout above 0 seconds, retries 0 or more")
        self.model = model
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self._base_url = given
        self.endpoint: str = urlunsplit(address._replace(netloc=address.netloc.rpartition("@")[2]))
        """`base_url` without a password that may be in it: for errors and specs."""
        self._checked = False

    def settings(self) -> dict[str, Any]:
        """What belongs in a run's spec."""
        return {"name": self.name, "base_url": self.endpoint, "model": self.model}

    def check(self) -> None:
        """Ask the endpoint for its models, once.

        Raises:
            InputError: it is down, refuses the key, or serves no such model (with those it does serve).
        """
        import openai

        if self._checked:
            return
        try:
            # Few retries: an endpoint that is down at the start is a mistake far more often than a hiccup.
            client = self._client.with_options(max_retries=1, timeout=min(self.timeout, 30.0))
            served = [str(entry.id) for entry in client.models.list().data or []]
        except (openai.NotFoundError, AttributeError, TypeError, ValueError):
            served = []  # no list of models, or none that the SDK can read: the first completion will tell
        except openai.OpenAIError as error:
            if isinstance(error, openai.APIConnectionError | openai.InternalServerError):
                problem = "did not answer in time" if isinstance(error, openai.APITimeoutError) else "is not reachable"
                if isinstance(error, openai.InternalServerError):
                    problem = f"answers {error.status_code}"
                raise InputError(f"the endpoint {self.endpoint} {problem}; start it, or check base_url") from None
            self._fail(error)
        if served and self.model not in served:
            raise InputError(
                f"the endpoint {self.endpoint} serves no model {self.model!r}; {did_you_mean(self.model, served)}"
            )
        self._checked = True

    def stream_completions(
        self, prompts: Sequence[str], params: SamplingParams
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (index, `params.n` completions) of each rendered prompt; see `GenerationEngine.stream_completions`.

        Raises:
            InputError: see `check`; or the endpoint refuses a request (a prompt too long for the model).
            RunError: the endpoint still fails after the retries, or its answers cannot be read.
        """
        if not prompts:
            return
        self.check()
        draws = params.n if params.temperature > 0 else 1  # greedy completions are all the same
        jobs = itertools.product(range(len(prompts)), range(draws))
        done: dict[int, dict[int, Completion]] = {}
        for (p, c), completion in self._run(jobs, prompts, params):
            done.setdefault(p, {})[c] = completion
            if len(done[p]) == draws:
                whole = done.pop(p)
                yield p, [whole[i % draws] for i in range(params.n)]

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[list[Completion]]:
        """`params.n` completions for each rendered prompt, in order; raises as `stream_completions` does."""
        done = dict(self.stream_completions(prompts, params))
        return [done[i] for i in range(len(prompts))]

    def _run(
        self, jobs: Iterator[_Job], prompts: Sequence[str], params: SamplingParams
    ) -> Iterator[tuple[_Job, Completion]]:
        """Completions as they arrive; at most `concurrency` requests are on their way, and none is sent after an error.

        Daemon threads, not an executor's: the interpreter waits for those at its end, and an answer may take minutes.
        """
        answers: SimpleQueue[tuple[_Job, Completion | BaseException]] = SimpleQueue()

        def ask(p: int, c: int) -> None:
            try:
                answers.put(((p, c), self._complete(prompts[p], c, params)))
            except BaseException as error:  # it is raised below, where somebody reads it
                answers.put(((p, c), error))

        running = 0
        while True:
            for job in itertools.islice(jobs, self.concurrency - running):
                Thread(target=ask, args=job, daemon=True).start()
                running += 1
            if not running:
                return
            job, answer = answers.get()
            running -= 1
            if isinstance(answer, BaseException):
                raise answer
            yield job, answer

    def _complete(self, prompt: str, number: int, params: SamplingParams) -> Completion:
        import openai

        try:
            answer = self._client.completions.create(
                model=self.model,
                prompt=prompt,
                max_tokens=params.max_new_tokens,
                temperature=params.temperature,
                top_p=params.top_p,
                seed=request_seed(params.seed, prompt, number),
                **({"stop": list(params.stop[:MAX_STOPS])} if params.stop else {}),
            )
            choice = answer.choices[0]
            return _cut(choice.text or "", choice.finish_reason, params.stop)
        except openai.OpenAIError as error:
            self._fail(error)
        except (AttributeError, LookupError, TypeError, ValueError):
            raise RunError(
                f"{self.endpoint} answered with something else than a completion; base_url must be an "
                "OpenAI-compatible endpoint, /v1 included"
            ) from None

    @cached_property
    def _client(self) -> Any:
        import openai

        key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
        # The SDK refuses to start without a key; a server that wants none ignores this one.
        return openai.OpenAI(
            base_url=self._base_url, api_key=key or "none", max_retries=self.retries, timeout=self.timeout
        )

    def _fail(self, error: Any) -> NoReturn:
        """One line for what the SDK raises. The server's own words are quoted where they cannot hold the key."""
        import openai

        at = f"the endpoint {self.endpoint}"
        kept = "what was done is kept: the same command goes on"
        failure: AlmostError
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            failure = InputError(f"{at} refuses the key ({error.status_code}); set {' or '.join(KEYS)} to a valid one")
        elif isinstance(error, openai.NotFoundError):
            failure = InputError(f"{at} has no model {self.model!r} at /completions (404); check model and base_url")
        elif isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
            failure = InputError(f"{at} refuses the request ({error.status_code}): {self._words(error)}")
        elif isinstance(error, openai.APITimeoutError):
            failure = RunError(f"{at} gave no answer within {self.timeout:g} s, {self.retries + 1} times; {kept}")
        elif isinstance(error, openai.APIConnectionError):
            failure = RunError(f"{at} is not reachable any more, after {self.retries + 1} tries; {kept}")
        elif isinstance(error, openai.APIStatusError):
            failure = RunError(
                f"{at} still answers {error.status_code} after {self.retries + 1} tries ({self._words(error)}); {kept}"
            )
        else:
            failure = RunError(f"{at} gave an answer that cannot be read ({type(error).__name__}); {kept}")
        raise failure from None

    def _words(self, error: Any) -> str:
        body = error.body if isinstance(error.body, dict) else {}
        text = " ".join(str(body.get("message") or type(error).__name__).split())[:300]
        for name in KEYS:
            if secret := os.environ.get(name):
                text = text.replace(secret, "***")
        return text


def _cut(text: str, finish_reason: str | None, stop: Sequence[str]) -> Completion:
    """The text before the first stop string: servers differ in whether they leave it in."""
    at = min((at for string in stop if (at := text.find(string)) >= 0), default=None)
    reason = "stop" if at is not None or finish_reason == "stop" else "length"
    return Completion(text[:at], (), reason)
