"""The chat template of a model in training, which its checkpoint keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from almost_eval.models.chat import ChatTemplate, load_template
from almost_eval.models.tokenizers import Opening
from almost_eval.rewards.base import is_framed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def keep_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The tokenizer's own chat template, or ALMoST's dialogue format, which is then set in the tokenizer.

    The one that is set writes the opening (BOS) that the tokenizer would add. Other programs (transformers, TRL, vLLM)
    render a chat and add no special token of their own, so they read the same ids as were trained on. For a tokenizer
    that frames a text between marks of its own ([CLS] ... [SEP]) it writes none: the first would be there twice.
    """
    template = load_template("auto", tokenizer)
    assert template is not None  # only `none` is
    if not getattr(tokenizer, "chat_template", None):
        line = "" if is_framed(tokenizer) else Opening.of(tokenizer).line
        tokenizer.chat_template = line + template.source
        template = load_template("auto", tokenizer)
        assert template is not None
    return template
