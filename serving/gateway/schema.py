"""What the gateway accepts. Requests are checked by these models, and the OpenAPI document is made from them.

Fields that are not named here go to the policy server as they are, so every sampling parameter of vLLM works. vLLM
ignores a field that it does not know. So a field that begins like one of the gateway's own (`best...`, `almost...`) and
is none of them is refused here.
"""

from __future__ import annotations

import json
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from almost_eval import __version__
from almost_eval.errors import did_you_mean
from almost_eval.types import JSONObject
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
    n: _Count | None = Field(None, description="Answers to return; with best_of, the n with the highest rewards.")
    stream: _Flag = None
    stream_options: StreamOptions | None = None


class ChatRequest(Generation):
    """A chat completion. Fields that are not listed go to the policy server as they are."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    best_of: _Count | None = Field(
        None, description="Candidates to draw and to score with the reward model; the best are returned."
    )
    best_of_fallback: _Flag = Field(
        None, description="While the reward model is down, answer without it instead of 503; `almost.fallback` says so."
    )
    almost_candidates: _Flag = Field(None, description="Return the text of all candidates in `almost.candidates`.")


class CompletionRequest(Generation):
    """A text completion, passed through. Fields that are not listed go to the policy server as they are."""

    prompt: StrictStr | list[StrictStr] | list[_TokenId] | list[list[_TokenId]]


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


class Almost(BaseModel):
    """What best-of-N did. `usage` of the same reply counts the tokens of all candidates, which is what was computed."""

    best_of: int
    reward: float | None = Field(description="Of the first choice: the raw logit, no sigmoid.")
    rewards: list[float | None] = Field(description="Of all candidates, in the order they were drawn.")
    chosen: list[int] = Field(description="The candidate behind each choice.")
    unscored: list[Unscored]
    fallback: str | None = Field(description="Why there are no rewards, where best_of_fallback was asked.")
    candidates: list[Candidate] | None = Field(None, description="Where almost_candidates was asked.")


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


_OWN = ("best_of", "best_of_fallback", "almost_candidates")
_Model = TypeVar("_Model", bound=BaseModel)
_Request = TypeVar("_Request", ChatRequest, CompletionRequest, RewardRequest)


def parse_json(body: bytes) -> JSONObject:
    """The object that a body holds.

    Raises:
        HTTPException: 400: it holds none.
    """
    try:
        # The parser that vLLM uses: of a field that is sent twice, both see the second.
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        words = str(error) if isinstance(error, json.JSONDecodeError) else "it cannot be read"
        raise refusal(400, f"the body is no JSON: {words}", "invalid_json") from None
    if not isinstance(fields, dict):
        raise refusal(400, "the body must be a JSON object", "invalid_json")
    return fields


def validated(kind: type[_Model], fields: JSONObject) -> _Model:
    """The fields as a pydantic model.

    Raises:
        HTTPException: 400, naming the first field that is wrong.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
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
            own = _OWN if isinstance(request, ChatRequest) else ()
            hint = did_you_mean(name, own) if own else "best_of works on /v1/chat/completions"
            raise refusal(400, f"unknown field {name[:50]!r}; {hint}", "unknown_field", param=name[:50])
    _check_counts(request, settings.max_best_of)
    return request


def _check_counts(request: ChatRequest | CompletionRequest, most: int) -> None:
    best_of = request.best_of if isinstance(request, ChatRequest) else None
    for name, value in (("n", request.n), ("best_of", best_of)):
        if value is not None and value > most:
            raise refusal(400, f"{name} is at most {most} here, not {value}", "too_many_candidates", param=name)
    if best_of is not None and best_of < (request.n or 1):
        message = f"best_of ({best_of}) must be at least n ({request.n}): the n best of best_of candidates are returned"
        raise refusal(400, message, "invalid_value", param="best_of")
    if isinstance(request, ChatRequest) and best_of is None:
        for name in ("best_of_fallback", "almost_candidates"):
            if getattr(request, name):
                raise refusal(
                    400, f"{name} says how best_of is answered; give best_of too", "invalid_value", param=name
                )


def openapi(settings: GatewaySettings) -> JSONObject:
    """The OpenAPI 3.1 document of a gateway with these settings."""
    from pydantic.json_schema import models_json_schema

    models = (ChatRequest, CompletionRequest, RewardRequest, Almost, RewardReply, ErrorReply)
    _, schema = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas = schema["$defs"]
    for model, name in (("ChatRequest", "n"), ("ChatRequest", "best_of"), ("CompletionRequest", "n")):
        schemas[model]["properties"][name]["anyOf"][0]["maximum"] = settings.max_best_of
    schemas["RewardRequest"]["properties"]["conversations"]["maxItems"] = settings.max_conversations
    # The fields themselves are vLLM's; what the gateway adds is described.
    schemas["ChatReply"] = {"type": "object", "properties": {"almost": {"$ref": "#/components/schemas/Almost"}}}
    schemas["Anything"] = {"type": "object"}

    def answer(what: str, kind: str = "application/json", model: str | None = None) -> JSONObject:
        body: JSONObject = {"schema": {"$ref": f"#/components/schemas/{model}"} if model else {"type": "string"}}
        return {"description": what, "content": {kind: body}}

    errors = {
        "400": "The request is wrong.",
        "401": "No valid key.",
        "404": "No such model.",
        "413": "The body is too long.",
        "415": "The body is not sent as JSON.",
        "422": "The policy server cannot work with the request.",
        "429": "Too many requests at work; see Retry-After.",
        "502": "The policy server is down or failed.",
        "503": "The reward server is down or failed, or the gateway is shutting down.",
        "504": "No answer in time.",
    }

    def operation(summary: str, good: JSONObject, bad: tuple[str, ...], body: str | None = None) -> JSONObject:
        shape: JSONObject = {"summary": summary, "responses": {"200": good}}
        shape["responses"] |= {status: answer(errors[status], model="ErrorReply") for status in bad}
        if body:
            content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body}"}}}
            shape["requestBody"] = {"required": True, "content": content}
        return shape

    work = tuple(errors)
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    events = {"schema": {**event, "description": "One event: a chunk or an error as JSON, or [DONE]."}}
    chat = answer("The completion; with `stream`, as events.", model="ChatReply")
    chat["content"]["text/event-stream"] = events
    text = answer("The completion; with `stream`, as events.", model="Anything")
    text["content"]["text/event-stream"] = events
    ready = operation("Whether both upstream servers answer.", answer("Both do.", model="Anything"), ("401",))
    ready["responses"]["503"] = answer("One does not; the body says which.", model="Anything")
    health = operation("Whether the gateway runs.", answer("It does.", model="Anything"), ())
    metrics = operation("The gateway's figures for Prometheus.", answer("Text format.", "text/plain"), ("401",))
    document = operation("This document.", answer("OpenAPI 3.1.", model="Anything"), ("401",))
    paths = {
        "/v1/chat/completions": {"post": operation("Chat, with best-of-N.", chat, work, "ChatRequest")},
        "/v1/completions": {"post": operation("Text, passed through.", text, work, "CompletionRequest")},
        "/v1/rewards": {
            "post": operation("Rewards.", answer("Raw logits.", model="RewardReply"), work, "RewardRequest")
        },
        "/v1/models": {
            "get": operation("The policy's models.", answer("The list.", model="Anything"), ("401", "502", "504"))
        },
        "/ready": {"get": ready},
        "/metrics": {"get": metrics},
        "/openapi.json": {"get": document},
        "/health": {"get": {**health, "security": []}},
    }
    components: JSONObject = {"schemas": schemas}
    whole: JSONObject = {
        "openapi": "3.1.0",
        "info": {"title": "ALMoST gateway", "version": __version__},
        "paths": paths,
        "components": components,
    }
    if settings.api_key is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        whole["security"] = [{"key": []}]
    return whole
