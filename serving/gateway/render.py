"""How the gateway writes a conversation itself, so that all candidates go to the reward server in one request.

vLLM's /classify takes many texts in one request, and only one conversation. Where the gateway knows the reward model's
checkpoint, it renders the texts as `almost_eval.rewards.hf` does: same template, same special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from almost_eval.errors import InputError, TemplateError
from almost_eval.models.chat import ChatTemplate, special_tokens
from almost_eval.types import JSONObject, Message

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
