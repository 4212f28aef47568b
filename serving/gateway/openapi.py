"""The OpenAPI 3.1 document of a gateway: what it takes with its settings, and no more.

Made from the models of `schema`. A gateway without a reward server has no best-of-N and no /v1/rewards in it, by which
`almost-chat` and others see what they can ask for.
"""

from __future__ import annotations

from pydantic import BaseModel

from almost_eval import __version__
from almost_eval.types import JSONObject
from serving.gateway.schema import (
    OWN_FIELDS,
    Almost,
    ChatRequest,
    CompletionRequest,
    ErrorReply,
    RewardReply,
    RewardRequest,
)
from serving.gateway.settings import GatewaySettings


def openapi(settings: GatewaySettings) -> JSONObject:
    """The document of a gateway with these settings."""
    from pydantic.json_schema import models_json_schema

    scores = settings.reward_url is not None
    models: list[type[BaseModel]] = [ChatRequest, CompletionRequest, ErrorReply]
    models += [RewardRequest, RewardReply, Almost] if scores else []
    _, schema = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas = schema["$defs"]
    if scores:
        schemas["RewardRequest"]["properties"]["conversations"]["maxItems"] = settings.max_conversations
    else:  # what needs rewards is not on offer
        for name in OWN_FIELDS:
            del schemas["ChatRequest"]["properties"][name]
    for model, name in (("ChatRequest", "n"), ("ChatRequest", "best_of"), ("CompletionRequest", "n")):
        if name in schemas[model]["properties"]:
            schemas[model]["properties"][name]["anyOf"][0]["maximum"] = settings.max_best_of
    # The fields themselves are vLLM's; what the gateway adds is described.
    added: JSONObject = {"almost": {"$ref": "#/components/schemas/Almost"}} if scores else {}
    schemas["ChatReply"] = {"type": "object", "properties": added}
    schemas["Anything"] = {"type": "object"}

    def answer(what: str, kind: str = "application/json", model: str | None = None) -> JSONObject:
        body: JSONObject = {"schema": {"$ref": f"#/components/schemas/{model}"} if model else {"type": "string"}}
        return {"description": what, "content": {kind: body}}

    errors = {
        "400": "The request is wrong.",
        "401": "No valid key.",
        "403": "Another host's name, or a page of another site.",
        "404": "No such model.",
        "408": "The body did not arrive in time.",
        "413": "The body is too long.",
        "415": "The body is not sent as JSON.",
        "422": "The policy server cannot work with the request.",
        "429": "Too many requests at work; see Retry-After.",
        "431": "The headers are too long.",
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
    offer = "Chat, with best-of-N." if scores else "Chat."
    paths = {
        "/v1/chat/completions": {"post": operation(offer, chat, work, "ChatRequest")},
        "/v1/completions": {"post": operation("Text, passed through.", text, work, "CompletionRequest")},
        "/v1/models": {
            "get": operation("The policy's models.", answer("The list.", model="Anything"), ("401", "502", "504"))
        },
        "/ready": {"get": ready},
        "/metrics": {"get": metrics},
        "/openapi.json": {"get": document},
        "/health": {"get": {**health, "security": []}},
    }
    if scores:
        rewards = answer("Raw logits.", model="RewardReply")
        paths["/v1/rewards"] = {"post": operation("Rewards.", rewards, work, "RewardRequest")}
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
