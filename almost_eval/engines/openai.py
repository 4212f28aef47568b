"""Generation by any OpenAI-compatible endpoint: a server of vLLM, of another toolkit, or of a company.

`/v1/completions` with rendered prompts, one request for each completion with a seed of its own: servers disagree on
what `n` does with a seed, and some ignore it. Retries and failures are in `openai_client`; log-likelihoods, which few
servers can give, are in `openai_loglikelihood`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from almost_eval.engines.base import GenerationEngine, SamplingParams
from almost_eval.engines.checkpoint_engine import collected
from almost_eval.engines.openai_client import OpenAIClient
from almost_eval.engines.seeding import request_seed
from almost_eval.models.stops import first_stop
from almost_eval.types import Completion, JSONObject

MAX_STOPS = 4
"""Stop strings that OpenAI's protocol takes; any more are looked for here."""


class OpenAIEngine(OpenAIClient, GenerationEngine):
    """A model behind an OpenAI-compatible endpoint; arguments and errors are `OpenAIClient`'s.

    `Completion.token_ids` is empty: the protocol does not tell. A completion is as reproducible as the server's seeds.
    """

    @property
    def warnings(self) -> list[str]:
        """What a reader of the results must know of the endpoints."""
        return self.lost

    def settings(self) -> JSONObject:
        """What belongs in a run's spec."""
        return {"name": self.name, "base_url": self.endpoint, "model": self.model}

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
        completions = self.ask_all(jobs, lambda job: self._complete(prompts[job[0]], job[1], params))
        for p, drawn in collected(completions, dict.fromkeys(range(len(prompts)), draws)):
            yield p, [drawn[i % draws] for i in range(params.n)]

    def sent_prompt(self, prompt: str) -> str | list[int]:
        """A rendered prompt as it is sent: the text, which the server encodes with its own special tokens in front."""
        return prompt

    def more_fields(self, params: SamplingParams) -> JSONObject:
        """What a request holds beside the SDK's own arguments."""
        return {"stop": list(params.stop[:MAX_STOPS])} if params.stop else {}

    def text_of(self, choice: Any) -> str:
        """The text of a choice of the answer, as the server decoded it."""
        return choice.text or ""

    def _complete(self, prompt: str, number: int, params: SamplingParams) -> Completion:
        import openai

        try:
            answer = self.client.completions.create(
                model=self.model,
                prompt=self.sent_prompt(prompt),
                max_tokens=params.max_new_tokens,
                temperature=params.temperature,
                top_p=params.top_p,
                seed=request_seed(params.seed, prompt, number),
                extra_body=self.more_fields(params) or None,
            )
            choice = answer.choices[0]
            text = self.text_of(choice)
            cut = first_stop(text, params.stop)  # servers differ in whether they leave it in
            reason = "stop" if cut is not None or choice.finish_reason == "stop" else "length"
            return Completion(text[:cut], (), reason, own_reasoning(choice))
        except openai.OpenAIError as error:
            self.fail(error)
        except (AttributeError, LookupError, TypeError, ValueError):
            raise self.unreadable("a completion") from None


def own_reasoning(choice: Any) -> str:
    """The thought that a server delivers beside the text, in `reasoning_content` or `reasoning`; empty without one."""
    fields = (getattr(choice, name, None) for name in ("reasoning_content", "reasoning"))
    return next((field for field in fields if isinstance(field, str) and field), "")
