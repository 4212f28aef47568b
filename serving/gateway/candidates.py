"""Candidates of best-of-N: what the policy server is asked for, what of an answer is scored, which are chosen. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from almost_eval.types import JSONObject
from serving.gateway.events import joined
from serving.gateway.rewards import Scored
from serving.gateway.schema import OWN_FIELDS

_NOT_DRAWN = (*OWN_FIELDS, "stream", "stream_options")
GREEDY = 1e-5
"""vLLM takes the likeliest token at every temperature below this one (0.31, `_SAMPLING_EPS`)."""

GREEDY_NOTE = "nothing is sampled at this temperature or top_k, so all candidates would be the same: one was drawn"
CALLS_NOTE = "candidates that call tools were scored as text, each call as <tool_call>{name, arguments}</tool_call>"


@dataclass(frozen=True, slots=True)
class Drawing:
    """What the policy server is asked for."""

    fields: JSONObject
    count: int
    """Candidates."""
    note: str | None = None
    """Why they are fewer than were asked for."""


def drawing_of(fields: JSONObject, count: int) -> Drawing:
    """The request for `count` candidates; for one, where all would be the same.

    vLLM gives candidate `i` the seed `seed + i`, so that the requests of neighbouring seeds would share all candidates
    but one. The seed is therefore hashed.
    """
    drawn = {name: value for name, value in fields.items() if name not in _NOT_DRAWN}
    if drawn.get("seed") is not None:
        drawn["seed"] = independent_seed(drawn["seed"])
    if _is_greedy(drawn):
        return Drawing(drawn | {"n": 1}, 1, GREEDY_NOTE if count > 1 else None)
    return Drawing(drawn | {"n": count}, count)


def independent_seed(seed: int) -> int:
    """A seed of 62 bits, far from those of the neighbours; always the same for the same seed."""
    digest = hashlib.sha256(f"almost best_of {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2  # vLLM adds the candidate's number, within 63 bits


def _is_greedy(fields: Mapping[str, object]) -> bool:
    temperature, top_k = fields.get("temperature"), fields.get("top_k")
    if fields.get("use_beam_search"):  # its answers differ without sampling
        return False
    return (isinstance(temperature, int | float) and temperature < GREEDY) or top_k == 1


def choices_of(completion: object, count: int) -> list[JSONObject] | None:
    """The choices of a chat completion in order of their index; None where they are not `count`, or not in OpenAI's
    form: an index each, a message, tool calls that are objects.
    """
    listed = completion.get("choices") if isinstance(completion, dict) else None
    if not isinstance(listed, list) or len(listed) != count:
        return None
    by_index = {is_index(one.get("index")): one for one in listed if isinstance(one, dict) and _is_told(one)}
    return [by_index[i] for i in range(count)] if by_index.keys() == set(range(count)) else None


def is_index(value: object) -> int | None:
    """A place in a list, as JSON has it; None for anything else: Python would take true for 1, and -1 for the last."""
    return value if type(value) is int and value >= 0 else None


def _is_told(choice: JSONObject) -> bool:
    message = choice.get("message")
    calls = message.get("tool_calls") or [] if isinstance(message, dict) else None
    return isinstance(calls, list) and all(isinstance(call, dict) for call in calls)


def scored_text(message: Mapping[str, object]) -> tuple[str | None, str]:
    """What of an answer the reward model reads, or None and the reason.

    It reads text without the whitespace around it, as in this toolkit's training. A tool call is written as Qwen's and
    Hermes' templates write it, after the text: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`.
    """
    if message.get("function_call") or message.get("audio"):
        return None, "it holds a function_call or audio, which the reward model cannot read"
    content, calls = message.get("content"), message.get("tool_calls")
    if content is not None and not isinstance(content, str):
        return None, "its content is no text"
    if not calls:
        return (None, "it has no text") if content is None else (joined(content).strip(), "")
    try:
        written = [_written_call(call["function"]) for call in calls]  # type: ignore[attr-defined]
    except (LookupError, TypeError, AttributeError):
        return None, "its tool calls cannot be read"
    return joined("\n".join([*filter(None, [(content or "").strip()]), *written])), ""


def _written_call(function: Mapping[str, object]) -> str:
    arguments = function["arguments"]
    with suppress(ValueError, RecursionError):  # what is no JSON is scored as the model wrote it
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    call = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def almost_of(scored: Sequence[Scored], drawn: int, wanted: int, fallback: str | None, note: str | None) -> JSONObject:
    """The field `almost` of the reply: the `wanted` best. Of equal ones, and without rewards, the first drawn.

    Args:
        scored: one for each candidate; ignored with `fallback`.
        drawn: how many candidates there are; where it is one, it is every answer.
        wanted: answers to return.
        fallback: why there are no rewards; None where there are.
        note: how candidates were drawn or scored, where that is not as usual.
    """
    rewards = [one.reward for one in scored] if fallback is None else [None] * drawn
    order = sorted((i for i in range(drawn) if rewards[i] is not None), key=lambda i: -(rewards[i] or 0.0))
    ranked = order if fallback is None else list(range(drawn))
    chosen = ranked * wanted if drawn == 1 else ranked[:wanted]
    return {
        "best_of": drawn,
        "reward": rewards[chosen[0]],
        "rewards": rewards,
        "chosen": chosen,
        "unscored": [{"index": i, "reason": one.reason} for i, one in enumerate(scored) if one.reward is None],
        "fallback": fallback,
        "note": note,
    }
