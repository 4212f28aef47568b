"""Best-of-N: draws N candidates from the policy in one request, scores them with the reward model, returns the best.

`rewards` scores, `candidates` says what is drawn and what of a candidate is scored, `racing` tells the best so far
while others are drawn. The reply holds the chosen candidates unchanged. A candidate without a reward is never chosen.
Where fewer than `n` have one, the whole request is an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.exceptions import HTTPException

from almost_eval.types import JSONObject
from serving.gateway.candidates import CALLS_NOTE, Drawing, almost_of, choices_of, drawing_of, scored_text
from serving.gateway.errors import message_of, refusal
from serving.gateway.metrics import Metrics
from serving.gateway.racing import Race
from serving.gateway.rewards import Rewards, Scored
from serving.gateway.schema import ChatRequest
from serving.gateway.streaming import Notes, ReplyWriter, notes_of, send_as_events, start_events
from serving.gateway.upstream import Upstream

_CHANGES_THE_TURN = ("continue_final_message", "echo")


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A chat completion whose choices are all candidates."""

    completion: JSONObject
    choices: list[JSONObject]
    notes: Notes
    scored: list[Scored]
    """One for each; empty with `fallback`."""
    fallback: str | None
    """Why they were not scored."""


class BestOf:
    """Answers chat requests that ask for `best_of`; `rewards` is None where the gateway has no reward server."""

    def __init__(self, policy: Upstream, rewards: Rewards | None, metrics: Metrics) -> None:
        self._policy = policy
        self._rewards = rewards
        self._metrics = metrics

    async def answer(self, request: ChatRequest, fields: JSONObject, reply: ReplyWriter) -> None:
        """Answer one request: `fields` as they were sent, which `request` holds checked.

        Raises:
            HTTPException: either server is down, the policy server refuses the request, or fewer candidates than are
                returned could be scored.
        """
        assert request.best_of is not None
        rewards = self._usable(request)

        # 1. The candidates and their rewards. Where it is known already that they cannot be scored, no more candidates
        #    than are returned.
        wanted = request.n or 1
        drawing = drawing_of(fields, request.best_of if isinstance(rewards, Rewards) else wanted)
        racing = request.almost_stream == "racing" and isinstance(rewards, Rewards)
        if racing and isinstance(rewards, Rewards):
            drawn = await self._race(rewards, request, drawing, reply)
        else:
            drawn = await self._draw(rewards, request, drawing)

        # 2. The best.
        note = drawing.note
        if drawn.fallback is None and any(choice["message"].get("tool_calls") for choice in drawn.choices):
            note = "; ".join(filter(None, [note, CALLS_NOTE]))
        almost = almost_of(drawn.scored, drawing.count, wanted, drawn.fallback, note)
        self._count(drawn)
        if request.almost_candidates:
            almost["candidates"] = [
                {
                    "index": i,
                    "text": choice["message"].get("content"),
                    "reward": reward,
                    "finish_reason": choice.get("finish_reason"),
                }
                for i, (reward, choice) in enumerate(zip(almost["rewards"], drawn.choices, strict=True))
            ]
        completion = dict(drawn.completion)
        completion["choices"] = [{**drawn.choices[i], "index": rank} for rank, i in enumerate(almost["chosen"])]
        completion["almost"] = almost

        # 3. The reply.
        if not request.stream:
            await reply.whole(200, json.dumps(completion).encode(), drawn.notes)
            return
        if not racing:
            await start_events(reply, drawn.notes)
        await send_as_events(completion, reply, include_usage=_wants_usage(request))

    async def _draw(self, rewards: Rewards | str, request: ChatRequest, drawing: Drawing) -> _Drawn:
        """All candidates, then all rewards."""
        body = json.dumps(drawing.fields).encode()
        async with self._policy.request("POST", "/v1/chat/completions", body) as response:
            if response.status >= 400:
                raise await self._policy.refused(response)
            completion, notes = self._policy.parsed(await response.read()), notes_of(response)
        choices = choices_of(completion, drawing.count)
        if choices is None:
            raise self._policy.malformed(f"the {drawing.count} choices of the request")
        messages = [choice["message"] for choice in choices]
        if isinstance(rewards, str):
            return _Drawn(completion, choices, notes, [], rewards)
        try:
            scored = await self._score(rewards, drawing.fields["messages"], messages)
            _refuse_too_few(scored, request.n or 1)
        except HTTPException as error:
            if not request.best_of_fallback:
                raise
            return _Drawn(completion, choices, notes, [], message_of(error))
        return _Drawn(completion, choices, notes, scored, None)

    async def _race(self, rewards: Rewards, request: ChatRequest, drawing: Drawing, reply: ReplyWriter) -> _Drawn:
        """Each candidate is scored when it ends, and the best so far told."""
        conversation = drawing.fields["messages"]

        async def score(message: JSONObject) -> Scored:
            return (await self._score(rewards, conversation, [message]))[0]

        race = Race(self._policy, drawing, score, reply, include_usage=_wants_usage(request))
        await race.run(fallback=bool(request.best_of_fallback))
        fallback = race.fallback
        if fallback is None:
            try:
                _refuse_too_few(race.scored, 1)
            except HTTPException as error:
                if not request.best_of_fallback:
                    raise
                fallback = message_of(error)
        await race.tell_winner(scored=fallback is None)
        return _Drawn(race.completion, race.choices, (), [] if fallback else race.scored, fallback)

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
        self, rewards: Rewards, conversation: list[JSONObject], messages: Sequence[JSONObject]
    ) -> list[Scored]:
        """One result for each answer to the conversation; see `Rewards.score` for what it raises."""
        read = [scored_text(message) for message in messages]
        texts = {i: text for i, (text, _) in enumerate(read) if text is not None}
        results = await rewards.score(
            [[*conversation, {"role": "assistant", "content": text}] for text in texts.values()]
        )
        scored = [Scored(None, reason) for _, reason in read]
        for i, one in zip(texts, results, strict=True):
            scored[i] = one
        return scored

    def _count(self, drawn: _Drawn) -> None:
        if drawn.fallback is not None:
            self._metrics.fallbacks.inc()
        rewarded = sum(one.reward is not None for one in drawn.scored)
        self._metrics.candidates.labels("scored").inc(rewarded)
        self._metrics.candidates.labels("unscored").inc(len(drawn.choices) - rewarded)


def _refuse_too_few(scored: Sequence[Scored], wanted: int) -> None:
    """Raise HTTPException where fewer than `wanted` have a reward; one candidate alone is every answer."""
    reasons = [one.reason for one in scored if one.reward is None]
    if len(reasons) == len(scored):
        message = f"none of the {len(scored)} candidates could be scored: {reasons[0]}"
        raise refusal(400, message, "nothing_scored")
    if (count := len(scored) - len(reasons)) < wanted and len(scored) > 1:
        message = f"only {count} of the {len(scored)} candidates could be scored, and n is {wanted}: {reasons[0]}"
        raise refusal(400, message, "too_few_scored", param="n")


def _wants_usage(request: ChatRequest) -> bool:
    return request.stream_options is not None and bool(request.stream_options.include_usage)
