"""`--held-out FILE`: any format of prompts is read, and a file that holds nothing out is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from almost_eval.errors import DataError
from almost_train.common.held_out import is_held_out, read_held_out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"id": "1", "prompt": "How big is the owl?"}\n'),
        ("a.csv", "id,prompt\n1,How big is the owl?\n"),
        ("a.json", json.dumps([{"prompt": [{"role": "user", "content": "How big is the owl?"}]}])),
    ],
)
def test_formats(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert is_held_out("how big is the owl", read_held_out(tmp_path / name))


def test_an_empty_file_holds_nothing_out_and_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no prompts"):
        read_held_out(tmp_path / "a.jsonl")
