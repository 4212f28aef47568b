"""How the gateway writes a conversation itself, so that all candidates go to the reward server in one request.

vLLM's /classify takes many texts in one request, and only one conversation. Where the gateway knows the reward model's
checkpoint, it renders the texts as the server would: same template, same special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from almost_eval.chat import ChatTemplate, special_tokens
from almost_eval.errors import TemplateError
from almost_eval.types import Message

Renderer = Callable[[list[dict[str, Any]]], str | None]
"""The text of a conversation, special tokens included; None where the server has to render it."""

_WRITES_BOS = "{{ bos_token }}"


def renderer_of(checkpoint: str) -> Renderer | None:
    """The renderer of a reward model; None for those whose tokenizer frames a text (`[CLS] ... [SEP]`).

    Args:
        checkpoint: a directory, hub id or built-in name.

    Raises:
        InputError: it cannot be found, or is no reward model.
    """
    from serving.models import TokenizerFiles, find_model

    served = find_model("reward", checkpoint)
    folder = served.checkpoint.path
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if config.get("sep_token") or config.get("cls_token"):
        return None
    template = served.template
    if served.chat_template is not None and served.chat_template.startswith(_WRITES_BOS):
        template = ChatTemplate(template.name, served.chat_template)
    tokens = special_tokens(TokenizerFiles(folder))  # type: ignore[arg-type]

    def render(messages: list[dict[str, Any]]) -> str | None:
        if any(not isinstance(message.get("content"), str) or len(message) != 2 for message in messages):
            return None  # parts, names, tool calls: the server knows what they become
        try:
            return template.render(tuple(Message(**message) for message in messages), special_tokens=tokens)
        except (TemplateError, TypeError):
            return None  # the server says what is wrong

    return render
