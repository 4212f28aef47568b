"""Preferences as rows."""

from __future__ import annotations

import pytest

from almost_eval.errors import DataError
from almost_eval.types import Message
from almost_train.common.records import Preference

PREFERENCE = Preference(
    prompt=(Message("user", "Where?"),),
    chosen=(Message("assistant", "Here."),),
    rejected=(Message("assistant", "No."),),
    chosen_source="large",
    rejected_source="small",
    prompt_id="p1",
)


def test_a_preference_comes_back() -> None:
    row = PREFERENCE.to_row()
    assert list(row) == ["prompt", "chosen", "rejected", "chosen_source", "rejected_source", "prompt_id"]
    assert row["chosen"] == [{"role": "assistant", "content": "Here."}]
    assert Preference.from_row(row, "row 1") == PREFERENCE


def test_a_row_of_another_program_needs_no_sources_and_no_id() -> None:
    row = {key: value for key, value in PREFERENCE.to_row().items() if key in ("prompt", "chosen", "rejected")}
    one, other = Preference.from_row(row, "row 1"), Preference.from_row({**row, "chosen": row["rejected"]}, "row 2")
    assert (one.chosen_source, one.rejected_source) == ("", "")
    assert one.prompt_id == other.prompt_id != ""


def test_a_row_without_an_answer_is_refused() -> None:
    row = PREFERENCE.to_row()
    for key, value in {"prompt": [], "chosen": [], "rejected": row["prompt"]}.items():
        with pytest.raises(DataError, match="row 3: needs a prompt, and answers that end in an assistant's message"):
            Preference.from_row({**row, key: value}, "row 3")
    with pytest.raises(DataError, match=r"row 3: a message must be \{'role', 'content'\}, and is 1"):
        Preference.from_row({**row, "chosen": [1]}, "row 3")
