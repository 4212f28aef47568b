"""Scores conversations with the reward server, and answers /v1/rewards.

The reward of a conversation is the raw logit that `almost_eval.rewards.hf.HFRewardModel` gives for it: the reward
server renders it with its own chat template, no generation prompt, and reads the last token.

vLLM's /classify takes many texts in one request, and only one conversation. Where the gateway knows the reward model's
checkpoint, it renders the texts itself, as `almost_eval.rewards.hf` does: same template, same special tokens. All
conversations then go in one request. Else, or where that request is refused because one of them is too long, each has
a request of its own, all at the same time. A conversation that the server then refuses is unscored, with its reason.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from almost_eval.errors import InputError, TemplateError
from almost_eval.models.chat import ChatTemplate, special_tokens
from almost_eval.types import JSONObject, Message
from serving.gateway.errors import refusal
from serving.gateway.metrics import Metrics
from serving.gateway.schema import RewardRequest
from serving.gateway.streaming import ReplyWriter
from serving.gateway.upstream import Upstream, error_body

_WRITES_BOS = "{{ bos_token }}"


@dataclass(frozen=True, slots=True)
class Renderer:
    """Writes conversations for one reward model."""

    template: ChatTemplate
    tokens: Mapping[str, str]
    """Special tokens by name, which the template writes."""
    framed: bool
    """Whether the tokenizer frames a text in markers of its own (`[CLS] ... [SEP]`), which the template leaves out."""

    def fields(self, conversations: Sequence[list[JSONObject]]) -> JSONObject | None:
        """What to ask /classify for these conversations; None where the server has to render one of them."""
        texts = [self._text(messages) for messages in conversations]
        return None if None in texts else {"input": texts, "add_special_tokens": self.framed}

    def _text(self, messages: list[JSONObject]) -> str | None:
        if any(not isinstance(message.get("content"), str) or len(message) != 2 for message in messages):
            return None  # parts, names, tool calls: the server knows what they become
        try:
            return self.template.render(tuple(Message(**message) for message in messages), special_tokens=self.tokens)
        except (TemplateError, TypeError):
            return None  # the server says what is wrong


def renderer_of(checkpoint: str) -> Renderer:
    """The renderer of a reward model: a directory, hub id or built-in name.

    Raises:
        InputError: it does not exist, is no reward model, or has only the slow form of an encoder's tokenizer.
    """
    from serving.models import TokenizerFiles, find_model

    served = find_model("reward", checkpoint)
    folder, template = served.checkpoint.path, served.template
    if _is_framed(folder):
        return Renderer(template, {}, framed=True)
    if served.chat_template is not None and served.chat_template.startswith(_WRITES_BOS):
        template = ChatTemplate(template.name, served.chat_template)
    return Renderer(template, special_tokens(TokenizerFiles(folder)), framed=False)  # type: ignore[arg-type]


def _is_framed(folder: Path) -> bool:
    """As `almost_eval.rewards.base` finds it, without transformers."""
    separator = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("sep_token")
    if not separator:
        return False
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(
            f"{folder} has no tokenizer.json, which the gateway reads: load its tokenizer by AutoTokenizer and save it"
        )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    text = separator["content"] if isinstance(separator, dict) else str(separator)
    return tokenizer.encode("a").ids[-1:] == [tokenizer.token_to_id(text)]


# --- scoring


@dataclass(frozen=True, slots=True)
class Scored:
    """What the reward server said of one conversation."""

    reward: float | None
    """Raw logit; None where there is none."""
    reason: str | None = None
    """Why there is none, though the server works."""
    model: str | None = None


class Rewards:
    """Scores conversations over HTTP, all of one call within `timeout_s`; without `render` the server writes them
    itself.
    """

    def __init__(self, upstream: Upstream, timeout_s: float, metrics: Metrics, render: Renderer | None = None) -> None:
        self.upstream = upstream
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._render = render

    async def score(self, conversations: list[list[JSONObject]], model: str | None = None) -> list[Scored]:
        """One result for each, in order.

        Raises:
            HTTPException: 503: the server is down or fails; 504: it is too slow; 404: it serves no such model.
        """
        began = perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                scored = await self._together(conversations, model) or await self._apart(conversations, model)
        except TimeoutError:
            message = f"the reward server gave no answer within {self._timeout_s:g} s"
            raise refusal(504, message, "reward_timeout") from None
        self._metrics.reward_seconds.observe(perf_counter() - began)
        return scored

    async def _together(self, conversations: list[list[JSONObject]], model: str | None) -> list[Scored] | None:
        """All in one request; None where the server has to render one, or refuses one."""
        fields = self._render.fields(conversations) if self._render else None
        if fields is None:
            return None
        scored = await self._classify(fields, model, len(conversations))
        return None if isinstance(scored, str) else scored

    async def _apart(self, conversations: list[list[JSONObject]], model: str | None) -> list[Scored]:
        """Each in a request of its own, so that one that is refused takes no other with it."""

        async def one(messages: list[JSONObject]) -> Scored:
            fields = self._render.fields([messages]) if self._render else None
            if fields is None:
                fields = {"messages": messages, "add_generation_prompt": False}
                if self._render and self._render.framed:
                    fields["add_special_tokens"] = True
            scored = await self._classify(fields, model, 1)
            return Scored(None, scored) if isinstance(scored, str) else scored[0]

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(messages)) for messages in conversations]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _classify(self, fields: JSONObject, model: str | None, count: int) -> list[Scored] | str:
        """`count` results, or the words in which the server refuses the request."""
        if model is not None:
            fields["model"] = model
        async with self.upstream.request("POST", "/classify", json.dumps(fields).encode()) as response:
            if response.status >= 400:
                words = self.upstream.words(await error_body(response))
                if response.status == 404 and model is not None:
                    raise refusal(404, words, "model_not_found", param="model")
                return words
            body = await response.read()
        return self.read(body, count)

    def read(self, body: bytes, count: int) -> list[Scored]:
        """The results that an answer of /classify holds, in the order of the conversations.

        Raises:
            HTTPException: it does not hold `count` numbers.
        """
        answer = self.upstream.parsed(body)
        try:
            served = str(answer["model"])
            rewards = {entry["index"]: _only_number(entry["probs"]) for entry in answer["data"]}
            if len(answer["data"]) != count:
                raise ValueError(f"{len(answer['data'])} rewards for {count} conversations")
            return [Scored(rewards[i], None, served) for i in range(count)]
        except (LookupError, TypeError, ValueError):
            raise self.upstream.malformed("one number for each conversation: it must serve a reward model") from None


def _only_number(values: object) -> float:
    """The one reward of an entry.

    Raises:
        ValueError: it has several, none, or one that is no number of a float's range.
    """
    if not isinstance(values, list) or len(values) != 1:
        raise ValueError("one reward was expected")
    (value,) = values
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > sys.float_info.max:
        raise ValueError("no number")
    return float(value)


async def answer_rewards(rewards: Rewards, request: RewardRequest, reply: ReplyWriter) -> None:
    """Answer a request to /v1/rewards: all conversations, or none.

    Raises:
        HTTPException: 400: a conversation cannot be scored, being too long or of unknown roles; or see `Rewards.score`.
    """
    conversations = [[message.model_dump() for message in messages] for messages in request.conversations]
    scored = await rewards.score(conversations, request.model)
    for i, one in enumerate(scored):
        if one.reward is None:
            message = f"conversation {i} cannot be scored: {one.reason}"
            raise refusal(400, message, "nothing_scored", param=f"conversations.{i}")
    rows = {"object": "list", "model": scored[0].model, "rewards": [one.reward for one in scored]}
    await reply.whole(200, json.dumps(rows).encode())
