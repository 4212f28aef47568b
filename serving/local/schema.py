"""What a request to the local server may hold. Anything else is refused, since it would be ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from almost_eval.types import Conversation, Message
from serving.gateway.schema import StreamOptions


class LocalTurn(BaseModel):
    """One message of a request."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str


class LocalChat(BaseModel):
    """What `/v1/chat/completions` takes."""

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[LocalTurn], Field(min_length=1)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class LocalClassify(BaseModel):
    """What `/classify` takes."""

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[LocalTurn], Field(min_length=1)]
    model: str | None = None
    add_generation_prompt: bool = False


def conversation_of(turns: Sequence[LocalTurn]) -> Conversation:
    """The messages of a request as this toolkit's own."""
    return tuple(Message(turn.role, turn.content) for turn in turns)
