"""Log-likelihoods over HTTP, from servers whose `/v1/completions` takes token ids and tells log-probabilities.

Context and continuation are encoded jointly here, as for every engine, and sent as ids: what is scored is exactly what
the other engines score. One tiny request before the start shows what the server can do:

- `ids`: vLLM's server. The last token of a continuation is scored as a *next* token (`logprob_token_ids`), those of all
  continuations that differ in nothing else in one request, which reads the server's prefix cache. What lies between
  context and last token comes of `prompt_logprobs`, for which vLLM's server reads the whole prompt anew: exact, slower.
- `echo`: servers that repeat the prompt with its log-probabilities (`echo` with `logprobs`), as lm-eval asks them.
- Anything else is refused: a server that takes no ids, or that tells nothing of the prompt, cannot score an answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Unpack

from almost_eval.engines.base import LoglikelihoodEngine, RequestScores, SamplingParams
from almost_eval.engines.checkpoint_engine import collected, encode_rolling
from almost_eval.engines.decoding import decode, marks
from almost_eval.engines.openai import OpenAIEngine
from almost_eval.engines.openai_client import ClientOptions, EndpointModel, is_here, post_json
from almost_eval.engines.openai_routes import Whole, plan_wholes, read_echo, read_ids, token_name
from almost_eval.engines.prefix import EncodedRequest, TokenEncoder, build_trie, scores_of_nothing
from almost_eval.engines.vllm_loglikelihood import ScoringPrompt, plan_prompts
from almost_eval.errors import InputError
from almost_eval.models.checkpoint import Checkpoint, find_checkpoint
from almost_eval.models.loading import load_tokenizer
from almost_eval.nano import BUILT_IN
from almost_eval.types import ContinuationScore, EngineReport, JSONObject, LoglikelihoodRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "The cat sat on the mat, and 12 dogs barked at it."
_BEYOND = {"ids": 1, "echo": 2}
"""Route -> tokens that a request needs beyond the positions it scores: the one that is sampled, and with `echo` the
continuation's last, which is then part of the prompt."""


class OpenAIScorer(OpenAIEngine, LoglikelihoodEngine):
    """`OpenAIEngine` that knows its tokens: it scores as well as it generates.

    Args:
        model: the name it is served under.
        tokenizer: checkpoint directory, built-in name or hub id with the model's tokenizer; None is the model's own
            where its name, or what the server says it has loaded, is a folder here.
        max_length: a context length below the server's, or what it is where the server does not tell.
        client: see `ClientOptions`.

    Raises:
        InputError: see `OpenAIClient`.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        max_length: int | None = None,
        **client: Unpack[ClientOptions],
    ) -> None:
        super().__init__(model, **client)
        if max_length is not None and max_length < 1:
            raise InputError(f"max length is {max_length}; it must be 1 or more")
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._report = EngineReport()
        self.route: str | None = None
        """`ids` or `echo`, once `check_scores` has run."""

    # --- the model ---

    @cached_property
    def checkpoint(self) -> EndpointModel:
        """The served model, in the place of the files it was loaded from."""
        self.check()
        return self.served_model(("CausalLM", "LMHeadModel"))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            InputError: no `tokenizer`, and the endpoint names no folder of this machine.
            ModelError: there is none at that place.
        """
        self.check()
        name = self._tokenizer or self._own_folder()
        if name is None:
            raise InputError(
                f"the endpoint {self.endpoint} does not say where its tokenizer is, and prompts are encoded here: give "
                "--tokenizer with the model's checkpoint directory or hub id"
            )
        path = find_checkpoint(name).path if name in BUILT_IN else Path(name).expanduser()
        if (path / "adapter_config.json").is_file():  # its tokenizer may be that of its base
            return load_tokenizer(find_checkpoint(str(path)))
        return load_tokenizer(Checkpoint(name, path, {}, ()))

    def sent_prompt(self, prompt: str) -> str | list[int]:
        """Token ids where the template wrote BOS, of which the server would write a second; else the text."""
        opening = self.encoder.opening
        if opening.ids and opening.is_written(prompt):
            return self.encoder.encode_texts([prompt])[0].tolist()
        return super().sent_prompt(prompt)

    @cached_property
    def _thought_ids(self) -> frozenset[int]:
        """Special tokens that mark a thought, of a vLLM server whose tokenizer is known; else empty."""
        if self.server["kind"] != "vllm" or not (self._tokenizer or self._own_folder()):
            return frozenset()
        return frozenset(marks(self.tokenizer))

    def more_fields(self, params: SamplingParams) -> JSONObject:
        """With the ids of what was written, where the text may lack the marks of a thought."""
        return super().more_fields(params) | ({"return_token_ids": True} if self._thought_ids else {})

    def text_of(self, choice: Any) -> str:
        """The text with the special tokens that mark a thought: vLLM's server leaves out all special tokens."""
        ids = getattr(choice, "token_ids", None) or []
        if self._thought_ids.isdisjoint(ids):
            return super().text_of(choice)
        # The token that ended it is among the ids, and not in the text; a stop string is in both.
        ended = choice.finish_reason == "stop" and not isinstance(getattr(choice, "stop_reason", None), str)
        return decode(self.tokenizer, ids[:-1] if ended else ids)

    def _own_folder(self) -> str | None:
        return self.model if is_here(self.model) else self.root

    @cached_property
    def encoder(self) -> TokenEncoder:
        """Joint encoding on this tokenizer."""
        return TokenEncoder(self.tokenizer)

    @property
    def context_length(self) -> int | None:
        """Positions that can be scored, or None where neither the server nor `max_length` says.

        One or two below the server's own limit, which counts a sampled token too.

        Raises:
            InputError: `max_length` is beyond the server's limit; or see `check`.
        """
        self.check()
        limit = self.context_limit
        own = None if limit is None else limit - _BEYOND[self.route or "ids"]
        if own is not None and self._max_length is not None and self._max_length > own:
            raise InputError(f"--max-length {self._max_length} is beyond what {self.endpoint} can score, {own} tokens")
        return self._max_length or own

    @property
    def report(self) -> EngineReport:
        """What the last `stream` did; `tokens_computed` are those sent, less those the server says it had cached."""
        return replace(self._report, warnings=[*self._report.warnings, *self.lost])

    def settings(self) -> JSONObject:
        """What belongs in a run's spec: what decides the numbers, as far as the server tells."""
        self.check()
        return {
            **super().settings(),
            "server": self.server,
            "dtype": None,
            "device": None,
            "context_length": self.context_length,
            "route": self.route,
        }

    # --- what the server can do ---

    def check_scores(self) -> None:
        """Find out, once and by a tiny request, whether and how the server scores.

        Raises:
            InputError: it does not, or it reads other tokens than were sent; or see `check`.
        """
        import openai

        if self.route is not None:
            return
        self.check()
        ids = self.encoder.encode_texts([PROBE])[0].tolist()
        probed = [ids[-1], ids[-2]]
        plain = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        more = {
            "logprobs": len(set(probed)),
            "logprob_token_ids": sorted(set(probed)),
            "prompt_logprobs": 0,
            "return_tokens_as_token_ids": True,
        }
        try:
            try:
                answer = post_json(self.client, "completions", plain | more)
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                # A strict server, to which the other fields are unknown.
                answer = post_json(self.client, "completions", plain)
            self._judge(answer, ids, probed)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            self._refuse(f"it answers {error.status_code}: {self.words(error)}")
        except openai.OpenAIError as error:
            self.fail(error)
        except (AttributeError, LookupError, TypeError, ValueError):
            self._refuse("its answer to a prompt of token ids is no completion with log-probabilities")

    def _judge(self, answer: JSONObject, ids: list[int], probed: Collection[int]) -> None:
        """Read the answer to the probe."""
        [choice] = answer["choices"]
        if (read := answer["usage"]["prompt_tokens"]) != len(ids):
            self._refuse(f"it read {read} tokens where {len(ids)} were sent, so it takes no token ids as they are")
        seen = " ".join(str(choice.get("text") or "").split())
        ours = (PROBE, " ".join(str(self.tokenizer.decode(ids, skip_special_tokens=True)).split()))
        if not any(text in seen for text in ours):
            raise InputError(
                f"the endpoint {self.endpoint} reads the ids of {PROBE!r} as {seen[:60]!r}: the tokenizer is not the "
                "served model's; give --tokenizer with its checkpoint directory or hub id"
            )
        logprobs = choice.get("logprobs") or {}
        rows = choice.get("prompt_logprobs") or []
        named = (logprobs.get("top_logprobs") or [{}])[-1] or {}
        if len(rows) == len(ids) and all(token_name(token) in named for token in probed):
            for row, token in zip(rows[1:], ids[1:], strict=True):
                float(row[str(token)]["logprob"]), int(row[str(token)]["rank"])
            self.route = "ids"
            return
        values = (logprobs.get("token_logprobs") or [])[1 : len(ids)]
        if len(values) < len(ids) - 1 or any(value is None for value in values):
            self._refuse("it tells no log-probabilities of a prompt's tokens")
        self.route = "echo"

    def _refuse(self, reason: str) -> NoReturn:
        raise InputError(
            f"the endpoint {self.endpoint} cannot score answers: {reason}; serve the model with vLLM (almost-serve "
            "policy), or use the engine hf or vllm"
        ) from None

    # --- log-likelihoods ---

    def encode(self, requests: Sequence[LoglikelihoodRequest]) -> list[EncodedRequest]:
        """Token ids of every request.

        Raises:
            InputError: a rolling request where the context length is not known.
        """
        whole = iter(self.encoder.encode([request for request in requests if not request.rolling]))
        return [self._encode_rolling(request) if request.rolling else next(whole) for request in requests]

    def _encode_rolling(self, request: LoglikelihoodRequest) -> EncodedRequest:
        self.check_scores()  # on which the length of a window depends
        if self.context_length is None:
            raise InputError(
                f"the endpoint {self.endpoint} does not tell its context length, and a text is scored in windows of "
                "it: give --max-length"
            )
        return encode_rolling(self.encoder, request, self.context_length)

    def stream(
        self, requests: Sequence[EncodedRequest], wanted: Collection[int] | None = None
    ) -> Iterator[tuple[int, RequestScores]]:
        """Yield (index, scores) of each wanted request as soon as it is known.

        Which requests share a batch is the server's to decide: a resumed run is equal up to rounding.

        Raises:
            InputError: a request longer than the context; or see `check_scores`.
            RunError: the endpoint still fails after the retries, or its answers cannot be read.
        """
        self._report = EngineReport("openai")
        if not requests:
            return
        self.check_scores()
        self._report.path = f"openai, {self.route}"
        longest, limit = max(request.n_positions for request in requests), self.context_length
        if limit is not None and longest > limit:
            raise InputError(f"a request of {longest} tokens does not fit the context of {limit}")
        trie = build_trie(requests)
        self._report.tokens_plain, self._report.tokens_in_trie = trie.tokens_plain, len(trie)
        wanted = sorted(range(len(requests)) if wanted is None else wanted)
        yield from scores_of_nothing(requests, wanted)
        sizes = {index: len(requests[index].continuations) for index in wanted}
        yield from collected(self._scores(requests, wanted), sizes)

    def _scores(
        self, requests: Sequence[EncodedRequest], wanted: Sequence[int]
    ) -> Iterator[tuple[tuple[int, int], ContinuationScore]]:
        """((request, number of its continuation), score) as they arrive."""
        jobs: list[ScoringPrompt | Whole] = []
        jobs += plan_prompts(requests, wanted) if self.route == "ids" else plan_wholes(requests, wanted)
        for job, answer in self.ask_all(iter(jobs), self._ask):
            try:
                [choice], usage = answer["choices"], answer["usage"]
                cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                self._report.tokens_computed += int(usage["prompt_tokens"]) - int(cached)
                for index, number in job.owners:
                    continuation = requests[index].continuations[number]
                    read = read_ids if self.route == "ids" else read_echo
                    yield (index, number), read(choice, len(continuation.prefix), continuation.scored)
            except (AttributeError, LookupError, TypeError, ValueError):
                raise self.unreadable("the log-probabilities it gave before") from None

    def _ask(self, job: ScoringPrompt | Whole) -> JSONObject:
        import openai

        body: JSONObject = {"model": self.model, "prompt": job.ids.tolist(), "max_tokens": 1, "temperature": 0}
        if isinstance(job, ScoringPrompt):
            last = sorted(job.last)
            body |= {"logprobs": len(last), "logprob_token_ids": last, "return_tokens_as_token_ids": True}
            if job.first_row is not None:
                body["prompt_logprobs"] = 0
        else:
            body |= {"echo": True, "logprobs": 1}
        try:
            return post_json(self.client, "completions", body)
        except openai.OpenAIError as error:
            self.fail(error)
        except ValueError:
            raise self.unreadable("a completion") from None
