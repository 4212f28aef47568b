"""What small trainings read."""

from __future__ import annotations

from pathlib import Path

import pytest

from almost_eval.files import write_rows

ANIMALS = "otter panther owl fox bear wolf hare lynx cat dog fish hen".split()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with prompts, dialogues and pairs on a dozen animals."""

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    asked = [f"How big is the {animal}?" for animal in ANIMALS]
    good, bad = turn("assistant", "It is big."), turn("assistant", "no idea")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in asked])
    write_rows(tmp_path / "dialogues.jsonl", [{"messages": [turn("user", text), good]} for text in asked])
    pairs = [{"prompt": [turn("user", text)], "chosen": [good], "rejected": [bad]} for text in asked]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    return tmp_path
