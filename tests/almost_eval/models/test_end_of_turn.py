"""An answer ends at the template's own end of turn, also where the checkpoint's EOS is another token."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from almost_eval.models.chat import load_template
from almost_eval.models.stops import end_ids
from almost_eval.nano import shipped

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(str(shipped("nano/almost")))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def test_the_token_after_an_answer_ends_it(tokenizer: Any) -> None:
    template = load_template("auto", tokenizer)
    assert template is not None
    assert template.stop == ("<|im_end|>",)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in end_ids(None, tokenizer, template.stop)


def test_where_it_is_the_eos_nothing_is_added(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|im_end|>"
    template = load_template("auto", tokenizer)
    assert template is not None
    assert template.stop == ()


def test_a_template_that_writes_no_token_has_no_end(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}\n\n{{ m.role }}: {{ m.content }}{% endfor %}"
    template = load_template("auto", tokenizer)
    assert template is not None
    assert template.stop == ()


def test_ids_of_a_list_end_an_answer_and_those_beyond_the_vocabulary_do_not(tokenizer: Any) -> None:
    ends = end_ids([2, 5, 99_999_999], tokenizer)
    assert {2, 5} <= ends
    assert max(ends) < len(tokenizer)
