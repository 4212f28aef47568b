"""Best-of-N: draws N candidates from the policy in one request, scores them with the reward model, returns the best.

The reward of a candidate is the raw logit that `almost_eval.rewards.hf.HFRewardModel` gives for the same conversation:
the reward server renders it with its own chat template, no generation prompt, and reads the last token. A candidate is
scored without the whitespace around it, as in this toolkit's training; the reply holds it unchanged.

All candidates go to the reward server in one request where the gateway knows the reward model's template (`render`).
Else, or where that request is refused because one of them is too long, each has a request of its own, all at the same
time. A candidate that the server then refuses is unscored and never chosen. Where fewer than `n` are scored, the whole
request is an error.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from starlette.exceptions import HTTPException

from almost_eval.types import JSONObject
from serving.gateway.errors import message_of, refusal, upstream_words
from serving.gateway.metrics import Metrics
from serving.gateway.render import Renderer
from serving.gateway.schema import ChatRequest, RewardRequest
from serving.gateway.streaming import ReplyWriter, notes_of, send_as_events
from serving.gateway.upstream import Upstream

_OWN = ("best_of", "best_of_fallback", "almost_candidates", "stream", "stream_options")
_CHANGES_THE_TURN = ("continue_final_message", "echo")


@dataclass(frozen=True, slots=True)
class Scored:
    """What the reward server said of one conversation."""

    reward: float | None
    """Raw logit; None where there is none."""
    reason: str | None = None
    """Why there is none, though the server works."""
    model: str | None = None


class Rewards:
    """Scores conversations over HTTP.

    Args:
        upstream: vLLM's pooling server.
        timeout_s: for all conversations of one call.
        metrics: where the time is counted.
        render: writes conversations as that server would; None leaves them to it.
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
            body = await response.read()
            if response.status == 404 and model is not None:
                raise refusal(404, upstream_words(body), "model_not_found", param="model")
            if response.status != 200:
                return upstream_words(body)
        answer = self.upstream.parsed(body)
        try:
            entries = sorted(answer["data"], key=lambda entry: entry["index"])
            rewards = [float(value) for entry in entries for value in entry["probs"]]
            served = str(answer["model"])
        except (LookupError, TypeError, ValueError):
            rewards = []
        if len(rewards) != count:
            raise self.upstream.malformed("one number for each conversation: it must serve a reward model")
        return [
            Scored(reward, None, served) if math.isfinite(reward) else Scored(None, "the reward is not finite")
            for reward in rewards
        ]


class BestOf:
    """Answers chat requests that ask for `best_of`.

    Args:
        policy: draws the candidates.
        rewards: scores them; None where the gateway has no reward server.
        metrics: where candidates and fallbacks are counted.
    """

    def __init__(self, policy: Upstream, rewards: Rewards | None, metrics: Metrics) -> None:
        self._policy = policy
        self._rewards = rewards
        self._metrics = metrics

    async def answer(self, request: ChatRequest, fields: JSONObject, reply: ReplyWriter) -> None:
        """Answer one request.

        Args:
            request: `fields`, checked; `best_of` is set.
            fields: the body as it was sent.
            reply: where the answer goes.

        Raises:
            HTTPException: either server is down, or no candidate could be scored.
        """
        assert request.best_of is not None
        rewards = self._usable(request)

        # 1. The candidates. Where it is known already that they cannot be scored, no more than are returned.
        wanted = request.n or 1
        drawn = request.best_of if isinstance(rewards, Rewards) else wanted
        drawing = {name: value for name, value in fields.items() if name not in _OWN} | {"n": drawn}
        async with self._policy.request("POST", "/v1/chat/completions", json.dumps(drawing).encode()) as response:
            body, notes = await response.read(), notes_of(response)
            completion = self._policy.parsed(body)
            if response.status != 200:
                await reply.whole(response.status, body, notes)
                return
        try:
            choices = sorted(completion["choices"], key=lambda choice: choice["index"])
            texts = [choice["message"].get("content") for choice in choices]
        except (LookupError, TypeError, AttributeError):
            raise self._policy.malformed("choices") from None
        if len(choices) != drawn:
            raise self._policy.malformed(f"the {drawn} choices of the request")

        # 2. Their rewards.
        fallback: str | None = None
        scored: list[Scored] = []
        if isinstance(rewards, Rewards):
            try:
                scored = await self._score(rewards, fields["messages"], texts, wanted)
            except HTTPException as error:
                if not request.best_of_fallback:
                    raise
                fallback = message_of(error)
        else:
            fallback = rewards
        self._count(scored, fallback, len(choices))

        # 3. The best.
        almost = _almost(scored, drawn, wanted, fallback)
        if request.almost_candidates:
            almost["candidates"] = [
                {"index": i, "text": text, "reward": reward, "finish_reason": choice.get("finish_reason")}
                for i, (text, reward, choice) in enumerate(zip(texts, almost["rewards"], choices, strict=True))
            ]
        completion["choices"] = [{**choices[i], "index": rank} for rank, i in enumerate(almost["chosen"])]
        completion["almost"] = almost
        if request.stream:
            usage = request.stream_options is not None and bool(request.stream_options.include_usage)
            await send_as_events(completion, reply, notes, include_usage=usage)
        else:
            await reply.whole(200, json.dumps(completion).encode(), notes)

    def _usable(self, request: ChatRequest) -> Rewards | str:
        """The reward model, or why to answer without it.

        Raises:
            HTTPException: it cannot be used, and the request allows no fallback.
        """
        for name in _CHANGES_THE_TURN:
            if (request.model_extra or {}).get(name):
                message = f"best_of does not go with {name}: the candidate would not be a turn of its own"
                raise refusal(400, message, "invalid_value", param=name)
        if self._rewards is None:
            error = refusal(400, "this gateway has no reward server: best_of is not to be had", "no_reward_server")
        elif self._rewards.upstream.known_down:
            error = self._rewards.upstream.unreachable()
        else:
            return self._rewards
        if not request.best_of_fallback:
            raise error
        return message_of(error)

    async def _score(
        self, rewards: Rewards, messages: list[JSONObject], texts: Sequence[object], wanted: int
    ) -> list[Scored]:
        """One result for each candidate, `wanted` of them at least with a reward.

        Raises:
            HTTPException: fewer have one; or see `Rewards.score`.
        """
        with_text = {i: text for i, text in enumerate(texts) if isinstance(text, str)}
        results = await rewards.score(
            [[*messages, {"role": "assistant", "content": text.strip()}] for text in with_text.values()]
        )
        scored = [Scored(None, "it has no text")] * len(texts)
        for i, one in zip(with_text, results, strict=True):
            scored[i] = one
        reasons = [one.reason for one in scored if one.reward is None]
        if len(reasons) == len(scored):
            message = f"none of the {len(scored)} candidates could be scored: {reasons[0]}"
            raise refusal(400, message, "nothing_scored")
        if (count := len(scored) - len(reasons)) < wanted:
            message = f"only {count} of the {len(scored)} candidates could be scored, and n is {wanted}: {reasons[0]}"
            raise refusal(400, message, "too_few_scored", param="n")
        return scored

    def _count(self, scored: list[Scored], fallback: str | None, drawn: int) -> None:
        if fallback is not None:
            self._metrics.fallbacks.inc()
        rewarded = sum(one.reward is not None for one in scored)
        self._metrics.candidates.labels("scored").inc(rewarded)
        self._metrics.candidates.labels("unscored").inc(drawn - rewarded)


def _almost(scored: Sequence[Scored], drawn: int, wanted: int, fallback: str | None) -> JSONObject:
    """The field `almost` of the reply: the `wanted` best. Of equal ones, and without rewards, the first drawn."""
    rewards = [one.reward for one in scored] if fallback is None else [None] * drawn
    order = sorted((i for i in range(drawn) if rewards[i] is not None), key=lambda i: -(rewards[i] or 0.0))
    chosen = order[:wanted] if fallback is None else list(range(wanted))
    return {
        "best_of": drawn,
        "reward": rewards[chosen[0]],
        "rewards": rewards,
        "chosen": chosen,
        "unscored": [{"index": i, "reason": one.reason} for i, one in enumerate(scored) if one.reward is None],
        "fallback": fallback,
    }


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
