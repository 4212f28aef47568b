"""What the gateway accepts. Requests are checked by these models, and the OpenAPI document is made from them.

Fields that are not named here go to the policy server as they are, so every sampling parameter of vLLM works. vLLM
ignores a field that it does not know. So a field that begins like one of the gateway's own (`best...`, `almost...`) and
is none of them is refused here.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from almost_eval.errors import did_you_mean
from almost_eval.types import JSONObject
from serving.door.strict_json import NotJSON, read_json
from serving.gateway.errors import refusal
from serving.gateway.settings import GatewaySettings

_Count = Annotated[StrictInt, Field(ge=1)]
_TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
_Flag = StrictBool | None


class ChatMessage(BaseModel):
    """One turn, as OpenAI's API has it."""

    model_config = ConfigDict(extra="allow")

    role: StrictStr
    content: StrictStr | list[JSONObject] | None = None


class StreamOptions(BaseModel):
    """What a stream holds besides the text."""

    model_config = ConfigDict(extra="allow")

    include_usage: _Flag = None


class Generation(BaseModel):
    """What chat and completion requests share."""

    model_config = ConfigDict(extra="allow")

    model: StrictStr | None = None
    n: _Count | None = Field(None, description="Answers to return.")
    stream: _Flag = None
    stream_options: StreamOptions | None = None


class ChatRequest(Generation):
    """A chat completion. Fields that are not listed go to the policy server as they are."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    best_of: _Count | None = Field(
        None, description="Candidates to draw and to score with the reward model; the n best are returned."
    )
    best_of_fallback: _Flag = Field(
        None, description="While the reward model is down, answer without it instead of 503; `almost.fallback` says so."
    )
    almost_candidates: _Flag = Field(None, description="Return the text of all candidates in `almost.candidates`.")
    almost_stream: Literal["racing"] | None = Field(
        None,
        description="With best_of and stream: the best answer so far comes in `almost.racing` while others are drawn.",
    )


class CompletionRequest(Generation):
    """A text completion, passed through. Fields that are not listed go to the policy server as they are."""

    prompt: StrictStr | list[StrictStr] | list[_TokenId] | list[list[_TokenId]]

    @property
    def prompts(self) -> int:
        """How many there are: a list of token ids is one. vLLM takes embeddings beside them, one prompt each."""
        several = isinstance(self.prompt, list) and not isinstance(next(iter(self.prompt), None), int)
        embedded = (self.model_extra or {}).get("prompt_embeds")
        beside = len(embedded) if isinstance(embedded, list) else int(embedded is not None)
        return (len(self.prompt) if several else 1) + beside


class RewardMessage(BaseModel):
    """One turn of a conversation to score."""

    model_config = ConfigDict(extra="forbid")

    role: StrictStr
    content: StrictStr


_Conversation = Annotated[list[RewardMessage], Field(min_length=1)]


class RewardRequest(BaseModel):
    """Conversations to score; the reward is that of the last answer."""

    model_config = ConfigDict(extra="forbid")

    conversations: Annotated[list[_Conversation], Field(min_length=1)]
    model: StrictStr | None = Field(None, description="The reward model's served name; left out, whatever is served.")


class Candidate(BaseModel):
    """One of the answers drawn for best-of-N."""

    index: int
    text: str | None
    reward: float | None = Field(description="Raw logit; null where it could not be scored.")
    finish_reason: str | None


class Unscored(BaseModel):
    """A candidate that has no reward, and is never chosen."""

    index: int
    reason: str


class Racing(BaseModel):
    """The best answer so far, while candidates are drawn. It may still be replaced, until `final`."""

    candidate: int
    reward: float | None = Field(description="Raw logit; null while the candidate is being drawn.")
    text: str | None = Field(None, description="All of the candidate's text; it replaces what was told before.")
    delta: str | None = Field(None, description="What the text of the same candidate grew by.")
    final: bool = Field(description="Whether this candidate is the answer, which now follows in `choices`.")


class Almost(BaseModel):
    """What best-of-N did. `usage` of the same reply counts the tokens of all candidates, which is what was computed."""

    best_of: int
    reward: float | None = Field(description="Of the first choice: the raw logit, no sigmoid.")
    rewards: list[float | None] = Field(description="Of all candidates, in the order they were drawn.")
    chosen: list[int] = Field(description="The candidate behind each choice.")
    unscored: list[Unscored]
    fallback: str | None = Field(description="Why there are no rewards, where best_of_fallback was asked.")
    note: str | None = Field(description="How the candidates were drawn or scored, where that is not as usual.")
    candidates: list[Candidate] | None = Field(None, description="Where almost_candidates was asked.")
    racing: Racing | None = Field(None, description="In a stream with `almost_stream`: the best answer so far.")


class RewardReply(BaseModel):
    """Raw logits, in order."""

    object: str = "list"
    model: str
    rewards: list[float]


class ErrorDetails(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorReply(BaseModel):
    """OpenAI's error form, on every failure."""

    error: ErrorDetails


_PLACE = 200
"""Characters of a field's name in an error; the names of some are the client's own."""
OWN_FIELDS = ("best_of", "best_of_fallback", "almost_candidates", "almost_stream")
"""Fields of a chat request that the gateway reads and no policy server sees."""
_Model = TypeVar("_Model", bound=BaseModel)
_Request = TypeVar("_Request", ChatRequest, CompletionRequest, RewardRequest)


def parse_json(body: bytes) -> JSONObject:
    """The object that a body holds.

    Raises:
        HTTPException: 400: it holds none.
    """
    try:
        fields = read_json(body)  # of a field that is sent twice, vLLM too sees the second
    except NotJSON as error:
        raise refusal(400, f"the body is no JSON: {error}", "invalid_json") from None
    if not isinstance(fields, dict):
        raise refusal(400, "the body must be a JSON object", "invalid_json")
    if b"\\u" in body or b"\xed" in body:  # else there can be none
        _refuse_halves(fields)
    return fields


def _refuse_halves(fields: JSONObject) -> None:
    """Raise HTTPException for half of a character beyond U+FFFF (a lone surrogate), which no tokenizer reads."""
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise refusal(400, "the body holds half of a character, a surrogate alone", "invalid_json") from None
    except RecursionError:
        raise refusal(400, "the body is nested too deeply", "invalid_json") from None


def validated(kind: type[_Model], fields: JSONObject) -> _Model:
    """The fields as a pydantic model.

    Raises:
        HTTPException: 400, naming the first field that is wrong.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:_PLACE]
        raise refusal(400, f"{place}: {first['msg']}", "invalid_value", param=place) from None


def check(kind: type[_Request], fields: JSONObject, settings: GatewaySettings) -> _Request:
    """The request, known to be sound as far as the gateway is concerned.

    Raises:
        HTTPException: 400, naming the field.
    """
    request = validated(kind, fields)
    if isinstance(request, RewardRequest):
        if len(request.conversations) > settings.max_conversations:
            message = f"at most {settings.max_conversations} conversations in a request"
            raise refusal(400, message, "too_many_conversations", param="conversations")
        return request
    for name in request.model_extra or ():
        if name.startswith(("best", "almost")):
            own = OWN_FIELDS if isinstance(request, ChatRequest) else ()
            hint = did_you_mean(name, own) if own else "best_of works on /v1/chat/completions"
            raise refusal(400, f"unknown field {name[:50]!r}; {hint}", "unknown_field", param=name[:50])
    _check_counts(request, settings)
    if isinstance(request, ChatRequest):
        _check_best_of(request)
    return request


def _check_counts(request: ChatRequest | CompletionRequest, settings: GatewaySettings) -> None:
    best_of = request.best_of if isinstance(request, ChatRequest) else None
    most = settings.max_best_of
    for name, value in (("n", request.n), ("best_of", best_of)):
        if value is not None and value > most:
            raise refusal(400, f"{name} is at most {most} here, not {value}", "too_many_candidates", param=name)
    prompts = request.prompts if isinstance(request, CompletionRequest) else 1
    sequences = prompts * (best_of or request.n or 1)
    if sequences > settings.max_sequences:
        message = f"{prompts} prompts times {best_of or request.n or 1} are {sequences} answers"
        message += f"; a request may ask for {settings.max_sequences} at most: send several"
        raise refusal(400, message, "too_many_sequences", param="prompt" if prompts > 1 else "n")


def _check_best_of(request: ChatRequest) -> None:
    if request.best_of is None:
        for name in OWN_FIELDS[1:]:
            if getattr(request, name):
                message = f"{name} says how best_of is answered; give best_of too"
                raise refusal(400, message, "invalid_value", param=name)
        return
    if request.best_of < (request.n or 1):
        message = f"best_of ({request.best_of}) must be at least n ({request.n}): the n best of them are returned"
        raise refusal(400, message, "invalid_value", param="best_of")
    seed = (request.model_extra or {}).get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise refusal(400, "seed must be a whole number", "invalid_value", param="seed")
    if request.almost_stream and not request.stream:
        message = "almost_stream says how a stream is written; give stream too"
        raise refusal(400, message, "invalid_value", param="almost_stream")
    if request.almost_stream and (request.n or 1) > 1:
        raise refusal(400, "almost_stream tells one best answer: n must be 1", "invalid_value", param="n")
