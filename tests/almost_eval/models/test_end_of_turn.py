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


@pytest.mark.parametrize("choice", ["auto", "tokenizer", "tokenizer:default"])
def test_it_is_the_same_however_the_template_is_chosen(tokenizer: Any, choice: str) -> None:
    tokenizer.chat_template = {"default": CHATML + "{{ strftime_now('%Y') }}"}
    template = load_template(choice, tokenizer)
    assert template is not None
    assert template.stop == ("<|im_end|>",)
    assert template.now is not None  # one date for the whole run


def test_a_token_that_begins_with_blanks_ends_an_answer(tokenizer: Any) -> None:
    tokenizer.eos_token = "<pad>"
    tokenizer.chat_template = "{% for m in messages %}\n\nHuman: {{ m.content }}{{ '\n\n-----' }}{% endfor %}"
    template = load_template("auto", tokenizer)
    assert template is not None
    assert template.stop == ("\n\n-----",)
