"""Where an answer ends: strings, and tokens."""

from __future__ import annotations

from typing import Any

import pytest

from almost_eval.models.chat import ChatTemplate, load_template, stop_strings
from almost_eval.models.stops import STOP_STRINGS, end_ids, first_stop, template_file
from almost_eval.models.tokenizers import BOS_LINE


def test_every_template_has_its_line() -> None:
    assert {file.stem for file in template_file("almost").parent.glob("*.jinja")} == set(STOP_STRINGS)
    assert all(stop and all(stop) for stop in STOP_STRINGS.values())


@pytest.mark.parametrize("name", STOP_STRINGS)
def test_a_tokenizers_template_has_the_stop_strings_of_the_built_in_one_that_it_is(name: str) -> None:
    built_in = load_template(name)
    assert built_in is not None
    assert built_in.stop == stop_strings(built_in) == STOP_STRINGS[name]
    for source in (built_in.source, BOS_LINE + built_in.source):
        assert stop_strings(ChatTemplate("tokenizer", source)) == STOP_STRINGS[name]
    assert stop_strings(ChatTemplate("tokenizer", built_in.source + " ")) == ()
    assert stop_strings(ChatTemplate("mine.jinja", built_in.source, ("###",))) == ("###",)


def test_the_first_stop_string_counts() -> None:
    assert first_stop("one two three", ("three", "two")) == 4
    assert first_stop("one", ("two",)) is None
    assert first_stop("one", ()) is None


@pytest.mark.parametrize("stated", [9, [9], (9, 1)])
def test_end_tokens(stated: Any, bpe_tokenizer: Any) -> None:
    assert end_ids(stated, bpe_tokenizer) == {1, 9}  # EOS is 1
    assert end_ids(stated, bpe_tokenizer, ("USER:", "<pad>")) == {1, 2, 9}  # <pad> is a special token
    assert end_ids(None, bpe_tokenizer) == {1}
